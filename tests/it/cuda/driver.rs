//! The CUDA device over a simulated driver: memory, streams, events, handles, and errors of the library.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use crate::support;
use std::thread;

use crate::support::cuda::Sim;
use crate::support::driver::{allocate, copy, fill, read, refusal, try_act, try_read, write};
use kitsune::driver::cuda::{Installation, borrow_stream, stream_handle};
use kitsune::driver::{DeviceKind, DevicePtr, RawEvent, RawGraph, RawStream};
use kitsune::units::{KIB, MIB};
use kitsune::{Device, Error, Event, HostConfig, Result};

const PAGE: u64 = 2 * MIB;
const INVALID_VALUE: i32 = 1;
const NOT_FOUND: i32 = 500;

#[test]
fn the_device_says_what_it_is() {
    let (_sim, device) = Sim::device();
    let properties = device.properties();
    assert_eq!(properties.kind, DeviceKind::Cuda);
    assert_eq!(properties.name, "Simulated CUDA device");
    assert_eq!(properties.total_memory, 8 << 30);
    assert!(properties.virtual_memory);
    assert_eq!(properties.page_granularity, PAGE);
    assert_eq!(properties.compute_capability, Some((9, 0)));
    assert_eq!(Device::why_not_cuda(), None);
    assert!(Device::auto().unwrap().is_same(&device));
    let info = device.memory_info().unwrap();
    assert_eq!(info.total, 8 << 30);

    let installation = Installation::find().unwrap();
    assert_eq!(installation.driver_version, (13, 0));
    assert_eq!(installation.library, support::cuda::library_path());
    assert!(installation.devices[0].memory_pools);
    assert_eq!(installation.devices[0].kernels_for, Some((8, 0)));
}

#[test]
fn copies_and_fills_move_bytes() {
    let (_sim, device) = Sim::device();
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
    copy(&stream, DevicePtr(0), DevicePtr(0), 0);
    fill(&stream, DevicePtr(0), 0, 0);
    write(&stream, DevicePtr(0), &[]);
    assert_eq!(read(&stream, a, 0), [0u8; 0]);
    // SAFETY: all work has run.
    unsafe { device.driver().free_pinned(pinned) }.unwrap();
    for ptr in [a, b] {
        // SAFETY: all work has run.
        unsafe { device.driver().free(ptr) }.unwrap();
    }
}

