//! Every driver call under a busy pool fails once: the pool stays sound, loses nothing, and goes on.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the test enqueues work of its own, and fails by panicking"
)]

mod device_support;
mod support;

use std::sync::Arc;

use kitsune::driver::fault::FaultDriver;
use kitsune::{
    Block, Device, Error, HostConfig, Pool, PoolConfig, Result, ReusePolicy, Schedule, Stream,
};

const CAPACITY: u64 = 64 << 20;
const OPERATIONS: usize = 300;

/// A program that does not give up: what fails is tried again.
struct Program {
    faults: Arc<FaultDriver>,
    pool: Pool,
    streams: Vec<Stream>,
    blocks: Vec<Block>,
    random: fastrand::Rng,
}

/// Calls `call` again if it fails: a fault fires once.
fn insist<T>(mut call: impl FnMut() -> Result<T>) -> T {
    call().or_else(|_| call()).unwrap()
}

impl Program {
    /// The program, whose driver call number `nth` fails.
    fn new(config: PoolConfig, nth: u64) -> Self {
        let host = HostConfig {
            capacity: CAPACITY,
            schedule: Schedule::Seeded(7),
            ..HostConfig::default()
        };
        let inner = device_support::device(host);
        let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
        let device = Device::from_driver(faults.clone());
        faults.fail_nth(None, nth);
        let pool = insist(|| Pool::new(&device, config.clone()));
        let streams = (0..3).map(|_| insist(|| device.create_stream())).collect();
        Self {
            faults,
            pool,
            streams,
            blocks: Vec::new(),
            random: fastrand::Rng::with_seed(5),
        }
    }

    fn stream(&mut self) -> Stream {
        let index = self.random.usize(0..self.streams.len());
        self.streams[index].clone()
    }

    fn allocate(&mut self) {
        let bytes = match self.random.u32(0..10) {
            0..4 => self.random.u64(1..64 << 10),
            4..8 => self.random.u64(1..5 << 20),
            _ => self.random.u64(1..30 << 20),
        };
        let stream = self.stream();
        match self.pool.allocate(bytes, &stream) {
            Ok(block) => {
                let (ptr, bytes, raw) = (block.ptr(), bytes.min(512), stream.raw());
                // SAFETY: the block is at least as long, and freed in order with this stream.
                // A refused fill changes nothing.
                let _ = unsafe { stream.driver().fill(ptr, 1, bytes, raw) };
                self.blocks.push(block);
            }
            Err(Error::OutOfMemory(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn step(&mut self) {
        match self.random.u32(0..100) {
            0..48 => self.allocate(),
            48..80 if !self.blocks.is_empty() => {
                let index = self.random.usize(0..self.blocks.len());
                drop(self.blocks.swap_remove(index));
            }
            80..88 => {
                let stream = self.stream();
                if let Some(block) = self.random.choice(self.blocks.iter_mut()) {
                    block.record_stream(&stream);
                }
            }
            88..91 => self.blocks.truncate(self.blocks.len() / 2),
            91..94 => drop(self.stream().synchronize()),
            94..97 => drop(self.pool.empty_cache()),
            97..99 => {
                let index = self.random.usize(0..self.streams.len());
                let device = self.pool.device().clone();
                self.streams[index] = insist(|| device.create_stream());
            }
            _ => {}
        }
    }

    /// Everything back: whatever failed before, nothing is in use, and the device has all its memory.
    fn end(mut self, nth: u64) -> bool {
        let fired = self.faults.disarm() == 0;
        self.pool.check_invariants();
        self.blocks.clear();
        let stream = self.stream();
        let large = self.pool.allocate(CAPACITY / 2, &stream).unwrap();
        drop(large);
        self.pool.empty_cache().unwrap();
        self.pool.check_invariants();
        let stats = self.pool.stats();
        assert_eq!(stats.active_bytes.current, 0, "active, call {nth}");
        assert_eq!(stats.reserved_bytes.current, 0, "reserved, call {nth}");
        let free = self.pool.device().memory_info().unwrap().free;
        assert_eq!(free, CAPACITY, "device memory, call {nth}");
        fired
    }
}

fn every_call_fails_once(reuse: ReusePolicy, contiguous: bool) {
    let config = PoolConfig {
        reuse,
        contiguous,
        ..PoolConfig::default()
    };
    let survives = |nth: u64| {
        let mut fired = false;
        support::with_seed(nth, |nth| {
            let mut program = Program::new(config.clone(), nth);
            for _ in 0..OPERATIONS {
                program.step();
            }
            fired = program.end(nth);
        });
        fired
    };
    let calls = support::seeds(1 << 20).skip_while(|nth| *nth == 0);
    let survived = calls.take_while(|nth| survives(*nth)).count();
    assert!(survived > 0, "no fault fired");
}

#[test]
fn stitching_pools_that_look_whether_memory_is_free() {
    every_call_fails_once(ReusePolicy::OnlyComplete, false);
}

#[test]
fn stitching_pools_that_wait_on_the_device() {
    every_call_fails_once(ReusePolicy::Wait, false);
}

#[test]
fn pools_of_plain_allocations() {
    every_call_fails_once(ReusePolicy::OnlyComplete, true);
}
