//! What a program writes to its blocks stays there: kernels write and read through addresses that come and go, of
//! pages that were mapped elsewhere before and may still be.
//!
//! On a GPU this is what shows that mappings which share pages need no more than stream order.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the test enqueues work on plain addresses, and fails by panicking"
)]

use crate::support;
use std::sync::Arc;

use kitsune::driver::DevicePtr;
use kitsune::driver::fault::FaultDriver;
use kitsune::launch::{self, Span};
use kitsune::units::{KIB, MIB, to_usize};
use kitsune::{Block, DType, Device, Error, HostConfig, Pool, PoolConfig, ReusePolicy, Stream};

/// So little that most requests are met with pages from anywhere.
const CAPACITY: u64 = 96 * MIB;
const OPERATIONS: usize = 1500;
/// Bytes of each part of a block that is written and read.
const WINDOW: u64 = 4 * KIB;
/// Windows that a pass reads at most.
const READS: usize = 64 * 1024;
const STAMP: u64 = size_of::<u32>() as u64;

/// A block, the number that its windows are full of, and its home.
struct Stamped {
    block: Block,
    stamp: u32,
    home: usize,
}

struct Program {
    counter: Arc<FaultDriver>,
    pool: Pool,
    streams: Vec<Stream>,
    live: Vec<Stamped>,
    random: fastrand::Rng,
    last_stamp: u32,
    /// Pinned memory that stamps are copied to.
    seen: DevicePtr,
    expected: Vec<u32>,
    /// Allocations that were met by mapping pages again and taking none.
    stitched: usize,
}

/// Windows at the start of a block, around each border of pages of 2 MiB that a block may have, and at its end.
fn windows(bytes: u64) -> Vec<u64> {
    let end = bytes.saturating_sub(WINDOW);
    let starts = (0..bytes / MIB).map(|number| number * MIB);
    let mut windows: Vec<u64> = starts.filter(|start| *start < end).collect();
    windows.push(end);
    windows
}

impl Program {
    fn new(counter: &Arc<FaultDriver>, reuse: ReusePolicy, seed: u64) -> Self {
        let device = &Device::from_driver(counter.clone());
        let config = PoolConfig {
            reuse,
            ..PoolConfig::default()
        };
        Self {
            counter: counter.clone(),
            pool: Pool::new(device, config).unwrap(),
            streams: (0..3).map(|_| device.create_stream().unwrap()).collect(),
            live: Vec::new(),
            random: fastrand::Rng::with_seed(seed),
            last_stamp: 0,
            seen: device
                .driver()
                .allocate_pinned(READS as u64 * STAMP)
                .unwrap(),
            expected: Vec::new(),
            stitched: 0,
        }
    }

    fn calls(&self, call: &'static str) -> u64 {
        self.counter.calls(call)
    }

    /// One window of a block as elements on stream number `stream`.
    fn window(&self, block: &Block, start: u64, stream: usize) -> Span {
        let len = WINDOW.min(block.requested() - start) / STAMP;
        let ptr = block.ptr().offset(start);
        // SAFETY: inside the block, which is freed behind all work of its home and of the streams recorded on it.
        unsafe { Span::new(ptr, to_usize(len), DType::U32, self.streams[stream].id()) }
    }

    fn allocate(&mut self) {
        let most = if self.random.bool() {
            256 * KIB
        } else {
            24 * MIB
        };
        let bytes = STAMP * self.random.u64(1..most / STAMP);
        let home = self.random.usize(0..self.streams.len());
        let (taken, mapped) = (self.calls("create_page"), self.calls("map"));
        let block = match self.pool.allocate(bytes, &self.streams[home]) {
            Ok(block) => block,
            Err(Error::OutOfMemory(_)) => return self.free(),
            Err(error) => panic!("{error}"),
        };
        let took_none = self.calls("create_page") == taken;
        self.stitched += usize::from(took_none && self.calls("map") > mapped);
        self.last_stamp += 1;
        for start in windows(bytes) {
            let window = self.window(&block, start, home);
            launch::fill(&self.streams[home], &window, f64::from(self.last_stamp)).unwrap();
        }
        self.live.push(Stamped {
            block,
            stamp: self.last_stamp,
            home,
        });
    }

    /// Copies a stamp out of each window, in order with stream number `stream`.
    fn read(&mut self, index: usize, stream: usize) {
        let Stamped { block, stamp, .. } = &self.live[index];
        for start in windows(block.requested()) {
            let window = self.window(block, start, stream);
            let at = self.random.u64(0..window.len() as u64) * STAMP;
            let place = self.seen.offset(self.expected.len() as u64 * STAMP);
            let stream = &self.streams[stream];
            let from = window.ptr().offset(at);
            // SAFETY: the element lies in the block, the place in the pinned memory, which outlives the streams' work.
            unsafe { stream.driver().copy(place, from, STAMP, stream.raw()) }.unwrap();
            self.expected.push(*stamp);
        }
        assert!(
            self.expected.len() < READS - 64,
            "the pinned memory is full"
        );
    }

    /// A use on another stream, behind the home's work.
    fn lend(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let index = self.random.usize(0..self.live.len());
        let user = self.random.usize(0..self.streams.len());
        let home = self.live[index].home;
        self.streams[user].wait_for(&self.streams[home]).unwrap();
        self.read(index, user);
        self.live[index].block.record_stream(&self.streams[user]);
    }

    fn free(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let index = self.random.usize(0..self.live.len());
        self.read(index, self.live[index].home);
        self.live.swap_remove(index);
    }

    fn step(&mut self) {
        match self.random.u32(0..10) {
            0..5 => self.allocate(),
            5..9 => self.free(),
            _ => self.lend(),
        }
    }

    /// Waits for all work, and compares what it read. How many allocations were stitched together.
    fn end(mut self) -> usize {
        while !self.live.is_empty() {
            self.free();
        }
        for stream in &self.streams {
            stream.synchronize().unwrap();
        }
        let address = std::ptr::with_exposed_provenance::<u32>(to_usize(self.seen.0));
        // SAFETY: so many stamps were copied there, by work that was waited for.
        let seen = unsafe { std::slice::from_raw_parts(address, self.expected.len()) };
        let wrong = (0..seen.len()).find(|at| seen[*at] != self.expected[*at]);
        assert_eq!(wrong, None, "of {} stamps", seen.len());
        // SAFETY: no work is left.
        unsafe { self.streams[0].driver().free_pinned(self.seen) }.unwrap();
        self.stitched
    }
}

fn contents_stay(reuse: ReusePolicy) {
    let config = HostConfig {
        capacity: CAPACITY,
        ..HostConfig::default()
    };
    let device = support::device::device(config);
    let counter = Arc::new(FaultDriver::new(device.driver().clone()));
    let mut stitched = 0;
    for seed in support::seeds::seeds(8) {
        support::seeds::with_seed(seed, |seed| {
            let mut program = Program::new(&counter, reuse, seed);
            (0..OPERATIONS).for_each(|_| program.step());
            stitched += program.end();
        });
    }
    let maps_pages = device.properties().virtual_memory;
    assert!(stitched > 0 || !maps_pages, "no page was mapped again");
}

#[test]
fn of_pools_that_look_whether_memory_is_free() {
    contents_stay(ReusePolicy::OnlyComplete);
}

#[test]
fn of_pools_that_wait_on_the_device() {
    contents_stay(ReusePolicy::Wait);
}

#[test]
fn of_pools_whose_streams_share_nothing() {
    contents_stay(ReusePolicy::Never);
}
