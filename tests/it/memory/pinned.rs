//! The pool of pinned host memory: when memory is handed out again, what the host may look at, and what
//! happens when the driver refuses.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the test enqueues work of its own, and fails by panicking"
)]

use crate::support;
use std::sync::Arc;
use std::thread;

use crate::support::driver::{Gate, seeded, threads, try_act};
use kitsune::driver::fault::FaultDriver;
use kitsune::memory::{PinnedBlock, PinnedPool};
use kitsune::units::{KIB, MIB};
use kitsune::{Context, DType, Device, Error, Result, Stream, Tensor};

/// A device whose calls fail on demand.
fn faulty(inner: &Device) -> (Arc<FaultDriver>, Device) {
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    (faults.clone(), Device::from_driver(faults))
}

/// Enqueues filling the block, and records it.
fn fill(block: &mut PinnedBlock, value: u8, stream: &Stream) -> Result<()> {
    block.order(stream)?;
    let (ptr, bytes, raw) = (block.ptr(), block.bytes(), stream.raw());
    // SAFETY: the block is this long, ordered behind its other uses, and the use is recorded below.
    unsafe { stream.driver().fill(ptr, value, bytes, raw) }?;
    block.record_use(stream)
}

#[test]
fn freed_memory_serves_the_next_request_of_its_size() {
    let pool = PinnedPool::new(&seeded(1));
    let first = pool.allocate(5000).unwrap();
    assert_eq!((first.bytes(), first.allocated()), (5000, 8 * KIB));
    let ptr = first.ptr();
    drop(first);
    let larger = pool.allocate(8 * KIB + 1).unwrap();
    let same = pool.allocate(8 * KIB).unwrap();
    assert_ne!(larger.ptr(), ptr);
    assert_eq!(same.ptr(), ptr);
    let stats = pool.stats();
    assert_eq!((stats.num_host_alloc, stats.cache_hits), (2, 1));
    assert_eq!(stats.allocation.current, 2);
    assert_eq!(stats.requested_bytes.current, 16 * KIB + 1);
    assert_eq!(stats.allocated_bytes.current, 20 * KIB);
    assert_eq!(stats.reserved_bytes.current, 20 * KIB);
    drop((larger, same));
    assert_eq!(pool.stats().allocated_bytes.current, 0);
    pool.empty_cache().unwrap();
    let stats = pool.stats();
    assert_eq!((stats.reserved_bytes.current, stats.num_host_free), (0, 2));
}

#[test]
fn the_bytes_are_ordinary_memory() {
    let pool = PinnedPool::new(&seeded(1));
    let mut block = pool.allocate(MIB + 3).unwrap();
    let bytes = block.as_mut_slice().unwrap();
    assert_eq!(bytes.len() as u64, MIB + 3);
    for (byte, value) in bytes.iter_mut().zip((0..=250).cycle()) {
        *byte = value;
    }
    assert_eq!(
        block.as_slice().unwrap()[(1 << 20) + 2],
        ((MIB + 2) % 251) as u8
    );
    let mut nothing = pool.allocate(0).unwrap();
    assert_eq!(nothing.as_mut_slice().unwrap(), [0u8; 0]);
    assert_eq!(nothing.as_slice().unwrap(), [0u8; 0]);
    assert!(nothing.is_idle());
    drop(nothing);
    assert_eq!(pool.stats().allocation.allocated, 1);
}

#[test]
fn memory_in_flight_is_not_handed_out() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let streams = [(); 2].map(|()| device.create_stream().unwrap());
    let mut block = pool.allocate(100).unwrap();
    let ptr = block.ptr();
    let gates = [0, 1].map(|index: usize| Gate::close(&streams[index]));
    for (stream, value) in streams.iter().zip([1, 2]) {
        fill(&mut block, value, stream).unwrap();
    }
    assert!(!block.is_idle());
    drop(block);
    assert_eq!(pool.stats().waiting_bytes, 4 * KIB);
    let [first, second] = gates;
    assert_ne!(
        pool.allocate(100).unwrap().ptr(),
        ptr,
        "used by both streams"
    );
    // What came back just now is free; take it away, so that only the waiting area is left.
    let other = pool.allocate(100).unwrap();
    first.open();
    streams[0].synchronize().unwrap();
    let third = pool.allocate(100).unwrap();
    assert_ne!(third.ptr(), ptr, "used by the second stream");
    second.open();
    streams[1].synchronize().unwrap();
    assert_eq!(pool.allocate(100).unwrap().ptr(), ptr);
    assert_eq!(pool.stats().num_host_alloc, 3);
    drop((other, third));
}

