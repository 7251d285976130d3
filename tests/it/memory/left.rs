//! What threads keep and leave: bounded, counted right, and taken back whatever the driver does meanwhile.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the tests enqueue work of their own, and fail by panicking"
)]

use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use crate::support::driver::{Gate, act, seeded, threads};
use kitsune::{Block, Device, HostConfig, Pool, PoolConfig, ReusePolicy, Stream};

const MIB: u64 = 1 << 20;

#[test]
fn a_thread_that_only_frees_holds_back_little() {
    const BLOCKS: u64 = 18;
    let device = threads();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    let (give, given) = channel::<Vec<Block>>();
    let (tell, told) = channel();
    let freer = thread::spawn(move || {
        for blocks in given {
            drop(blocks);
            tell.send(()).unwrap();
        }
    });
    for round in 0..6 {
        // Sizes that differ, so that nothing fits by chance.
        let bytes = (32 + 2 * round) * MIB;
        let blocks = (0..BLOCKS).map(|_| pool.allocate(bytes, &stream).unwrap());
        give.send(blocks.collect()).unwrap();
        told.recv().unwrap();
        let stats = pool.stats();
        let kept = stats.reserved_bytes.current - stats.allocated_bytes.peak;
        // Two in the lane, and what may be left: one that is too much, after 32 MiB.
        assert!(
            kept <= 4 * bytes + 32 * MIB,
            "round {round}: {} MiB",
            kept / MIB
        );
    }
    drop(give);
    freer.join().unwrap();
}

#[test]
fn the_peak_of_active_bytes_lies_before_blocks_come_back() {
    let device = threads();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let [home, other] = [(); 2].map(|()| device.create_stream().unwrap());
    let mut used = pool.allocate(40 * MIB, &home).unwrap();
    drop(pool.allocate(8 * MIB, &home).unwrap());
    let gate = Gate::close(&other);
    used.record_stream(&other);
    drop(used);
    // Asks, in vain, so that an event lies where the other stream is now.
    drop(pool.allocate(MIB, &home).unwrap());
    pool.reset_peaks();
    let kept = pool.allocate(8 * MIB, &home).unwrap();
    gate.open();
    other.synchronize().unwrap();
    let more = [(); 2].map(|()| pool.allocate(2 * MIB, &home).unwrap());
    let active = pool.stats().active_bytes;
    drop((kept, more));
    assert_eq!(active.current, 12 * MIB, "the block is back");
    // 40 pending beside 8: the others may have come when the block was back.
    assert!(active.peak >= 48 * MIB, "{} MiB", active.peak / MIB);
}

/// Many blocks that kernels own, on `stream`: they run, and free, inside calls of the driver.
fn enqueue_owners(pool: &Pool, stream: &Stream, count: usize) {
    for _ in 0..count {
        let block = pool.allocate(512, stream).unwrap();
        act(stream, move || assert_ne!(block.ptr().0, 0));
    }
}

/// A thread's cache with blocks that another stream asks for, while kernels that own blocks are under way; kept until
/// `end` hangs up.
fn use_pool(pool: Pool, ready: &std::sync::mpsc::Sender<()>, end: &Receiver<()>) {
    let device = pool.device().clone();
    let [asked, asking] = [(); 2].map(|()| device.create_stream().unwrap());
    let small: Vec<Block> = (0..100)
        .map(|_| pool.allocate(4096, &asked).unwrap())
        .collect();
    for _ in 0..8 {
        let block = pool.allocate(64 * MIB, &asked).unwrap();
        for _ in 0..50 {
            act(&asked, || ());
        }
        drop(block);
        for mib in [48, 40] {
            drop(pool.allocate(mib * MIB, &asked).unwrap());
        }
        drop(pool.allocate(70 * MIB, &asking).unwrap());
    }
    enqueue_owners(&pool, &asked, 200);
    for mib in [64, 66] {
        drop(pool.allocate(mib * MIB, &asked).unwrap());
    }
    drop(pool.allocate(300 * MIB, &asking).unwrap());
    drop(pool.allocate(68 * MIB, &asked).unwrap());
    enqueue_owners(&pool, &asked, 300);
    drop(small);
    drop(pool);
    ready.send(()).unwrap();
    // Until the other end is gone.
    let _ = end.recv();
}

/// Empties the other thread's cache from a thread that has none: work that the driver runs meanwhile needs one.
fn empty_from_outside(seed: u64) {
    let pool = Pool::new(&seeded(seed), PoolConfig::default()).unwrap();
    let (keep, end) = channel();
    let (ready, is_ready) = channel();
    let of_user = pool.clone();
    let user = thread::spawn(move || use_pool(of_user, &ready, &end));
    is_ready.recv().unwrap();
    pool.decay_now();
    drop(keep);
    user.join().unwrap();
}

#[test]
fn caches_are_emptied_while_the_driver_runs_work_that_frees() {
    for seed in 0..20 {
        let (tell, told) = channel();
        thread::spawn(move || {
            empty_from_outside(seed);
            tell.send(()).unwrap();
        });
        let outcome = told.recv_timeout(Duration::from_secs(60));
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn as_many_streams_are_waited_for_as_hold_a_part() {
    const STREAMS: usize = 300;
    let device = Device::host(HostConfig {
        capacity: 4096 * MIB,
        ..HostConfig::default()
    })
    .unwrap();
    let config = PoolConfig {
        limit: Some(1200 * MIB),
        reuse: ReusePolicy::Never,
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let held = [(); 2].map(|()| device.create_stream().unwrap());
    let gates = held.each_ref().map(Gate::close);
    let events = held.each_ref().map(|stream| stream.record().unwrap());
    let mut streams = Vec::new();
    for number in 0..STREAMS {
        let stream = device.create_stream().unwrap();
        let block = pool.allocate(4 * MIB, &stream).unwrap();
        // Some go on late, when all others have been waited for in vain.
        stream.wait(&events[usize::from(number < 40)]).unwrap();
        drop(block);
        streams.push(stream);
    }
    let opener = thread::spawn(move || {
        for gate in gates {
            thread::sleep(Duration::from_millis(500));
            gate.open();
        }
    });
    let stream = device.create_stream().unwrap();
    let all = pool.allocate(1100 * MIB, &stream);
    opener.join().unwrap();
    assert!(all.is_ok(), "{all:?}");
}
