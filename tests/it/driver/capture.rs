//! Captures and graphs of the host device.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::support::driver::{
    act, allocate, assert_capturing, copy, devices, fill, read, refusal, threads, try_act,
    try_read, write,
};
use kitsune::{Device, Error, Event, Graph, Result, Stream};

const EINVAL: i32 = 22;
const ECANCELED: i32 = 125;

fn launch(graph: &Graph, stream: &Stream) {
    // SAFETY: the memory of the tests lives until they end.
    unsafe { graph.launch(stream) }.unwrap();
}

fn streams(device: &Device) -> (Stream, Stream) {
    (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    )
}

#[test]
fn captured_work_runs_when_launched_and_as_often() {
    for device in devices() {
        let stream = device.create_stream().unwrap();
        let a = allocate(&device, 8);
        write(&stream, a, &[9; 8]);
        let count = Arc::new(AtomicU32::new(0));
        let graph = stream
            .capture(|| {
                assert!(device.driver().is_capturing(stream.raw())?);
                let mut staged = vec![1; 4];
                write(&stream, a, &staged);
                staged.fill(7);
                fill(&stream, a.offset(4), 2, 2);
                copy(&stream, a.offset(6), a, 2);
                let count = Arc::clone(&count);
                try_act(&stream, move || {
                    count.fetch_add(1, Ordering::SeqCst);
                })
            })
            .unwrap();
        assert!(!device.driver().is_capturing(stream.raw()).unwrap());
        assert_eq!(read(&stream, a, 8), [9; 8], "capturing runs nothing");
        for round in 1..=2 {
            launch(&graph, &stream);
            assert_eq!(read(&stream, a, 8), [1, 1, 1, 1, 2, 2, 1, 1]);
            assert_eq!(count.load(Ordering::SeqCst), round);
            write(&stream, a, &[9; 8]);
        }
        let other = device.create_stream().unwrap();
        launch(&graph, &other);
        drop(graph);
        other.synchronize().unwrap();
        assert_eq!(
            count.load(Ordering::SeqCst),
            3,
            "a launch outlives its graph"
        );
    }
}

#[test]
fn fork_and_join_are_captured_in_order() {
    for device in devices() {
        let (origin, side) = streams(&device);
        let a = allocate(&device, 2);
        let graph = origin
            .capture(|| {
                fill(&origin, a, 1, 1);
                side.wait_for(&origin)?;
                assert!(device.driver().is_capturing(side.raw())?);
                copy(&side, a.offset(1), a, 1);
                origin.wait_for(&side)?;
                fill(&origin, a, 5, 1);
                Ok(())
            })
            .unwrap();
        assert!(!device.driver().is_capturing(side.raw()).unwrap());
        for _ in 0..2 {
            write(&origin, a, &[8, 8]);
            launch(&graph, &origin);
            assert_eq!(read(&origin, a, 2), [5, 1]);
        }
        // The side stream is an ordinary stream again.
        fill(&side, a, 3, 1);
        assert_eq!(read(&side, a, 1), [3]);
    }
}

#[test]
fn a_member_joined_through_another_is_joined() {
    let device = threads();
    let (origin, side) = streams(&device);
    let third = device.create_stream().unwrap();
    let outcome = origin.capture(|| {
        side.wait_for(&origin)?;
        third.wait_for(&side)?;
        act(&third, || {});
        side.wait_for(&third)?;
        origin.wait_for(&side)
    });
    outcome.unwrap();
}

#[test]
fn a_member_must_be_joined_back() {
    let device = threads();
    let (origin, side) = streams(&device);
    let never = origin.capture(|| side.wait_for(&origin));
    let too_early = origin.capture(|| {
        side.wait_for(&origin)?;
        origin.wait_for(&side)?;
        act(&side, || {});
        Ok(())
    });
    for outcome in [never, too_early] {
        let (call, code, reason) = refusal(outcome);
        assert_eq!((call, code), ("end_capture", EINVAL));
        assert!(reason.starts_with("unjoined"), "{reason}");
    }
    // The capture is over for both streams.
    for stream in [&origin, &side] {
        assert!(!device.driver().is_capturing(stream.raw()).unwrap());
        stream.synchronize().unwrap();
    }
}

/// What `forbidden` returns in a capture, and what the capture then ends with.
fn invalidated(
    device: &Device,
    forbidden: impl FnOnce(&Stream, &Event) -> Result<()>,
) -> (Result<()>, Result<Graph>) {
    let stream = device.create_stream().unwrap();
    let mut outcome = Ok(());
    let graph = stream.capture(|| {
        let event = stream.record()?;
        outcome = forbidden(&stream, &event);
        let (_, code, reason) = refusal(try_act(&stream, || {}));
        assert_eq!(code, ECANCELED);
        assert!(reason.contains("invalidated by"), "{reason}");
        Ok(())
    });
    stream.synchronize().unwrap();
    (outcome, graph)
}

