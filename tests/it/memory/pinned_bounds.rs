//! How much host memory a pool keeps pinned: against what was in use, under a limit, after a decay, and on a machine
//! that has no more.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the test enqueues work of its own, and fails by panicking"
)]

use crate::support;
use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::support::driver::{Gate, refusal, seeded, threads};
use kitsune::driver::fault::FaultDriver;
use kitsune::memory::{PinnedBlock, PinnedConfig, PinnedPool, PinnedStats};
use kitsune::units::{KIB, MIB};
use kitsune::{Device, Error, OutOfMemory, Stream};

/// A random program with at most `live` blocks at a time; what it pinned at most and what it asked for at most.
fn play(pool: &PinnedPool, steps: usize, live: usize, mut size: impl FnMut(usize) -> u64) {
    let mut blocks: VecDeque<PinnedBlock> = VecDeque::new();
    for step in 0..steps {
        if blocks.len() == live {
            let at = step * 7 % live;
            drop(blocks.swap_remove_back(at));
        }
        blocks.push_back(pool.allocate(size(step)).unwrap());
        let PinnedStats {
            reserved_bytes,
            allocated_bytes,
            requested_bytes,
            ..
        } = pool.stats();
        let most = 2 * allocated_bytes.peak;
        assert!(
            reserved_bytes.peak <= most,
            "step {step}: {reserved_bytes:?} of {most}"
        );
        let rounding = live as u64 * 4 * KIB;
        assert!(allocated_bytes.peak <= requested_bytes.peak + rounding);
    }
    pool.check_invariants();
}

#[test]
fn what_is_pinned_is_at_most_twice_what_was_in_use() {
    for seed in support::seeds::seeds(3) {
        support::seeds::with_seed(seed, |seed| {
            for live in [1, 2, 5, 10] {
                let mut random = fastrand::Rng::with_seed(seed);
                let pool = PinnedPool::new(&seeded(seed));
                play(&pool, 150, live, |_| random.u64(MIB..8 * MIB));
                // From the size of a page to that of many, each as likely.
                play(&pool, 150, live, |_| {
                    random.u64(1..4 * KIB) << random.u32(0..12)
                });
                play(&pool, 40, live, |step| (40 - step as u64) * MIB / 4);
                drop(pool);
                let pool = PinnedPool::new(&seeded(seed));
                play(&pool, 100, live, |step| (step as u64 + 1) * 100 * KIB);
            }
        });
    }
}

#[test]
fn one_block_at_a_time_of_1_to_64_mib() {
    let pool = PinnedPool::new(&seeded(1));
    let mut random = fastrand::Rng::with_seed(7);
    for round in 0..3 {
        for _ in 0..10 {
            drop(pool.allocate(random.u64(MIB..=64 * MIB)).unwrap());
        }
        drop(pool.allocate(64 * MIB).unwrap());
        let stats = pool.stats();
        assert_eq!(stats.allocated_bytes.peak, 64 * MIB);
        assert!(
            stats.reserved_bytes.peak <= 128 * MIB,
            "round {round}: {stats:?}"
        );
    }
    // Everything fits into the largest by now.
    let pinned = pool.stats().num_host_alloc;
    for _ in 0..10 {
        drop(pool.allocate(random.u64(2 * MIB..=64 * MIB)).unwrap());
    }
    assert_eq!(pool.stats().num_host_alloc, pinned);
}

#[test]
fn a_steady_program_pins_in_its_first_round_alone() {
    let pool = PinnedPool::new(&seeded(1));
    let round = || {
        let batch = [5 * MIB, 3 * MIB, 64 * KIB, 300].map(|bytes| pool.allocate(bytes).unwrap());
        let [first, second, third, fourth] = batch;
        drop((second, fourth));
        let more = [2 * MIB, MIB, 400].map(|bytes| pool.allocate(bytes).unwrap());
        drop((first, third, more));
        pool.stats().num_host_alloc
    };
    let pinned = round();
    for _ in 0..20 {
        assert_eq!(round(), pinned);
    }
    assert_eq!(pool.stats().num_host_free, 0);
}

/// Allocates and has the stream use it until the gate is opened.
fn in_flight(pool: &PinnedPool, bytes: u64, stream: &Stream) {
    let mut block = pool.allocate(bytes).unwrap();
    block.order(stream).unwrap();
    // SAFETY: the block is this long, ordered behind its other uses, and the use is recorded below.
    unsafe { stream.driver().fill(block.ptr(), 1, bytes, stream.raw()) }.unwrap();
    block.record_use(stream).unwrap();
}

