//! Every driver call under a busy pool fails once: the pool stays sound, loses nothing, and goes on.
//!
//! The program makes a thousand operations. By default one run makes every `STRIDE`th call fail, and the runs
//! begin at the 1st, 2nd, ... call, so that every call fails in one of them; the kinds of errors take turns.
//! `KITSUNE_FAULTS=all` plays the whole program again for every single call and every kind.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the test enqueues work of its own, and fails by panicking"
)]

use crate::support;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kitsune::driver::fault::{Fault, FaultDriver, FaultKind};
use kitsune::memory::Registration;
use kitsune::{
    Block, Device, Error, HostConfig, HostSchedule, Pool, PoolConfig, Result, ReusePolicy, Stream,
};
use parking_lot::Mutex;

const CAPACITY: u64 = 64 << 20;
const OPERATIONS: usize = 1000;
/// Calls between two that fail in one run: enough for the pool to get over the first.
const STRIDE: u64 = 61;

/// A program that does not give up: what fails is tried again.
struct Program {
    faults: Arc<FaultDriver>,
    pool: Pool,
    streams: Vec<Stream>,
    blocks: Vec<Block>,
    /// Blocks that a callback gives up when memory is short.
    spare: Arc<Mutex<Vec<Block>>>,
    /// Failures that an observer was told of.
    told: Arc<AtomicU64>,
    registrations: Vec<Registration>,
    random: fastrand::Rng,
}

/// Calls `call` again if it fails: a fault fires once.
fn insist<T>(mut call: impl FnMut() -> Result<T>) -> T {
    call().or_else(|_| call()).unwrap()
}

impl Program {
    /// The program, whose driver calls are to fail as `planned` says: (number of the call, kind).
    fn new(config: PoolConfig, planned: impl Iterator<Item = (u64, FaultKind)>) -> Self {
        let host = HostConfig {
            capacity: CAPACITY,
            schedule: HostSchedule::Seeded(7),
            ..HostConfig::default()
        };
        let inner = support::device::device(host);
        let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
        let device = Device::from_driver(faults.clone());
        for (nth, kind) in planned {
            let call = None;
            faults.arm(Fault { call, nth, kind });
        }
        let pool = insist(|| Pool::new(&device, config.clone()));
        let streams = (0..3).map(|_| insist(|| device.create_stream())).collect();
        let spare: Arc<Mutex<Vec<Block>>> = Arc::default();
        let told = Arc::new(AtomicU64::new(0));
        let (given_up, count) = (Arc::clone(&spare), Arc::clone(&told));
        let registrations = vec![
            pool.on_shortage(move |_| drop(given_up.lock().pop())),
            pool.on_out_of_memory(move |_| {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        ];
        Self {
            faults,
            pool,
            streams,
            blocks: Vec::new(),
            spare,
            told,
            registrations,
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
            48..50 if !self.blocks.is_empty() => {
                let index = self.random.usize(0..self.blocks.len());
                self.spare.lock().push(self.blocks.swap_remove(index));
            }
            50..80 if !self.blocks.is_empty() => {
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
            94..95 => drop(self.pool.empty_cache()),
            95..96 => drop(self.pool.trim(self.random.u64(0..CAPACITY))),
            96..97 => self.pool.decay_now(),
            97..98 => {
                let bytes = self.random.u64(CAPACITY / 2..=CAPACITY);
                // Fails where the driver does not take memory back; the limit holds all the same.
                let limit = self.random.bool().then_some(bytes);
                let _ = self.pool.set_limit(limit);
                assert_eq!(self.pool.limit(), limit);
            }
            98..99 => {
                let index = self.random.usize(0..self.streams.len());
                let device = self.pool.device().clone();
                self.streams[index] = insist(|| device.create_stream());
            }
            _ => {}
        }
    }

    /// Everything back: whatever failed before, nothing is in use, and the device has all its memory.
    /// How many faults did not come to it.
    fn end(mut self, nth: u64) -> usize {
        let left = self.faults.disarm();
        self.pool.check_invariants();
        assert_eq!(
            self.pool.stats().num_ooms,
            self.told.load(Ordering::Relaxed)
        );
        self.registrations.clear();
        self.pool.set_limit(None).unwrap();
        self.spare.lock().clear();
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
        left
    }
}

fn every_call_fails_once(reuse: ReusePolicy, contiguous: bool, deterministic: bool) {
    let config = PoolConfig {
        reuse,
        contiguous,
        deterministic,
        ..PoolConfig::default()
    };
    let play = |seed: u64, planned: Vec<(u64, FaultKind)>| {
        let mut left = 0;
        support::seeds::with_seed(seed, |seed| {
            let mut program = Program::new(config.clone(), planned.into_iter());
            for _ in 0..OPERATIONS {
                program.step();
            }
            left = program.end(seed);
        });
        left
    };
    let kinds = FaultKind::ALL;
    let turn = |turn: u64| kinds[usize::try_from(turn).unwrap() % kinds.len()].clone();
    if std::env::var("KITSUNE_FAULTS").is_ok_and(|which| which == "all") {
        for kind in &kinds {
            let mut calls = support::seeds::seeds(1 << 20).skip_while(|nth| *nth == 0);
            assert!(calls.any(|nth| play(nth, vec![(nth, kind.clone())]) == 1));
        }
        return;
    }
    for first in support::seeds::seeds(STRIDE) {
        let every = |n: u64| (1 + first + n * STRIDE, turn(first + n));
        let most = 1 << 16;
        let planned: Vec<_> = (0..most / STRIDE).map(every).collect();
        let (all, left) = (planned.len(), play(first, planned));
        assert!((1..all).contains(&left), "{left} of {all} faults are left");
    }
}

#[test]
fn stitching_pools_that_look_whether_memory_is_free() {
    every_call_fails_once(ReusePolicy::OnlyComplete, false, false);
}

#[test]
fn stitching_pools_that_wait_on_the_device() {
    every_call_fails_once(ReusePolicy::Wait, false, false);
}

#[test]
fn pools_of_plain_allocations() {
    every_call_fails_once(ReusePolicy::OnlyComplete, true, false);
}

#[test]
fn deterministic_pools() {
    every_call_fails_once(ReusePolicy::Wait, false, true);
}
