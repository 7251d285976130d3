//! Private pools as a part of their pool: what is routed to them, how long they last, what they count to.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch graphs and kernels on plain addresses, and fail by panicking"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;

use crate::support::driver::{Gate, act, assert_capturing, fill, read, threads};
use kitsune::driver::fault::FaultDriver;
use kitsune::{
    Block, CapturedGraph, Device, Error, HostConfig, HostSchedule, Pool, PoolConfig, PrivatePool,
    Stream,
};

const PAGE: u64 = 2 << 20;

struct Setup {
    device: Device,
    pool: Pool,
    stream: Stream,
    side: Stream,
}

fn setup_on(device: Device, config: PoolConfig) -> Setup {
    Setup {
        pool: Pool::new(&device, config).unwrap(),
        stream: device.create_stream().unwrap(),
        side: device.create_stream().unwrap(),
        device,
    }
}

fn setup() -> Setup {
    setup_on(threads(), PoolConfig::default())
}

fn launch(graph: &CapturedGraph, stream: &Stream) {
    // SAFETY: in these tests graphs use private memory and blocks that live until the end, one at a time.
    unsafe { graph.launch(stream) }.unwrap();
}

/// Pages that ordinary and private memory grow by when a page is allocated and kept.
fn growth(pool: &Pool, stream: &Stream, kept: &mut Vec<Block>) -> (u64, u64) {
    let held = || {
        let stats = pool.stats();
        let private = stats.private_reserved_bytes / PAGE;
        (stats.reserved_bytes.current / PAGE - private, private)
    };
    let before = held();
    kept.push(pool.allocate(PAGE, stream).unwrap());
    let after = held();
    (after.0 - before.0, after.1 - before.1)
}

const ORDINARY: (u64, u64) = (1, 0);
const PRIVATE: (u64, u64) = (0, 1);

#[test]
fn a_capture_takes_what_is_allocated_for_its_streams_by_any_thread() {
    let Setup {
        device,
        pool,
        stream,
        side,
    } = setup();
    let private = pool.private().unwrap();
    let other = device.create_stream().unwrap();
    let mut kept = Vec::new();
    assert_eq!(growth(&pool, &stream, &mut kept), ORDINARY, "before");
    let graph = private.capture(&stream, || {
        assert_eq!(growth(&pool, &stream, &mut kept), PRIVATE, "the origin");
        assert_eq!(growth(&pool, &side, &mut kept), ORDINARY, "not joined yet");
        side.wait_for(&stream)?;
        assert_eq!(growth(&pool, &side, &mut kept), PRIVATE, "joined");
        thread::scope(|scope| {
            let elsewhere = scope.spawn(|| {
                let mut kept = Vec::new();
                let grown = [&stream, &side, &other].map(|s| growth(&pool, s, &mut kept));
                assert_eq!(grown, [PRIVATE, PRIVATE, ORDINARY]);
            });
            elsewhere.join().unwrap();
        });
        assert_eq!(
            growth(&pool, &other, &mut kept),
            (0, 0),
            "what the thread freed"
        );
        stream.wait_for(&side)
    });
    for stream in [&stream, &side] {
        assert_eq!(growth(&pool, stream, &mut kept), ORDINARY, "afterwards");
    }
    drop((graph, kept));
    pool.check_invariants();
}

#[test]
fn a_pass_takes_what_its_thread_allocates() {
    let Setup {
        pool, stream, side, ..
    } = setup();
    let private = pool.private().unwrap();
    let elsewhere = Pool::new(pool.device(), PoolConfig::default()).unwrap();
    let mut kept = Vec::new();
    private.prime(|| {
        assert_eq!(growth(&pool, &stream, &mut kept), PRIVATE);
        assert_eq!(growth(&pool, &side, &mut kept), PRIVATE);
        assert_eq!(
            growth(&elsewhere, &stream, &mut kept),
            ORDINARY,
            "another pool"
        );
        let other_thread = || growth(&pool, &stream, &mut Vec::new());
        let grown = thread::scope(|scope| scope.spawn(other_thread).join().unwrap());
        assert_eq!(grown, ORDINARY);
        // A capture within the pass goes before it, for its streams.
        let inner = pool.private().unwrap();
        let graph = inner.capture(&side, || {
            growth(&pool, &side, &mut kept);
            assert_eq!(inner.reserved_bytes(), PAGE);
            growth(&pool, &stream, &mut kept);
            assert_eq!(private.reserved_bytes(), 3 * PAGE);
            Ok(())
        });
        graph.unwrap();
    });
    let afterwards = growth(&pool, &side, &mut kept);
    assert_eq!(afterwards, (0, 0), "what the other thread freed");
    drop(kept);
    pool.check_invariants();
}

