//! Times an allocation that is freed at once, with thousands of free holes and with none, to show that the pool does
//! not walk the holes. The goal is at most 1.2 times the time without holes.
//!
//! The thread's lane serves a single repeated size. Three alternating large sizes miss it, and show the search.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use kitsune::units::KIB;
use kitsune::{Block, Device, HostConfig, Pool, PoolConfig, Stream};

const HOLES: [u64; 2] = [0, 4096];

/// The cases: a name, and the sizes to allocate in turn.
const CASES: [(&str, [u64; 3]); 3] = [
    ("one_small", [4 * KIB; 3]),
    ("one_large", [512 * KIB; 3]),
    ("three_large", [512 * KIB, 640 * KIB, 768 * KIB]),
];

fn allocate(pool: &Pool, bytes: u64, stream: &Stream) -> Block {
    pool.allocate(bytes, stream).expect("there is room")
}

/// Live blocks with `holes` free blocks between them, half of them small and half large, of many sizes.
fn fragment(pool: &Pool, holes: u64, stream: &Stream) -> Vec<Block> {
    let bytes = |n: u64| match n % 4 {
        0 | 1 => 512 * (1 + n % 61),
        _ => 264 * KIB + 512 * (n % 1021),
    };
    let blocks: Vec<_> = (0..2 * holes)
        .map(|n| allocate(pool, bytes(n), stream))
        .collect();
    let kept = blocks.into_iter().step_by(2).collect();
    // The check empties the thread's lane, so that the free blocks become holes of the pool.
    pool.check_invariants();
    kept
}

fn pair(criterion: &mut Criterion) {
    for holes in HOLES {
        let device = Device::host(HostConfig::default()).expect("the host has memory");
        let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
        let stream = device.create_stream().expect("the host has streams");
        let kept = fragment(&pool, holes, &stream);
        for (name, sizes) in CASES {
            let mut turn = 0;
            criterion.bench_function(
                &format!("pool/alloc_free/{name}/{holes}_holes"),
                |bencher| {
                    bencher.iter(|| {
                        turn = (turn + 1) % sizes.len();
                        allocate(&pool, black_box(sizes[turn]), &stream)
                    });
                },
            );
        }
        drop(kept);
    }
}

criterion_group!(benches, pair);
criterion_main!(benches);