#[test]
fn what_streams_still_use_counts_as_in_use() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let gate = Gate::close(&stream);
    for _ in 0..10 {
        in_flight(&pool, 4 * MIB, &stream);
    }
    let stats = pool.stats();
    assert_eq!(stats.reserved_bytes.current, 40 * MIB, "ten are in flight");
    assert_eq!(
        (stats.waiting_bytes, stats.allocated_bytes.peak),
        (40 * MIB, 4 * MIB)
    );
    gate.open();
    stream.synchronize().unwrap();
    // Ten were in use at once, so a ten-fold block has room beside what is idle, and one more has not.
    drop(pool.allocate(40 * MIB).unwrap());
    assert_eq!(pool.stats().reserved_bytes.current, 80 * MIB);
    let large = pool.allocate(48 * MIB).unwrap();
    let held = pool.stats().reserved_bytes;
    assert!(
        held.current >= 48 * MIB && held.peak <= 96 * MIB,
        "{held:?}"
    );
    drop(large);
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
    pool.check_invariants();
}

#[test]
fn neighbors_in_a_segment_are_apart_while_streams_use_them() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    drop(pool.allocate(8 * MIB).unwrap());
    let gate = Gate::close(&stream);
    in_flight(&pool, 4 * MIB, &stream);
    let mut other = pool.allocate(4 * MIB).unwrap();
    other.as_mut_slice().unwrap().fill(9);
    gate.open();
    stream.synchronize().unwrap();
    assert!(other.as_slice().unwrap().iter().all(|byte| *byte == 9));
    assert_eq!(pool.stats().reserved_bytes.current, 8 * MIB);
    drop(other);
    // Both parts are one again.
    drop(pool.allocate(8 * MIB).unwrap());
    assert_eq!(pool.stats().num_host_alloc, 1);
}

fn report(outcome: kitsune::Result<PinnedBlock>) -> Box<OutOfMemory> {
    match outcome {
        Err(Error::OutOfMemory(report)) => report,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_limit_bounds_what_is_pinned_and_is_named() {
    let limit = Some(8 * MIB);
    let config = PinnedConfig {
        limit,
        ..PinnedConfig::default()
    };
    let pool = PinnedPool::with_config(&threads(), config).unwrap();
    let first = pool.allocate(5 * MIB).unwrap();
    let refused = report(pool.allocate(4 * MIB));
    assert!(refused.limited && refused.pinned);
    assert_eq!((refused.limit, refused.reserved), (limit, 5 * MIB));
    let said = refused.to_string();
    assert!(
        said.starts_with("out of pinned memory for 4.0 MiB"),
        "{said}"
    );
    assert!(said.contains("limit 8.0 MiB (exceeded)"), "{said}");
    assert!(!said.contains("device"), "{said}");
    // More than it at once, for which nothing is given up.
    drop(first);
    assert!(report(pool.allocate(8 * MIB + 1)).tried.is_empty());
    assert_eq!(pool.stats().reserved_bytes.current, 5 * MIB);
    // What is idle makes room.
    drop(pool.allocate(8 * MIB).unwrap());
    assert_eq!(pool.stats().reserved_bytes.peak, 8 * MIB);
    pool.set_limit(Some(6 * MIB)).unwrap();
    assert_eq!(
        (pool.limit(), pool.stats().reserved_bytes.current),
        (Some(6 * MIB), 0)
    );
    let held = pool.allocate(6 * MIB).unwrap();
    pool.set_limit(Some(4 * KIB)).unwrap();
    assert_eq!(
        pool.stats().reserved_bytes.current,
        6 * MIB,
        "what is in use stays"
    );
    assert!(report(pool.allocate(1)).limited);
    drop(held);
    drop(pool.allocate(1).unwrap());
    pool.set_limit(None).unwrap();
    drop(pool.allocate(16 * MIB).unwrap());
    for limit in [0, 4 * KIB - 1] {
        let refused = pool.set_limit(Some(limit));
        assert!(matches!(
            refused,
            Err(Error::InvalidConfig { key: "limit", .. })
        ));
    }
    assert_eq!(pool.limit(), None);
}

#[test]
fn a_limit_waits_for_streams_before_it_refuses() {
    let device = threads();
    let config = PinnedConfig {
        limit: Some(4 * MIB),
        ..PinnedConfig::default()
    };
    let pool = PinnedPool::with_config(&device, config).unwrap();
    let stream = device.create_stream().unwrap();
    let gate = Gate::close(&stream);
    in_flight(&pool, 3 * MIB, &stream);
    let block = thread::scope(|scope| {
        let waiter = scope.spawn(|| pool.allocate(4 * MIB));
        gate.open();
        waiter.join().unwrap()
    });
    assert_eq!(block.unwrap().bytes(), 4 * MIB);
    assert_eq!(pool.stats().reserved_bytes.peak, 4 * MIB);
}

#[test]
fn threads_never_hold_more_than_the_limit() {
    let config = PinnedConfig {
        limit: Some(MIB),
        ..PinnedConfig::default()
    };
    let pool = PinnedPool::with_config(&threads(), config).unwrap();
    thread::scope(|scope| {
        for seed in 0..4 {
            let pool = &pool;
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..200 {
                    // Four of these always fit; what another thread gives back just now is waited for.
                    drop(pool.allocate(random.u64(1..=256 * KIB)).unwrap());
                }
            });
        }
    });
    assert!(pool.stats().reserved_bytes.peak <= MIB);
    pool.check_invariants();
}

