//! Captures with memory of a private pool: what a graph computes, what it reuses, what it asks of the driver.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch graphs and kernels on plain addresses, and fail by panicking"
)]

use crate::support;
use std::sync::Arc;

use crate::support::driver::{act, copy, devices, fill, read, seeded, threads, write};
use kitsune::driver::DevicePtr;
use kitsune::driver::fault::FaultDriver;
use kitsune::{Block, CapturedGraph, Device, Pool, PoolConfig, PrivatePool, Result, Stream};

const BYTES: u64 = 4096;
const LEN: usize = 4096;
const PAGE: u64 = 2 << 20;

fn pool(device: &Device, contiguous: bool) -> Pool {
    let config = PoolConfig {
        contiguous,
        poison: true,
        ..PoolConfig::default()
    };
    Pool::new(device, config).unwrap()
}

fn launch(graph: &CapturedGraph, stream: &Stream) {
    // SAFETY: in these tests graphs use private memory and blocks that live until the end, one at a time.
    unsafe { graph.launch(stream) }.unwrap();
}

/// Enqueues `dst = src + value` over `LEN` bytes.
fn add(stream: &Stream, dst: DevicePtr, src: DevicePtr, value: u8) {
    act(stream, move || {
        let address = |ptr: DevicePtr| usize::try_from(ptr.0).unwrap();
        let src = std::ptr::with_exposed_provenance::<u8>(address(src));
        let dst = std::ptr::with_exposed_provenance_mut::<u8>(address(dst));
        // SAFETY: the tests pass blocks of at least `LEN` bytes that live when this runs.
        let src = unsafe { std::slice::from_raw_parts(src, LEN) };
        // SAFETY: as above, and the two blocks are not the same.
        let dst = unsafe { std::slice::from_raw_parts_mut(dst, LEN) };
        for (sum, byte) in dst.iter_mut().zip(src) {
            *sum = byte.wrapping_add(value);
        }
    });
}

/// `output = input + 6`, through three temporaries of `bytes`, of which the third can have the first's place.
fn step(pool: &Pool, stream: &Stream, bytes: u64, input: &Block, output: &Block) -> Result<()> {
    let first = pool.allocate(bytes, stream)?;
    add(stream, first.ptr(), input.ptr(), 1);
    let second = pool.allocate(bytes, stream)?;
    add(stream, second.ptr(), first.ptr(), 2);
    drop(first);
    let third = pool.allocate(bytes, stream)?;
    add(stream, third.ptr(), second.ptr(), 3);
    drop(second);
    copy(stream, output.ptr(), third.ptr(), BYTES);
    Ok(())
}

/// Whether the first `LEN` bytes of a block are all `value`.
fn shows(stream: &Stream, block: &Block, value: u8) -> bool {
    read(stream, block.ptr(), LEN)
        .iter()
        .all(|byte| *byte == value)
}

fn input_and_output(pool: &Pool, stream: &Stream) -> (Block, Block) {
    let blocks = [(); 2].map(|()| pool.allocate(BYTES, stream).unwrap());
    let [input, output] = blocks;
    (input, output)
}

/// Replays with several inputs, and uses ordinary memory in between.
fn check_replays(graph: &CapturedGraph, pool: &Pool, stream: &Stream, blocks: &(Block, Block)) {
    let (input, output) = blocks;
    for value in [0, 7, 100] {
        write(stream, input.ptr(), &[value; LEN]);
        let noise: Vec<Block> = (0..20)
            .map(|n| pool.allocate(BYTES << (n % 10), stream).unwrap())
            .collect();
        for block in &noise {
            fill(stream, block.ptr(), 0xee, block.allocated());
        }
        launch(graph, stream);
        for block in &noise {
            assert!(shows(stream, block, 0xee), "ordinary memory");
        }
        assert!(shows(stream, output, value + 6), "a replay of {value}");
    }
}

#[test]
fn replays_compute_what_running_at_once_computes() {
    for device in devices() {
        for (contiguous, bytes) in [(false, BYTES), (false, 3 << 20), (true, BYTES)] {
            let stream = device.create_stream().unwrap();
            let pool = pool(&device, contiguous);
            let blocks = input_and_output(&pool, &stream);
            let (input, output) = &blocks;
            write(&stream, input.ptr(), &[1; LEN]);
            step(&pool, &stream, bytes, input, output).unwrap();
            assert!(shows(&stream, output, 7));

            let private = pool.private().unwrap();
            let unprimed = private.capture(&stream, || step(&pool, &stream, bytes, input, output));
            check_replays(&unprimed.unwrap(), &pool, &stream, &blocks);

            let private = pool.private().unwrap();
            write(&stream, input.ptr(), &[2; LEN]);
            private
                .prime(|| step(&pool, &stream, bytes, input, output))
                .unwrap();
            assert!(shows(&stream, output, 8), "a pass runs");
            let primed = private.capture(&stream, || step(&pool, &stream, bytes, input, output));
            check_replays(&primed.unwrap(), &pool, &stream, &blocks);
            pool.check_invariants();
        }
    }
}