#[test]
fn a_pinned_source_may_be_reused_at_once_too() {
    let (_sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let a = allocate(&device, 8);
    let pinned = device.driver().allocate_pinned(8).unwrap();
    let place = std::ptr::with_exposed_provenance_mut::<u8>(usize::try_from(pinned.0).unwrap());
    // SAFETY: pinned memory of this test.
    let source = unsafe { std::slice::from_raw_parts_mut(place, 8) };
    source.fill(1);
    write(&stream, a, source);
    source.fill(2);
    assert_eq!(read(&stream, a, 8), [1; 8]);
    // SAFETY: all work has run.
    unsafe { device.driver().free_pinned(pinned) }.unwrap();
}

/// A device that reaches ordinary memory may read it after the call: what is copied must not depend on that.
#[test]
fn a_source_may_be_reused_at_once_where_the_device_reaches_it() {
    let sim = Sim::take();
    sim.set("devices", "4");
    sim.set("pageable", "1");
    // No other test opens this one.
    let device = Device::cuda(3).unwrap();
    let stream = device.create_stream().unwrap();
    let small = allocate(&device, KIB);
    let held = sim.held("pinned");
    let mut source = vec![0; 1024];
    // More copies than are kept under way, and none runs before somebody waits.
    for value in 0..=255_u8 {
        source.fill(value);
        write(&stream, small, &source[..100]);
        write(&stream, small.offset(100), &source[..924]);
    }
    source.fill(1);
    assert_eq!(read(&stream, small, 1024), [255; 1024]);
    // More bytes than the ring has, in two goes, from odd places.
    let bytes = 21 * MIB + 77;
    let large = allocate(&device, bytes);
    let numbers = |seed: u64| -> Vec<u8> {
        (0..bytes)
            .map(|place| (place * 31 + place / 4099 + seed).to_le_bytes()[0])
            .collect()
    };
    for seed in [3, 8] {
        let mut source = numbers(seed);
        write(&stream, large, &source);
        source.fill(0);
    }
    assert!(read(&stream, large, usize::try_from(bytes).unwrap()) == numbers(8));
    assert_eq!(sim.held("pinned"), held + 1, "the ring");
    for (function, is_reported) in [("cuMemcpyHtoDAsync_v2", true), ("cuEventRecord", false)] {
        sim.fail(function, 1, 46);
        // SAFETY: the destination is there.
        let outcome = unsafe {
            device
                .driver()
                .copy_from_host(small, &[9; 100], stream.raw())
        };
        assert_eq!(outcome.is_err(), is_reported, "{function}: {outcome:?}");
        assert_eq!(sim.armed(), 0);
        write(&stream, small, &[7; 50]);
        assert_eq!(read(&stream, small, 50), [7; 50]);
    }
}

#[test]
fn streams_are_ordered_by_events_and_by_nothing_else() {
    let (_sim, device) = Sim::device();
    let (first, second) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let (a, b) = (allocate(&device, KIB), allocate(&device, KIB));
    fill(&first, a, 9, KIB);
    copy(&second, b, a, KIB);
    assert_eq!(
        read(&second, b, 1),
        [0],
        "without a wait the copy came first"
    );
    let event = first.record().unwrap();
    assert!(!event.is_complete().unwrap());
    assert!(!first.is_idle().unwrap());
    second.wait(&event).unwrap();
    copy(&second, b, a, KIB);
    assert_eq!(read(&second, b, 1024), vec![9; 1024]);
    event.synchronize().unwrap();
    assert!(event.is_complete().unwrap());
}

#[test]
fn a_wait_means_the_record_before_it() {
    let (_sim, device) = Sim::device();
    let streams: Vec<_> = (0..3).map(|_| device.create_stream().unwrap()).collect();
    let a = allocate(&device, 2);
    let event = Event::new(&device).unwrap();
    assert!(
        event.is_complete().unwrap(),
        "an event that marks nothing is complete"
    );
    event.synchronize().unwrap();
    streams[0].wait(&event).unwrap();
    fill(&streams[0], a, 1, 1);
    event.record(&streams[0]).unwrap();
    streams[1].wait(&event).unwrap();
    event.record(&streams[2]).unwrap();
    event.synchronize().unwrap();
    copy(&streams[1], a.offset(1), a, 1);
    assert_eq!(read(&streams[1], a, 2), [1, 1]);
}

#[test]
fn events_are_handed_out_again_and_forget_their_mark() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let a = allocate(&device, 1);
    drop(Event::new(&device).unwrap());
    let before = sim.calls("cuEventCreate");
    for _ in 0..100 {
        fill(&stream, a, 1, 1);
        let event = stream.record().unwrap();
        drop(event);
        let fresh = Event::new(&device).unwrap();
        assert!(
            fresh.is_complete().unwrap(),
            "the old mark is not passed, but it is not this event's"
        );
    }
    assert_eq!(sim.calls("cuEventCreate"), before);
    assert_eq!(sim.calls("cuEventDestroy_v2"), 0);
}

#[test]
fn work_outlives_its_stream_and_its_events() {
    let (_sim, device) = Sim::device();
    let (first, second) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let a = allocate(&device, KIB);
    fill(&first, a, 5, KIB);
    second.wait_for(&first).unwrap();
    drop(first);
    assert_eq!(read(&second, a, 1024), vec![5; 1024]);
}

#[test]
fn memory_in_stream_order_is_given_back_when_the_stream_gets_there() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let before = sim.held("bytes");
    let a = device.driver().allocate_on(KIB, stream.raw()).unwrap();
    fill(&stream, a, 3, KIB);
    let seen = try_read(&stream, a, 1).unwrap();
    // SAFETY: the work on it is on the same stream.
    unsafe { device.driver().free_on(a, stream.raw()) }.unwrap();
    assert_eq!(seen, [3]);
    assert_eq!(sim.held("bytes"), before + 1024);
    stream.synchronize().unwrap();
    assert_eq!(sim.held("bytes"), before);
}

