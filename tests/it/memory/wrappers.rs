//! Limits, logs and tables around a pool: what they count, in any order, from any thread, when things fail.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use kitsune::memory::{Allocate, Limit, Log, Track, Watch, tag};
use kitsune::telemetry::ReplayCsv;
use kitsune::units::MIB;
use kitsune::{
    Block, Context, DType, Device, Error, HostConfig, HostSchedule, OutOfMemory, Pool, PoolConfig,
    Result, ReusePolicy, Stream, Tensor,
};
use parking_lot::Mutex;

fn pool() -> (Pool, Stream) {
    let host = HostConfig {
        capacity: 1 << 30,
        schedule: HostSchedule::Seeded(1),
        ..HostConfig::default()
    };
    let device = Device::host(host).unwrap();
    // Addresses and peaks then depend on the calls alone.
    let config = PoolConfig {
        reuse: ReusePolicy::Wait,
        ..PoolConfig::default()
    };
    let stream = device.create_stream().unwrap();
    (Pool::new(&device, config).unwrap(), stream)
}

fn refusal(outcome: Result<Block>) -> Box<OutOfMemory> {
    match outcome {
        Err(Error::OutOfMemory(report)) => report,
        other => panic!("out of memory was expected, not {other:?}"),
    }
}

#[test]
fn a_limit_refuses_what_exceeds_it_and_counts_nothing_for_it() {
    let (pool, stream) = pool();
    let limit = Limit::new(pool.clone(), 10 * MIB);
    let first = limit.allocate(4 * MIB, &stream).unwrap();
    let second = limit.allocate(4 * MIB, &stream).unwrap();
    let before = pool.stats();
    let report = refusal(limit.allocate(3 * MIB, &stream));
    assert!(report.limited);
    assert_eq!(report.limit, Some(10 * MIB));
    assert_eq!(report.limit_used, Some(8 * MIB));
    assert_eq!(report.requested, 3 * MIB);
    let text = report.to_string();
    let part = "limit 10.0 MiB with 8.0 MiB in use (exceeded)";
    assert!(text.contains(part), "{text}");
    assert_eq!((limit.used(), pool.stats()), (8 * MIB, before));

    drop(first);
    let third = limit.allocate(6 * MIB, &stream).unwrap();
    assert_eq!(limit.used(), limit.limit());
    refusal(limit.allocate(1, &stream));
    drop((second, third));
    assert_eq!(limit.used(), 0);
}

#[test]
fn a_limit_counts_rounded_bytes_and_refuses_what_cannot_be_rounded() {
    let (pool, stream) = pool();
    let limit = Limit::new(pool, 1024);
    let block = limit.allocate(513, &stream).unwrap();
    assert_eq!((block.allocated(), limit.used()), (1024, 1024));
    let nothing = limit.allocate(0, &stream).unwrap();
    assert_eq!(nothing.allocated(), 0);
    for bytes in [1, u64::MAX, u64::MAX - 511] {
        refusal(limit.allocate(bytes, &stream));
    }
    drop((block, nothing));
    assert_eq!(limit.used(), 0);
}

#[test]
fn what_the_allocator_inside_refuses_is_not_counted() {
    let (pool, stream) = pool();
    let (other, foreign) = self::pool();
    let limit = Limit::new(pool.clone(), u64::MAX);
    let track = Track::new(Limit::new(pool.clone(), 1024));
    let report = refusal(limit.allocate(2 << 30, &stream));
    assert!(!report.limited);
    assert!(limit.allocate(512, &foreign).is_err());
    assert_eq!(limit.used(), 0);
    // A stream of another device is an error of its own, whatever the limit says.
    let outcome = track.allocate(4096, &foreign);
    assert!(matches!(outcome, Err(Error::InvalidArgument { .. })));
    assert!(track.allocate(4096, &stream).is_err());
    assert!(track.report().blocks.is_empty());
    drop(other);
    pool.check_invariants();
}