/// Allocates and frees as `seed` says; what it holds in the end goes.
fn churn(pool: &Pool, stream: &Stream, seed: u64) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut blocks = Vec::new();
    for _ in 0..150 {
        if blocks.is_empty() || random.u32(0..100) < 55 {
            let most = if random.bool() { 64 << 10 } else { 6 << 20 };
            blocks.push(pool.allocate(random.u64(1..most), stream)?);
        } else {
            drop(blocks.swap_remove(random.usize(0..blocks.len())));
        }
    }
    Ok(())
}

/// Calls that must not be made in a capture, or that a primed capture has no need for.
const CALLS: [&str; 14] = [
    "allocate",
    "free",
    "reserve",
    "release",
    "create_page",
    "destroy_page",
    "map",
    "unmap",
    "create_event",
    "record",
    "query_event",
    "synchronize_event",
    "synchronize_stream",
    "stream_wait",
];

#[test]
fn a_primed_capture_asks_the_driver_for_nothing() {
    for contiguous in [false, true] {
        for seed in support::seeds::seeds(30) {
            let faults = Arc::new(FaultDriver::new(threads().driver().clone()));
            let device = Device::from_driver(faults.clone());
            let config = PoolConfig {
                contiguous,
                ..PoolConfig::default()
            };
            let pool = Pool::new(&device, config).unwrap();
            let stream = device.create_stream().unwrap();
            let private = pool.private().unwrap();
            let mut taken = u64::MAX;
            let mut passes = 0;
            while pool.stats().num_device_alloc != taken {
                taken = pool.stats().num_device_alloc;
                private.prime(|| churn(&pool, &stream, seed)).unwrap();
                passes += 1;
                assert!(passes < 6, "seed {seed}: passes go on taking memory");
            }
            let graph = private.capture(&stream, || {
                faults.reset_calls();
                churn(&pool, &stream, seed)?;
                assert_eq!(faults.total_calls(), 0, "seed {seed}");
                Ok(())
            });
            graph.unwrap();
            pool.check_invariants();
            assert_eq!(
                pool.stats().private_reserved_bytes,
                private.reserved_bytes()
            );
        }
    }
}

#[test]
fn an_unprimed_capture_takes_memory_and_does_nothing_else() {
    let faults = Arc::new(FaultDriver::new(threads().driver().clone()));
    let device = Device::from_driver(faults.clone());
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let [stream, side] = [(); 2].map(|()| device.create_stream().unwrap());
    let private = pool.private().unwrap();
    let other = device.create_stream().unwrap();
    let early = private.prime(|| pool.allocate(4 * PAGE, &other)).unwrap();
    let graph = private.capture(&stream, || {
        side.wait_for(&stream)?;
        faults.reset_calls();
        // Whether a stream outside is done with its block cannot be asked here.
        drop(early);
        churn(&pool, &stream, 3)?;
        churn(&pool, &side, 4)?;
        let mut block = pool.allocate(PAGE, &stream)?;
        block.record_stream(&side);
        drop(block);
        churn(&pool, &stream, 5)?;
        let needless = CALLS
            .iter()
            .filter(|call| !["create_page", "map"].contains(call));
        for call in needless {
            assert_eq!(faults.calls(call), 0, "{call}");
        }
        assert!(faults.calls("create_page") > 0);
        stream.wait_for(&side)
    });
    graph.unwrap();
    pool.check_invariants();
    // The recorded block is there again for the next capture.
    assert_eq!(pool.stats().allocated_bytes.current, 0);
    private.prime(|| {});
    assert_eq!(pool.stats().active_bytes.current, 0);
}

#[test]
fn freed_memory_is_reused_by_its_stream_at_once_and_by_others_in_the_next_capture() {
    let device = threads();
    let pool = pool(&device, false);
    let [stream, side] = [(); 2].map(|()| device.create_stream().unwrap());
    let private = pool.private().unwrap();
    let mut ptrs = Vec::new();
    let graph = private.capture(&stream, || {
        side.wait_for(&stream)?;
        let first = pool.allocate(PAGE, &stream)?.ptr();
        assert_eq!(pool.allocate(PAGE, &stream)?.ptr(), first);
        // Nothing orders the side stream behind the free, before the join or as far as the pool knows.
        assert_ne!(pool.allocate(PAGE, &side)?.ptr(), first);
        stream.wait_for(&side)?;
        side.wait_for(&stream)?;
        assert_ne!(pool.allocate(PAGE, &side)?.ptr(), first);
        ptrs.push(first);
        stream.wait_for(&side)
    });
    let graph = graph.unwrap();
    assert_eq!(private.reserved_bytes(), 2 * PAGE);
    let next = private.capture(&stream, || {
        side.wait_for(&stream)?;
        let both = [pool.allocate(PAGE, &side)?, pool.allocate(PAGE, &side)?];
        assert!(both.iter().any(|block| block.ptr() == ptrs[0]));
        stream.wait_for(&side)
    });
    next.unwrap();
    assert_eq!(private.reserved_bytes(), 2 * PAGE, "nothing new was needed");
    launch(&graph, &stream);
    stream.synchronize().unwrap();
    pool.check_invariants();
}