#[test]
fn passes_nest_and_end_with_a_panic() {
    let Setup { pool, stream, .. } = setup();
    let pools: Vec<PrivatePool> = (0..3).map(|_| pool.private().unwrap()).collect();
    let held = || [0, 1, 2].map(|at: usize| pools[at].reserved_bytes() / PAGE);
    let mut kept = Vec::new();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        pools[0].prime(|| {
            growth(&pool, &stream, &mut kept);
            pools[1].prime(|| {
                growth(&pool, &stream, &mut kept);
                pools[2].prime(|| growth(&pool, &stream, &mut kept));
                assert_eq!(held(), [1, 1, 1]);
                growth(&pool, &stream, &mut kept);
                assert_eq!(held(), [1, 2, 1]);
                panic!("in a pass");
            });
        });
    }));
    assert!(outcome.is_err());
    assert_eq!(growth(&pool, &stream, &mut kept), ORDINARY);
    assert_eq!(held(), [1, 2, 1]);
    drop(kept);
    pool.check_invariants();
}

#[test]
fn lanes_keep_ordinary_and_private_blocks_apart() {
    for bytes in [512, 300 << 10] {
        let Setup { pool, stream, .. } = setup();
        let private = pool.private().unwrap();
        let ptr = || pool.allocate(bytes, &stream).unwrap().ptr();
        let ordinary = ptr();
        assert_eq!(ptr(), ordinary, "from the lane");
        let primed = private.prime(ptr);
        assert_ne!(primed, ordinary);
        assert_eq!(ptr(), ordinary);
        let held = pool.allocate(bytes, &stream).unwrap();
        let graph = private.capture(&stream, || {
            // The thread keeps the block for the stream, but not for the graph.
            drop(held);
            assert_eq!([ptr(), ptr()], [primed; 2]);
            Ok(())
        });
        graph.unwrap();
        assert_eq!(ptr(), ordinary);
        pool.check_invariants();
    }
}

fn capture_page(private: &PrivatePool, pool: &Pool, stream: &Stream) -> CapturedGraph {
    let work = || {
        let block = pool.allocate(PAGE, stream)?;
        fill(stream, block.ptr(), 9, PAGE);
        Ok(())
    };
    private.capture(stream, work).unwrap()
}

#[test]
fn memory_lasts_as_long_as_the_handle_or_a_graph() {
    let held = |pool: &Pool| {
        pool.empty_cache().unwrap();
        pool.check_invariants();
        (
            pool.stats().private_reserved_bytes,
            pool.stats().reserved_bytes.current,
        )
    };
    for contiguous in [false, true] {
        for graph_first in [false, true] {
            let config = PoolConfig {
                contiguous,
                ..PoolConfig::default()
            };
            let Setup { pool, stream, .. } = setup_on(threads(), config);
            let private = pool.private().unwrap();
            let graph = capture_page(&private, &pool, &stream);
            let bytes = private.reserved_bytes();
            assert!(bytes >= PAGE);
            assert_eq!(held(&pool), (bytes, bytes));
            if graph_first {
                drop(graph);
                assert_eq!(held(&pool), (bytes, bytes), "the handle is left");
                drop(private);
            } else {
                drop(private);
                assert_eq!(held(&pool), (bytes, bytes), "the graph is left");
                launch(&graph, &stream);
                drop(graph);
            }
            assert_eq!(held(&pool), (0, 0));
            let (taken, freed) = (pool.stats().num_device_alloc, pool.stats().num_device_free);
            assert!(
                taken > 0 && taken == freed,
                "{taken} taken, {freed} returned"
            );
        }
    }
}

#[test]
fn a_launch_outlives_its_graph_and_keeps_the_memory() {
    let Setup {
        device,
        pool,
        stream,
        side,
    } = setup();
    let private = pool.private().unwrap();
    let graph = capture_page(&private, &pool, &stream);
    let gate = Gate::close(&side);
    launch(&graph, &side);
    drop((graph, private));
    let held = |pool: &Pool| {
        let stats = pool.stats();
        (stats.private_reserved_bytes, stats.reserved_bytes.current)
    };
    assert_eq!(held(&pool), (0, PAGE));
    let waiting = thread::spawn({
        let pool = pool.clone();
        move || pool.empty_cache()
    });
    // Other threads go on, and take nothing of it.
    let block = pool.allocate(PAGE, &stream).unwrap();
    assert_eq!(held(&pool), (0, 2 * PAGE));
    gate.open();
    waiting.join().unwrap().unwrap();
    assert_eq!(held(&pool), (0, PAGE));
    drop(block);
    side.synchronize().unwrap();
    pool.empty_cache().unwrap();
    assert_eq!(
        device.memory_info().unwrap().free,
        device.properties().total_memory
    );
}

