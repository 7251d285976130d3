//! The checked-in PTX: the same entry points as the sources, for the version that drivers are promised.

use std::collections::BTreeSet;

use kitsune_shim::PTX;

use crate::support::device::argument_bytes;

fn names(ptx: &str) -> BTreeSet<&str> {
    let entries = ptx.split(".visible .entry ").skip(1);
    entries
        .map(|entry| &entry[..entry.find('(').expect("a parameter list")])
        .collect()
}

#[test]
fn every_source_is_in_the_ptx() {
    let of_kernels = |name: &&str| !name.starts_with("probe_");
    let sources: BTreeSet<_> = kitsune_shim::entries().filter(of_kernels).collect();
    assert!(sources.len() > 100, "{}", sources.len());
    assert_eq!(names(PTX), sources);
    assert_eq!(argument_bytes().len(), sources.len());
}

#[test]
fn ptx_is_of_the_promised_version() {
    assert!(PTX.contains("\n.version 8.0\n"));
    assert!(PTX.contains("\n.target sm_80\n"));
    // A NUL would end the text early for a driver.
    assert!(!PTX.contains('\0'));
}

/// Memory of a thread's own lies in device memory: an array that did not stay in registers.
#[test]
fn no_kernel_spills_an_array() {
    assert!(!PTX.contains(".local "));
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
