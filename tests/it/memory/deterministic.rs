//! Deterministic pools: the same program gets the same addresses, however far the device is at each call.
//!
//! Where the driver puts a new range of addresses depends on what else the process maps. So the test that compares
//! addresses has a process of its own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use crate::support::process::{alone, test_name};

use kitsune::{
    Block, Device, Error, HostConfig, HostSchedule, Pool, PoolConfig, ReusePolicy, Stream,
};

const MIB: u64 = 1 << 20;
const CAPACITY: u64 = 64 * MIB;

fn device(schedule: HostSchedule) -> Device {
    Device::host(HostConfig {
        capacity: CAPACITY,
        schedule,
        ..HostConfig::default()
    })
    .unwrap()
}

/// A program with three streams at the brink of its memory.
struct Program {
    pool: Pool,
    streams: Vec<Stream>,
    blocks: Vec<Block>,
    random: fastrand::Rng,
    /// Where the first block lay, and what every block's address was, told so that it can be compared: by
    /// distance from the first where that is in the pool's range of pages, else by when it was seen first.
    base: Option<u64>,
    ranges: Vec<u64>,
    told: Vec<(bool, u64)>,
}

impl Program {
    fn tell(&mut self, address: u64) {
        let base = *self.base.get_or_insert(address);
        let distance = address.wrapping_sub(base);
        if distance < 4 * CAPACITY {
            return self.told.push((true, distance));
        }
        let known = self.ranges.iter().position(|range| *range == address);
        let number = known.unwrap_or_else(|| {
            self.ranges.push(address);
            self.ranges.len() - 1
        });
        self.told.push((false, number as u64));
    }

    fn allocate(&mut self) {
        let bytes = match self.random.u32(0..10) {
            0..4 => self.random.u64(1..64 << 10),
            4..8 => self.random.u64(1..5 * MIB),
            _ => self.random.u64(1..24 * MIB),
        };
        let stream = self.random.choice(&self.streams).unwrap().clone();
        match self.pool.allocate(bytes, &stream) {
            Ok(block) => {
                self.tell(block.ptr().0);
                self.blocks.push(block);
            }
            Err(Error::OutOfMemory(_)) => self.told.push((false, u64::MAX)),
            Err(error) => panic!("{error}"),
        }
    }

    fn step(&mut self) {
        match self.random.u32(0..100) {
            0..50 => self.allocate(),
            50..80 if !self.blocks.is_empty() => {
                let index = self.random.usize(0..self.blocks.len());
                drop(self.blocks.swap_remove(index));
            }
            80..90 => {
                let stream = self.random.choice(&self.streams).unwrap().clone();
                if let Some(block) = self.random.choice(self.blocks.iter_mut()) {
                    block.record_stream(&stream);
                }
            }
            90..94 => self.blocks.truncate(self.blocks.len() / 2),
            94..96 => {
                let stream = self.pool.device().create_stream().unwrap();
                let index = self.random.usize(0..self.streams.len());
                self.streams[index] = stream;
            }
            96..97 => self.pool.trim(self.random.u64(0..CAPACITY)).unwrap(),
            _ => self.streams[0].wait_for(&self.streams[1]).unwrap(),
        }
    }
}

/// What every block's address was, and the peak and driver calls that the program took.
type Run = (Vec<(bool, u64)>, u64, u64);

/// Plays the program number `seed`; `pace` changes nothing but how far the device is at each call.
fn run(
    seed: u64,
    reuse: ReusePolicy,
    deterministic: bool,
    contiguous: bool,
    pace: HostSchedule,
) -> Run {
    let device = device(pace);
    let config = PoolConfig {
        reuse,
        deterministic,
        contiguous,
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let streams = (0..3).map(|_| device.create_stream().unwrap()).collect();
    let mut program = Program {
        pool,
        streams,
        blocks: Vec::new(),
        random: fastrand::Rng::with_seed(seed),
        base: None,
        ranges: Vec::new(),
        told: Vec::new(),
    };
    for _ in 0..600 {
        program.step();
    }
    program.pool.check_invariants();
    let stats = program.pool.stats();
    let peak = stats.reserved_bytes.peak;
    (program.told, peak, stats.num_device_alloc)
}

/// Whether program `seed` runs alike on devices of every pace.
fn is_same_at_every_pace(seed: u64, reuse: ReusePolicy, deterministic: bool) -> bool {
    let first = run(seed, reuse, deterministic, false, HostSchedule::Seeded(0));
    let paces = [
        HostSchedule::Seeded(0),
        HostSchedule::Seeded(1),
        HostSchedule::Seeded(2),
        HostSchedule::Threads,
    ];
    paces
        .into_iter()
        .all(|pace| run(seed, reuse, deterministic, false, pace) == first)
}

#[test]
fn a_deterministic_pool_gives_the_same_addresses_and_peaks_at_every_pace() {
    alone(
        test_name!("a_deterministic_pool_gives_the_same_addresses_and_peaks_at_every_pace"),
        || {
            for reuse in [ReusePolicy::Wait, ReusePolicy::Never] {
                for seed in support::seeds::seeds(40) {
                    assert!(
                        is_same_at_every_pace(seed, reuse, true),
                        "{reuse}, seed {seed}"
                    );
                }
            }
        },
    );
}

#[test]
fn other_pools_do_not() {
    let differs = |seed| !is_same_at_every_pace(seed, ReusePolicy::OnlyComplete, false);
    assert!((0..40).any(differs));
}

#[test]
fn plain_allocations_are_as_many_at_every_pace() {
    // Where the driver puts them is its own affair.
    for seed in support::seeds::seeds(20) {
        let outcomes = [
            HostSchedule::Seeded(0),
            HostSchedule::Seeded(1),
            HostSchedule::Threads,
        ]
        .map(|pace| {
            let (_, peak, allocations) = run(seed, ReusePolicy::Wait, true, true, pace);
            (peak, allocations)
        });
        assert!(
            outcomes.iter().all(|outcome| *outcome == outcomes[0]),
            "seed {seed}: {outcomes:?}"
        );
    }
}
