//! The host device: memory, streams, events, failures.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use crate::support;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use crate::support::driver::{
    Gate, act, allocate, copy, devices, fill, read, refusal, seeded, threads, try_act, try_read,
    write,
};
use kitsune::driver::{DevicePtr, RawEvent, RawGraph, RawStream};
use kitsune::units::{GIB, KIB};
use kitsune::{Device, Error, Event, HostConfig};
use parking_lot::Mutex;

const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;
const EIO: i32 = 5;
const EDEADLK: i32 = 35;

#[test]
fn a_stream_runs_in_order() {
    for device in devices() {
        let stream = device.create_stream().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        for step in 0..500 {
            let seen = Arc::clone(&seen);
            act(&stream, move || seen.lock().push(step));
        }
        stream.synchronize().unwrap();
        assert!(stream.is_idle().unwrap());
        assert_eq!(*seen.lock(), (0..500).collect::<Vec<_>>());
    }
}

#[test]
fn copies_and_fills_move_bytes() {
    for device in devices() {
        let stream = device.create_stream().unwrap();
        let (a, b) = (allocate(&device, 1000), allocate(&device, 1000));
        let pinned = device.driver().allocate_pinned(1000).unwrap();
        let mut source: Vec<u8> = (0..200).collect();
        write(&stream, a, &source);
        source.fill(0xee);
        fill(&stream, a.offset(100), 7, 50);
        copy(&stream, pinned, a, 200);
        copy(&stream, b.offset(3), pinned, 200);
        let mut expected: Vec<u8> = (0..200).collect();
        expected[100..150].fill(7);
        assert_eq!(read(&stream, b.offset(3), 200), expected);
        // Overlap is forbidden to callers, yet must not tear bytes apart.
        copy(&stream, b.offset(4), b.offset(3), 200);
        assert_eq!(read(&stream, b.offset(4), 200), expected);
        copy(&stream, DevicePtr(0), DevicePtr(0), 0);
        assert_eq!(read(&stream, a, 0), [0u8; 0]);
    }
}

#[test]
fn an_event_orders_two_streams() {
    let device = threads();
    let (first, second) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let (a, b) = (allocate(&device, KIB), allocate(&device, KIB));
    fill(&second, b, 1, KIB);
    second.synchronize().unwrap();
    let gate = Gate::close(&first);
    fill(&first, a, 9, KIB);
    let event = first.record().unwrap();
    second.wait(&event).unwrap();
    copy(&second, b, a, KIB);
    assert!(!event.is_complete().unwrap());
    assert!(!first.is_idle().unwrap());
    assert!(!second.is_idle().unwrap());
    gate.open();
    assert_eq!(read(&second, b, 1024), vec![9; 1024]);
    event.synchronize().unwrap();
    assert!(event.is_complete().unwrap());
}

#[test]
fn a_wait_means_the_record_before_it() {
    let device = threads();
    let streams: Vec<_> = (0..3).map(|_| device.create_stream().unwrap()).collect();
    let event = Event::new(&device).unwrap();
    assert!(
        event.is_complete().unwrap(),
        "an event that marks nothing is complete"
    );
    event.synchronize().unwrap();
    streams[0].wait(&event).unwrap();

    let gate = Gate::close(&streams[0]);
    event.record(&streams[0]).unwrap();
    streams[1].wait(&event).unwrap();
    event.record(&streams[2]).unwrap();
    event.synchronize().unwrap();
    let reached = Arc::new(AtomicU32::new(0));
    let reach = Arc::clone(&reached);
    act(&streams[1], move || reach.store(1, Ordering::SeqCst));
    // The third stream is past the event's new mark; the second still waits for the first.
    assert!(event.is_complete().unwrap());
    assert!(!streams[1].is_idle().unwrap());
    assert_eq!(reached.load(Ordering::SeqCst), 0);
    gate.open();
    streams[1].synchronize().unwrap();
    assert_eq!(reached.load(Ordering::SeqCst), 1);
}

#[test]
fn work_outlives_its_stream_and_its_events() {
    let device = threads();
    let (first, second) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let a = allocate(&device, KIB);
    let gate = Gate::close(&first);
    fill(&first, a, 5, KIB);
    second.wait_for(&first).unwrap();
    drop(first);
    gate.open();
    assert_eq!(read(&second, a, 1024), vec![5; 1024]);
}

#[test]
fn work_outlives_its_device() {
    let device = threads();
    let stream = device.create_stream().unwrap();
    let (a, b) = (allocate(&device, KIB), allocate(&device, KIB));
    let (sender, receiver) = channel();
    let gate = Gate::close(&stream);
    fill(&stream, a, 5, KIB);
    copy(&stream, b, a, KIB);
    act(&stream, move || sender.send(()).unwrap());
    drop((stream, device));
    gate.open();
    receiver.recv().expect("the work ran");
}

