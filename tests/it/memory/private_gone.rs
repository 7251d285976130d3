//! What private pools leave when they are gone: who gets it, when, and that it goes back to the driver.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch graphs and kernels on plain addresses, and fail by panicking"
)]

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::support::driver::{Gate, act, threads};
use kitsune::driver::fault::FaultDriver;
use kitsune::units::MIB;
use kitsune::{CapturedGraph, Device, HostConfig, Pool, PoolConfig, PoolStats, Stream};

const PAGE: u64 = 2 * MIB;

struct Setup {
    calls: Arc<FaultDriver>,
    device: Device,
    pool: Pool,
    stream: Stream,
    side: Stream,
}

fn setup(config: PoolConfig) -> Setup {
    let calls = Arc::new(FaultDriver::new(threads().driver().clone()));
    let device = Device::from_driver(calls.clone());
    Setup {
        pool: Pool::new(&device, config).unwrap(),
        stream: device.create_stream().unwrap(),
        side: device.create_stream().unwrap(),
        calls,
        device,
    }
}

/// Pages, and plain allocations.
fn configs() -> [PoolConfig; 2] {
    [false, true].map(|contiguous| PoolConfig {
        contiguous,
        ..PoolConfig::default()
    })
}

fn launch(graph: &CapturedGraph, stream: &Stream) {
    // SAFETY: in these tests graphs touch no memory.
    unsafe { graph.launch(stream) }.unwrap();
}

fn reserved(pool: &Pool) -> u64 {
    pool.stats().reserved_bytes.current
}

/// A graph with `bytes` of private memory, whose pool lives as long as it does.
fn graph_of(pool: &Pool, stream: &Stream, bytes: u64) -> CapturedGraph {
    let private = pool.private().unwrap();
    let work = || pool.allocate(bytes, stream).map(drop);
    private.prime(work).unwrap();
    private.capture(stream, work).unwrap()
}

#[test]
fn graphs_one_after_another_hold_no_more_than_the_largest() {
    for config in configs() {
        let Setup { pool, stream, .. } = setup(config);
        for mib in 30..50 {
            let graph = graph_of(&pool, &stream, mib * MIB);
            launch(&graph, &stream);
            stream.synchronize().unwrap();
        }
        let stats = pool.stats();
        assert_eq!(stats.private_reserved_bytes, 0, "all are gone");
        let held = (stats.reserved_bytes.current, stats.reserved_bytes.peak);
        assert_eq!(held, (50 * MIB, 50 * MIB));
        let block = pool.allocate(20 * MIB, &stream).unwrap();
        // A plain allocation that would stay mostly empty is exchanged for one that fits.
        let is_exchanged = pool.config().contiguous;
        let of_all = if is_exchanged { 20 } else { 50 };
        assert_eq!(reserved(&pool), of_all * MIB);
        pool.check_invariants();
        for _ in 0..2 {
            pool.decay_now();
        }
        // An eighth is held on to beside what lives.
        let kept = if is_exchanged { 20 } else { 22 };
        assert_eq!(reserved(&pool), kept * MIB);
        pool.empty_cache().unwrap();
        assert_eq!(reserved(&pool), 20 * MIB);
        pool.check_invariants();
        drop(block);
        pool.empty_cache().unwrap();
        let stats = pool.stats();
        assert_eq!(stats.reserved_bytes.current, 0);
        assert_eq!(stats.num_device_alloc, stats.num_device_free);
    }
}

#[test]
fn graphs_that_go_at_once_leave_their_memory_to_blocks_and_to_the_driver() {
    for config in configs() {
        let Setup { pool, stream, .. } = setup(config);
        let graphs: Vec<_> = (0..20)
            .map(|_| graph_of(&pool, &stream, 40 * MIB))
            .collect();
        for graph in &graphs {
            launch(graph, &stream);
        }
        stream.synchronize().unwrap();
        assert_eq!(pool.stats().private_reserved_bytes, 800 * MIB);
        drop(graphs);
        let taken = pool.stats().num_device_alloc;
        let blocks: Vec<_> = (0..10)
            .map(|_| pool.allocate(40 * MIB, &stream).unwrap())
            .collect();
        let stats = pool.stats();
        assert_eq!(stats.num_device_alloc, taken, "nothing new is taken");
        assert_eq!(stats.reserved_bytes.current, 800 * MIB);
        assert_eq!((stats.cache_hits, stats.num_alloc_retries), (30, 0));
        pool.decay_now();
        pool.decay_now();
        assert!(reserved(&pool) <= 450 * MIB, "an eighth beside what lives");
        pool.check_invariants();
        drop(blocks);
        pool.trim(100 * MIB).unwrap();
        assert!(reserved(&pool) <= 100 * MIB);
        pool.check_invariants();
    }
}

