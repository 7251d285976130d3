//! The pool at its edges: sizes near 2^64, homes used up, streams and pools dropped early, captures.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "the tests enqueue work of their own, and fail by panicking"
)]

use crate::support;
use std::sync::Arc;
use std::sync::mpsc::channel;

use crate::support::driver::{Gate, seeded};
use kitsune::driver::fault::FaultDriver;
use kitsune::{Device, Error, HostConfig, Pool, PoolConfig, ReusePolicy, Stream};

const PAGE: u64 = 2 << 20;

fn device(capacity: u64) -> Device {
    let config = HostConfig {
        capacity,
        ..HostConfig::default()
    };
    support::device::device(config)
}

fn pool(device: &Device, reuse: ReusePolicy) -> Pool {
    let config = PoolConfig {
        reuse,
        ..PoolConfig::default()
    };
    Pool::new(device, config).unwrap()
}

fn pool_and_stream(device: &Device, contiguous: bool) -> (Pool, Stream) {
    let config = PoolConfig {
        contiguous,
        ..PoolConfig::default()
    };
    let pool = Pool::new(device, config).unwrap();
    (pool, device.create_stream().unwrap())
}

/// `inner`, with its calls counted.
fn counted(inner: &Device) -> (Arc<FaultDriver>, Device) {
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    (faults.clone(), Device::from_driver(faults))
}

fn fill(stream: &Stream, ptr: kitsune::driver::DevicePtr) {
    // SAFETY: the callers pass blocks of at least 512 bytes that live, or are freed in order with `stream`.
    unsafe { stream.driver().fill(ptr, 3, 512, stream.raw()) }.unwrap();
}

/// Places within a pool are numbers of 32 bits, of 512 bytes each.
#[test]
fn more_than_two_tebibytes_are_refused_on_a_device_that_has_them() {
    for contiguous in [false, true] {
        let device = device(8 << 40);
        if device.properties().total_memory <= 2 << 40 {
            // One that has less than was asked for, as every GPU has.
            return;
        }
        let (pool, stream) = pool_and_stream(&device, contiguous);
        let _in_use = pool.allocate(3 << 20, &stream).unwrap();
        for bytes in [2 << 40, 3 << 40] {
            let error = pool.allocate(bytes, &stream).unwrap_err();
            let Error::OutOfMemory(report) = &error else {
                panic!("{error}");
            };
            // Before anything is given up for what can never be.
            assert!(report.tried.is_empty(), "{error}");
            assert!(error.to_string().contains("at most 2 TiB"), "{error}");
        }
        let block = pool.allocate(5 << 20, &stream).unwrap();
        fill(&stream, block.ptr());
        pool.check_invariants();
    }
}

#[test]
fn sizes_that_no_device_has_are_refused_with_a_report() {
    for contiguous in [false, true] {
        let device = device(64 << 20);
        let (pool, stream) = pool_and_stream(&device, contiguous);
        let _in_use = pool.allocate(3 << 20, &stream).unwrap();
        for bytes in [
            1 << 40,
            1 << 62,
            1 << 63,
            u64::MAX - (1 << 21),
            u64::MAX - 511,
            u64::MAX,
        ] {
            for bytes in [bytes - 1, bytes, bytes.saturating_add(1)] {
                let refused = pool.allocate(bytes, &stream);
                assert!(matches!(refused, Err(Error::OutOfMemory(_))), "{bytes}");
            }
        }
        pool.check_invariants();
    }
}

#[test]
fn homes_of_returned_pages_serve_requests_of_any_size() {
    let capacity = 16 * PAGE;
    let device = device(capacity);
    let pool = pool(&device, ReusePolicy::default());
    let stream = device.create_stream().unwrap();
    for _ in 0..80 {
        drop(pool.allocate(PAGE, &stream).unwrap());
        pool.empty_cache().unwrap();
    }
    for bytes in [3 * PAGE, capacity] {
        drop(pool.allocate(bytes, &stream).unwrap());
        pool.empty_cache().unwrap();
    }
    pool.check_invariants();
}

#[test]
fn a_block_freed_after_its_pool_is_not_kept_by_the_thread_that_freed_it() {
    let device = device(64 << 20);
    let pool = pool(&device, ReusePolicy::default());
    let stream = device.create_stream().unwrap();
    let block = pool.allocate(4096, &stream).unwrap();
    drop(pool);
    let (freed, is_freed) = channel();
    let (leave, may_leave) = channel();
    let thread = std::thread::spawn(move || {
        drop(block);
        freed.send(()).unwrap();
        may_leave.recv().unwrap();
    });
    is_freed.recv().unwrap();
    let free = device.memory_info().unwrap().free;
    leave.send(()).unwrap();
    thread.join().unwrap();
    assert_eq!(free, 64 << 20);
}

