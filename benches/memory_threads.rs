//! Compares two threads, each on its own stream, with one; and times blocks handed from a thread that allocates them to
//! one that uses and frees them. The goal for two threads is at most 1.15 times the time of one, which requires two
//! free cores.
//!
//! A figure is the wall time for one allocation and free of each thread.

use std::sync::Barrier;
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use kitsune::units::{KIB, MIB};
use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, Stream};

const THREADS: [usize; 2] = [1, 2];
const STREAMS: usize = 2;

/// The sizes that each thread allocates and frees, in turn. The thread's lane serves a single size; the pool, under its
/// lock, serves several large ones.
const CASES: [(&str, &[u64]); 3] = [
    ("64KiB", &[64 * KIB]),
    ("8MiB", &[8 * MIB]),
    ("large_sizes", &[3 * MIB, 5 * MIB, 4 * MIB, 7 * MIB]),
];

/// Blocks in transit from the producer to the consumer.
const IN_FLIGHT: usize = 64;

fn pool() -> (Pool, Vec<Stream>) {
    // Without device threads, which would occupy cores.
    let config = HostConfig {
        schedule: HostSchedule::Seeded(0),
        ..HostConfig::default()
    };
    let device = Device::host(config).expect("the host has memory");
    let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
    let streams = (0..STREAMS).map(|_| device.create_stream().expect("the host has streams"));
    (pool, streams.collect())
}

fn allocate(pool: &Pool, bytes: u64, stream: &Stream) -> Block {
    pool.allocate(bytes, stream).expect("there is room")
}

/// Wall time from a common start until the last thread is done. Each thread does `work` on its own stream.
fn wall(streams: &[Stream], work: impl Fn(&Stream) + Sync) -> Duration {
    let barrier = Barrier::new(streams.len());
    let timed = |stream| {
        barrier.wait();
        let start = Instant::now();
        work(stream);
        (start, Instant::now())
    };
    let spans: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = streams
            .iter()
            .map(|stream| scope.spawn(|| timed(stream)))
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|span| span.expect("no thread panics")).collect()
    });
    let start = spans.iter().map(|(start, _)| *start).min();
    let end = spans.iter().map(|(_, end)| *end).max();
    end.zip(start)
        .map_or(Duration::ZERO, |(end, start)| end - start)
}

fn threads(criterion: &mut Criterion) {
    for (name, sizes) in CASES {
        for threads in THREADS {
            let (pool, streams) = pool();
            let id = format!("pool/threads/{name}/{threads}");
            criterion.bench_function(&id, |bencher| {
                bencher.iter_custom(|pairs| {
                    wall(&streams[..threads], |stream| {
                        let turns = sizes.iter().cycle();
                        for (bytes, _) in turns.zip(0..pairs) {
                            drop(allocate(&pool, *bytes, stream));
                        }
                    })
                });
            });
        }
    }
}

/// Allocates blocks of `sizes` in turn on `home`; a second thread records each on `other` and drops it.
fn hand_over(pool: &Pool, home: &Stream, other: &Stream, sizes: &[u64], blocks: u64) -> Duration {
    let (sender, receiver) = sync_channel::<Block>(IN_FLIGHT);
    let start = Instant::now();
    thread::scope(|scope| {
        scope.spawn(move || {
            for mut block in receiver {
                block.record_stream(other);
            }
        });
        let turns = sizes.iter().cycle();
        for (bytes, _) in turns.zip(0..blocks) {
            let sent = sender.send(allocate(pool, *bytes, home));
            sent.expect("the consumer receives until the producer is done");
        }
        drop(sender);
    });
    start.elapsed()
}

fn producer_consumer(criterion: &mut Criterion) {
    for (name, sizes) in CASES {
        let (pool, streams) = pool();
        let id = format!("pool/producer_consumer/{name}");
        criterion.bench_function(&id, |bencher| {
            bencher.iter_custom(|blocks| hand_over(&pool, &streams[0], &streams[1], sizes, blocks));
        });
    }
}

criterion_group!(benches, threads, producer_consumer);
criterion_main!(benches);
