//! Random sequences of every verb of the pool against a naive model, with the structures walked after
//! every step. A failure prints the seed; `KITSUNE_SEED=n` runs that seed alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod device_support;
mod support;

use std::collections::BTreeMap;

use kitsune::{Block, Error, HostConfig, Pool, PoolConfig, ReusePolicy, Schedule, Stream};

/// Device memory: small, so that every rung of the ladder is reached.
const CAPACITY: u64 = 64 << 20;
const LIMIT: u64 = 48 << 20;
const LIMIT_MIN: u64 = 2 << 20;

/// The pool under test with what a naive observer knows of it.
struct Model {
    pool: Pool,
    streams: Vec<Stream>,
    blocks: Vec<Block>,
    /// Live ranges by start.
    live: BTreeMap<u64, u64>,
    random: fastrand::Rng,
}

impl Model {
    fn new(seed: u64) -> Self {
        let schedule = Schedule::Seeded(seed);
        let config = HostConfig {
            capacity: CAPACITY,
            schedule,
            ..HostConfig::default()
        };
        let device = device_support::device(config);
        let mut random = fastrand::Rng::with_seed(seed);
        let limit = random.bool().then_some(LIMIT);
        let policies = [
            ReusePolicy::Never,
            ReusePolicy::OnlyComplete,
            ReusePolicy::Wait,
        ];
        let config = PoolConfig {
            limit,
            reuse: policies[random.usize(0..policies.len())],
            contiguous: random.u32(0..4) == 0,
            poison: random.bool(),
            deterministic: random.u32(0..4) == 0,
            ..PoolConfig::default()
        };
        let pool = Pool::new(&device, config).unwrap();
        let streams = (0..3).map(|_| device.create_stream().unwrap()).collect();
        Self {
            pool,
            streams,
            blocks: Vec::new(),
            live: BTreeMap::new(),
            random,
        }
    }

    fn size(&mut self) -> u64 {
        match self.random.u32(0..10) {
            0 => self.random.u64(0..3),
            1..=5 => self.random.u64(1..64 << 10),
            6..=8 => self.random.u64(1..3 << 20),
            _ => self.random.u64(1..40 << 20),
        }
    }

    fn stream(&mut self) -> Stream {
        let index = self.random.usize(0..self.streams.len());
        self.streams[index].clone()
    }

    fn allocate(&mut self) {
        let (bytes, stream) = (self.size(), self.stream());
        match self.pool.allocate(bytes, &stream) {
            Ok(block) => {
                assert_eq!(block.requested(), bytes);
                assert!(block.allocated() >= bytes && block.allocated() - bytes < 512);
                if bytes > 0 {
                    let (start, end) = (block.ptr().0, block.ptr().0 + block.allocated());
                    assert_eq!(start % 512, 0);
                    let before = self.live.range(..end).next_back();
                    assert!(
                        before.is_none_or(|(_, end)| *end <= start),
                        "{start:#x} overlaps"
                    );
                    self.live.insert(start, end);
                }
                self.blocks.push(block);
            }
            Err(Error::OutOfMemory(report)) => {
                let stats = self.pool.stats();
                assert_eq!(report.requested, bytes);
                assert_eq!(report.limit, self.pool.limit());
                assert_eq!(report.allocated, stats.allocated_bytes.current);
                assert!(
                    report.largest_free < bytes.next_multiple_of(512),
                    "{report}"
                );
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn free(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let index = self.random.usize(0..self.blocks.len());
        let block = self.blocks.swap_remove(index);
        self.live.remove(&block.ptr().0);
        if self.random.u32(0..8) == 0 {
            std::thread::spawn(move || drop(block)).join().unwrap();
        }
    }

    fn record(&mut self) {
        let stream = self.stream();
        if let Some(block) = self.random.choice(self.blocks.iter_mut()) {
            block.record_stream(&stream);
        }
    }

    fn replace_stream(&mut self) {
        let index = self.random.usize(0..self.streams.len());
        self.streams[index] = self.pool.device().create_stream().unwrap();
    }

    fn shrink(&mut self) {
        let bytes = self.random.u64(0..CAPACITY);
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
        match self.random.u32(0..100) {
            0..45 => self.allocate(),
            45..80 => self.free(),
            80..90 => self.record(),
            90..94 => self.stream().synchronize().unwrap(),
            94..96 => self.pool.empty_cache().unwrap(),
            96..97 => self.pool.reset_peaks(),
            97..98 => self.replace_stream(),
            98..99 => self.shrink(),
            _ => self.blocks.truncate(self.blocks.len() / 2),
        }
        self.live
            .retain(|start, _| self.blocks.iter().any(|block| block.ptr().0 == *start));
    }

    fn check(&self) {
        self.pool.check_invariants();
        let stats = self.pool.stats();
        let requested: u64 = self.blocks.iter().map(Block::requested).sum();
        let allocated: u64 = self.blocks.iter().map(Block::allocated).sum();
        assert_eq!(stats.requested_bytes.current, requested);
        assert_eq!(stats.allocated_bytes.current, allocated);
        assert!(allocated <= stats.active_bytes.current);
        assert!(stats.active_bytes.current <= stats.reserved_bytes.current);
        assert!(stats.reserved_bytes.peak <= CAPACITY);
    }
}

#[test]
fn random_sequences_agree_with_a_naive_model() {
    for seed in support::seeds(100) {
        support::with_seed(seed, |seed| {
            let mut model = Model::new(seed);
            for _ in 0..600 {
                model.step();
                model.check();
            }
            model.blocks.clear();
            for stream in &model.streams {
                stream.synchronize().unwrap();
            }
            model.pool.empty_cache().unwrap();
            let stats = model.pool.stats();
            assert_eq!(stats.active_bytes.current, 0);
            assert_eq!(stats.reserved_bytes.current, 0, "idle memory went back");
            let free = model.pool.device().memory_info().unwrap().free;
            assert_eq!(free, CAPACITY, "the device has everything back");
        });
    }
}