#[test]
fn decay_alone_returns_it_without_a_wait() {
    for config in configs() {
        let Setup {
            calls,
            pool,
            stream,
            ..
        } = setup(config);
        let graph = graph_of(&pool, &stream, 40 * MIB);
        launch(&graph, &stream);
        stream.synchronize().unwrap();
        drop(graph);
        calls.reset_calls();
        for _ in 0..3 {
            pool.decay_now();
        }
        assert_eq!(reserved(&pool), 0);
        let waits = ["synchronize_stream", "synchronize_event", "stream_wait"];
        assert_eq!(waits.map(|call| calls.calls(call)), [0; 3]);
    }
}

#[test]
fn a_launch_is_passed_first_and_other_streams_are_not_asked() {
    for config in configs() {
        let Setup {
            device,
            pool,
            stream,
            side,
            ..
        } = setup(config);
        let other = device.create_stream().unwrap();
        let of_other = pool.allocate(512, &other).unwrap();
        let graph = graph_of(&pool, &stream, 40 * MIB);
        let [held_up, busy] = [&side, &other].map(Gate::close);
        launch(&graph, &side);
        drop(graph);
        let before = reserved(&pool);
        let first = pool.allocate(40 * MIB, &stream).unwrap();
        assert_eq!(reserved(&pool), before + 40 * MIB, "the graph may run yet");
        held_up.open();
        side.synchronize().unwrap();
        let second = pool.allocate(40 * MIB, &stream).unwrap();
        assert_eq!(reserved(&pool), before + 40 * MIB, "it has run");
        let stats = pool.stats();
        assert_eq!(
            (stats.num_alloc_retries, stats.num_sync_all_streams),
            (0, 0)
        );
        busy.open();
        drop((first, second, of_other));
        pool.check_invariants();
    }
}

#[test]
fn what_a_stream_was_given_after_the_release_does_not_hold_it_back() {
    let Setup {
        pool, stream, side, ..
    } = setup(PoolConfig::default());
    let graph = graph_of(&pool, &stream, 40 * MIB);
    launch(&graph, &side);
    drop(graph);
    let (tell, passed) = channel();
    act(&side, move || tell.send(()).unwrap());
    let _busy = Gate::close(&side);
    passed.recv().unwrap();
    let block = pool.allocate(40 * MIB, &stream).unwrap();
    assert_eq!(reserved(&pool), 40 * MIB);
    drop(block);
}

#[test]
fn a_stream_that_nobody_holds_any_more_is_passed_first_too() {
    for config in configs() {
        let Setup {
            device,
            pool,
            stream,
            side,
            ..
        } = setup(config);
        let graph = graph_of(&pool, &stream, 40 * MIB);
        let gate = Gate::close(&side);
        launch(&graph, &side);
        drop(side);
        // A new stream makes the pool look at those that are gone.
        let new = device.create_stream().unwrap();
        let of_new = pool.allocate(512, &new).unwrap();
        pool.decay_now();
        drop(graph);
        let before = reserved(&pool);
        let block = pool.allocate(40 * MIB, &stream).unwrap();
        assert_eq!(reserved(&pool), before + 40 * MIB, "the graph may run yet");
        gate.open();
        drop((block, of_new));
        pool.empty_cache().unwrap();
        assert_eq!(reserved(&pool), 0);
        pool.check_invariants();
    }
}

#[test]
fn a_graph_keeps_all_of_it_when_the_handle_is_gone() {
    for config in configs() {
        let Setup { pool, stream, .. } = setup(config);
        let graph = graph_of(&pool, &stream, 40 * MIB);
        let block = pool.allocate(40 * MIB, &stream).unwrap();
        pool.empty_cache().unwrap();
        assert_eq!(reserved(&pool), 80 * MIB);
        assert_eq!(pool.stats().private_reserved_bytes, 40 * MIB);
        launch(&graph, &stream);
        stream.synchronize().unwrap();
        drop((graph, block));
        assert_eq!(pool.stats().private_reserved_bytes, 0);
        pool.check_invariants();
    }
}

#[test]
fn blocks_that_live_keep_their_own_pages_alone() {
    let Setup { pool, stream, .. } = setup(PoolConfig::default());
    let private = pool.private().unwrap();
    let mut kept = Vec::new();
    let graph = private.capture(&stream, || {
        for bytes in [10 * PAGE, PAGE, 10 * PAGE, 700] {
            kept.push(pool.allocate(bytes, &stream)?);
        }
        Ok(())
    });
    drop((kept.remove(2), kept.remove(0), graph.unwrap(), private));
    let held = reserved(&pool);
    assert_eq!((held, pool.stats().private_reserved_bytes), (22 * PAGE, 0));
    let block = pool.allocate(20 * PAGE, &stream).unwrap();
    assert_eq!(reserved(&pool), held);
    pool.check_invariants();
    // They come when the blocks are freed.
    kept.clear();
    let rest = pool.allocate(2 * PAGE, &stream).unwrap();
    assert_eq!(reserved(&pool), held);
    drop((block, rest));
    pool.empty_cache().unwrap();
    assert_eq!(reserved(&pool), 0);
    pool.check_invariants();
}