#[test]
fn the_last_device_handle_may_die_on_its_own_stream() {
    let device = threads();
    let stream = device.create_stream().unwrap();
    let (sender, receiver): (_, Receiver<()>) = channel();
    let gate = Gate::close(&stream);
    let owned = (device, stream.clone(), sender);
    act(&stream, move || {
        let (device, _stream, _sender) = &owned;
        assert!(device.memory_info().is_ok());
    });
    drop(stream);
    gate.open();
    receiver
        .recv()
        .expect_err("the kernel and all it owned are gone");
}

#[test]
fn a_seeded_device_finishes_its_work_when_it_goes() {
    for seed in 0..20 {
        let device = support::driver::seeded(seed);
        let stream = device.create_stream().unwrap();
        let count = Arc::new(AtomicU32::new(0));
        for _ in 0..50 {
            let count = Arc::clone(&count);
            act(&stream, move || {
                count.fetch_add(1, Ordering::SeqCst);
            });
        }
        drop((stream, device));
        assert_eq!(count.load(Ordering::SeqCst), 50);
    }
}

#[test]
fn threads_of_the_host_work_side_by_side() {
    for device in devices() {
        thread::scope(|scope| {
            for worker in 0..4_u8 {
                let device = device.clone();
                scope.spawn(move || {
                    let stream = device.create_stream().unwrap();
                    let side = device.create_stream().unwrap();
                    let (a, b) = (allocate(&device, KIB), allocate(&device, KIB));
                    for round in 0..50 {
                        let value = round * 4 + worker;
                        fill(&stream, a, value, KIB);
                        side.wait_for(&stream).unwrap();
                        copy(&side, b, a, KIB);
                        assert_eq!(read(&side, b, 1024), vec![value; 1024]);
                        stream.wait_for(&side).unwrap();
                    }
                });
            }
        });
    }
}

#[test]
fn untouched_memory_costs_nothing() {
    let device = threads();
    let stream = device.create_stream().unwrap();
    let blocks: Vec<_> = (0..4).map(|_| allocate(&device, 20 * GIB)).collect();
    assert_eq!(device.memory_info().unwrap().free, 0);
    for block in &blocks {
        assert!(block.0.is_multiple_of(512));
        fill(&stream, block.offset(20 * GIB - 1), 3, 1);
        assert_eq!(read(&stream, block.offset(20 * GIB - 1), 1), [3]);
    }
    let (call, code, reason) = refusal(device.driver().allocate(1));
    assert_eq!((call, code), ("allocate", ENOMEM));
    assert!(reason.contains("0 B of 80.0 GiB are free"), "{reason}");
    // SAFETY: all work on the block has run.
    unsafe { device.driver().free(blocks[0]) }.unwrap();
    assert_eq!(device.memory_info().unwrap().free, 20 * GIB);
    allocate(&device, 20 * GIB);
}

#[test]
fn capacity_is_counted_in_units_of_4_kib() {
    let config = HostConfig {
        capacity: 10 * KIB,
        ..HostConfig::default()
    };
    let device = Device::host(config).unwrap();
    assert_eq!(device.properties().total_memory, 10 * KIB);
    let small = allocate(&device, 1);
    assert_eq!(device.memory_info().unwrap().free, 6 * KIB);
    for bytes in [
        6 * KIB,
        8 * KIB,
        1 << 50,
        u64::MAX - 4096,
        u64::MAX - 1,
        u64::MAX,
    ] {
        let (call, code, _) = refusal(device.driver().allocate(bytes));
        assert_eq!((call, code), ("allocate", ENOMEM), "{bytes}");
    }
    for bytes in [u64::MAX, 1 << 62] {
        let (call, code, _) = refusal(device.driver().allocate_pinned(bytes));
        assert_eq!((call, code), ("allocate_pinned", ENOMEM));
    }
    let pinned = device.driver().allocate_pinned(KIB).unwrap();
    assert_eq!(
        device.memory_info().unwrap().free,
        6 * KIB,
        "pinned memory is the host's"
    );
    // SAFETY: nothing was enqueued.
    unsafe { device.driver().free_pinned(pinned) }.unwrap();
    // SAFETY: nothing was enqueued.
    unsafe { device.driver().free(small) }.unwrap();
    assert_eq!(device.memory_info().unwrap().free, 10 * KIB);
}