#[test]
fn looking_at_the_bytes_waits_for_the_uses() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut block = pool.allocate(64).unwrap();
    for value in 1..20 {
        let gate = Gate::close(&stream);
        fill(&mut block, value, &stream).unwrap();
        assert!(!block.is_idle());
        thread::scope(|scope| {
            let opener = scope.spawn(|| {
                thread::yield_now();
                gate.open();
            });
            assert_eq!(block.as_slice().unwrap(), [value; 64]);
            assert!(block.is_idle());
            opener.join().unwrap();
        });
        assert_eq!(block.as_mut_slice().unwrap(), [value; 64]);
    }
}

#[test]
fn uses_on_several_streams_run_in_the_order_of_the_calls() {
    for seed in support::seeds::seeds(50) {
        support::seeds::with_seed(seed, |seed| {
            let device = seeded(seed);
            let pool = PinnedPool::new(&device);
            let contexts = [(); 3].map(|()| Context::new(&device).unwrap());
            let mut staging = pool.allocate(4 * 256).unwrap();
            let mut copies = Vec::new();
            for round in 0..6_usize {
                let value = round as f32;
                let source =
                    Tensor::from_slice(&contexts[round % 3], [256], &[value; 256]).unwrap();
                source.copy_to_pinned(&mut staging).unwrap();
                let copy = Tensor::zeros(&contexts[(round + 1) % 3], [256], DType::F32).unwrap();
                copy.copy_from_pinned(&mut staging).unwrap();
                copies.push((copy, value));
            }
            let last: &[f32] = bytemuck::cast_slice(staging.as_slice().unwrap());
            assert_eq!(last, [5.0; 256]);
            for (copy, value) in copies {
                assert_eq!(copy.to_vec::<f32>().unwrap(), [value; 256]);
            }
        });
    }
}

#[test]
fn memory_that_is_reused_keeps_what_earlier_copies_took_from_it() {
    for seed in support::seeds::seeds(50) {
        support::seeds::with_seed(seed, |seed| {
            let device = seeded(seed);
            let pool = PinnedPool::new(&device);
            let context = Context::new(&device).unwrap();
            let mut tensors = Vec::new();
            for round in 0..20_u8 {
                let tensor = Tensor::zeros(&context, [1000], DType::F32).unwrap();
                let mut staging = pool.allocate(4000).unwrap();
                staging.as_mut_slice().unwrap().fill(round);
                tensor.copy_from_pinned(&mut staging).unwrap();
                // Dropped with the copy in flight: the next round must not overwrite it.
                tensors.push((tensor, f32::from_ne_bytes([round; 4])));
            }
            for (tensor, value) in tensors {
                assert_eq!(tensor.to_vec::<f32>().unwrap(), [value; 1000]);
            }
        });
    }
}

