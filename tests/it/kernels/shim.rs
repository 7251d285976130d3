//! The shim by itself: barriers and shuffles, in either order of the threads, and threads that miss one.
#![expect(unsafe_code, reason = "launches take addresses")]

use kitsune::driver::{Arguments, DevicePtr};
use kitsune_shim::Failure;

const BLOCKS: usize = 3;
const THREADS: usize = 96;

/// What a probe writes, an element a thread.
fn probe(entry: &str) -> Result<Vec<usize>, Failure> {
    let mut out = vec![u32::MAX; BLOCKS * THREADS];
    let mut arguments = Arguments::new();
    arguments.ptr(DevicePtr(out.as_mut_ptr().expose_provenance() as u64));
    let grid = [BLOCKS, THREADS, 0].map(|number| u32::try_from(number).expect("small"));
    // SAFETY: a probe takes the address of an element for each thread.
    unsafe { kitsune_shim::launch(entry, grid, arguments.as_bytes()) }?;
    Ok(out.into_iter().map(|value| value as usize).collect())
}

#[test]
fn barriers_and_shuffles_exchange_what_they_should() {
    for reversed in [false, true] {
        kitsune_shim::reverse(reversed);
        let rotated: Vec<_> = (0..BLOCKS * THREADS)
            .map(|thread| (thread % THREADS + 1) % THREADS)
            .collect();
        assert_eq!(probe("probe_rotate").expect("all threads arrive"), rotated);
        // Each lane holds the sum of its warp, so the block adds every number 32 times.
        let sum = THREADS + 32 * (0..THREADS).sum::<usize>();
        let sums = probe("probe_sums").expect("all threads arrive");
        assert_eq!(sums, vec![sum * 4 + 2; BLOCKS * THREADS]);
    }
    kitsune_shim::reverse(false);
}

#[test]
fn a_missed_barrier_is_an_error_and_leaves_nothing_behind() {
    for entry in ["probe_divergent_block", "probe_divergent_warp"] {
        assert_eq!(probe(entry), Err(Failure::Kernel), "{entry}");
        assert!(probe("probe_rotate").is_ok(), "after {entry}");
    }
}