#[test]
fn a_limit_leaves_it_to_others_before_anything_is_retried() {
    for deterministic in [false, true] {
        for config in configs() {
            let Setup { pool, stream, .. } = setup(PoolConfig {
                limit: Some(64 * MIB),
                deterministic,
                ..config
            });
            let graph = graph_of(&pool, &stream, 48 * MIB);
            launch(&graph, &stream);
            stream.synchronize().unwrap();
            drop(graph);
            let block = pool.allocate(60 * MIB, &stream).unwrap();
            let PoolStats {
                num_alloc_retries,
                num_ooms,
                num_sync_all_streams,
                ..
            } = pool.stats();
            assert_eq!((num_alloc_retries, num_ooms), (0, 0));
            // A deterministic pool must not look whether the stream has passed.
            assert_eq!(num_sync_all_streams, u64::from(deterministic));
            pool.check_invariants();
            drop(block);
        }
    }
}

#[test]
fn a_deterministic_pool_waits_for_no_graph_while_there_is_memory() {
    for config in configs() {
        let Setup {
            pool, stream, side, ..
        } = setup(PoolConfig {
            deterministic: true,
            ..config
        });
        let graph = graph_of(&pool, &stream, 40 * MIB);
        let gate = Gate::close(&side);
        launch(&graph, &side);
        drop(graph);
        // It would wait for ever.
        let block = pool.allocate(40 * MIB, &stream).unwrap();
        assert_eq!(reserved(&pool), 80 * MIB);
        gate.open();
        // The pass of the next graph waits for all streams in any case.
        let next = graph_of(&pool, &stream, 40 * MIB);
        assert_eq!(reserved(&pool), 80 * MIB);
        drop((block, next));
        pool.empty_cache().unwrap();
        assert_eq!(reserved(&pool), 0);
    }
}

#[test]
fn a_capture_that_was_not_primed_takes_what_others_left() {
    for config in configs() {
        let Setup {
            calls,
            pool,
            stream,
            ..
        } = setup(config);
        drop(graph_of(&pool, &stream, 40 * MIB));
        let private = pool.private().unwrap();
        let graph = private.capture(&stream, || {
            calls.reset_calls();
            drop(pool.allocate(40 * MIB, &stream)?);
            assert_eq!(
                (calls.calls("create_page"), calls.calls("allocate")),
                (0, 0)
            );
            // No more is left, and none is given back meanwhile.
            let _more = pool.allocate(60 * MIB, &stream)?;
            let returns = ["free", "unmap", "destroy_page", "query_event"];
            assert_eq!(returns.map(|call| calls.calls(call)), [0; 4]);
            Ok(())
        });
        graph.unwrap();
        pool.check_invariants();
    }
}

#[test]
fn a_pass_takes_what_a_pool_within_it_left() {
    for config in configs() {
        let Setup {
            pool, stream, side, ..
        } = setup(config);
        let outer = pool.private().unwrap();
        outer.prime(|| {
            drop(graph_of(&pool, &side, 40 * MIB));
            side.synchronize().unwrap();
            drop(pool.allocate(40 * MIB, &stream).unwrap());
        });
        assert_eq!(outer.reserved_bytes(), 40 * MIB);
        assert_eq!(reserved(&pool), 40 * MIB);
        pool.check_invariants();
    }
}

#[test]
fn it_decays_by_the_clock_where_the_pool_does() {
    let capacity = 8 << 30;
    let device = Device::host(HostConfig {
        capacity,
        ..HostConfig::default()
    });
    let device = device.unwrap();
    let decay = Some(Duration::ZERO);
    let config = PoolConfig {
        decay,
        ..PoolConfig::default()
    };
    let pool = Pool::new(&device, config).unwrap();
    let stream = device.create_stream().unwrap();
    for _ in 0..20 {
        let graph = graph_of(&pool, &stream, 40 * MIB);
        launch(&graph, &stream);
        stream.synchronize().unwrap();
    }
    let mut block = None;
    for _ in 0..3 {
        block = Some(pool.allocate(20 * MIB, &stream).unwrap());
    }
    assert!(reserved(&pool) <= 46 * MIB, "{}", reserved(&pool));
    drop(block);
}
