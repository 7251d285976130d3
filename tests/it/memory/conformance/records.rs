//! Cases about what is kept of blocks beside their bytes: tables, logs, tags, counters of a part of a program.

use std::io;
use std::sync::Arc;

use kitsune::memory::{Allocate, Log, LogAction, LogEvent, LogSink, Track, tag};
use kitsune::{Context, DType, Tensor};
use parking_lot::Mutex;

use crate::support::subject::{KIB, MIB, Subject, allocated, setup};

/// What a log was told, but for the actions that are left out.
#[derive(Clone, Default)]
struct Told {
    skipped: Vec<LogAction>,
    events: Arc<Mutex<Vec<LogEvent>>>,
}

impl LogSink for Told {
    fn write(&mut self, event: &LogEvent) -> io::Result<()> {
        if !self.skipped.contains(&event.action) {
            self.events.lock().push(event.clone());
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// PyTorch can switch its cache off. Memory that no cache keeps is the driver's own, beside the pool.
pub(crate) fn case_14_memory_of_the_driver_is_not_counted<S: Subject>() {
    let (device, pool, stream) = setup::<S>(64 * MIB);
    let requested = || pool.stats().requested_bytes.current;
    let raw = device.driver().allocate(MIB).unwrap();
    assert_eq!(requested(), 0);
    let block = pool.allocate(MIB, &stream).unwrap();
    assert_eq!(requested(), MIB);
    // SAFETY: nothing was enqueued on it.
    unsafe { device.driver().free(raw) }.unwrap();
    drop(block);
    assert_eq!(requested(), 0);
}

/// PyTorch keeps stacks of allocations and of frees. Here the live blocks have theirs, where that is asked
/// for, and no stack outlives its block.
pub(crate) fn case_17_live_blocks_have_stacks_where_asked_for<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    for is_asked in [false, true] {
        let track = if is_asked {
            Track::with_backtraces(pool.clone())
        } else {
            Track::new(pool.clone())
        };
        let block = track.allocate(1000, &stream).unwrap();
        let live = track.report().blocks;
        assert_eq!(live.len(), 1);
        assert_eq!(live[0].backtrace.is_some(), is_asked);
        drop(block);
        assert!(track.report().blocks.is_empty());
    }
}

/// Metadata is a tag here: a block carries the innermost one, and bytes are counted by it.
pub(crate) fn case_19_blocks_carry_the_tag_they_were_allocated_under<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let track = Track::new(pool.clone());
    let outer = tag("case 19");
    let first = track.allocate(1000, &stream).unwrap();
    let inner = tag("case 19, inside");
    let second = track.allocate(2000, &stream).unwrap();
    drop(inner);
    let third = track.allocate(3000, &stream).unwrap();
    drop(outer);
    let fourth = track.allocate(4000, &stream).unwrap();
    let tags: Vec<_> = track.report().blocks.iter().map(|b| b.tag).collect();
    assert_eq!(tags, ["case 19", "case 19, inside", "case 19", "untagged"]);
    let stats = pool.tag_stats();
    let bytes = |name| {
        let found = stats.iter().find(|stat| stat.tag == name);
        found.unwrap().allocated_bytes.current
    };
    assert_eq!(bytes("case 19"), first.allocated() + third.allocated());
    assert_eq!(bytes("case 19, inside"), second.allocated());
    assert_eq!(bytes("untagged"), fourth.allocated());
}

/// PyTorch is told which actions to leave out; here the sink of a log sees all and picks.
pub(crate) fn case_20_a_sink_may_leave_actions_out<S: Subject>() {
    let all = [
        LogAction::Allocate,
        LogAction::RecordStream,
        LogAction::Free,
        LogAction::Failure,
    ];
    for left_out in all.map(Some).into_iter().chain([None]) {
        let (device, pool, stream) = setup::<S>(64 * MIB);
        let other = device.create_stream().unwrap();
        let told = Told {
            skipped: left_out.into_iter().collect(),
            ..Told::default()
        };
        let log = Log::new(pool, told.clone());
        let mut block = log.allocate(1000, &stream).unwrap();
        block.record_stream(&other);
        drop(block);
        assert!(log.allocate(1 << 40, &stream).is_err());
        log.flush().unwrap();
        let seen: Vec<_> = told
            .events
            .lock()
            .iter()
            .map(|event| event.action)
            .collect();
        let expected: Vec<_> = all.into_iter().filter(|a| Some(*a) != left_out).collect();
        assert_eq!(seen, expected);
    }
}

pub(crate) fn case_21_table_and_log_have_the_size_that_was_asked_for<S: Subject>() {
    let (_, pool, _) = setup::<S>(64 * MIB);
    let told = Told::default();
    let track = Arc::new(Track::new(Log::new(pool, told.clone())));
    let context = Context::with_allocator(track.clone()).unwrap();
    let tensor = Tensor::zeros(&context, [311, 411], DType::F32).unwrap();
    let bytes = 311 * 411 * 4;
    let live = track.report();
    assert_eq!((live.blocks.len(), live.requested_bytes()), (1, bytes));
    assert_eq!(live.blocks[0].ptr, tensor.ptr());
    let events = told.events.lock();
    let last = events.last().unwrap();
    assert_eq!((last.action, last.bytes), (LogAction::Allocate, bytes));
    assert_eq!(last.ptr, tensor.ptr());
}

/// RMM's counters are a stack, of which one too many can be popped; a scope here ends with its value.
pub(crate) fn case_50_inner_peaks_fold_into_outer_ones<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let outer = pool.peak_scope();
    let kept = pool.allocate(10 * KIB, &stream).unwrap();
    let inner = pool.peak_scope();
    let blocks = [2, 3].map(|n| pool.allocate(n * KIB, &stream).unwrap());
    drop(blocks);
    let stats = inner.stats().allocated_bytes;
    let kib = i64::try_from(KIB).unwrap();
    assert_eq!(
        (stats.current, stats.peak, stats.total),
        (0, 5 * kib, 5 * KIB)
    );
    drop(inner);
    let stats = outer.stats().allocated_bytes;
    assert_eq!((stats.current, stats.peak), (10 * kib, 15 * kib));
    assert_eq!(stats.total, 15 * KIB);
    drop(kept);
    assert_eq!(outer.stats().allocated_bytes.peak, 15 * kib);
    assert_eq!(allocated(&pool), 0);
}

pub(crate) fn case_51_an_inner_scope_goes_below_zero<S: Subject>() {
    let (_, pool, stream) = setup::<S>(64 * MIB);
    let outer = pool.peak_scope();
    let blocks = [2, 3].map(|n| pool.allocate(n * KIB, &stream).unwrap());
    let inner = pool.peak_scope();
    drop(blocks);
    drop(pool.allocate(KIB, &stream).unwrap());
    let kib = i64::try_from(KIB).unwrap();
    let stats = inner.stats().allocated_bytes;
    assert_eq!((stats.current, stats.peak, stats.total), (-5 * kib, 0, KIB));
    drop(inner);
    let stats = outer.stats().allocated_bytes;
    assert_eq!(
        (stats.current, stats.peak, stats.total),
        (0, 5 * kib, 6 * KIB)
    );
}
