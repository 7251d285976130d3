//! What threads do to one pool at once, run in every order that loom can find within its bound on
//! preemptions: `.ci/run loom`. The pool is the real one; only its locks, its queue and its thread locals
//! are loom's (`src/sync.rs`).
//!
//! loom's `join` returns before the joined thread's lanes are flushed, where the standard library's returns
//! after it: the models see more orders than programs do. So that nothing is missed that happens after the
//! last line of a model, each begins by looking at what the one before has left of the device's memory.

#![cfg(loom)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, Stream};
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

const CAPACITY: u64 = 4 << 20;
/// More than half of the device: only one such block can exist.
const LARGE: u64 = 3 << 20;
const SMALL: u64 = 4096;

/// A device with plain allocations: what has no lock of the pool is to be cheap. It gets no work, so it starts
/// no threads and every event is complete at once; a seeded schedule would let the pool find that out sooner in
/// one run of a model than in the next.
struct Subject {
    device: Device,
    streams: [Stream; 2],
}

impl Subject {
    fn new() -> Self {
        let device = Device::host(HostConfig {
            capacity: CAPACITY,
            schedule: HostSchedule::Threads,
            virtual_memory: false,
        })
        .unwrap();
        let streams = [(); 2].map(|()| device.create_stream().unwrap());
        Self { device, streams }
    }

    fn assert_whole(&self) {
        let free = self.device.memory_info().unwrap().free;
        assert_eq!(free, CAPACITY, "the device has all its memory back");
    }

    fn pool(&self) -> Pool {
        Pool::new(&self.device, PoolConfig::default()).unwrap()
    }
}

/// Runs `model` in every order with at most `preemptions` switches that no wait forces: all orders would be
/// too many.
fn check(preemptions: usize, model: impl Fn(&Subject) + Send + Sync + 'static) {
    let subject = Arc::new(Subject::new());
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    let runs = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (shared, counted) = (subject.clone(), runs.clone());
    builder.check(move || {
        shared.assert_whole();
        // Relaxed: the models run one after another.
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model(&shared);
    });
    subject.assert_whole();
    let runs = runs.load(std::sync::atomic::Ordering::Relaxed);
    println!("{runs} orders");
    assert!(runs > 20, "only {runs} orders were tried");
}

/// What all threads have counted agrees with the blocks that are out.
fn assert_live(pool: &Pool, blocks: &[&Block]) {
    pool.check_invariants();
    let stats = pool.stats();
    let allocated = blocks.iter().map(|block| block.allocated()).sum::<u64>();
    assert_eq!(stats.allocation.current, blocks.len() as u64);
    assert_eq!(stats.allocated_bytes.current, allocated);
    assert_eq!(stats.active_bytes.current, allocated);
}

#[test]
fn a_block_freed_by_another_thread_is_found_when_memory_is_short() {
    check(3, |subject| {
        let pool = subject.pool();
        let stream = subject.streams[0].clone();
        let block = pool.allocate(LARGE, &stream).unwrap();
        let is_freed = Arc::new(AtomicBool::new(false));
        let other = {
            let is_freed = is_freed.clone();
            thread::spawn(move || {
                drop(block);
                is_freed.store(true, Ordering::Release);
            })
        };
        let was_freed = is_freed.load(Ordering::Acquire);
        // The block is in the other thread's lane, on its way out of it, in the queue or in the pool.
        let again = pool.allocate(LARGE, &stream);
        assert!(again.is_ok() || !was_freed, "{again:?}");
        other.join().unwrap();
        drop(again);
        let again = pool.allocate(LARGE, &stream).unwrap();
        assert_live(&pool, &[&again]);
    });
}

#[test]
fn a_block_freed_by_the_thread_before_is_found_at_once() {
    check(3, |subject| {
        let pool = subject.pool();
        let stream = subject.streams[0].clone();
        let block = pool.allocate(LARGE, &stream).unwrap();
        let is_freed = Arc::new(AtomicBool::new(false));
        let other = {
            let (is_freed, pool, stream) = (is_freed.clone(), pool.clone(), stream.clone());
            thread::spawn(move || {
                drop(block);
                drop(pool.allocate(LARGE, &stream).unwrap());
                is_freed.store(true, Ordering::Release);
                // Loom ends the thread before its cache is emptied.
            })
        };
        if is_freed.load(Ordering::Acquire) {
            let again = pool.allocate(LARGE, &stream).unwrap();
            let stats = pool.stats();
            assert_eq!(stats.num_device_alloc, 1);
            assert_eq!(stats.num_alloc_retries, 0);
            assert_eq!(stats.allocated_bytes.peak, LARGE);
            assert_live(&pool, &[&again]);
        }
        other.join().unwrap();
        assert_live(&pool, &[]);
    });
}

#[test]
fn threads_on_one_stream_never_get_the_same_block() {
    // Three threads: with one preemption more, the orders are too many.
    check(2, |subject| {
        let pool = subject.pool();
        let stream = subject.streams[0].clone();
        // One block in the pool, one in the lane of this thread.
        let kept = [(); 2].map(|()| pool.allocate(SMALL, &stream).unwrap());
        drop(kept);
        let others = [(); 2].map(|()| {
            let (pool, stream) = (pool.clone(), stream.clone());
            thread::spawn(move || {
                drop(pool.allocate(SMALL, &stream).unwrap());
                pool.allocate(SMALL, &stream).unwrap()
            })
        });
        let mine = pool.allocate(SMALL, &stream).unwrap();
        let [first, second] = others.map(|other| other.join().unwrap());
        assert_ne!(mine.ptr(), first.ptr());
        assert_ne!(mine.ptr(), second.ptr());
        assert_ne!(first.ptr(), second.ptr());
        assert_live(&pool, &[&mine, &first, &second]);
    });
}

#[test]
fn flushing_the_lane_of_a_thread_that_ends_loses_nothing() {
    check(3, |subject| {
        let pool = subject.pool();
        let streams = subject.streams.clone();
        let other = {
            let (pool, streams) = (pool.clone(), streams.clone());
            thread::spawn(move || {
                for stream in &streams {
                    drop(pool.allocate(SMALL, stream).unwrap());
                }
            })
        };
        pool.empty_cache().unwrap();
        other.join().unwrap();
        assert_live(&pool, &[]);
    });
}

#[test]
fn the_last_handle_takes_the_memory_along_whoever_frees_the_last_block() {
    check(3, |subject| {
        let pool = subject.pool();
        let stream = &subject.streams[0];
        let [first, second] = [(); 2].map(|()| pool.allocate(SMALL, stream).unwrap());
        let other = {
            let pool = pool.clone();
            thread::spawn(move || {
                drop(first);
                drop(pool);
            })
        };
        drop(pool);
        drop(second);
        other.join().unwrap();
    });
}

#[test]
fn statistics_read_beside_other_threads_count_each_block_once() {
    check(3, |subject| {
        let pool = subject.pool();
        let stream = subject.streams[0].clone();
        let block = pool.allocate(SMALL, &stream).unwrap();
        let other = {
            let (pool, stream) = (pool.clone(), stream.clone());
            thread::spawn(move || {
                let more = pool.allocate(SMALL, &stream).unwrap();
                drop(block);
                more
            })
        };
        let live = pool.stats().allocation.current;
        assert!((1..=2).contains(&live), "{live} blocks");
        let more = other.join().unwrap();
        assert_live(&pool, &[&more]);
    });
}
