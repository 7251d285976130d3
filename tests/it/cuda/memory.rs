//! Virtual memory of the CUDA device, captures and graphs, and the pool on top, over a simulated driver.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

use crate::support::cuda::Sim;
use crate::support::driver::{
    allocate, assert_capturing, copy, fill, read, refusal, try_read, write,
};
use kitsune::driver::{DevicePtr, PageHandle};
use kitsune::units::{KIB, MIB};
use kitsune::{Device, Event, Graph, Pool, PoolConfig, Result, Stream};

const PAGE: u64 = 2 * MIB;
const INVALID_VALUE: i32 = 1;
const OUT_OF_MEMORY: i32 = 2;

fn unmap(device: &Device, ptr: DevicePtr, bytes: u64) -> Result<()> {
    // SAFETY: the tests synchronize before they unmap.
    unsafe { device.driver().unmap(ptr, bytes) }
}

fn launch(graph: &Graph, stream: &Stream) {
    // SAFETY: the memory of the tests lives until they end.
    unsafe { graph.launch(stream) }.unwrap();
}

// Virtual memory.

#[test]
fn a_page_shows_the_same_bytes_at_every_address() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let (free, ranges) = (device.memory_info().unwrap().free, sim.held("ranges"));
    let range = driver.reserve(8 * PAGE).unwrap();
    assert!(range.0.is_multiple_of(PAGE));
    let page = driver.create_page(2 * PAGE).unwrap();
    let (one, two) = (range.offset(PAGE), range.offset(5 * PAGE));
    driver.map(one, &[page]).unwrap();
    driver.map(two, &[page]).unwrap();
    write(&stream, one.offset(PAGE - 2), &[1, 2, 3, 4]);
    assert_eq!(read(&stream, two.offset(PAGE - 2), 4), [1, 2, 3, 4]);
    unmap(&device, one, 2 * PAGE).unwrap();
    driver.destroy_page(page).unwrap();
    assert_eq!(read(&stream, two.offset(PAGE - 2), 4), [1, 2, 3, 4]);
    assert_eq!(device.memory_info().unwrap().free, free - 2 * PAGE);
    unmap(&device, two, 2 * PAGE).unwrap();
    assert_eq!(device.memory_info().unwrap().free, free);
    driver.release(range, 8 * PAGE).unwrap();
    assert_eq!(sim.held("ranges"), ranges);
}

#[test]
fn pages_are_mapped_side_by_side_with_access_set_once() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let stream = device.create_stream().unwrap();
    let range = driver.reserve(8 * PAGE).unwrap();
    let [one, two, three] = [1, 2, 1].map(|pages| driver.create_page(pages * PAGE).unwrap());
    driver.map(range, &[]).unwrap();
    driver.map(range, &[one, two]).unwrap();
    driver
        .map(range.offset(3 * PAGE), &[three, one, three])
        .unwrap();
    assert_eq!((sim.calls("cuMemMap"), sim.calls("cuMemSetAccess")), (5, 2));
    for (index, value) in [(0, 1), (1, 2), (2, 3), (3, 4)] {
        fill(&stream, range.offset(index * PAGE), value, PAGE);
    }
    let seen: Vec<u8> = (0..6)
        .map(|index| read(&stream, range.offset(index * PAGE + 7), 1)[0])
        .collect();
    assert_eq!(seen, [1, 2, 3, 4, 1, 4]);
    for pages in [
        vec![one, PageHandle(999)],
        vec![one, one, one],
        vec![one, two],
    ] {
        let at = range.offset(6 * PAGE);
        assert_eq!(
            refusal(driver.map(at, &pages)).1,
            INVALID_VALUE,
            "{pages:?}"
        );
        assert_eq!(refusal(unmap(&device, at, 2 * PAGE)).1, INVALID_VALUE);
    }
    for (start, pages) in [(0, 2), (2, 1), (2, 4), (6, 1)] {
        let (call, code, _) = refusal(unmap(&device, range.offset(start * PAGE), pages * PAGE));
        assert_eq!(
            (call, code),
            ("unmap", INVALID_VALUE),
            "{pages} from {start}"
        );
    }
    assert_eq!(refusal(driver.release(range, 8 * PAGE)).1, INVALID_VALUE);
    for page in [one, two, three] {
        driver.destroy_page(page).unwrap();
    }
    unmap(&device, range, 8 * PAGE).unwrap();
    driver.release(range, 8 * PAGE).unwrap();
}