#[test]
fn threads_cannot_exceed_a_limit_together() {
    const LIMIT: u64 = 64 << 10;
    let (pool, stream) = pool();
    let limit = Limit::new(pool, LIMIT);
    let (live, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut blocks: Vec<Block> = Vec::new();
        for _ in 0..5000 {
            if random.bool() {
                match limit.allocate(random.u64(1..16 << 10), &stream) {
                    Ok(block) => {
                        let before = live.fetch_add(block.allocated(), Ordering::SeqCst);
                        assert!(before + block.allocated() <= LIMIT);
                        blocks.push(block);
                    }
                    Err(_) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                }
            } else if !blocks.is_empty() {
                let block = blocks.swap_remove(random.usize(0..blocks.len()));
                live.fetch_sub(block.allocated(), Ordering::SeqCst);
            }
        }
        live.fetch_sub(blocks.iter().map(Block::allocated).sum(), Ordering::SeqCst);
    };
    thread::scope(|scope| {
        for seed in 0..4 {
            scope.spawn(move || work(seed));
        }
    });
    assert!(refused.into_inner() > 0, "the limit was never reached");
    assert_eq!(limit.used(), 0);
}

/// A wrapper made outside the crate: writes down its name when a block is freed, and looks whether the
/// memory can be had already.
#[derive(Debug)]
struct Named<A> {
    inner: A,
    witness: Arc<Witness>,
}

#[derive(Debug)]
struct Witness {
    name: &'static str,
    told: Arc<Mutex<Vec<(&'static str, u64)>>>,
    pool: Pool,
}

impl<A: Allocate> Allocate for Named<A> {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let mut block = self.inner.allocate(bytes, stream)?;
        block.watch(self.witness.clone(), bytes);
        Ok(block)
    }

    fn pool(&self) -> &Pool {
        self.inner.pool()
    }
}

impl Watch for Witness {
    fn freed(&self, key: u64, block: &Block) {
        self.told.lock().push((self.name, key));
        let home = block.home().unwrap();
        let other = self.pool.allocate(block.requested(), home).unwrap();
        assert_ne!(other.ptr(), block.ptr(), "{} is told too late", self.name);
    }
}

#[test]
fn the_outermost_is_told_first_and_before_the_memory_is_free() {
    let (pool, stream) = pool();
    let told = Arc::new(Mutex::new(Vec::new()));
    let witness = |name| {
        let (told, pool) = (told.clone(), pool.clone());
        Arc::new(Witness { name, told, pool })
    };
    let inner = Named {
        inner: pool.clone(),
        witness: witness("inner"),
    };
    let outer = Named {
        inner,
        witness: witness("outer"),
    };
    for bytes in [512, 4096, 3 * MIB] {
        let block = outer.allocate(bytes, &stream).unwrap();
        let ptr = block.ptr();
        drop(block);
        let told = std::mem::take(&mut *told.lock());
        assert_eq!(told, [("outer", bytes), ("inner", bytes)]);
        // A reused record has no watch left.
        let plain = pool.allocate(bytes, &stream).unwrap();
        assert!(bytes > 4096 || plain.ptr() == ptr || told.len() == 2);
        drop(plain);
    }
    assert!(told.lock().is_empty());
    drop(outer.allocate(0, &stream).unwrap());
    assert!(told.lock().is_empty());
    pool.check_invariants();
}

#[test]
fn wrappers_nest_in_any_order_and_blocks_may_be_dropped_anywhere() {
    let (pool, stream) = pool();
    let log = |inner: Arc<dyn Allocate>| -> Arc<dyn Allocate> {
        Arc::new(Log::new(inner, ReplayCsv::new(io::sink()).unwrap()))
    };
    let limit = Arc::new(Limit::new(log(Arc::new(pool.clone())), MIB));
    let track = Arc::new(Track::new(log(limit.clone())));
    let around = Arc::new(Track::new(Limit::new(track.clone(), MIB)));
    let mut blocks = Vec::new();
    for bytes in 1..40 {
        blocks.push(around.allocate(bytes * 100, &stream).unwrap());
    }
    let allocated: u64 = blocks.iter().map(Block::allocated).sum();
    for report in [track.report(), around.report()] {
        assert_eq!(report.blocks.len(), 39);
        assert_eq!(report.allocated_bytes(), allocated);
    }
    assert_eq!(
        (limit.used(), around.inner().used()),
        (allocated, allocated)
    );
    // The blocks outlive the wrapper, and part of them is dropped by another thread.
    let rest = blocks.split_off(20);
    thread::spawn(move || drop(rest)).join().unwrap();
    assert_eq!(around.report().blocks.len(), 20);
    drop(around);
    drop(blocks);
    assert!(track.report().blocks.is_empty());
    assert_eq!(limit.used(), 0);
    assert_eq!(pool.stats().allocation.current, 0);
    pool.check_invariants();
}

