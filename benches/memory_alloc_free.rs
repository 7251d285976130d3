//! Times an allocation that is freed at once: the fastest path of a pool, compared with the system's allocator and with
//! the driver without a pool. On the host driver this is bookkeeping only: no byte is touched.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use kitsune::units::to_usize;
use kitsune::{Device, HostConfig, Pool, PoolConfig, Stream};

const SIZES: [(&str, u64); 3] = [("512B", 512), ("64KiB", 64 << 10), ("4MiB", 4 << 20)];
/// Live blocks between the holes, so that the free memory has as many holes.
const HOLES: [usize; 2] = [256, 4096];

fn pool() -> (Pool, Stream) {
    let device = Device::host(HostConfig::default()).expect("the host has memory");
    let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
    let stream = device.create_stream().expect("the host has streams");
    (pool, stream)
}

fn pair(criterion: &mut Criterion) {
    for (name, bytes) in SIZES {
        let (pool, stream) = pool();
        criterion.bench_function(&format!("pool/alloc_free/{name}"), |bencher| {
            bencher.iter(|| {
                pool.allocate(black_box(bytes), &stream)
                    .expect("there is room")
            });
        });
        criterion.bench_function(&format!("system/alloc_free/{name}"), |bencher| {
            bencher.iter(|| black_box(Vec::<u8>::with_capacity(to_usize(black_box(bytes)))));
        });
        let driver = stream.driver();
        criterion.bench_function(&format!("driver/alloc_free/{name}"), |bencher| {
            bencher.iter(|| {
                let ptr = driver.allocate(black_box(bytes)).expect("there is room");
                #[expect(unsafe_code, reason = "freeing memory through the driver is unsafe")]
                // SAFETY: the memory was just allocated, and no work was enqueued on it.
                unsafe { driver.free(ptr) }.expect("the driver takes back what it gave");
            });
        });
    }
}

/// Every other of many blocks is free. The size requested differs each time, so caches by size do not help.
fn pair_among_holes(criterion: &mut Criterion) {
    for holes in HOLES {
        let (pool, stream) = pool();
        let allocate = |bytes| pool.allocate(bytes, &stream).expect("there is room");
        let blocks: Vec<_> = (0..2 * holes as u64)
            .map(|n| allocate(512 * (1 + n % 61)))
            .collect();
        let kept: Vec<_> = blocks.into_iter().step_by(2).collect();
        let mut turn = 0;
        criterion.bench_function(&format!("pool/alloc_free/{holes}_holes"), |bencher| {
            bencher.iter(|| {
                turn = (turn + 17) % 61;
                allocate(black_box(512 * (1 + turn)))
            });
        });
        drop(kept);
    }
}

criterion_group!(benches, pair, pair_among_holes);
criterion_main!(benches);