#[test]
fn a_wait_that_began_before_a_launch_does_not_end_its_memory() {
    let faults = Arc::new(FaultDriver::new(threads().driver().clone()));
    let device = Device::from_driver(faults.clone());
    let Setup {
        pool, stream, side, ..
    } = setup_on(device.clone(), PoolConfig::default());
    let other = device.create_stream().unwrap();
    let private = pool.private().unwrap();
    let graph = capture_page(&private, &pool, &stream);
    drop(pool.allocate(PAGE, &other).unwrap());
    let gates = [&other, &side].map(Gate::close);
    faults.reset_calls();
    let waiting = thread::spawn({
        let pool = pool.clone();
        move || pool.empty_cache()
    });
    while faults.calls("synchronize_stream") == 0 {
        thread::yield_now();
    }
    // The wait is for the streams that were known when it began: this one it knows nothing of.
    launch(&graph, &side);
    drop((graph, private));
    let [first, second] = gates;
    first.open();
    waiting.join().unwrap().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, PAGE);
    second.open();
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}

#[test]
fn everything_may_go_in_any_order() {
    for order in 0..24_usize {
        let Setup {
            device,
            pool,
            stream,
            ..
        } = setup();
        let total = device.memory_info().unwrap().free;
        let private = pool.private().unwrap();
        let mut kept = None;
        let graph = private.capture(&stream, || {
            kept = Some(pool.allocate(PAGE, &stream)?);
            Ok(())
        });
        let block = kept.expect("the closure ran");
        let mut parts: Vec<Box<dyn std::any::Any>> =
            vec![Box::new(pool), Box::new(private), Box::new(graph.unwrap())];
        // The block is used once more when `order / 6` parts are gone.
        let mut rest = order % 6;
        let mut block = Some(block);
        for gone in 0..=3 {
            if gone == order / 6
                && let Some(block) = block.take()
            {
                fill(&stream, block.ptr(), 3, PAGE);
                assert_eq!(read(&stream, block.ptr(), 4), [3; 4], "order {order}");
            }
            if !parts.is_empty() {
                let next = rest % parts.len();
                rest /= parts.len();
                drop(parts.remove(next));
            }
        }
        assert_eq!(device.memory_info().unwrap().free, total, "order {order}");
    }
}

#[test]
fn private_memory_counts_to_the_limit_and_is_never_taken() {
    let limit = 4 * PAGE;
    let config = PoolConfig {
        limit: Some(limit),
        ..PoolConfig::default()
    };
    let Setup { pool, stream, .. } = setup_on(threads(), config);
    let private = pool.private().unwrap();
    let graph = private.capture(&stream, || pool.allocate(3 * PAGE, &stream).map(drop));
    let graph = graph.unwrap();
    let full = pool.allocate(2 * PAGE, &stream);
    let Err(Error::OutOfMemory(report)) = full else {
        panic!("the limit should refuse, not {full:?}")
    };
    assert!(report.limited);
    assert_eq!(report.reserved, 3 * PAGE, "what is private stays");
    assert_eq!(private.reserved_bytes(), 3 * PAGE);
    let page = pool.allocate(PAGE, &stream).unwrap();
    pool.check_invariants();
    drop((graph, page));
    drop(private);
    // Released memory is returned for whoever needs it.
    drop(pool.allocate(limit, &stream).unwrap());
    assert_eq!(pool.stats().private_reserved_bytes, 0);
    pool.check_invariants();
}

#[test]
fn a_pass_gets_what_the_pool_has_idle_and_a_capture_does_not() {
    let config = PoolConfig {
        limit: Some(4 * PAGE),
        ..PoolConfig::default()
    };
    let Setup { pool, stream, .. } = setup_on(threads(), config);
    let private = pool.private().unwrap();
    drop(pool.allocate(3 * PAGE, &stream).unwrap());
    let in_capture = private.capture(&stream, || pool.allocate(2 * PAGE, &stream).map(drop));
    assert!(
        matches!(in_capture, Err(Error::OutOfMemory(_))),
        "{in_capture:?}"
    );
    assert_eq!(pool.stats().num_sync_all_streams, 0);
    pool.check_invariants();
    let in_pass = private.prime(|| pool.allocate(2 * PAGE, &stream).map(drop));
    in_pass.unwrap();
    assert_eq!(private.reserved_bytes(), 2 * PAGE);
    let again = private.capture(&stream, || pool.allocate(2 * PAGE, &stream).map(drop));
    again.unwrap();
    pool.check_invariants();
}