#[test]
fn a_wrapped_block_still_waits_for_the_streams_that_used_it() {
    let (pool, stream) = pool();
    let other = pool.device().create_stream().unwrap();
    let limit = Limit::new(pool.clone(), MIB);
    let mut block = limit.allocate(4096, &stream).unwrap();
    block.record_stream(&other);
    drop(block);
    // The limit is on what callers hold; the memory itself is active until `other` has passed.
    assert_eq!(limit.used(), 0);
    let stats = pool.stats();
    assert_eq!(stats.allocated_bytes.current, 0);
    assert_eq!(stats.active_bytes.current, 4096);
    pool.check_invariants();
}

#[test]
fn a_report_says_what_is_live_and_where_it_comes_from() {
    let (pool, stream) = pool();
    let track = Track::with_backtraces(pool.clone());
    let scope = tag("loader");
    let small = track.allocate(700, &stream).unwrap();
    drop(scope);
    let large = track.allocate(5 * MIB, &stream).unwrap();
    let report = track.report();
    let [first, second] = &report.blocks[..] else {
        panic!("{report}");
    };
    assert_eq!((first.ptr, second.ptr), (small.ptr(), large.ptr()));
    assert_eq!((first.requested, first.allocated), (700, 1024));
    assert_eq!((first.tag, second.tag), ("loader", "untagged"));
    assert_eq!(first.stream, stream.id());
    assert_eq!(first.thread, thread::current().id());
    let backtrace = first.backtrace.as_ref().unwrap().to_string();
    let here = "a_report_says_what_is_live";
    assert!(backtrace.contains(here), "{backtrace}");
    let text = report.to_string();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("2 live blocks, 5.0 MiB requested"));
    assert!(lines.next().unwrap().starts_with("block 1: 5.0 MiB at 0x"));
    assert!(text.contains("block 0: 700 B"), "{text}");

    drop(small);
    let again = track.allocate(700, &stream).unwrap();
    let numbers: Vec<u64> = track.report().blocks.iter().map(|b| b.number).collect();
    assert_eq!(numbers, [1, 2]);
    drop((large, again));
    assert_eq!(track.report().to_string(), "0 live blocks, 0 B requested");
    let plain = Track::new(pool);
    let block = plain.allocate(1, &stream).unwrap();
    assert!(plain.report().blocks[0].backtrace.is_none());
    drop(block);
}

#[test]
fn a_table_never_shows_two_live_blocks_at_one_address() {
    let (pool, stream) = pool();
    let track = Track::new(pool);
    let (sender, receiver) = crossbeam::channel::bounded::<Block>(8);
    thread::scope(|scope| {
        for seed in 0..2 {
            let (sender, track, stream) = (sender.clone(), &track, &stream);
            scope.spawn(move || {
                let mut random = fastrand::Rng::with_seed(seed);
                for _ in 0..2000 {
                    let bytes = random.u64(1..400 << 10);
                    sender.send(track.allocate(bytes, stream).unwrap()).unwrap();
                }
            });
        }
        drop(sender);
        // Blocks are freed here, and their memory goes back and forth between the threads.
        for (index, block) in receiver.iter().enumerate() {
            drop(block);
            if index % 16 == 0 {
                let mut seen = HashMap::new();
                for block in track.report().blocks {
                    if let Some(other) = seen.insert(block.ptr, block.number) {
                        panic!("{} and {other} are both at {:?}", block.number, block.ptr);
                    }
                }
            }
        }
    });
    let report = track.report();
    assert_eq!((report.blocks.len(), report.allocated_bytes()), (0, 0));
}

#[test]
fn tensors_take_their_memory_through_the_wrappers_of_their_context() {
    let (pool, _) = pool();
    let limit = Arc::new(Limit::new(pool.clone(), 8192));
    let context = Context::with_allocator(limit.clone()).unwrap();
    let tensor = Tensor::from_slice(&context, [4], &[1.0_f32, 2.0, 3.0, 4.0]).unwrap();
    assert_eq!(limit.used(), 512);
    let outcome = Tensor::zeros(&context, [4096], DType::F32);
    assert!(matches!(outcome, Err(Error::OutOfMemory(report)) if report.limited));
    assert_eq!(tensor.to_vec::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0]);
    drop(tensor);
    assert_eq!(limit.used(), 0);
    assert_eq!(context.pool().stats().num_ooms, 0);
}

