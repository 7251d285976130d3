//! The checked-in PTX: the same entry points as the sources, for the version that drivers are promised.

use std::collections::BTreeSet;

use kitsune_kernels::MODULES;

use crate::support::device::argument_bytes;

#[test]
fn every_source_is_in_the_ptx() {
    let of_kernels = |name: &&str| !name.starts_with("probe_");
    let sources: BTreeSet<_> = kitsune_shim::entries().filter(of_kernels).collect();
    assert!(sources.len() > 100, "{}", sources.len());
    let entries = MODULES.iter().flat_map(|module| module.entries);
    assert_eq!(entries.copied().collect::<BTreeSet<_>>(), sources);
    assert_eq!(argument_bytes().len(), sources.len());
}

/// Memory of a thread's own lies in device memory: an array that did not stay in registers.
#[test]
fn no_kernel_spills_an_array() {
    for module in MODULES {
        assert!(!module.text.contains(".local "), "{}", module.name);
    }
}

#[test]
#[expect(unsafe_code, reason = "no entry point runs")]
fn what_is_not_there_is_told() {
    // SAFETY: there is no such entry point, so nothing reads the arguments.
    let outcome = unsafe { kitsune_shim::launch("add_f8", [1, 32, 0], &[]) };
    assert_eq!(outcome, Err(kitsune_shim::Failure::UnknownEntry));
    // SAFETY: the shape is refused before the kernel runs.
    let outcome = unsafe { kitsune_shim::launch("add_f16", [1, 33, 0], &[]) };
    assert_eq!(outcome, Err(kitsune_shim::Failure::Kernel));
}
