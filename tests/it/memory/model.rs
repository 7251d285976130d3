//! Random sequences of every verb of the pool against a naive model: blocks are apart, what a stream wrote is
//! what it reads, the statistics equal sums over the blocks. A failure prints the seed; `KITSUNE_SEED=n` runs
//! that seed alone.
//!
//! The model looks at each block when it is handed out, at the statistics after every step, and at the
//! contents of one freed block in eight. All structures are walked every [`WALK`] steps: a walk empties the
//! threads' caches, so that walking more often would keep them from being tested, too. In all, the tests take a
//! million steps.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the model enqueues work on blocks that live, and fails by panicking"
)]

use crate::support;
use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::support::driver::{fill, read};
use kitsune::{
    Block, Error, HostConfig, HostSchedule, Pool, PoolConfig, Result, ReusePolicy, Stream,
};

/// Steps between two walks over all structures.
const WALK: usize = 64;
/// Bytes at the front of a block that are written and looked at.
const SHOWN: usize = 512;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does one thing at a time while the model waits.
struct Helper {
    jobs: Option<Sender<Job>>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl Helper {
    fn new() -> Self {
        let (jobs, incoming) = channel::<Job>();
        let (finished, done) = channel();
        let thread = std::thread::spawn(move || {
            for job in incoming {
                job();
                finished.send(()).unwrap();
            }
        });
        Self {
            jobs: Some(jobs),
            done,
            thread: Some(thread),
        }
    }

    fn run(&self, job: impl FnOnce() + Send + 'static) {
        let jobs = self.jobs.as_ref().expect("jobs are given until the drop");
        jobs.send(Box::new(job)).unwrap();
        self.done.recv().expect("the helper does not panic");
    }
}

/// The thread ends, and gives back what it kept.
impl Drop for Helper {
    fn drop(&mut self) {
        drop(self.jobs.take());
        let ended = self.thread.take().expect("joined once").join();
        assert!(
            ended.is_ok() || std::thread::panicking(),
            "the helper panicked"
        );
    }
}

/// A live block and what its home stream wrote to it last.
struct Live {
    block: Block,
    home: Stream,
    value: u8,
}

/// What a naive observer counts.
#[derive(Debug, Default, PartialEq)]
struct Sums {
    blocks: u64,
    requested: u64,
    allocated: u64,
}

/// How large a heap gets.
#[derive(Clone, Copy)]
struct Size {
    capacity: u64,
    limit: u64,
    blocks_max: usize,
}

/// Small enough that every rung of the ladder is reached often.
const SMALL: Size = Size {
    capacity: 64 << 20,
    limit: 48 << 20,
    blocks_max: 40,
};

/// The least limit: a page.
const LIMIT_MIN: u64 = 2 << 20;

const LARGE: Size = Size {
    capacity: 1 << 30,
    limit: 640 << 20,
    blocks_max: 600,
};

/// The pool under test with what a naive observer knows of it.
struct Model {
    size: Size,
    pool: Pool,
    streams: Vec<Stream>,
    helper: Helper,
    live: Vec<Live>,
    /// Live ranges by start.
    ranges: BTreeMap<u64, u64>,
    sums: Sums,
    /// Blocks ever handed out.
    handed_out: u64,
    random: fastrand::Rng,
}

impl Model {
    fn new(seed: u64, size: Size) -> Self {
        let config = HostConfig {
            capacity: size.capacity,
            schedule: HostSchedule::Seeded(seed),
            ..HostConfig::default()
        };
        let device = support::device::device(config);
        let mut random = fastrand::Rng::with_seed(seed);
        let limit = random.bool().then_some(size.limit);
        let policies = [
            ReusePolicy::Never,
            ReusePolicy::OnlyComplete,
            ReusePolicy::Wait,
        ];
        let mut config = PoolConfig {
            limit,
            reuse: policies[random.usize(0..policies.len())],
            deterministic: random.u32(0..4) == 0,
            ..PoolConfig::default()
        };
        config.contiguous = random.u32(0..4) == 0;
        config.poison = random.u32(0..4) == 0;
        let pool = Pool::new(&device, config).unwrap();
        let streams = (0..3).map(|_| device.create_stream().unwrap()).collect();
        Self {
            size,
            pool,
            streams,
            helper: Helper::new(),
            live: Vec::new(),
            ranges: BTreeMap::new(),
            sums: Sums::default(),
            handed_out: 0,
            random,
        }
    }

    fn bytes(&mut self) -> u64 {
        match self.random.u32(0..100) {
            0..4 => self.random.u64(0..3),
            4..70 => self.random.u64(1..64 << 10),
            70..97 => self.random.u64(1..3 << 20),
            _ => self.random.u64(1..40 << 20),
        }
    }

