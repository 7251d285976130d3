//! Ordering between streams, on seeded schedules with poison: what is right passes on every schedule, and
//! with one piece of ordering left out some schedule shows it.
#![allow(
    unsafe_code,
    reason = "the tests play a program that uses blocks on several streams"
)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use std::sync::Arc;

use kitsune::driver::fault::FaultDriver;
use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, ReusePolicy, Stream};

const BYTES: u64 = 4096;

/// How the program under test keeps the order between its streams.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    RecordStream,
    RecordUse,
    /// `record_use`, but before the consumer was given its work.
    RecordUseTooEarly,
    NoRecord,
    NoWait,
}

fn fill(stream: &Stream, ptr: kitsune::driver::DevicePtr, value: u8) {
    // SAFETY: the callers pass blocks of BYTES bytes that live, or are freed in order with `stream`.
    unsafe { stream.driver().fill(ptr, value, BYTES, stream.raw()) }.unwrap();
}

/// A producer writes blocks on one stream, a consumer copies them on another, and the producer frees and
/// reuses them at once. Whether the consumer saw every value.
fn consumer_sees_every_value(seed: u64, order: Order) -> bool {
    let config = HostConfig {
        schedule: HostSchedule::Seeded(seed),
        ..HostConfig::default()
    };
    let device = Device::host(config).unwrap();
    let pool = Pool::new(
        &device,
        PoolConfig {
            poison: true,
            ..PoolConfig::default()
        },
    )
    .unwrap();
    let producer = device.create_stream().unwrap();
    let consumer = device.create_stream().unwrap();
    let rounds = 6u8;
    let results: Vec<_> = (0..rounds)
        .map(|_| pool.allocate(BYTES, &consumer).unwrap())
        .collect();
    for round in 0..rounds {
        let mut block = pool.allocate(BYTES, &producer).unwrap();
        fill(&producer, block.ptr(), round);
        if order == Order::RecordUseTooEarly {
            block.record_use(&consumer);
        }
        if order != Order::NoWait {
            consumer.wait_for(&producer).unwrap();
        }
        let result = results[usize::from(round)].ptr();
        // SAFETY: both blocks are BYTES long and live until the consumer's stream has passed, or are
        // wrongly reused, which is what the test is about: the host's pages stay mapped all the same.
        unsafe {
            device
                .driver()
                .copy(result, block.ptr(), BYTES, consumer.raw())
        }
        .unwrap();
        match order {
            Order::RecordStream | Order::NoWait => block.record_stream(&consumer),
            Order::RecordUse => block.record_use(&consumer),
            Order::RecordUseTooEarly | Order::NoRecord => {}
        }
        drop(block);
        // What a stream new to the pool asks for misses its cache, and blocks that wait are looked at.
        let fresh = device.create_stream().unwrap();
        drop(pool.allocate(BYTES, &fresh).unwrap());
    }
    (0..rounds).zip(&results).all(|(round, result)| {
        let mut bytes = vec![0; 4096];
        // SAFETY: the block is BYTES long and written only on the stream it is read on.
        unsafe {
            device
                .driver()
                .copy_to_host(&mut bytes, result.ptr(), consumer.raw())
        }
        .unwrap();
        bytes.iter().all(|byte| *byte == round)
    })
}

#[test]
fn recorded_blocks_are_not_reused_too_early_on_any_schedule() {
    for order in [Order::RecordStream, Order::RecordUse] {
        for seed in support::seeds::seeds(10_000) {
            assert!(consumer_sees_every_value(seed, order), "seed {seed}");
        }
    }
}

#[test]
#[cfg_attr(
    asan,
    ignore = "frees on purpose what is in use, which ends the process"
)]
fn a_missing_or_early_record_or_a_missing_wait_is_found() {
    for order in [Order::NoRecord, Order::RecordUseTooEarly, Order::NoWait] {
        let found = (0..200).find(|seed| !consumer_sees_every_value(*seed, order));
        assert!(found.is_some(), "no schedule showed the missing order");
    }
}

#[test]
fn a_freed_block_is_reused_at_once_on_its_own_stream_only() {
    let device = Device::host(HostConfig::default()).unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let [home, other] = [(); 2].map(|()| device.create_stream().unwrap());
    let first = pool.allocate(BYTES, &home).unwrap().ptr();
    assert_ne!(pool.allocate(BYTES, &other).unwrap().ptr(), first);
    assert_eq!(pool.allocate(BYTES, &home).unwrap().ptr(), first);
}