#[test]
fn every_thread_can_call_and_gets_its_own_context_back() {
    let (_sim, device) = Sim::device();
    thread::scope(|scope| {
        for worker in 0..4 {
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

#[test]
fn devices_share_streams_events_and_addresses() {
    let (sim, one) = Sim::device();
    sim.set("devices", "2");
    let two = Device::cuda(1).unwrap();
    assert!(!one.is_same(&two));
    assert_eq!(one.driver().platform(), two.driver().platform());
    assert_ne!(
        one.driver().platform(),
        Device::host(HostConfig::default())
            .unwrap()
            .driver()
            .platform()
    );
    let (left, right) = (one.create_stream().unwrap(), two.create_stream().unwrap());
    let (a, b) = (allocate(&one, KIB), allocate(&two, KIB));
    fill(&left, a, 42, KIB);
    right.wait_for(&left).unwrap();
    copy(&right, b, a, KIB);
    assert_eq!(read(&right, b, 1024), vec![42; 1024]);
    let (call, code, reason) = refusal(Device::cuda(7));
    assert_eq!((call, code), ("open", 101));
    assert!(
        reason.contains("no CUDA device 7: the driver has 2"),
        "{reason}"
    );
}

/// A page of `device` where it can be used.
fn mapped(device: &Device) -> DevicePtr {
    let driver = device.driver();
    let ptr = driver.reserve(PAGE).unwrap();
    let page = driver.create_page(PAGE).unwrap();
    driver.map(ptr, &[page]).unwrap();
    ptr
}

/// Mapped memory is reached by its own device alone, so a copy between two has to name both.
#[test]
fn copies_between_devices_name_both_and_others_ask_nothing() {
    let (sim, one) = Sim::device();
    sim.set("devices", "2");
    let (left, a, near) = (one.create_stream().unwrap(), mapped(&one), mapped(&one));
    fill(&left, a, 42, KIB);
    let before = sim.log();
    copy(&left, near, a, KIB);
    assert_eq!(
        sim.names_since(&before),
        ["cuMemcpyAsync"],
        "with one device"
    );
    let two = Device::cuda(1).unwrap();
    let (right, b) = (two.create_stream().unwrap(), mapped(&two));
    right.wait_for(&left).unwrap();
    copy(&right, b, a, KIB);
    assert_eq!(read(&right, b, 1024), vec![42; 1024]);
    // Either end may be plain memory, and the stream that of either device.
    let (plain, pinned) = (
        allocate(&one, KIB),
        one.driver().allocate_pinned(KIB).unwrap(),
    );
    left.wait_for(&right).unwrap();
    copy(&left, plain, b, KIB);
    assert_eq!(read(&left, plain, 1024), vec![42; 1024]);
    assert_eq!(sim.calls("cuMemcpyPeerAsync"), 2);
    copy(&right, pinned, b, KIB);
    copy(&left, near, plain, KIB);
    assert_eq!(sim.calls("cuMemcpyPeerAsync"), 2, "one device each");
    right.synchronize().unwrap();
    left.synchronize().unwrap();
    sim.fail("cuMemcpyPeerAsync", 1, 217);
    // SAFETY: both ranges are there.
    let refused = unsafe { one.driver().copy(plain, b, KIB, left.raw()) };
    let (call, code, reason) = refusal(refused);
    assert_eq!((call, code), ("copy", 217));
    assert!(reason.starts_with("cuMemcpyPeerAsync"), "{reason}");
}

#[test]
fn unknown_handles_are_refused_before_the_library_sees_them() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let (stream, event, graph) = (RawStream(999_999), RawEvent(999_999), RawGraph(999_999));
    let known = driver.create_event().unwrap();
    let (queue, gone) = (
        driver.create_stream().unwrap(),
        driver.create_stream().unwrap(),
    );
    driver.destroy_stream(gone).unwrap();
    let log = sim.log();
    for (call, outcome) in [
        ("destroy_stream", driver.destroy_stream(stream)),
        ("destroy_stream", driver.destroy_stream(gone)),
        ("synchronize_stream", driver.synchronize_stream(stream)),
        ("query_stream", driver.query_stream(stream).map(drop)),
        ("destroy_event", driver.destroy_event(event)),
        ("record", driver.record(event, queue)),
        ("record", driver.record(known, gone)),
        ("query_event", driver.query_event(event).map(drop)),
        ("synchronize_event", driver.synchronize_event(event)),
        ("stream_wait", driver.stream_wait(queue, event)),
        ("begin_capture", driver.begin_capture(stream)),
        ("end_capture", driver.end_capture(stream).map(drop)),
        ("is_capturing", driver.is_capturing(stream).map(drop)),
        ("destroy_graph", driver.destroy_graph(graph)),
    ] {
        let (named, code, _) = refusal(outcome);
        assert_eq!((named, code), (call, INVALID_VALUE));
    }
    assert_eq!(sim.log(), log);
    driver.destroy_event(known).unwrap();
    driver.destroy_stream(queue).unwrap();
}

#[test]
fn wrong_addresses_are_refused() {
    let (_sim, device) = Sim::device();
    let driver = device.driver();
    assert_eq!(refusal(driver.allocate(0)).1, INVALID_VALUE);
    assert_eq!(refusal(driver.allocate_pinned(0)).1, INVALID_VALUE);
    let (plain, pinned) = (allocate(&device, 1), driver.allocate_pinned(1).unwrap());
    // SAFETY: nothing is enqueued.
    let free = |ptr| unsafe { driver.free(ptr) };
    for wrong in [DevicePtr(0), plain.offset(64), pinned] {
        let (call, code, _) = refusal(free(wrong));
        assert_eq!((call, code), ("free", INVALID_VALUE));
    }
    // SAFETY: refused.
    let outcome = unsafe { driver.free_pinned(plain) };
    assert_eq!(refusal(outcome).0, "free_pinned");
    free(plain).unwrap();
    assert_eq!(refusal(free(plain)).1, INVALID_VALUE);
}

#[test]
fn errors_say_call_function_code_and_name() {
    let (sim, device) = Sim::device();
    let (call, code, reason) = refusal(device.driver().allocate(1 << 40));
    assert_eq!((call, code), ("allocate", 2));
    assert_eq!(reason, "cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY, simulated");
    sim.fail("cuMemAlloc_v2", 1, 9999);
    let (_, code, reason) = refusal(device.driver().allocate(1));
    assert_eq!(code, 9999, "a code that nobody knows is passed on");
    assert!(reason.contains("no name for"), "{reason}");
}

type Attempt<'a> = &'a dyn Fn() -> Result<()>;

/// Each attempt calls a function of the library for a method of the driver: once made to fail, then not.
fn assert_reported_once(sim: &Sim, attempts: &[(&str, &str, Attempt<'_>)]) {
    for (call, function, attempt) in attempts {
        sim.fail(function, 1, 46);
        let (named, code, reason) = refusal(attempt());
        assert_eq!((named, code), (*call, 46), "{function}");
        assert!(reason.starts_with(function), "{reason}");
        attempt().unwrap();
    }
    assert_eq!(sim.armed(), 0);
}

#[test]
fn memory_calls_that_fail_once_are_reported_once() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let queue = driver.create_stream().unwrap();
    let attempts: [(&str, &str, Attempt<'_>); 7] = [
        ("memory_info", "cuMemGetInfo_v2", &|| {
            driver.memory_info().map(drop)
        }),
        ("memory_info", "cuCtxGetCurrent", &|| {
            driver.memory_info().map(drop)
        }),
        ("allocate", "cuMemAlloc_v2", &|| {
            driver.allocate(1).map(drop)
        }),
        ("allocate_on", "cuMemAllocAsync", &|| {
            driver.allocate_on(1, queue).map(drop)
        }),
        ("allocate_pinned", "cuMemHostAlloc", &|| {
            driver.allocate_pinned(1).map(drop)
        }),
        ("reserve", "cuMemAddressReserve", &|| {
            driver.reserve(PAGE).map(drop)
        }),
        ("create_page", "cuMemCreate", &|| {
            driver.create_page(PAGE).map(drop)
        }),
    ];
    assert_reported_once(&sim, &attempts);
}

#[test]
fn stream_calls_that_fail_once_are_reported_once() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let queue = stream.raw();
    let event = driver.create_event().unwrap();
    let a = allocate(&device, KIB);
    driver.record(event, queue).unwrap();
    driver.synchronize_event(event).unwrap();
    let attempts: [(&str, &str, Attempt<'_>); 9] = [
        ("create_stream", "cuStreamCreate", &|| {
            driver.create_stream().map(drop)
        }),
        ("synchronize_stream", "cuStreamSynchronize", &|| {
            driver.synchronize_stream(queue)
        }),
        ("query_stream", "cuStreamQuery", &|| {
            driver.query_stream(queue).map(drop)
        }),
        ("record", "cuEventRecord", &|| driver.record(event, queue)),
        ("query_event", "cuEventQuery", &|| {
            driver.query_event(event).map(drop)
        }),
        ("synchronize_event", "cuEventSynchronize", &|| {
            driver.synchronize_event(event)
        }),
        ("stream_wait", "cuStreamWaitEvent", &|| {
            driver.stream_wait(queue, event)
        }),
        ("is_capturing", "cuStreamIsCapturing", &|| {
            driver.is_capturing(queue).map(drop)
        }),
        ("copy_to_host", "cuMemcpyDtoHAsync_v2", &|| {
            try_read(&stream, a, 4).map(drop)
        }),
    ];
    assert_reported_once(&sim, &attempts);
}

#[test]
fn work_on_memory_that_is_gone_is_reported_by_every_later_wait() {
    let (_sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let driver = device.driver();
    let range = driver.reserve(PAGE).unwrap();
    let page = driver.create_page(PAGE).unwrap();
    driver.map(range, &[page]).unwrap();
    fill(&stream, range, 1, PAGE);
    // SAFETY: breaks the promise that no work is enqueued, which the simulated device notices.
    unsafe { driver.unmap(range, PAGE) }.unwrap();
    for _ in 0..2 {
        let (call, code, reason) = refusal(stream.synchronize());
        assert_eq!((call, code), ("synchronize_stream", 700));
        assert!(reason.contains("CUDA_ERROR_ILLEGAL_ADDRESS"), "{reason}");
    }
}

#[test]
fn a_kernel_without_code_is_refused() {
    let (_sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let (call, code, reason) = refusal(try_act(&stream, || {}));
    assert_eq!((call, code), ("launch", NOT_FOUND));
    assert_eq!(reason, "no code for act");
}

#[test]
fn streams_of_other_code_can_be_used_and_stay_theirs() {
    let (sim, device) = Sim::device();
    let own = device.create_stream().unwrap();
    let handle = stream_handle(&own).unwrap();
    // SAFETY: `own` lives until the test ends.
    let borrowed = unsafe { borrow_stream(&device, handle) }.unwrap();
    let a = allocate(&device, 4);
    fill(&borrowed, a, 6, 4);
    assert!(!own.is_idle().unwrap(), "it is the same stream");
    assert_eq!(read(&own, a, 4), [6; 4]);
    assert_ne!(own.id(), borrowed.id());
    drop(borrowed);
    assert_eq!(sim.calls("cuStreamDestroy_v2"), 0);

    let legacy = std::ptr::null_mut();
    // SAFETY: the default stream lives as long as the context.
    let legacy = unsafe { borrow_stream(&device, legacy) }.unwrap();
    fill(&legacy, a, 7, 4);
    assert_eq!(read(&legacy, a, 1), [7]);

    let per_thread = std::ptr::without_provenance_mut(2);
    // SAFETY: refused.
    let (call, _, reason) = refusal(unsafe { borrow_stream(&device, per_thread) });
    assert_eq!(call, "borrow_stream");
    assert!(
        reason.contains("a different stream on each thread"),
        "{reason}"
    );
    let host = Device::host(HostConfig::default()).unwrap();
    // SAFETY: refused.
    refusal(unsafe { borrow_stream(&host, handle) });
    refusal(stream_handle(&host.create_stream().unwrap()));
}

#[test]
fn capturing_errors_are_told_apart() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    sim.fail("cuMemAlloc_v2", 1, 900);
    match device.driver().allocate(1) {
        Err(Error::Capturing { call }) => assert_eq!(call, "allocate"),
        other => panic!("{other:?}"),
    }
    stream.synchronize().unwrap();
}