    fn stream(&mut self) -> Stream {
        let index = self.random.usize(0..self.streams.len());
        self.streams[index].clone()
    }

    fn allocate(&mut self) {
        let (bytes, stream) = (self.bytes(), self.stream());
        match self.pool.allocate(bytes, &stream) {
            Ok(block) => self.take_in(block, bytes, stream),
            Err(Error::OutOfMemory(report)) => self.check_report(&report, bytes),
            Err(error) => panic!("{error}"),
        }
    }

    fn take_in(&mut self, block: Block, bytes: u64, home: Stream) {
        assert_eq!(block.requested(), bytes);
        assert!(block.allocated() >= bytes && block.allocated() - bytes < 512);
        let value = self.random.u8(..);
        if bytes > 0 {
            let (start, end) = (block.ptr().0, block.ptr().0 + block.allocated());
            assert_eq!(start % 512, 0);
            let before = self.ranges.range(..end).next_back();
            let is_apart = before.is_none_or(|(_, end)| *end <= start);
            assert!(is_apart, "{start:#x} overlaps");
            self.ranges.insert(start, end);
            fill(&home, block.ptr(), value, SHOWN as u64);
            self.sums.blocks += 1;
            self.sums.requested += bytes;
            self.sums.allocated += block.allocated();
            self.handed_out += 1;
        }
        self.live.push(Live { block, home, value });
    }

    fn check_report(&self, report: &kitsune::OutOfMemory, bytes: u64) {
        assert_eq!(report.requested, bytes);
        assert!(report.reserved <= self.size.capacity);
        assert_eq!(report.allocated, self.sums.allocated);
        let rounded = bytes.next_multiple_of(512);
        assert!(report.largest_free < rounded, "{report}");
    }

    /// Lets go of a live block, which the caller frees.
    fn leave(&mut self) -> Option<Block> {
        if self.live.is_empty() {
            return None;
        }
        let index = self.random.usize(0..self.live.len());
        let Live { block, home, value } = self.live.swap_remove(index);
        if block.requested() > 0 {
            if self.random.u32(0..8) == 0 {
                let shown = read(&home, block.ptr(), SHOWN);
                assert!(shown.iter().all(|byte| *byte == value), "{block:?}");
            }
            self.ranges.remove(&block.ptr().0);
            self.sums.blocks -= 1;
            self.sums.requested -= block.requested();
            self.sums.allocated -= block.allocated();
        }
        Some(block)
    }

    fn free_elsewhere(&mut self) {
        if let Some(block) = self.leave() {
            self.helper.run(move || drop(block));
        }
    }

    /// The helper has a cache of its own: it allocates from what it freed before.
    fn allocate_elsewhere(&mut self) {
        let (bytes, stream) = (self.bytes(), self.stream());
        let (send, receive) = channel();
        let (pool, home) = (self.pool.clone(), stream.clone());
        self.helper
            .run(move || send.send(pool.allocate(bytes, &home)).unwrap());
        match receive.recv().unwrap() {
            Ok(block) => self.take_in(block, bytes, stream),
            Err(Error::OutOfMemory(report)) => self.check_report(&report, bytes),
            Err(error) => panic!("{error}"),
        }
    }

    /// Another stream overwrites a block after its home stream, which goes on after it.
    fn use_elsewhere(&mut self) {
        let user = self.stream();
        let value = self.random.u8(..);
        let Some(live) = self.random.choice(self.live.iter_mut()) else {
            return;
        };
        if live.block.requested() > 0 && user.id() != live.home.id() {
            user.wait_for(&live.home).unwrap();
            fill(&user, live.block.ptr(), value, SHOWN as u64);
            live.value = value;
            // Half of the users leave the home stream behind: only the record holds the memory back.
            if value.is_multiple_of(2) {
                live.home.wait_for(&user).unwrap();
            } else {
                live.home = user.clone();
            }
        }
        if value.is_multiple_of(3) {
            live.block.record_use(&user);
        } else {
            live.block.record_stream(&user);
        }
    }

    fn replace_stream(&mut self) {
        let index = self.random.usize(0..self.streams.len());
        self.streams[index] = self.pool.device().create_stream().unwrap();
    }