#[test]
fn a_failure_half_way_maps_nothing() {
    let (sim, device) = Sim::device();
    let driver = device.driver();
    let range = driver.reserve(3 * PAGE).unwrap();
    let pages: Vec<_> = (0..3).map(|_| driver.create_page(PAGE).unwrap()).collect();
    for (function, nth) in [("cuMemMap", 1), ("cuMemMap", 3), ("cuMemSetAccess", 1)] {
        sim.fail(function, nth, OUT_OF_MEMORY);
        assert_eq!(refusal(driver.map(range, &pages)).1, OUT_OF_MEMORY);
        assert_eq!(
            refusal(unmap(&device, range, 3 * PAGE)).1,
            INVALID_VALUE,
            "nothing is mapped"
        );
    }
    driver.map(range, &pages).unwrap();
    unmap(&device, range, 3 * PAGE).unwrap();
}

#[test]
fn wrong_lengths_are_refused() {
    let (_sim, device) = Sim::device();
    let driver = device.driver();
    for bytes in [0, 1, PAGE - 1, PAGE + 1, u64::MAX] {
        assert_eq!(refusal(driver.reserve(bytes)).1, INVALID_VALUE, "{bytes}");
        assert_eq!(
            refusal(driver.create_page(bytes)).1,
            INVALID_VALUE,
            "{bytes}"
        );
        assert_eq!(
            refusal(unmap(&device, DevicePtr(PAGE), bytes)).1,
            INVALID_VALUE,
            "{bytes}"
        );
    }
    assert_eq!(refusal(driver.create_page(1 << 40)).1, OUT_OF_MEMORY);
}

// Captures and graphs.

#[test]
fn captured_work_runs_when_launched_and_as_often() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let (pinned, graphs) = (sim.held("pinned"), sim.held("graphs"));
    let a = allocate(&device, 8);
    write(&stream, a, &[9; 8]);
    let graph = stream
        .capture(|| {
            assert!(device.driver().is_capturing(stream.raw())?);
            let mut staged = vec![1; 4];
            write(&stream, a, &staged);
            staged.fill(7);
            fill(&stream, a.offset(4), 2, 2);
            copy(&stream, a.offset(6), a, 2);
            Ok(())
        })
        .unwrap();
    assert!(!device.driver().is_capturing(stream.raw()).unwrap());
    assert_eq!(read(&stream, a, 8), [9; 8], "capturing runs nothing");
    for _ in 0..2 {
        launch(&graph, &stream);
        assert_eq!(read(&stream, a, 8), [1, 1, 1, 1, 2, 2, 1, 1]);
        write(&stream, a, &[9; 8]);
    }
    let other = device.create_stream().unwrap();
    launch(&graph, &other);
    drop(graph);
    assert_eq!(sim.held("pinned"), pinned + 1, "the launch still reads it");
    assert_eq!(read(&other, a, 8), [1, 1, 1, 1, 2, 2, 1, 1]);
    drop(stream.capture(|| Ok(())).unwrap());
    assert_eq!(sim.held("pinned"), pinned);
    assert_eq!(sim.held("graphs"), graphs);
}

#[test]
fn memory_can_be_taken_and_other_events_asked_during_a_capture() {
    let (_sim, device) = Sim::device();
    let (stream, other) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let foreign = other.record().unwrap();
    stream
        .capture(|| {
            let a = device.driver().allocate(KIB)?;
            foreign.synchronize()?;
            assert!(foreign.is_complete()?);
            fill(&stream, a, 1, KIB);
            Ok(())
        })
        .unwrap();
}

#[test]
fn fork_and_join_are_captured_in_order() {
    let (_sim, device) = Sim::device();
    let (origin, side) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
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
    let unjoined = origin.capture(|| side.wait_for(&origin));
    assert_eq!(refusal(unjoined).1, 904);
    side.synchronize().unwrap();
}

#[test]
fn calls_that_would_wait_invalidate_the_capture() {
    let (_sim, device) = Sim::device();
    let a = allocate(&device, 1);
    let outside = device.create_stream().unwrap();
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
        let stream = device.create_stream().unwrap();
        let mut outcome = Ok(());
        let graph = stream.capture(|| {
            let event = stream.record()?;
            outcome = forbidden(&stream, &event);
            Ok(())
        });
        assert_capturing(outcome, call);
        let (named, code, _) = refusal(graph);
        assert_eq!((named, code), ("end_capture", 901));
        stream.synchronize().unwrap();
    }
}

