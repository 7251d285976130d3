//! Scoped peaks against a model, and in the cases that other allocators' suites name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use std::thread;

use kitsune::memory::{PeakScope, ScopedStat};
use kitsune::{Block, Device, HostConfig, HostSchedule, Pool, PoolConfig, Stream};

fn pool() -> (Pool, Stream) {
    let host = HostConfig {
        capacity: 1 << 30,
        schedule: HostSchedule::Seeded(1),
        ..HostConfig::default()
    };
    let device = Device::host(host).unwrap();
    let stream = device.create_stream().unwrap();
    (Pool::new(&device, PoolConfig::default()).unwrap(), stream)
}

fn allocated(scope: &PeakScope) -> (i64, i64, u64) {
    let ScopedStat {
        current,
        peak,
        total,
    } = scope.stats().allocated_bytes;
    (current, peak, total)
}

#[test]
fn inner_peaks_count_in_outer_scopes() {
    let (pool, stream) = pool();
    let take = |bytes| pool.allocate(bytes, &stream).unwrap();
    let before = take(1024);
    let outer = pool.peak_scope();
    let kept = take(2048);
    let inner = pool.peak_scope();
    drop((take(4096), take(8192)));
    assert_eq!(allocated(&inner), (0, 4096 + 8192, 4096 + 8192));
    drop(take(512));
    assert_eq!(inner.stats().blocks.peak, 2);
    assert_eq!(inner.stats().blocks.total, 3);
    drop(inner);
    assert_eq!(allocated(&outer), (2048, 14_336, 14_848));
    let late = pool.peak_scope();
    assert_eq!(late.stats(), Default::default());
    drop(kept);
    assert_eq!(allocated(&outer), (0, 14_336, 14_848));
    drop((before, late, outer));
    assert_eq!(pool.stats().allocated_bytes.peak, 1024 + 14_336);
}

#[test]
fn freeing_outer_blocks_makes_an_inner_scope_negative() {
    let (pool, stream) = pool();
    let take = |bytes| pool.allocate(bytes, &stream).unwrap();
    let (first, second) = (take(4096), take(700));
    let scope = pool.peak_scope();
    let third = take(512);
    drop((first, second));
    let stats = scope.stats();
    assert_eq!(allocated(&scope), (512 - 4096 - 1024, 512, 512));
    assert_eq!(stats.requested_bytes.current, 512 - 4096 - 700);
    assert_eq!((stats.blocks.current, stats.blocks.peak), (-1, 1));
    // The peak is the highest since the start, not since the fall.
    let fourth = take(4096);
    assert_eq!(allocated(&scope), (-512 - 512 + 512, 512, 512 + 4096));
    drop((third, fourth));
}

#[test]
fn scopes_may_end_in_any_order_and_after_the_pool() {
    let (pool, stream) = pool();
    let take = |bytes| pool.allocate(bytes, &stream).unwrap();
    let scopes: Vec<PeakScope> = (0..4).map(|_| pool.peak_scope()).collect();
    let [first, second, third, fourth] = <[PeakScope; 4]>::try_from(scopes).unwrap();
    let block = take(1024);
    drop(first);
    drop(take(2048));
    drop(third);
    assert_eq!(allocated(&second), (1024, 3072, 3072));
    thread::spawn(move || drop(second)).join().unwrap();
    drop((block, stream.clone()));
    let device = pool.device().clone();
    drop(pool);
    assert_eq!(allocated(&fourth), (0, 3072, 3072));
    drop(fourth);
    // The scope was the last handle of the pool.
    let info = device.memory_info().unwrap();
    assert_eq!(info.free, info.total);
}

#[test]
fn the_peaks_of_the_pool_do_not_notice_scopes() {
    let (pool, stream) = pool();
    let take = |bytes| pool.allocate(bytes, &stream).unwrap();
    let peak = || pool.stats().allocated_bytes.peak;
    drop(take(8192));
    let scope = pool.peak_scope();
    assert_eq!(peak(), 8192);
    let kept = take(1024);
    assert_eq!(peak(), 8192);
    drop(take(16_384));
    assert_eq!(peak(), 17_408);
    pool.reset_peaks();
    assert_eq!((peak(), allocated(&scope).1), (1024, 17_408));
    drop(take(512));
    assert_eq!((peak(), allocated(&scope).1), (1536, 17_408));
    drop(scope);
    assert_eq!(peak(), 1536);
    drop(kept);
    pool.reset_peaks();
    assert_eq!(peak(), 0);
}

#[test]
fn a_scope_in_which_nothing_happens_is_all_zeros() {
    let (pool, stream) = pool();
    let block = pool.allocate(4096, &stream).unwrap();
    drop(pool.allocate(1 << 20, &stream).unwrap());
    let scope = pool.peak_scope();
    assert_eq!(scope.stats(), Default::default());
    drop(block);
    assert_eq!(allocated(&scope), (-4096, 0, 0));
}