/// An allocator in safe code that does not return what it is asked for.
#[derive(Debug)]
struct Liar {
    pool: Pool,
    other_stream: Stream,
    other_pool: Pool,
    lie: Lie,
}

#[derive(Clone, Copy, Debug)]
enum Lie {
    None,
    TooSmall,
    Empty,
    OtherStream,
    OtherDevice,
}

impl Allocate for Liar {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        match self.lie {
            Lie::None => self.pool.allocate(bytes, stream),
            Lie::TooSmall => self.pool.allocate(bytes.saturating_sub(512), stream),
            Lie::Empty => self.pool.allocate(0, stream),
            Lie::OtherStream => self.pool.allocate(bytes, &self.other_stream),
            Lie::OtherDevice => {
                let stream = self.other_pool.device().create_stream()?;
                self.other_pool.allocate(bytes, &stream)
            }
        }
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }
}

#[test]
fn a_block_that_is_not_what_was_asked_for_is_refused_before_anything_is_written() {
    let lies = [
        (Lie::TooSmall, Some("a block of 3584 bytes for 4096")),
        (Lie::Empty, Some("a block of 0 bytes for 4096")),
        (Lie::OtherStream, Some("for stream")),
        (Lie::OtherDevice, Some("for stream")),
        (Lie::None, None),
    ];
    for (lie, expected) in lies {
        let (pool, other_stream) = pool();
        let other_device = Device::host(HostConfig::default()).unwrap();
        let liar = Liar {
            other_pool: Pool::new(&other_device, PoolConfig::default()).unwrap(),
            pool: pool.clone(),
            other_stream,
            lie,
        };
        let context = Context::with_allocator(Arc::new(liar)).unwrap();
        // A neighbor that a write past the end of a block would hit.
        let neighbor = Context::with_pool(&pool).unwrap();
        let neighbor = Tensor::full(&neighbor, [1 << 16], DType::F32, 3.0).unwrap();
        let made = [
            Tensor::full(&context, [1024], DType::F32, 1.0),
            Tensor::zeros(&context, [1024], DType::F32),
            Tensor::from_slice(&context, [1024], &[1.0_f32; 1024]),
            neighbor.narrow(0, 0, 1024).unwrap().copy_to(&context),
        ];
        for made in made {
            match (made, expected) {
                (Ok(tensor), None) => assert_eq!(tensor.to_vec::<f32>().unwrap().len(), 1024),
                (Err(Error::InvalidArgument { op, reason }), Some(expected)) => {
                    assert_eq!(op, "Allocate::allocate");
                    assert!(reason.contains(expected), "{lie:?}: {reason}");
                }
                (made, _) => panic!("{lie:?}: {made:?}"),
            }
        }
        // What holds no memory needs none.
        let empty = Tensor::zeros(&context, [0], DType::F32).unwrap();
        assert_eq!(empty.ptr().0, 0);
        assert!(neighbor.to_vec::<f32>().unwrap().iter().all(|v| *v == 3.0));
        drop(empty);
        assert_eq!(pool.stats().allocation.current, 1, "{lie:?}");
    }
}

/// The device that an allocator names is where the stream is made, whichever pool it has.
#[test]
fn an_allocator_that_names_another_device_than_its_pools_is_refused() {
    #[derive(Debug)]
    struct Abroad(Pool, Device);
    impl Allocate for Abroad {
        fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
            let home = self.0.device().create_stream()?;
            let _ = stream;
            self.0.allocate(bytes, &home)
        }
        fn pool(&self) -> &Pool {
            &self.0
        }
        fn device(&self) -> &Device {
            &self.1
        }
    }
    let (pool, _) = pool();
    let device = Device::host(HostConfig::default()).unwrap();
    let context = Context::with_allocator(Arc::new(Abroad(pool, device))).unwrap();
    let outcome = Tensor::zeros(&context, [1], DType::F32);
    assert!(matches!(outcome, Err(Error::InvalidArgument { .. })));
}