#[test]
fn tensors_of_any_layout_copy_through_pinned_memory() {
    let device = seeded(3);
    let pool = PinnedPool::new(&device);
    let context = Context::new(&device).unwrap();
    let values: Vec<f32> = (0..6_u8).map(f32::from).collect();
    let tensor = Tensor::from_slice(&context, [2, 3], &values).unwrap();
    let turned = tensor.transpose(0, 1).unwrap();
    let mut staging = pool.allocate(100).unwrap();
    turned.copy_to_pinned(&mut staging).unwrap();
    let found: &[f32] = bytemuck::cast_slice(&staging.as_slice().unwrap()[..24]);
    assert_eq!(found, [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    // Back through the turned view: the same elements in the same places.
    let target = Tensor::zeros(&context, [2, 3], DType::F32).unwrap();
    let view = target.transpose(0, 1).unwrap();
    view.copy_from_pinned(&mut staging).unwrap();
    assert_eq!(target.to_vec::<f32>().unwrap(), values);

    let mut short = pool.allocate(23).unwrap();
    for outcome in [
        tensor.copy_to_pinned(&mut short),
        tensor.copy_from_pinned(&mut short),
    ] {
        let error = outcome.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
    let empty = Tensor::zeros(&context, [0], DType::F32).unwrap();
    empty
        .copy_to_pinned(&mut pool.allocate(0).unwrap())
        .unwrap();
}

#[test]
fn streams_of_other_platforms_and_captures_are_refused() {
    let device = seeded(1);
    let pool = PinnedPool::new(&device);
    let context = Context::new(&device).unwrap();
    let foreign = Context::new(&seeded(1)).unwrap();
    let mut staging = pool.allocate(16).unwrap();
    let far = Tensor::zeros(&foreign, [4], DType::F32).unwrap();
    let outcome = far.copy_to_pinned(&mut staging);
    assert!(matches!(outcome, Err(Error::InvalidArgument { .. })));

    let near = Tensor::zeros(&context, [4], DType::F32).unwrap();
    let outcome = context
        .stream()
        .capture(|| near.copy_from_pinned(&mut staging));
    assert!(matches!(outcome, Err(Error::Capturing { .. })));
    // Nothing was enqueued, so nothing is lost.
    near.copy_from_pinned(&mut staging).unwrap();
    assert_eq!(staging.as_slice().unwrap(), [0; 16]);
}

#[test]
fn a_use_within_a_capture_is_lost_with_its_memory() {
    let device = seeded(1);
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut block = pool.allocate(16).unwrap();
    let outcome = stream.capture(|| block.record_use(&stream));
    assert!(matches!(outcome, Err(Error::Capturing { .. })));
    let ptr = block.ptr();
    assert!(!block.is_idle());
    assert!(block.as_slice().is_err() && block.order(&stream).is_err());
    drop(block);
    assert_ne!(pool.allocate(16).unwrap().ptr(), ptr);
    pool.empty_cache().unwrap();
    let stats = pool.stats();
    assert_eq!(
        (stats.reserved_bytes.current, stats.allocated_bytes.current),
        (4 * KIB, 0)
    );
}

#[test]
fn where_no_mark_can_be_made_the_host_waits() {
    let (faults, device) = faulty(&threads());
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    for call in ["is_capturing", "create_event", "record"] {
        let mut block = pool.allocate(16).unwrap();
        block.as_mut_slice().unwrap().fill(0);
        let (ptr, raw) = (block.ptr(), stream.raw());
        // SAFETY: the block is this long, and the use is recorded below.
        unsafe { stream.driver().fill(ptr, 9, 16, raw) }.unwrap();
        faults.fail_nth(Some(call), 1);
        block.record_use(&stream).unwrap();
        assert_eq!(faults.disarm(), 0, "{call}");
        assert!(block.is_idle());
        assert_eq!(block.as_slice().unwrap(), [9; 16]);
    }
    // Neither marked nor waited for: nobody can tell when the memory is free.
    let mut block = pool.allocate(16).unwrap();
    faults.fail_nth(Some("record"), 1);
    faults.fail_nth(Some("synchronize_stream"), 1);
    assert!(block.record_use(&stream).is_err());
    assert!(block.as_mut_slice().is_err());
}

#[test]
fn what_a_failed_stream_used_stays_where_it_is() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut block = pool.allocate(16).unwrap();
    let gate = Gate::close(&stream);
    try_act(&stream, || panic!("a kernel that fails, as the test wants")).unwrap();
    fill(&mut block, 1, &stream).unwrap();
    gate.open();
    assert!(block.as_slice().is_err());
    let ptr = block.ptr();
    drop(block);
    assert_ne!(pool.allocate(16).unwrap().ptr(), ptr);
}

#[test]
fn a_refusal_gives_back_what_is_cached_and_asks_again() {
    let (faults, device) = faulty(&seeded(1));
    let pool = PinnedPool::new(&device);
    drop((pool.allocate(100).unwrap(), pool.allocate(2 * MIB).unwrap()));
    faults.fail_nth(Some("allocate_pinned"), 1);
    let block = pool.allocate(3 * MIB).unwrap();
    assert_eq!(faults.disarm(), 0);
    let stats = pool.stats();
    assert_eq!((stats.num_host_free, stats.num_ooms), (2, 0));
    assert_eq!(stats.reserved_bytes.current, 3 * MIB);
    drop(block);

    for _ in 0..3 {
        faults.fail_nth(Some("allocate_pinned"), 1);
    }
    match pool.allocate(5 * MIB) {
        Err(Error::OutOfMemory(report)) => {
            assert_eq!((report.requested, report.reserved), (5 * MIB, 0));
            assert!(report.pinned && !report.limited);
            let said = report.driver_error.as_deref().unwrap();
            assert!(said.starts_with("allocate_pinned failed"), "{said}");
            assert_eq!(report.tried.len(), 4);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((faults.disarm(), pool.stats().num_ooms), (0, 1));
    pool.allocate(5 * MIB).unwrap();
    assert!(matches!(
        pool.allocate(u64::MAX),
        Err(Error::OutOfMemory(_))
    ));
}

#[test]
fn before_it_gives_up_the_pool_waits_for_streams() {
    let (faults, device) = faulty(&threads());
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut block = pool.allocate(16).unwrap();
    let gate = Gate::close(&stream);
    fill(&mut block, 1, &stream).unwrap();
    let ptr = block.ptr();
    drop(block);
    // The first two requests to the driver fail; a third is not made.
    for _ in 0..3 {
        faults.fail_nth(Some("allocate_pinned"), 1);
    }
    let block = thread::scope(|scope| {
        let waiter = scope.spawn(|| pool.allocate(16).unwrap());
        while faults.calls("allocate_pinned") < 3 && !waiter.is_finished() {
            thread::yield_now();
        }
        gate.open();
        waiter.join().unwrap()
    });
    assert_eq!((block.ptr(), faults.disarm()), (ptr, 1));
    assert_eq!(block.as_slice().unwrap(), [1; 16]);
}

#[test]
fn memory_that_the_driver_does_not_take_back_stays_cached() {
    let (faults, device) = faulty(&seeded(1));
    let pool = PinnedPool::new(&device);
    let first = pool.allocate(16).unwrap();
    let ptr = first.ptr();
    drop(first);
    faults.fail_nth(Some("free_pinned"), 1);
    assert!(pool.empty_cache().is_err());
    assert_eq!(pool.stats().reserved_bytes.current, 4 * KIB);
    assert_eq!(pool.allocate(16).unwrap().ptr(), ptr);
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}

#[test]
fn blocks_may_outlive_the_pool_and_their_copies_the_blocks() {
    let (faults, device) = faulty(&threads());
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut early = pool.allocate(16).unwrap();
    let late = pool.allocate(16).unwrap();
    let gate = Gate::close(&stream);
    fill(&mut early, 1, &stream).unwrap();
    drop((pool, device, early));
    assert_eq!(faults.calls("free_pinned"), 0);
    // The last handle waits for the copy before it frees the memory.
    let last = thread::spawn(move || drop(late));
    gate.open();
    last.join().unwrap();
    assert_eq!(faults.calls("free_pinned"), 2);
}

/// A random program that goes on when something is refused; what it copies is checked where it succeeds.
fn busy(pool: &PinnedPool, streams: &[Stream], seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut blocks: Vec<(PinnedBlock, u8)> = Vec::new();
    for _ in 0..60 {
        match random.u32(0..10) {
            0..4 => {
                let Ok(mut block) = pool.allocate(random.u64(1..20 * KIB)) else {
                    continue;
                };
                let value = random.u8(..);
                block.as_mut_slice().unwrap().fill(value);
                blocks.push((block, value));
            }
            4..7 if !blocks.is_empty() => {
                let (block, value) = random.choice(blocks.iter_mut()).unwrap();
                let stream = random.choice(streams).unwrap();
                let new = random.u8(..);
                // What fails before the use is enqueued leaves the bytes alone.
                if fill(block, new, stream).is_ok() {
                    *value = new;
                }
            }
            7 if !blocks.is_empty() => {
                let (block, value) = random.choice(blocks.iter()).unwrap();
                if let Ok(bytes) = block.as_slice() {
                    assert!(bytes.iter().all(|byte| byte == value));
                }
            }
            8 => drop(pool.empty_cache()),
            _ if !blocks.is_empty() => {
                drop(blocks.swap_remove(random.usize(0..blocks.len())));
            }
            _ => {}
        }
    }
}

#[test]
fn every_call_fails_once_and_nothing_is_lost() {
    let survives = |nth: u64| {
        let inner = seeded(5);
        let (faults, device) = faulty(&inner);
        let pool = PinnedPool::new(&device);
        let streams = [(); 2].map(|()| device.create_stream().unwrap());
        faults.fail_nth(None, nth);
        busy(&pool, &streams, 3);
        let fired = faults.disarm() == 0;
        streams
            .iter()
            .for_each(|stream| stream.synchronize().unwrap());
        pool.empty_cache().unwrap();
        let stats = pool.stats();
        assert_eq!(stats.allocated_bytes.current, 0, "call {nth}");
        assert_eq!(stats.reserved_bytes.current, 0, "call {nth}");
        assert_eq!(stats.num_host_alloc, stats.num_host_free, "call {nth}");
        fired
    };
    let survived = (1..).take_while(|nth| survives(*nth)).count();
    assert!(survived > 50, "only {survived} calls");
}

#[test]
fn threads_share_a_pool() {
    let device = threads();
    let pool = PinnedPool::new(&device);
    let streams: Vec<Stream> = (0..3).map(|_| device.create_stream().unwrap()).collect();
    thread::scope(|scope| {
        for seed in 0..4 {
            let (pool, streams) = (&pool, &streams);
            scope.spawn(move || (0..10).for_each(|round| busy(pool, streams, 4 * round + seed)));
        }
    });
    let stats = pool.stats();
    assert_eq!(
        (stats.allocation.current, stats.requested_bytes.current),
        (0, 0)
    );
    assert!(stats.cache_hits > 0);
    streams
        .iter()
        .for_each(|stream| stream.synchronize().unwrap());
    pool.empty_cache().unwrap();
    assert_eq!(pool.stats().reserved_bytes.current, 0);
}