#[test]
fn calls_that_would_wait_invalidate_the_capture() {
    let device = threads();
    let a = allocate(&device, 1);
    let outside = device.create_stream().unwrap();
    act(&outside, || {});
    let foreign = outside.record().unwrap();
    type Forbidden<'a> = Box<dyn FnOnce(&Stream, &Event) -> Result<()> + 'a>;
    let calls: [(&str, Forbidden<'_>); 6] = [
        (
            "synchronize_stream",
            Box::new(|stream, _| stream.synchronize()),
        ),
        (
            "query_stream",
            Box::new(|stream, _| stream.is_idle().map(drop)),
        ),
        (
            "synchronize_event",
            Box::new(|_, event| event.synchronize()),
        ),
        (
            "query_event",
            Box::new(|_, event| event.is_complete().map(drop)),
        ),
        (
            "copy_to_host",
            Box::new(|stream, _| try_read(stream, a, 1).map(drop)),
        ),
        ("stream_wait", Box::new(|stream, _| stream.wait(&foreign))),
    ];
    for (call, forbidden) in calls {
        let (outcome, graph) = invalidated(&device, forbidden);
        assert_capturing(outcome, call);
        let (named, code, reason) = refusal(graph);
        assert_eq!((named, code), ("end_capture", ECANCELED));
        assert!(reason.contains(call), "{reason}");
    }
}

#[test]
fn events_that_mark_nothing_may_be_waited_for() {
    let device = threads();
    let (stream, event) = (
        device.create_stream().unwrap(),
        Event::new(&device).unwrap(),
    );
    stream.capture(|| stream.wait(&event)).unwrap();
}

#[test]
fn two_captures_do_not_mix() {
    let device = threads();
    let (one, two) = streams(&device);
    let mut inner = None;
    let outer = one.capture(|| {
        let event = one.record()?;
        inner = Some(two.capture(|| two.wait(&event)));
        Ok(())
    });
    assert_capturing(inner.expect("the closure ran"), "stream_wait");
    assert_eq!(refusal(outer).1, ECANCELED);
}

#[test]
fn captures_begin_and_end_on_one_stream() {
    let device = threads();
    let driver = device.driver();
    let (origin, side) = streams(&device);
    driver.begin_capture(origin.raw()).unwrap();
    assert_capturing(driver.begin_capture(origin.raw()), "begin_capture");
    side.wait_for(&origin).unwrap();
    assert_capturing(driver.begin_capture(side.raw()), "begin_capture");
    assert_eq!(refusal(driver.end_capture(side.raw())).1, EINVAL);
    origin.wait_for(&side).unwrap();
    let graph = driver.end_capture(origin.raw()).unwrap();
    driver.destroy_graph(graph).unwrap();
    // SAFETY: refused.
    let outcome = unsafe { driver.launch_graph(graph, origin.raw()) };
    assert_eq!(refusal(outcome).0, "launch_graph");
}

#[test]
fn events_of_a_capture_that_is_over_mark_nothing_usable() {
    let device = threads();
    let (stream, side) = streams(&device);
    let mut kept = None;
    stream
        .capture(|| {
            kept = Some(stream.record()?);
            Ok(())
        })
        .unwrap();
    let event = kept.expect("the closure ran");
    assert_eq!(refusal(side.wait(&event)).0, "stream_wait");
    assert_eq!(refusal(event.synchronize()).0, "synchronize_event");
    assert_eq!(refusal(event.is_complete()).0, "query_event");
    event.record(&side).unwrap();
    event.synchronize().unwrap();
}

#[test]
fn streams_may_go_while_they_are_captured() {
    let device = threads();
    let (origin, side) = streams(&device);
    let count = Arc::new(AtomicU32::new(0));
    let captured = Arc::clone(&count);
    let graph = origin.capture(|| {
        side.wait_for(&origin)?;
        act(&side, move || {
            captured.fetch_add(1, Ordering::SeqCst);
        });
        origin.wait_for(&side)?;
        drop(side);
        Ok(())
    });
    launch(&graph.unwrap(), &origin);
    origin.synchronize().unwrap();
    assert_eq!(count.load(Ordering::SeqCst), 1);

    // An origin that goes takes its capture with it.
    let member = device.create_stream().unwrap();
    device.driver().begin_capture(origin.raw()).unwrap();
    member.wait_for(&origin).unwrap();
    drop(origin);
    assert!(!device.driver().is_capturing(member.raw()).unwrap());
    member.synchronize().unwrap();
}

#[test]
fn a_graph_can_be_part_of_a_graph() {
    for device in devices() {
        let stream = device.create_stream().unwrap();
        let count = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&count);
        let inner = stream.capture(|| {
            try_act(&stream, move || {
                counted.fetch_add(1, Ordering::SeqCst);
            })
        });
        let inner = inner.unwrap();
        let outer = stream
            .capture(|| {
                launch(&inner, &stream);
                launch(&inner, &stream);
                Ok(())
            })
            .unwrap();
        drop(inner);
        launch(&outer, &stream);
        stream.synchronize().unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_panic_in_a_graph_names_its_kernel_and_stops_the_graph() {
    let device = threads();
    let stream = device.create_stream().unwrap();
    let count = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&count);
    let graph = stream
        .capture(|| {
            act(&stream, || panic!("not again"));
            try_act(&stream, move || {
                counted.fetch_add(1, Ordering::SeqCst);
            })
        })
        .unwrap();
    launch(&graph, &stream);
    assert_eq!(
        refusal(stream.synchronize()).2,
        "kernel act panicked: not again"
    );
    assert_eq!(count.load(Ordering::SeqCst), 0);
}

#[test]
fn a_closure_that_fails_ends_its_capture() {
    let device = threads();
    let stream = device.create_stream().unwrap();
    let outcome = stream.capture(|| Err(Error::Capturing { call: "mine" }));
    assert_capturing(outcome, "mine");
    assert!(!device.driver().is_capturing(stream.raw()).unwrap());
}