    /// Captures allocations with memory of their own and runs them twice; the memory goes with the graph.
    fn capture(&mut self) {
        let stream = self.stream();
        let sizes: Vec<u64> = (0..4).map(|_| self.bytes().max(1)).collect();
        let (pool, handed_out) = (self.pool.clone(), Cell::new(0));
        let work = || -> Result<()> {
            let mut blocks = Vec::new();
            for bytes in &sizes {
                blocks.push(pool.allocate(*bytes, &stream)?);
                handed_out.set(handed_out.get() + 1);
                let block = &blocks[blocks.len() - 1];
                fill(&stream, block.ptr(), 1, SHOWN as u64);
                if blocks.len() > 2 {
                    drop(blocks.remove(0));
                }
            }
            Ok(())
        };
        let private = self.pool.private().unwrap();
        let primed = private.prime(work);
        let graph = primed.and_then(|()| private.capture(&stream, work));
        match graph {
            // SAFETY: the captured work writes to memory of the graph alone.
            Ok(graph) => (0..2).for_each(|_| unsafe { graph.launch(&stream) }.unwrap()),
            Err(Error::OutOfMemory(_)) => {}
            Err(error) => panic!("{error}"),
        }
        self.handed_out += handed_out.get();
    }

    fn shrink(&mut self) {
        let bytes = self.random.u64(0..self.size.capacity);
        match self.random.u32(0..4) {
            0 => self.pool.trim(bytes).unwrap(),
            1 => self.pool.decay_now(),
            2 => {
                let limit = bytes.max(LIMIT_MIN);
                self.pool.set_limit(Some(limit)).unwrap();
                assert_eq!(self.pool.limit(), Some(limit));
            }
            _ => self.pool.set_limit(None).unwrap(),
        }
    }

    fn step(&mut self) {
        if self.live.len() >= self.size.blocks_max {
            for _ in 0..self.size.blocks_max / 2 {
                drop(self.leave());
            }
        }
        match self.random.u32(0..1000) {
            0..450 => self.allocate(),
            450..760 => drop(self.leave()),
            760..810 => self.free_elsewhere(),
            810..850 => self.allocate_elsewhere(),
            850..930 => self.use_elsewhere(),
            930..960 => self.stream().synchronize().unwrap(),
            960..970 => self.pool.empty_cache().unwrap(),
            970..977 => self.pool.reset_peaks(),
            977..985 => self.replace_stream(),
            985..990 => self.helper = Helper::new(),
            990..995 => self.pool = self.pool.clone(),
            995..997 => self.shrink(),
            997..999 => self.capture(),
            _ => while self.live.len() > 3 && self.leave().is_some() {},
        }
    }

    fn check(&self) {
        let stats = self.pool.stats();
        let sums = Sums {
            blocks: stats.allocation.current,
            requested: stats.requested_bytes.current,
            allocated: stats.allocated_bytes.current,
        };
        assert_eq!(sums, self.sums);
        assert_eq!(stats.allocation.allocated, self.handed_out);
        assert_eq!(stats.allocation.freed, self.handed_out - sums.blocks);
        assert!(sums.requested <= sums.allocated);
        assert!(sums.allocated <= stats.active_bytes.current);
        assert!(stats.active_bytes.current <= stats.reserved_bytes.current);
        assert!(stats.reserved_bytes.peak <= self.size.capacity);
        assert!(stats.allocated_bytes.peak >= sums.allocated);
    }

    /// Everything back: nothing is in use, and the device has all its memory.
    fn end(mut self) {
        while self.leave().is_some() {}
        for stream in &self.streams {
            stream.synchronize().unwrap();
        }
        self.pool.check_invariants();
        self.pool.empty_cache().unwrap();
        let stats = self.pool.stats();
        assert_eq!(stats.active_bytes.current, 0);
        assert_eq!(stats.reserved_bytes.current, 0, "idle memory went back");
        let free = self.pool.device().memory_info().unwrap().free;
        assert_eq!(free, self.size.capacity, "the device has everything back");
    }
}

fn agree(seeds: Range<u64>, steps: usize, size: Size) {
    for seed in support::seeds::seeds_in(seeds) {
        support::seeds::with_seed(seed, |seed| {
            let mut model = Model::new(seed, size);
            for step in 0..steps {
                model.step();
                model.check();
                if step % WALK == 0 {
                    model.pool.check_invariants();
                }
            }
            model.end();
        });
    }
}

// Seeds are split so that the tests run side by side.

#[test]
fn random_sequences_agree_with_a_naive_model() {
    agree(0..160, 3000, SMALL);
}

#[test]
fn more_random_sequences_agree_with_a_naive_model() {
    agree(160..320, 3000, SMALL);
}

#[test]
fn random_sequences_in_large_heaps_agree_with_a_naive_model() {
    agree(320..332, 4000, LARGE);
}