#[test]
fn impossible_settings_are_refused() {
    for capacity in [0, 4095, (1 << 46) + 1, u64::MAX] {
        let config = HostConfig {
            capacity,
            ..HostConfig::default()
        };
        match Device::host(config) {
            Err(Error::InvalidConfig { key, .. }) => assert_eq!(key, "capacity"),
            other => panic!("{capacity}: {other:?}"),
        }
    }
    match Device::hosts(HostConfig::default(), 0) {
        Err(Error::InvalidConfig { key, .. }) => assert_eq!(key, "count"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn wrong_addresses_are_refused() {
    let device = threads();
    let driver = device.driver();
    assert_eq!(refusal(driver.allocate(0)).1, EINVAL);
    assert_eq!(refusal(driver.allocate_pinned(0)).1, EINVAL);
    let (plain, pinned) = (allocate(&device, 1), driver.allocate_pinned(1).unwrap());
    // SAFETY: nothing is enqueued.
    let free = |ptr| unsafe { driver.free(ptr) };
    // SAFETY: nothing is enqueued.
    let free_pinned = |ptr| unsafe { driver.free_pinned(ptr) };
    for wrong in [DevicePtr(0), plain.offset(64), pinned] {
        let (call, code, _) = refusal(free(wrong));
        assert_eq!((call, code), ("free", EINVAL));
    }
    assert_eq!(refusal(free_pinned(plain)).0, "free_pinned");
    free(plain).unwrap();
    assert_eq!(refusal(free(plain)).1, EINVAL);

    let stream = device.create_stream().unwrap();
    // SAFETY: refused, nothing is written, here and below.
    let outcome = unsafe { driver.fill(DevicePtr(0), 1, 1, stream.raw()) };
    assert_eq!(refusal(outcome).0, "fill");
    // SAFETY: see above.
    let outcome = unsafe { driver.copy(pinned, DevicePtr(u64::MAX), 2, stream.raw()) };
    assert_eq!(refusal(outcome).0, "copy");
    assert_eq!(
        refusal(try_read(&stream, DevicePtr(0), 1)).0,
        "copy_to_host"
    );
}

#[test]
fn unknown_handles_are_refused() {
    let device = threads();
    let driver = device.driver();
    let (stream, event, graph) = (RawStream(999), RawEvent(999), RawGraph(999));
    let known = driver.create_event().unwrap();
    let (queue, other) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    for (call, outcome) in [
        ("destroy_stream", driver.destroy_stream(stream)),
        ("synchronize_stream", driver.synchronize_stream(stream)),
        ("query_stream", driver.query_stream(stream).map(drop)),
        ("destroy_event", driver.destroy_event(event)),
        ("record", driver.record(event, queue)),
        ("record", driver.record(known, stream)),
        ("query_event", driver.query_event(event).map(drop)),
        ("synchronize_event", driver.synchronize_event(event)),
        ("stream_wait", driver.stream_wait(queue, event)),
        ("stream_wait", driver.stream_wait(stream, known)),
        ("begin_capture", driver.begin_capture(stream)),
        ("end_capture", driver.end_capture(stream).map(drop)),
        ("end_capture", driver.end_capture(queue).map(drop)),
        ("is_capturing", driver.is_capturing(stream).map(drop)),
        ("destroy_graph", driver.destroy_graph(graph)),
    ] {
        let (named, code, _) = refusal(outcome);
        assert_eq!((named, code), (call, EINVAL));
    }
    driver.destroy_stream(other).unwrap();
    assert_eq!(refusal(driver.destroy_stream(other)).1, EINVAL);
    driver.destroy_event(known).unwrap();
    assert_eq!(refusal(driver.destroy_event(known)).1, EINVAL);
}

#[test]
fn a_panic_in_a_kernel_fails_its_stream() {
    for device in devices() {
        let (stream, side) = (
            device.create_stream().unwrap(),
            device.create_stream().unwrap(),
        );
        let after = Arc::new(AtomicU32::new(0));
        let before = stream.record().unwrap();
        act(&stream, || panic!("no luck today"));
        let count = Arc::clone(&after);
        act(&stream, move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let event = stream.record().unwrap();
        before.synchronize().unwrap();
        for _ in 0..2 {
            let (call, code, reason) = refusal(stream.synchronize());
            assert_eq!((call, code), ("synchronize_stream", EIO));
            assert_eq!(reason, "kernel act panicked: no luck today");
        }
        assert_eq!(refusal(stream.is_idle()).0, "query_stream");
        assert_eq!(refusal(event.synchronize()).0, "synchronize_event");
        assert_eq!(refusal(event.is_complete()).0, "query_event");
        let a = allocate(&device, 1);
        assert_eq!(refusal(try_read(&stream, a, 1)).0, "copy_to_host");
        try_act(&stream, || {}).unwrap();
        assert_eq!(
            after.load(Ordering::SeqCst),
            0,
            "work behind a failure does not run"
        );

        // Other streams are well until they wait for what failed.
        side.synchronize().unwrap();
        side.wait(&event).unwrap();
        let (call, _, reason) = refusal(side.synchronize());
        assert_eq!(call, "synchronize_stream");
        assert!(reason.contains("no luck today"), "{reason}");
    }
}

#[test]
fn devices_of_a_platform_understand_each_other() {
    let devices = Device::hosts(HostConfig::default(), 2).unwrap();
    let [one, two] = &devices[..] else {
        panic!("two devices")
    };
    assert_eq!(one.driver().platform(), two.driver().platform());
    assert_ne!(one.driver().platform(), threads().driver().platform());
    assert_eq!(
        (one.properties().ordinal.0, two.properties().ordinal.0),
        (0, 1)
    );
    let (left, right) = (one.create_stream().unwrap(), two.create_stream().unwrap());
    let (a, b) = (allocate(one, KIB), allocate(two, 2 * KIB));
    assert_eq!(one.memory_info().unwrap().free, 80 * GIB - 4 * KIB);
    let gate = Gate::close(&left);
    fill(&left, a, 42, KIB);
    right.wait_for(&left).unwrap();
    copy(&right, b, a, KIB);
    gate.open();
    assert_eq!(read(&right, b, 1024), vec![42; 1024]);
    drop((left, right));
}

#[test]
fn events_of_another_platform_are_refused() {
    let [one, other] = [(); 2].map(|()| Device::host(HostConfig::default()).unwrap());
    let (stream, foreign) = (one.create_stream().unwrap(), other.create_stream().unwrap());
    // Handles of the two are the same numbers, and mean other things.
    let (event, strange) = (stream.record().unwrap(), foreign.record().unwrap());
    for (call, outcome) in [
        ("wait", stream.wait(&strange)),
        ("wait", stream.wait_for(&foreign)),
        ("record", event.record(&foreign)),
    ] {
        match outcome {
            Err(Error::InvalidArgument { op, reason }) => {
                assert_eq!(op, call);
                assert!(reason.contains("are on different platforms"), "{reason}");
            }
            other => panic!("{call}: {other:?}"),
        }
    }
    stream.wait(&event).unwrap();
}

/// A read is work of its stream: what is enqueued behind it, by whomever, does not show in it.
#[test]
fn a_read_comes_before_the_work_behind_it() {
    const LEN: usize = 1 << 20;
    let device = threads();
    let stream = device.create_stream().unwrap();
    let buffer = allocate(&device, LEN as u64);
    fill(&stream, buffer, 1, LEN as u64);
    for round in 0..20_u8 {
        let gate = Gate::close(&stream);
        let reader = {
            let stream = stream.clone();
            thread::spawn(move || read(&stream, buffer, LEN))
        };
        // Behind the read or before it, but never in the middle.
        thread::sleep(Duration::from_micros(u64::from(round) * 50));
        fill(&stream, buffer, round + 2, LEN as u64);
        gate.open();
        let bytes = reader.join().unwrap();
        assert!(bytes[0] == round + 1 || bytes[0] == round + 2);
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "round {round}");
    }
}

/// A kernel must not wait, so its read of a stream with work on it is refused. The copy is in the queue by then; the
/// bytes that it was for may be gone when it runs.
#[test]
fn a_read_that_was_refused_writes_nothing_later() {
    const LEN: usize = 4096;
    for (device, is_seeded) in [(threads(), false), (seeded(1), true)] {
        let [kernels, source] = [(); 2].map(|()| device.create_stream().unwrap());
        let buffer = allocate(&device, LEN as u64);
        fill(&source, buffer, 9, LEN as u64);
        source.synchronize().unwrap();
        let (open, gate) = channel::<()>();
        if is_seeded {
            // Without threads, nothing of another stream runs before a kernel is over.
            open.send(()).unwrap();
        }
        let gate = Mutex::new(Some(gate));
        let bytes = Arc::new(Mutex::new(vec![0_u8; LEN]));
        let is_refused = Arc::new(AtomicBool::new(false));
        let (of_kernel, refused, from) = (bytes.clone(), is_refused.clone(), source.clone());
        act(&kernels, move || {
            let gate = Mutex::new(gate.lock().take().unwrap());
            // Keeps a stream with a thread busy.
            act(&from, move || {
                let _ = gate.lock().recv();
            });
            let mut bytes = of_kernel.lock();
            // SAFETY: the test's memory.
            let outcome = unsafe { from.driver().copy_to_host(&mut bytes, buffer, from.raw()) };
            assert_eq!(refusal(outcome).1, EDEADLK);
            refused.store(true, Ordering::Relaxed);
        });
        let over = kernels.record().unwrap();
        while !is_refused.load(Ordering::Relaxed) {
            over.is_complete().unwrap();
            thread::yield_now();
        }
        drop(open);
        kernels.synchronize().unwrap();
        source.synchronize().unwrap();
        assert!(
            bytes.lock().iter().all(|byte| *byte == 0),
            "the copy found its slice"
        );
        assert!(read(&source, buffer, LEN).iter().all(|byte| *byte == 9));
    }
}