#[test]
fn idle_memory_decays_by_hand_and_by_the_clock() {
    let pool = PinnedPool::new(&seeded(1));
    let blocks = [(); 8].map(|()| pool.allocate(4 * MIB).unwrap());
    drop(blocks);
    pool.decay_now();
    assert_eq!(
        pool.stats().reserved_bytes.current,
        32 * MIB,
        "it was needed just now"
    );
    let block = pool.allocate(4 * MIB).unwrap();
    pool.decay_now();
    assert_eq!(
        pool.stats().reserved_bytes.current,
        4 * MIB,
        "with an eighth there is no room for another"
    );
    drop(block);
    pool.decay_now();
    pool.decay_now();
    assert_eq!(pool.stats().reserved_bytes.current, 0);

    let config = PinnedConfig {
        decay: Some(Duration::ZERO),
        ..PinnedConfig::default()
    };
    let pool = PinnedPool::with_config(&seeded(1), config).unwrap();
    drop([(); 8].map(|()| pool.allocate(4 * MIB).unwrap()));
    drop(pool.allocate(4 * KIB).unwrap());
    drop(pool.allocate(4 * KIB).unwrap());
    assert_eq!(pool.stats().reserved_bytes.current, 4 * KIB);
}

#[test]
fn trimming_returns_as_much_as_is_asked_for() {
    let pool = PinnedPool::new(&seeded(1));
    drop([16, 8, 4, 2].map(|mib| pool.allocate(mib * MIB).unwrap()));
    pool.trim(30 * MIB).unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 30 * MIB);
    pool.trim(27 * MIB).unwrap();
    assert_eq!(
        pool.stats().reserved_bytes.current,
        26 * MIB,
        "the smallest that suffices"
    );
    assert_eq!(pool.stats().num_host_free, 1);
    pool.trim(5 * MIB).unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 2 * MIB);
}

/// Kilobytes of a line of `/proc/meminfo` or `/proc/self/status`.
#[cfg(target_os = "linux")]
fn kilobytes(file: &str, key: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
#[cfg(target_os = "linux")]
fn a_machine_that_has_not_as_much_refuses_before_it_is_touched() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let kept = pool.allocate(MIB).unwrap();
    let [total, available] =
        ["MemTotal:", "MemAvailable:"].map(|key| kilobytes("/proc/meminfo", key) << 10);
    let before = kilobytes("/proc/self/status", "VmHWM:");
    for bytes in [
        1 << 46,
        1 << 63,
        u64::MAX,
        u64::MAX - 4095,
        1 << 41,
        total,
        available,
    ] {
        let refused = report(pool.allocate(bytes));
        assert!(
            (refused.requested, refused.limited) == (bytes, false),
            "{bytes}"
        );
    }
    let refused = report(pool.allocate(total));
    let said = refused.driver_error.unwrap();
    assert!(said.contains("must stay free"), "{said}");
    assert!(pool.allocate(0).is_ok());
    let touched = kilobytes("/proc/self/status", "VmHWM:") - before;
    assert!(touched < 64 << 10, "{touched} KiB");
    let stats = pool.stats();
    assert_eq!(
        (stats.num_host_alloc, stats.reserved_bytes.current),
        (1, MIB)
    );
    for bytes in [1 << 46, total] {
        let (call, code, _) = refusal(device.driver().allocate_pinned(bytes));
        assert_eq!((call, code), ("allocate_pinned", 12));
    }
    // What was refused is no peak: it leaves no room for idle memory.
    drop(kept);
    drop((
        pool.allocate(2 * MIB).unwrap(),
        pool.allocate(3 * MIB).unwrap(),
    ));
    drop(pool.allocate(6 * MIB).unwrap());
    drop(pool.allocate(7 * MIB).unwrap());
    let held = pool.stats().reserved_bytes.current;
    assert!(held <= 14 * MIB, "{held}");
}

#[test]
fn a_size_that_no_pool_can_have_waits_for_nobody() {
    let calls = Arc::new(FaultDriver::new(threads().driver().clone()));
    let device = Device::from_driver(calls.clone());
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let gate = Gate::close(&stream);
    in_flight(&pool, MIB, &stream);
    drop(pool.allocate(2 * MIB).unwrap());
    calls.reset_calls();
    for bytes in [(1 << 41) + 1, 1 << 46, 1 << 63, u64::MAX] {
        assert!(report(pool.allocate(bytes)).tried.is_empty());
    }
    let calls =
        ["allocate_pinned", "free_pinned", "synchronize_event"].map(|call| calls.calls(call));
    assert_eq!(calls, [0; 3]);
    assert_eq!(pool.stats().num_ooms, 4);
    gate.open();
}