#[test]
fn a_capture_that_fails_leaves_the_pool_sound() {
    let Setup {
        pool, stream, side, ..
    } = setup();
    let private = pool.private().unwrap();
    let mut kept = None;
    let failed = private.capture(&stream, || {
        kept = Some(pool.allocate(PAGE, &stream)?);
        drop(pool.allocate(512, &stream)?);
        Err(Error::Capturing { call: "mine" })
    });
    assert_capturing(failed, "mine");
    let invalidated = private.capture(&stream, || {
        drop(pool.allocate(512, &stream)?);
        drop(stream.synchronize());
        // The pool goes on, though nothing will come of it.
        drop(pool.allocate(PAGE, &stream)?);
        Ok(())
    });
    assert!(
        matches!(invalidated, Err(Error::Driver { .. })),
        "{invalidated:?}"
    );
    let unjoined = private.capture(&stream, || {
        side.wait_for(&stream)?;
        drop(pool.allocate(PAGE, &side)?);
        Ok(())
    });
    assert!(unjoined.is_err());
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        private.capture(&stream, || {
            let _block = pool.allocate(PAGE, &stream)?;
            panic!("in a capture")
        })
    }));
    assert!(panicked.is_err());
    let mut ordinary = Vec::new();
    for stream in [&stream, &side] {
        assert_eq!(growth(&pool, stream, &mut ordinary), ORDINARY);
    }
    let graph = capture_page(&private, &pool, &stream);
    launch(&graph, &stream);
    stream.synchronize().unwrap();
    drop((ordinary, kept, graph, private));
    pool.empty_cache().unwrap();
    pool.check_invariants();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}

#[test]
fn a_pool_follows_one_capture_at_a_time() {
    let Setup {
        device,
        pool,
        stream,
        side,
    } = setup();
    let private = pool.private().unwrap();
    let elsewhere = Pool::new(&device, PoolConfig::default()).unwrap();
    let outer = private.capture(&stream, || {
        let same = private.capture(&stream, || Ok(()));
        assert_capturing(same, "begin_capture");
        let inner = private.capture(&side, || Ok(()));
        assert!(
            matches!(inner, Err(Error::InvalidArgument { .. })),
            "{inner:?}"
        );
        let work = || elsewhere.allocate(PAGE, &side).map(drop);
        elsewhere.private()?.capture(&side, work).map(drop)
    });
    outer.unwrap();
    let foreign = threads().create_stream().unwrap();
    let refused = private.capture(&foreign, || Ok(()));
    assert!(matches!(
        refused,
        Err(Error::InvalidArgument { op: "capture", .. })
    ));
    let graph = private.capture(&stream, || Ok(())).unwrap();
    // SAFETY: refused.
    let refused = unsafe { graph.launch(&foreign) };
    assert!(matches!(
        refused,
        Err(Error::InvalidArgument { op: "launch", .. })
    ));
    pool.check_invariants();
}

#[test]
fn a_graph_may_go_in_a_kernel() {
    for schedule in [HostSchedule::Threads, HostSchedule::Seeded(4)] {
        let config = HostConfig {
            schedule,
            ..HostConfig::default()
        };
        let device = Device::host(config).unwrap();
        let Setup {
            pool, stream, side, ..
        } = setup_on(device, PoolConfig::default());
        for _ in 0..20 {
            let private = pool.private().unwrap();
            let graph = capture_page(&private, &pool, &stream);
            drop(private);
            let mut block = pool.allocate(PAGE, &stream).unwrap();
            // The kernel, and the graph with it, goes on the other stream, at any time from now on.
            act(&side, move || assert!(std::mem::size_of_val(&graph) > 0));
            block.record_use(&side);
            drop(block);
            drop(pool.allocate(5 * PAGE, &stream).unwrap());
        }
        side.synchronize().unwrap();
        pool.empty_cache().unwrap();
        pool.check_invariants();
        assert_eq!(pool.stats().reserved_bytes.current, 0);
    }
}

#[test]
fn the_last_block_of_a_pool_may_go_in_a_kernel() {
    for schedule in [HostSchedule::Threads, HostSchedule::Seeded(5)] {
        let config = HostConfig {
            schedule,
            ..HostConfig::default()
        };
        let device = Device::host(config).unwrap();
        let total = device.properties().total_memory;
        let Setup {
            pool, stream, side, ..
        } = setup_on(device.clone(), PoolConfig::default());
        let gate = matches!(schedule, HostSchedule::Threads).then(|| Gate::close(&stream));
        let mut block = pool.allocate(PAGE, &stream).unwrap();
        block.record_stream(&side);
        act(&stream, move || assert_eq!(block.allocated(), PAGE));
        // Behind the kernel, so that a wait from within it for its own stream would never end.
        act(&stream, || {});
        drop(pool);
        if let Some(gate) = gate {
            gate.open();
        }
        stream.synchronize().unwrap();
        // Another thread gives the memory back, when the streams allow it.
        while device.memory_info().unwrap().free < total {
            thread::yield_now();
        }
    }
}
