//! Lanes: freed blocks kept by the thread that freed them, for its next allocation on the same stream.
//!
//! A lane belongs to one (thread, stream, pool). It keeps blocks of up to [`SMALL_MAX`] in one list a size,
//! last in, first out, and the large block freed last in the *hot slot*: one large allocation in six is
//! undone by the very next event. Reuse is in stream order as everywhere: the thread that allocates is the
//! one that freed, so it enqueued the block's last work before.
//!
//! Its lock is never contended while its thread alone uses it; others take it only to flush it or to fold
//! its counters. What a lane holds counts as reserved, not as allocated. It is flushed when it holds more
//! than its share, when its thread ends, when memory runs short, and when the pool's last handle is dropped,
//! after which it takes nothing more.

use std::cell::RefCell;
use std::sync::Arc;

use super::arena::GRANULARITY;
use super::block::BlockRecord;
use super::pool;
use super::state::Counted;
use super::stats::Usage;
use super::tags::TagTable;
use crate::sync::{Mutex, thread_local};
use crate::units::{KIB, MIB, StreamId, to_usize};

/// Largest block kept in the lists by size.
const SMALL_MAX: u64 = 256 * KIB;
const SIZES: usize = to_usize(SMALL_MAX / GRANULARITY) + 1;

/// Bytes of small blocks that every lane may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A lane may keep one part in this many of what the pool holds: measured to cost nothing in peak memory.
const SHARE: u64 = 200;

/// The blocks a thread keeps for one stream of one pool.
#[derive(Debug)]
pub(super) struct Lane {
    slots: Mutex<Slots>,
}

#[derive(Debug)]
pub(super) struct Slots {
    /// By size in units: the block freed last, which links to the one before.
    small: Box<[Option<Box<BlockRecord>>; SIZES]>,
    hot: Option<Box<BlockRecord>>,
    /// Bytes in `small`, and how many there may be.
    small_bytes: u64,
    small_bytes_max: u64,
    is_closed: bool,
    /// Changes since they were folded into the pool's.
    pub(super) usage: Usage,
    pub(super) tags: TagTable,
}

impl Lane {
    fn new() -> Self {
        Self {
            slots: Mutex::new(Slots {
                small: Box::new([const { None }; SIZES]),
                hot: None,
                small_bytes: 0,
                small_bytes_max: SMALL_BYTES_MIN,
                is_closed: false,
                usage: Usage::default(),
                tags: TagTable::default(),
            }),
        }
    }

    /// Makes a lane that is empty keep nothing.
    pub(super) fn close(&self) {
        self.slots.lock().is_closed = true;
    }

    /// Takes a block of exactly `bytes` (rounded) for a request of `requested`.
    #[inline]
    pub(super) fn take(&self, requested: u64, bytes: u64) -> Option<Box<BlockRecord>> {
        let mut slots = self.slots.lock();
        let mut record = slots.pop(bytes)?;
        record.hand_out(requested);
        slots.usage.allocate(&record);
        slots.usage.lane_hits += 1;
        slots.tags.increase(record.tag, bytes);
        Some(record)
    }

    /// Counts a free, and keeps the block if it can.
    #[inline]
    pub(super) fn keep(&self, record: Box<BlockRecord>) -> Kept {
        let mut slots = self.slots.lock();
        slots.usage.free(&record);
        slots.tags.decrease(record.tag, record.allocated);
        if slots.is_closed {
            return Kept::Not(record);
        }
        slots.push(record)
    }

    /// Empties the lane, each block to `give`, and keeps nothing more if it is to be closed.
    pub(super) fn flush(&self, close: Close, mut give: impl FnMut(Box<BlockRecord>)) {
        let mut slots = self.slots.lock();
        slots.is_closed |= close == Close::Yes;
        while let Some(record) = slots.pop_any() {
            give(record);
        }
    }

    /// Folds the counters into the pool's, and learns how many bytes the pool holds.
    pub(super) fn fold(&self, usage: &mut Usage, tags: &mut TagTable, held: u64) {
        let mut slots = self.slots.lock();
        slots.small_bytes_max = SMALL_BYTES_MIN.max(held / SHARE);
        usage.fold(&mut slots.usage);
        tags.fold(&mut slots.tags);
    }
}

/// What became of a block that a lane was to keep. What comes back goes to the pool.
#[derive(Debug)]
pub(super) enum Kept {
    /// The lane has it.
    Yes,
    /// The lane has it, in place of another.
    InPlaceOf(Box<BlockRecord>),
    /// The lane is full. It should be flushed: what it holds is not what is asked for.
    Full(Box<BlockRecord>),
    /// The lane is closed.
    Not(Box<BlockRecord>),
}

/// Whether a lane goes on after a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    Yes,
    No,
}

impl Slots {
    #[inline]
    fn pop(&mut self, bytes: u64) -> Option<Box<BlockRecord>> {
        if bytes > SMALL_MAX {
            return self.hot.take_if(|record| record.allocated == bytes);
        }
        let slot = &mut self.small[to_usize(bytes / GRANULARITY)];
        let mut record = slot.take()?;
        *slot = record.next.take();
        self.small_bytes -= bytes;
        Some(record)
    }