#[test]
fn streams_that_wait_for_each_other_leave_no_events_behind() {
    let (faults, device) = counted(&device(1 << 30));
    let pool = pool(&device, ReusePolicy::Wait);
    let streams = [(); 2].map(|()| device.create_stream().unwrap());
    for round in 0..200 {
        let stream = &streams[round % 2];
        let all = [(); 3].map(|()| pool.allocate(4 << 20, stream).unwrap());
        fill(stream, all[0].ptr());
        drop(all);
        stream.synchronize().unwrap();
    }
    let made = faults.calls("create_event");
    assert!(made >= 100, "the streams took each other's memory");
    let left = made - faults.calls("destroy_event");
    assert!(left < 20, "{left} events are left");
}

#[test]
fn a_recorded_stream_dropped_during_a_wait_is_not_forgotten() {
    // Gates are closures, which only the host device runs.
    let host = HostConfig {
        capacity: 64 << 20,
        ..HostConfig::default()
    };
    let (faults, device) = counted(&Device::host(host).unwrap());
    let pool = pool(&device, ReusePolicy::default());
    let [home, slow, user] = [(); 3].map(|()| device.create_stream().unwrap());
    let mut block = pool.allocate(4 << 20, &home).unwrap();
    let address = block.ptr();
    let held = pool.allocate(4096, &slow).unwrap();
    let slow_gate = Gate::close(&slow);
    let user_gate = Gate::close(&user);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.empty_cache());
        while faults.calls("synchronize_stream") < 2 {
            std::thread::yield_now();
        }
        fill(&user, address);
        block.record_stream(&user);
        // The pool cannot mark the end of `user` when it looks after the blocks that wait for it.
        faults.fail_nth(Some("create_event"), 1);
        drop((block, user));
        slow_gate.open();
        waiting.join().unwrap().unwrap();
    });
    assert_eq!(faults.disarm(), 0, "the fault fired");
    // A new stream must not inherit what the pool knows of the one that is gone.
    let fresh = device.create_stream().unwrap();
    let _on_fresh = pool.allocate(4096, &fresh).unwrap();
    fresh.synchronize().unwrap();
    let all: Vec<_> = (0..4)
        .map(|_| pool.allocate(4 << 20, &home).unwrap())
        .collect();
    let stats = pool.stats();
    let waiting = stats.active_bytes.current - stats.allocated_bytes.current;
    assert_eq!(waiting, 4 << 20, "the block at {address:?} is in use");
    user_gate.open();
    drop((held, all));
    pool.empty_cache().unwrap();
    pool.check_invariants();
    assert_eq!(pool.stats().active.current, 1);
}

#[test]
fn allocating_beside_a_capture_leaves_it_and_the_stream_alone() {
    for reuse in [ReusePolicy::OnlyComplete, ReusePolicy::Wait] {
        let device = seeded(3);
        let pool = pool(&device, reuse);
        let [captured, other] = [(); 2].map(|()| device.create_stream().unwrap());
        let kept = pool.allocate(PAGE, &captured).unwrap();
        drop(pool.allocate(8 * PAGE, &captured).unwrap());
        let graph = captured.capture(|| {
            fill(&captured, kept.ptr());
            drop(pool.allocate(6 * PAGE, &other)?);
            // Whatever comes of its capture, the other stream must not have become part of it.
            assert!(!device.driver().is_capturing(other.raw())?, "{reuse}");
            drop(pool.allocate(4 * PAGE, &captured)?);
            drop(pool.empty_cache());
            Ok(())
        });
        graph.unwrap_or_else(|error| panic!("{reuse}: {error}"));
        pool.empty_cache().unwrap();
        pool.check_invariants();
    }
}

#[test]
fn a_stream_of_another_device_is_refused_whatever_the_thread_keeps() {
    let device = device(64 << 20);
    let pool = pool(&device, ReusePolicy::OnlyComplete);
    let stream = device.create_stream().unwrap();
    let foreign = Device::host(HostConfig::default()).unwrap();
    let other = foreign.create_stream().unwrap();
    for _ in 0..2 {
        for bytes in [0, 512, 1 << 20, u64::MAX] {
            let refused = pool.allocate(bytes, &other);
            assert!(
                matches!(refused, Err(Error::InvalidArgument { .. })),
                "{bytes}: {refused:?}"
            );
        }
        // The second time the thread has a lane, with blocks of these sizes.
        for bytes in [512, 1 << 20, 4096] {
            drop(pool.allocate(bytes, &stream).unwrap());
        }
    }
    assert_eq!(pool.stats().allocation.current, 0);
    pool.check_invariants();
}

#[test]
fn a_stream_of_another_platform_holds_no_memory_back() {
    let device = device(64 << 20);
    let pool = pool(&device, ReusePolicy::OnlyComplete);
    let foreign = Device::host(HostConfig::default()).unwrap();
    assert_ne!(device.driver().platform(), foreign.driver().platform());
    let mut block = pool
        .allocate(1 << 20, &device.create_stream().unwrap())
        .unwrap();
    let user = foreign.create_stream().unwrap();
    block.record_stream(&user);
    block.record_use(&user);
    drop(block);
    assert_eq!(pool.stats().active_bytes.current, 0);
}
