//! Host threads that take turns: the pool serves them as if they were one, and its statistics are exact.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use kitsune::driver::DevicePtr;
use kitsune::memory::tag;
use kitsune::units::{KIB, MIB};
use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, PoolStats, Stream};

/// A program with the blocks that it holds and a naive count of them.
struct Program {
    pool: Pool,
    streams: [Stream; 2],
    random: fastrand::Rng,
    blocks: Vec<Block>,
    /// Every address that was handed out, numbered in the order in which they first were.
    numbers: HashMap<DevicePtr, usize>,
    /// The number of each block's address.
    places: Vec<usize>,
    requested: Peak,
    allocated: Peak,
    count: Peak,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Peak {
    now: u64,
    most: u64,
}

impl Peak {
    fn add(&mut self, by: u64) {
        self.now += by;
        self.most = self.most.max(self.now);
    }
}

impl Program {
    fn new(seed: u64) -> Self {
        let device = Device::host(HostConfig {
            capacity: 4 << 30,
            schedule: HostSchedule::Seeded(seed),
            ..HostConfig::default()
        });
        let device = device.unwrap();
        Self {
            pool: Pool::new(&device, PoolConfig::default()).unwrap(),
            streams: [(); 2].map(|()| device.create_stream().unwrap()),
            random: fastrand::Rng::with_seed(seed),
            blocks: Vec::new(),
            numbers: HashMap::new(),
            places: Vec::new(),
            requested: Peak::default(),
            allocated: Peak::default(),
            count: Peak::default(),
        }
    }

    /// Allocates or frees a block.
    fn event(&mut self) {
        let _tag = (self.random.u32(..50) == 0).then(|| tag("turns"));
        if self.blocks.len() == 300 || (!self.blocks.is_empty() && self.random.bool()) {
            let block = self
                .blocks
                .swap_remove(self.random.usize(..self.blocks.len()));
            self.requested.now -= block.requested();
            self.allocated.now -= block.allocated();
            self.count.now -= 1;
            return;
        }
        let bytes = match self.random.u32(..4) {
            0 => self.random.u64(1..512 * KIB),
            1 => 3 * MIB,
            2 => 4096,
            _ => self.random.u64(1..8 * MIB),
        };
        let stream = usize::from(self.random.u32(..8) == 0);
        let block = self.pool.allocate(bytes, &self.streams[stream]).unwrap();
        self.requested.add(bytes);
        self.allocated.add(block.allocated());
        self.count.add(1);
        let next = self.numbers.len();
        self.places
            .push(*self.numbers.entry(block.ptr()).or_insert(next));
        self.blocks.push(block);
    }

    fn assert_exact(&self, stats: &PoolStats) {
        let count = |now, most| Peak { now, most };
        for (stat, naive) in [
            (stats.requested_bytes, self.requested),
            (stats.allocated_bytes, self.allocated),
            (stats.active_bytes, self.allocated),
            (stats.allocation, self.count),
            (stats.active, self.count),
        ] {
            assert_eq!(count(stat.current, stat.peak), naive);
        }
    }
}

/// Plays `events` events, `turn` of them by each of `threads` threads in turn. The last thread gives the program back.
fn play(program: Program, threads: usize, turn: usize, events: usize) -> Program {
    /// `None` at the end.
    type Baton = Option<(Program, usize)>;
    let (done, result) = channel();
    let (senders, receivers): (Vec<Sender<Baton>>, Vec<Receiver<Baton>>) =
        (0..threads).map(|_| channel()).unzip();
    senders[0].send(Some((program, events))).unwrap();
    thread::scope(|scope| {
        for (number, baton) in receivers.into_iter().enumerate() {
            let (next, done) = (senders[(number + 1) % threads].clone(), done.clone());
            scope.spawn(move || {
                while let Some((mut program, left)) = baton.recv().unwrap() {
                    let turn = turn.min(left);
                    (0..turn).for_each(|_| program.event());
                    if left == turn {
                        done.send(program).unwrap();
                        break;
                    }
                    next.send(Some((program, left - turn))).unwrap();
                }
                // The first one to end has ended before.
                let _ = next.send(None);
            });
        }
        result.recv().unwrap()
    })
}

#[test]
fn statistics_are_exact_however_often_threads_take_turns() {
    for (turn, threads) in [(5, 2), (7, 3), (10, 2), (100, 2), (1000, 4), (10_000, 2)] {
        let program = play(Program::new(turn as u64), threads, turn, 20_000);
        program.assert_exact(&program.pool.stats());
        program.pool.check_invariants();
        assert!(program.requested.most > 100 * MIB, "{turn}");
    }
}

#[test]
fn statistics_are_exact_while_threads_read_them_in_their_turn() {
    let mut program = Program::new(5);
    for round in 1..40 {
        program = play(program, 2, 5 + round % 13, 100);
        program.assert_exact(&program.pool.stats());
    }
}

#[test]
fn threads_that_take_turns_get_the_blocks_that_one_thread_gets() {
    let alone = play(Program::new(3), 1, 20_000, 20_000);
    for (turn, threads) in [(5, 2), (13, 3), (500, 2)] {
        let program = play(Program::new(3), threads, turn, 20_000);
        assert!(program.places == alone.places, "every {turn} events");
        let reserved = |program: &Program| program.pool.stats().reserved_bytes;
        assert_eq!(reserved(&program), reserved(&alone));
    }
}

/// Also if it is more than half of the device.
#[test]
fn what_a_thread_freed_is_found_by_the_next_one() {
    for bytes in [512, 256 * KIB, 3 * MIB, 3 << 30] {
        let program = Program::new(1);
        let (pool, stream) = (&program.pool, &program.streams[0]);
        let mut block = pool.allocate(bytes, stream).unwrap();
        let ptr = block.ptr();
        let (to_other, from_main) = channel::<Block>();
        let (to_main, from_other) = channel::<Block>();
        thread::scope(|scope| {
            scope.spawn(move || {
                for block in from_main {
                    drop(block);
                    to_main.send(pool.allocate(bytes, stream).unwrap()).unwrap();
                }
            });
            for _ in 0..3 {
                drop(block);
                let next = pool.allocate(bytes, stream).unwrap();
                assert_eq!(next.ptr(), ptr, "{bytes} bytes");
                to_other.send(next).unwrap();
                block = from_other.recv().unwrap();
                assert_eq!(block.ptr(), ptr, "{bytes} bytes");
            }
            drop((to_other, block));
        });
        assert_eq!(pool.stats().allocation.peak, 1);
    }
}

/// Threads that overlapped work with caches of their own; reading the statistics makes those one again.
#[test]
fn statistics_are_exact_after_calls_that_overlapped() {
    for seed in 0..5 {
        let mut program = Program::new(seed);
        thread::scope(|scope| {
            for thread in 0..3_u64 {
                let (pool, stream) = (program.pool.clone(), program.streams[0].clone());
                scope.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(thread);
                    let mut blocks = Vec::new();
                    for _ in 0..20_000 {
                        let bytes = random.u64(1..2 * MIB);
                        blocks.push(pool.allocate(bytes, &stream).unwrap());
                        if blocks.len() > 20 {
                            blocks.swap_remove(random.usize(..blocks.len()));
                        }
                    }
                });
            }
        });
        let stats = program.pool.stats();
        assert_eq!(stats.allocation.current, 0);
        assert_eq!(stats.requested_bytes.current, 0);
        program.pool.reset_peaks();
        program = play(program, 2, 11, 5000);
        program.assert_exact(&program.pool.stats());
        program.pool.check_invariants();
    }
}