#[test]
fn a_block_recorded_on_another_stream_is_not_reused_in_its_capture() {
    for device in [threads(), seeded(3)] {
        let pool = pool(&device, false);
        let [stream, side] = [(); 2].map(|()| device.create_stream().unwrap());
        let private = pool.private().unwrap();
        let forked = private.capture(&stream, || {
            let mut block = pool.allocate(PAGE, &stream)?;
            let ptr = block.ptr();
            side.wait_for(&stream)?;
            fill(&side, ptr, 1, BYTES);
            block.record_use(&side);
            drop(block);
            assert_ne!(pool.allocate(PAGE, &stream)?.ptr(), ptr, "before the join");
            stream.wait_for(&side)?;
            assert_ne!(pool.allocate(PAGE, &stream)?.ptr(), ptr, "after it");
            Ok(())
        });
        forked.unwrap();
        pool.check_invariants();
        assert_eq!(private.reserved_bytes(), 2 * PAGE);
        private
            .capture(&stream, || {
                let both = [pool.allocate(PAGE, &stream)?, pool.allocate(PAGE, &stream)?];
                drop(both);
                Ok(())
            })
            .unwrap();
        assert_eq!(private.reserved_bytes(), 2 * PAGE, "it is free again");
    }
}

#[test]
fn graphs_that_take_turns_share_memory() {
    for device in devices() {
        let pool = pool(&device, false);
        let stream = device.create_stream().unwrap();
        let one = input_and_output(&pool, &stream);
        let two = input_and_output(&pool, &stream);
        let private = pool.private().unwrap();
        let capture = |(input, output): &(Block, Block)| {
            let work = || step(&pool, &stream, 3 << 20, input, output);
            private.capture(&stream, work).unwrap()
        };
        let first = capture(&one);
        let held = private.reserved_bytes();
        let second = capture(&two);
        assert_eq!(private.reserved_bytes(), held);
        let third = first.private_pool().capture(&stream, || Ok(())).unwrap();
        for _ in 0..2 {
            check_replays(&first, &pool, &stream, &one);
            check_replays(&second, &pool, &stream, &two);
        }
        drop((first, third, private));
        check_replays(&second, &pool, &stream, &two);
        pool.check_invariants();
    }
}

#[test]
fn what_a_capture_leaves_in_blocks_is_kept_from_the_next() {
    let device = threads();
    let pool = pool(&device, false);
    let stream = device.create_stream().unwrap();
    let private = pool.private().unwrap();
    let capture = |value: u8| {
        let mut result = None;
        let graph = private.capture(&stream, || {
            let block = pool.allocate(BYTES, &stream)?;
            fill(&stream, block.ptr(), value, BYTES);
            result = Some(block);
            Ok(())
        });
        (graph.unwrap(), result.expect("the closure ran"))
    };
    let (first, one) = capture(1);
    let (second, two) = capture(2);
    launch(&first, &stream);
    launch(&second, &stream);
    assert!(shows(&stream, &one, 1));
    assert!(shows(&stream, &two, 2));
    // Once it is free it is the next capture's, not ordinary memory.
    let freed = one.ptr();
    drop(one);
    assert_ne!(pool.allocate(BYTES, &stream).unwrap().ptr(), freed);
    let (_, three) = capture(3);
    assert_eq!(three.ptr(), freed);
    pool.check_invariants();
}

#[test]
fn replays_do_not_poison_ordinary_memory_that_was_freed_in_the_capture() {
    let device = threads();
    let pool = pool(&device, false);
    let [stream, other] = [(); 2].map(|()| device.create_stream().unwrap());
    let mut recorded = pool.allocate(PAGE, &stream).unwrap();
    let block = pool.allocate(BYTES, &stream).unwrap();
    let ptr = block.ptr();
    let private: PrivatePool = pool.private().unwrap();
    let graph = private.capture(&stream, || {
        drop(block);
        recorded.record_use(&other);
        drop(recorded);
        Ok(())
    });
    let graph = graph.unwrap();
    let owner = pool.allocate(BYTES, &stream).unwrap();
    assert_eq!(owner.ptr(), ptr, "the stream has its block back");
    fill(&stream, owner.ptr(), 5, BYTES);
    launch(&graph, &stream);
    assert!(shows(&stream, &owner, 5));
    pool.check_invariants();
}