#[test]
fn captures_begin_and_end_on_one_stream() {
    let (_sim, device) = Sim::device();
    let driver = device.driver();
    let (origin, side) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    driver.begin_capture(origin.raw()).unwrap();
    assert_capturing(driver.begin_capture(origin.raw()), "begin_capture");
    let graph = driver.end_capture(origin.raw()).unwrap();
    driver.destroy_graph(graph).unwrap();
    // SAFETY: refused.
    let outcome = unsafe { driver.launch_graph(graph, origin.raw()) };
    assert_eq!(refusal(outcome).0, "launch_graph");
    assert_eq!(refusal(driver.end_capture(side.raw())).0, "end_capture");
    // Events of a capture that is over mark nothing usable, until they are recorded again.
    let mut kept = None;
    drop(
        origin
            .capture(|| {
                kept = Some(origin.record()?);
                Ok(())
            })
            .unwrap(),
    );
    let event = kept.unwrap();
    assert_eq!(refusal(side.wait(&event)).0, "stream_wait");
    assert_eq!(refusal(event.synchronize()).0, "synchronize_event");
    assert_eq!(refusal(event.is_complete()).0, "query_event");
    event.record(&side).unwrap();
    event.synchronize().unwrap();
}

#[test]
fn a_graph_can_be_part_of_a_graph() {
    let (_sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let a = allocate(&device, 3);
    write(&stream, a, &[0; 3]);
    let inner = stream
        .capture(|| {
            write(&stream, a, &[1]);
            Ok(())
        })
        .unwrap();
    let outer = stream
        .capture(|| {
            launch(&inner, &stream);
            copy(&stream, a.offset(1), a, 1);
            Ok(())
        })
        .unwrap();
    drop(inner);
    launch(&outer, &stream);
    assert_eq!(read(&stream, a, 3), [1, 1, 0]);
}

// The pool on top.

#[test]
fn a_cache_hit_asks_nothing_and_one_stream_needs_no_event() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let sizes = [100, 4 * KIB, 300 * KIB, 3 * MIB, 40 * MIB];
    let round = || {
        let blocks: Vec<_> = sizes
            .iter()
            .map(|bytes| pool.allocate(*bytes, &stream).unwrap())
            .collect();
        drop(blocks);
    };
    (0..3).for_each(|_| round());
    let events = sim.calls("cuEventRecord") + sim.calls("cuEventCreate");
    let log = sim.log();
    (0..100).for_each(|_| round());
    assert_eq!(sim.names_since(&log), [""; 0]);
    assert_eq!(events, 0, "{log}");
}

/// Sizes that come and go at random, so that holes are split and merged, pages taken, and requests stitched together.
#[test]
fn a_program_on_one_stream_records_no_event_and_never_waits() {
    let (sim, device) = Sim::device();
    let stream = device.create_stream().unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let mut random = fastrand::Rng::with_seed(3);
    let mut blocks = Vec::new();
    for _ in 0..3000 {
        if blocks.len() > 60 {
            blocks.swap_remove(random.usize(0..blocks.len()));
        }
        let most = 1 << random.u32(8..26);
        let bytes = random.u64(1..most);
        blocks.push(pool.allocate(bytes, &stream).unwrap());
    }
    assert!(
        sim.calls("cuMemMap") > sim.calls("cuMemCreate"),
        "pages were stitched"
    );
    for call in [
        "cuEventCreate",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuStreamSynchronize",
        "cuStreamQuery",
        "cuCtxSynchronize",
        "cuMemUnmap",
    ] {
        assert_eq!(sim.calls(call), 0, "{call}");
    }
}

#[test]
fn a_pool_gives_everything_back() {
    let (sim, device) = Sim::device();
    let before = (sim.held("bytes"), sim.held("pages"), sim.held("ranges"));
    let (one, two) = (
        device.create_stream().unwrap(),
        device.create_stream().unwrap(),
    );
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    for round in 1..20_u64 {
        let a = pool.allocate(round * MIB, &one).unwrap();
        let b = pool.allocate(round * 100, &two).unwrap();
        drop((a, b));
    }
    one.synchronize().unwrap();
    two.synchronize().unwrap();
    drop(pool);
    assert_eq!(
        (sim.held("bytes"), sim.held("pages"), sim.held("ranges")),
        before
    );
}