    #[inline]
    fn push(&mut self, mut record: Box<BlockRecord>) -> Kept {
        let bytes = record.allocated;
        if bytes > SMALL_MAX {
            return self.hot.replace(record).map_or(Kept::Yes, Kept::InPlaceOf);
        }
        if self.small_bytes + bytes > self.small_bytes_max {
            return Kept::Full(record);
        }
        let slot = &mut self.small[to_usize(bytes / GRANULARITY)];
        record.next = slot.take();
        *slot = Some(record);
        self.small_bytes += bytes;
        Kept::Yes
    }

    fn pop_any(&mut self) -> Option<Box<BlockRecord>> {
        if let Some(record) = self.hot.take() {
            return Some(record);
        }
        if self.small_bytes == 0 {
            return None;
        }
        let units = self.small.iter().position(Option::is_some)?;
        self.pop(units as u64 * GRANULARITY)
    }
}

/// A thread's lanes, the one used last in front.
struct ThreadLanes {
    lanes: Vec<(u64, StreamId, Arc<Lane>)>,
}

impl Drop for ThreadLanes {
    fn drop(&mut self) {
        for (_, _, lane) in &self.lanes {
            flush_to_pool(lane);
        }
    }
}

thread_local! {
    static LANES: RefCell<ThreadLanes> = const { RefCell::new(ThreadLanes { lanes: Vec::new() }) };
}

/// Calls `with` with the calling thread's lane for `stream` in pool number `pool` and with `value`; makes a
/// lane and shows it to `register` if there is none. Gives `value` back when the thread is going down.
#[inline]
pub(super) fn with_lane<T, R>(
    (pool, stream): (u64, StreamId),
    value: T,
    register: impl FnOnce(&T, &Arc<Lane>),
    with: impl FnOnce(&Lane, T) -> R,
) -> Result<R, T> {
    let mut value = Some(value);
    let mut take = || value.take().expect("the value is taken once");
    let outcome = LANES.try_with(|lanes| {
        let lanes = &mut lanes.borrow_mut().lanes;
        let value = take();
        match lanes.first() {
            Some((p, s, lane)) if *p == pool && *s == stream => with(lane, value),
            _ => with(
                find(lanes, pool, stream, |lane| register(&value, lane)),
                value,
            ),
        }
    });
    outcome.map_err(|_| take())
}

#[cold]
fn find(
    lanes: &mut Vec<(u64, StreamId, Arc<Lane>)>,
    pool: u64,
    stream: StreamId,
    register: impl FnOnce(&Arc<Lane>),
) -> &Lane {
    let position = lanes
        .iter()
        .position(|(p, s, _)| *p == pool && *s == stream);
    let position = position.unwrap_or_else(|| {
        // Lanes of pools that are gone have no other holder.
        lanes.retain(|(_, _, lane)| Arc::strong_count(lane) > 1);
        let lane = Arc::new(Lane::new());
        register(&lane);
        lanes.push((pool, stream, lane));
        lanes.len() - 1
    });
    lanes.swap(0, position);
    &lanes[0].2
}

/// Gives every block of the calling thread's lane back to the pool.
#[cold]
pub(super) fn flush_thread_lane(key: (u64, StreamId)) {
    if let Some(lane) = existing(key) {
        flush_to_pool(&lane);
    }
}

/// Gives the block in the hot slot of the calling thread's lane back to the pool when a request of `bytes`
/// could not use it but might be met by what it merges to.
pub(super) fn give_up_hot(key: (u64, StreamId), bytes: u64) {
    if bytes <= SMALL_MAX {
        return;
    }
    let hot = existing(key).and_then(|lane| lane.slots.lock().hot.take());
    if let Some(record) = hot {
        pool::free_in_pool(record, Counted::Yes);
    }
}

fn existing((pool, stream): (u64, StreamId)) -> Option<Arc<Lane>> {
    let found = LANES.try_with(|lanes| {
        let lanes = &lanes.borrow().lanes;
        let found = lanes.iter().find(|(p, s, _)| *p == pool && *s == stream);
        found.map(|(_, _, lane)| lane.clone())
    });
    found.ok().flatten()
}

/// Calls `visit` with each lane of the calling thread in pool number `pool`.
pub(super) fn for_each_of_thread(pool: u64, mut visit: impl FnMut(&Lane)) {
    // A thread that is going down has flushed its lanes; the pool folds them when it next looks at all.
    let _ = LANES.try_with(|lanes| {
        let lanes = &lanes.borrow().lanes;
        lanes
            .iter()
            .filter(|(p, ..)| *p == pool)
            .for_each(|(.., lane)| visit(lane));
    });
}

/// Gives every block of a lane back to its pool. Each goes from the lane to the pool's queue under the lane's
/// lock: whoever flushes all lanes and then looks into the queue misses none.
fn flush_to_pool(lane: &Lane) {
    let mut pool = None;
    lane.flush(Close::No, |record| {
        pool = Some(pool::leave(record, Counted::Yes))
    });
    if let Some(pool) = pool {
        pool.take_in_left();
    }
}
