//! Short workloads modelled on the tests and benchmarks of other allocators.

use kitsune::telemetry::trace::Event;
use kitsune::units::{MIB, to_usize};

use super::minstd::MinStd;
use crate::replay::program::{Builder, Program};

/// Blocks in a round of [`primed`]; a round takes nine tenths of the device in RMM's benchmark.
pub(super) const PRIMED_BLOCKS: u64 = 100;
/// Sizes of RMM's vectors in bytes: 10^4 to 10^9 elements of four bytes.
const VECTORS: [u64; 6] = [
    40_000,
    400_000,
    4_000_000,
    40_000_000,
    400_000_000,
    4_000_000_000,
];
/// The most bytes live in [`fuzz`]: 2^30 / 40 elements of four bytes.
const FUZZ_LIVE_MAX: u64 = 4 * (1 << 30) / 40;
/// Of 21 draws of [`fuzz`], ten allocate, ten free, and one trims the cache.
const FUZZ_WEIGHTS: (u64, u64) = (10, 10);

/// Repeatedly allocates [`PRIMED_BLOCKS`] blocks of `bytes`, then frees them all.
pub(super) fn primed(allocations: u64, bytes: u64, stream: u32) -> Program {
    let mut builder = Builder::default();
    for id in 0..allocations {
        builder.push(&Event::Allocate { id, bytes, stream }, 0);
        let round = id / PRIMED_BLOCKS * PRIMED_BLOCKS;
        if id + 1 == (round + PRIMED_BLOCKS).min(allocations) {
            (round..=id).for_each(|id| builder.push(&Event::Free { id, stream: None }, 0));
        }
    }
    builder.finish()
}

/// Vectors of each size in turn, each freed before the host waits for the device.
pub(super) fn vectors(allocations: u64, stream: u32) -> Program {
    let mut builder = Builder::default();
    for (id, bytes) in (0..allocations).zip(VECTORS.into_iter().cycle()) {
        builder.push(&Event::Allocate { id, bytes, stream }, 0);
        builder.push(&Event::Free { id, stream: None }, 0);
        builder.push(&Event::Synchronize { stream: None }, 0);
    }
    builder.finish()
}

/// Allocates blocks of 2 to 20 MiB and frees random ones with equal probability; while too much is live, only frees.
/// Occasionally trims the cache.
pub(super) fn fuzz(allocations: u64, seed: u64, stream: u32) -> Program {
    let mut random = MinStd::new(seed);
    let mut builder = Builder::default();
    let mut live: Vec<(u64, u64)> = Vec::new();
    let (mut live_bytes, mut next) = (0, 0);
    let (allocate, free) = FUZZ_WEIGHTS;
    while next < allocations {
        let draw = random.uniform(0, allocate + free);
        if draw == allocate + free {
            builder.push(&Event::Trim, 0);
        } else if draw < allocate && live_bytes <= FUZZ_LIVE_MAX {
            let (id, bytes) = (next, 4 * random.uniform(MIB / 2, 5 * MIB));
            builder.push(&Event::Allocate { id, bytes, stream }, 0);
            live.push((id, bytes));
            live_bytes += bytes;
            next += 1;
        } else if !live.is_empty() {
            let (id, bytes) = live.swap_remove(to_usize(random.uniform(0, live.len() as u64 - 1)));
            builder.push(&Event::Free { id, stream: None }, 0);
            live_bytes -= bytes;
        }
    }
    builder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::program::Operation;

    fn count(program: &Program, wanted: impl Fn(&Operation) -> bool) -> usize {
        program
            .operations
            .iter()
            .filter(|operation| wanted(operation))
            .count()
    }

    /// Most bytes live at once.
    fn peak(program: &Program) -> u64 {
        let mut slots = vec![0; program.slots];
        let (mut live, mut peak) = (0, 0);
        for operation in &program.operations {
            match *operation {
                Operation::Allocate { slot, bytes, .. } => {
                    slots[slot as usize] = bytes;
                    live += bytes;
                }
                Operation::Free { slot } => live -= slots[slot as usize],
                _ => {}
            }
            peak = peak.max(live);
        }
        peak
    }

    #[test]
    fn a_hundred_primed_blocks_are_live_at_once() {
        let program = primed(250, 7, 0);
        assert_eq!((program.allocations, program.operations.len()), (250, 500));
        assert_eq!((program.slots, peak(&program)), (100, 700));
    }

    #[test]
    fn the_host_waits_after_each_vector() {
        let program = vectors(8, 0);
        let waits = count(&program, |operation| {
            matches!(operation, Operation::Synchronize { stream: None })
        });
        assert_eq!((program.slots, waits), (1, 8));
        assert_eq!(peak(&program), 4_000_000_000);
    }

    #[test]
    fn the_fuzz_frees_before_too_much_is_live_and_trims_now_and_then() {
        let program = fuzz(10_000, 123, 0);
        let trims = count(&program, |operation| matches!(operation, Operation::Trim));
        let peak = peak(&program);
        assert!((500..2000).contains(&trims), "{trims} trims");
        // The block that exceeds the limit is still allocated.
        let bound = FUZZ_LIVE_MAX..FUZZ_LIVE_MAX + 20 * MIB;
        assert!(bound.contains(&peak), "{peak} bytes live");
    }
}