#[test]
fn a_recorded_block_stays_active_until_the_other_stream_has_passed() {
    let config = HostConfig {
        schedule: HostSchedule::Seeded(1),
        ..HostConfig::default()
    };
    let device = Device::host(config).unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let [home, other] = [(); 2].map(|()| device.create_stream().unwrap());
    let mut block = pool.allocate(BYTES, &home).unwrap();
    // Work on `other` that cannot run yet: it waits for `home`, which nobody has let run.
    for _ in 0..8 {
        fill(&home, block.ptr(), 1);
    }
    other.wait_for(&home).unwrap();
    fill(&other, block.ptr(), 2);
    block.record_stream(&other);
    drop(block);
    let stats = pool.stats();
    assert_eq!(
        (stats.allocated_bytes.current, stats.active_bytes.current),
        (0, BYTES)
    );
    other.synchronize().unwrap();
    // The next allocation polls when the cache has nothing; a second block must not be a new segment.
    let segments = pool.stats().segment.current;
    let all: Vec<_> = (0..512)
        .map(|_| pool.allocate(BYTES, &home).unwrap())
        .collect();
    assert_eq!(pool.stats().segment.current, segments);
    assert_eq!(
        all.len(),
        512,
        "a 2 MiB segment holds 512 blocks of 4 KiB, the recorded one included"
    );
}

/// Active bytes at the next look after a block was freed whose use on another stream has run, while that
/// stream has been given more work that has not.
fn active_after_use(seed: u64, reuse: ReusePolicy, record: impl Fn(&mut Block, &Stream)) -> u64 {
    let config = HostConfig {
        schedule: HostSchedule::Seeded(seed),
        ..HostConfig::default()
    };
    let device = Device::host(config).unwrap();
    let config = PoolConfig {
        reuse,
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let [home, other] = [(); 2].map(|()| device.create_stream().unwrap());
    let later = pool.allocate(BYTES, &other).unwrap();
    let mut block = pool.allocate(BYTES, &home).unwrap();
    other.wait_for(&home).unwrap();
    fill(&other, block.ptr(), 2);
    record(&mut block, &other);
    let used = other.record().unwrap();
    for _ in 0..40 {
        fill(&other, later.ptr(), 3);
    }
    used.synchronize().unwrap();
    drop(block);
    let probe = pool.allocate(1 << 20, &home).unwrap();
    let active = pool.stats().active_bytes.current - probe.allocated() - later.allocated();
    drop(probe);
    pool.check_invariants();
    active
}

#[test]
fn work_after_record_use_does_not_delay_the_reuse_and_after_record_stream_it_does() {
    for reuse in [ReusePolicy::OnlyComplete, ReusePolicy::Never] {
        let mut delayed = 0;
        for seed in support::seeds::seeds(100) {
            let precise = active_after_use(seed, reuse, Block::record_use);
            assert_eq!(precise, 0, "seed {seed}");
            let twice = active_after_use(seed, reuse, |block, stream| {
                block.record_use(stream);
                block.record_use(stream);
            });
            assert_eq!(twice, 0, "seed {seed}");
            let both = active_after_use(seed, reuse, |block, stream| {
                block.record_stream(stream);
                block.record_use(stream);
            });
            let loose = active_after_use(seed, reuse, Block::record_stream);
            delayed += u32::from(loose == BYTES) + u32::from(both == BYTES);
        }
        assert!(delayed > 100, "of 200 looks, {delayed} found the block");
    }
}

#[test]
fn a_use_by_the_home_stream_or_of_no_memory_marks_nothing() {
    let host = Device::host(HostConfig::default()).unwrap();
    let faults = Arc::new(FaultDriver::new(host.driver().clone()));
    let device = Device::from_driver(faults.clone());
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let [home, other] = [(); 2].map(|()| device.create_stream().unwrap());
    pool.allocate(0, &home).unwrap().record_use(&other);
    pool.allocate(BYTES, &home).unwrap().record_use(&home);
    assert_eq!(faults.calls("record"), 0);
    // Where the driver has no event, the free decides.
    faults.fail_nth(Some("record"), 1);
    let mut block = pool.allocate(BYTES, &home).unwrap();
    block.record_use(&other);
    drop(block);
    assert_eq!(pool.stats().active_bytes.current, BYTES);
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().active_bytes.current, 0);
    pool.check_invariants();
}

#[test]
fn a_stream_dropped_with_blocks_out_stays_usable_by_them() {
    let device = Device::host(HostConfig::default()).unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    let block = pool.allocate(BYTES, &stream).unwrap();
    drop(stream);
    drop(block);
    pool.check_invariants();
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}

#[test]
fn blocks_outlive_their_pool_handle() {
    let device = Device::host(HostConfig::default()).unwrap();
    let total = device.memory_info().unwrap().free;
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    let block = pool.allocate(BYTES, &stream).unwrap();
    drop(pool);
    fill(&stream, block.ptr(), 7);
    drop(block);
    assert_eq!(
        device.memory_info().unwrap().free,
        total,
        "the last block took the pool along"
    );
}