/// What a quantity of the pool and its scopes should be.
#[derive(Clone, Copy, Default)]
struct Model {
    current: i64,
    peak: i64,
    total: u64,
}

impl Model {
    fn change(&mut self, amount: i64) {
        self.current += amount;
        self.peak = self.peak.max(self.current);
        self.total += amount.max(0).unsigned_abs();
    }
}

#[test]
fn one_thread_gets_exact_figures() {
    for seed in support::seeds::seeds(40) {
        support::seeds::with_seed(seed, |seed| {
            let (pool, first) = pool();
            let streams = [first, pool.device().create_stream().unwrap()];
            let mut random = fastrand::Rng::with_seed(seed);
            let mut blocks: Vec<Block> = Vec::new();
            let mut scopes: Vec<(PeakScope, [Model; 3])> = Vec::new();
            let mut overall = [Model::default(); 3];
            for _ in 0..1500 {
                let mut change = |sign: i64, block: &Block| {
                    let sizes = [1, block.requested(), block.allocated()];
                    let models = scopes.iter_mut().map(|(_, models)| models);
                    for models in models.chain([&mut overall]) {
                        for (model, size) in models.iter_mut().zip(sizes) {
                            model.change(sign * size.cast_signed());
                        }
                    }
                };
                match random.u32(0..100) {
                    0..40 => {
                        let bytes = match random.u32(0..6) {
                            0 => random.u64(1..3 << 20),
                            _ => random.u64(1..5000),
                        };
                        let stream = &streams[random.usize(0..2)];
                        let block = pool.allocate(bytes, stream).unwrap();
                        change(1, &block);
                        blocks.push(block);
                    }
                    40..78 if !blocks.is_empty() => {
                        let block = blocks.swap_remove(random.usize(0..blocks.len()));
                        change(-1, &block);
                    }
                    78..84 => {
                        let stream = &streams[random.usize(0..2)];
                        if let Some(block) = random.choice(blocks.iter_mut()) {
                            block.record_stream(stream);
                        }
                    }
                    84..90 => scopes.push((pool.peak_scope(), Default::default())),
                    90..95 if !scopes.is_empty() => {
                        drop(scopes.swap_remove(random.usize(0..scopes.len())));
                    }
                    95 => {
                        pool.reset_peaks();
                        overall
                            .iter_mut()
                            .for_each(|model| model.peak = model.current);
                    }
                    96 => pool.empty_cache().unwrap(),
                    _ => check(&pool, &scopes, &overall),
                }
            }
            check(&pool, &scopes, &overall);
            drop(scopes);
            check(&pool, &[], &overall);
        });
    }
}

fn check(pool: &Pool, scopes: &[(PeakScope, [Model; 3])], overall: &[Model; 3]) {
    for (scope, models) in scopes {
        let stats = scope.stats();
        let found = [stats.blocks, stats.requested_bytes, stats.allocated_bytes];
        for (found, model) in found.into_iter().zip(models) {
            assert_eq!(
                (found.current, found.peak, found.total),
                (model.current, model.peak, model.total)
            );
        }
    }
    let stats = pool.stats();
    let found = [
        stats.allocation,
        stats.requested_bytes,
        stats.allocated_bytes,
    ];
    for (found, model) in found.into_iter().zip(overall) {
        let current = model.current.cast_unsigned();
        assert_eq!((found.current, found.allocated), (current, model.total));
        assert_eq!(found.peak, model.peak.cast_unsigned());
    }
}

#[test]
fn threads_that_take_turns_get_exact_peaks() {
    let (pool, stream) = pool();
    let outer = pool.peak_scope();
    for kib in [8_u64, 32, 16] {
        thread::scope(|scope| {
            scope.spawn(|| {
                let blocks: Vec<Block> = (0..4)
                    .map(|_| pool.allocate(kib << 10, &stream).unwrap())
                    .collect();
                drop(blocks);
            });
        });
        let _ = outer.stats();
    }
    assert_eq!(allocated(&outer), (0, 128 << 10, (4 * 56) << 10));
}

#[test]
fn several_threads_get_exact_values_and_totals() {
    let (pool, stream) = pool();
    let outer = pool.peak_scope();
    let kept: Vec<Block> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let inner = pool.peak_scope();
                    for _ in 0..500 {
                        drop(pool.allocate(2048, &stream).unwrap());
                    }
                    assert!(inner.stats().allocated_bytes.total >= 500 * 2048);
                    pool.allocate(1024, &stream).unwrap()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let (current, peak, total) = allocated(&outer);
    assert_eq!((current, total), (4 * 1024, 4 * (500 * 2048 + 1024)));
    assert!(peak >= 4 * 1024, "{peak}");
    drop(kept);
    assert_eq!(allocated(&outer).0, 0);
    pool.check_invariants();
}
