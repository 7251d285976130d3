//! A block allocated and freed at once, with thousands of free holes around and with none: the holes must
//! not be walked. The goal is at most 1.2 times the figure without holes.
//!
//! One size again and again is served by the thread's lane; three large sizes in turn are not, and show the search.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use kitsune::units::KIB;
use kitsune::{Block, Device, HostConfig, Pool, PoolConfig, Stream};

const HOLES: [u64; 2] = [0, 4096];

/// What is allocated: a name, and the sizes in turn.
const CASES: [(&str, [u64; 3]); 3] = [
    ("one_small", [4 * KIB; 3]),
    ("one_large", [512 * KIB; 3]),
    ("three_large", [512 * KIB, 640 * KIB, 768 * KIB]),
];

fn allocate(pool: &Pool, bytes: u64, stream: &Stream) -> Block {
    pool.allocate(bytes, stream).expect("there is room")
}

/// Live blocks with `holes` free ones between them, half small and half large, of many sizes.
fn fragment(pool: &Pool, holes: u64, stream: &Stream) -> Vec<Block> {
    let bytes = |n: u64| match n % 4 {
        0 | 1 => 512 * (1 + n % 61),
        _ => 264 * KIB + 512 * (n % 1021),
    };
    let blocks: Vec<_> = (0..2 * holes)
        .map(|n| allocate(pool, bytes(n), stream))
        .collect();
    let kept = blocks.into_iter().step_by(2).collect();
    // What the thread's lane holds is a hole only in the pool.
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
