//! What is in a thread's cache of a pool: a lane per stream, blocks on their way back, counters.
//!
//! The lane used last is in *front*; all that is fast happens there. Large blocks that a lane has no room for
//! are *left*: the pool takes them back when the thread has its lock the next time, before it looks for memory.
//! So freeing takes no lock, and what is found is what would have been found had they been freed at once.
//!
//! Nothing here runs code of others, which could free a block of this very cache while it is being changed. So nothing
//! calls a driver, which may run work inside a call, and no record is dropped: with it may go the last handle of a
//! stream or a pool. Records without a place are handed out, for the caller to drop outside. A panic leaks the records
//! that are on their way.
//!
//! Must not know: who may enter.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::counts::Counts;
use super::lane::{self, Blanks, Kept, Lane, LaneKey, Limits, List};
use super::packed::Size;
use super::pool::{Shared, new_record};
use super::record::Record;
use super::state::State;
use super::tags::TagId;
use super::wanted::{Found, Wanted};
use crate::units::MIB;

/// Bytes of small blocks that every lane may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A lane may keep one part in this many of what the pool holds: measured to cost nothing in peak memory.
const SHARE: u64 = 200;
/// Lanes beside the one in front, before they are forgotten: streams may come and go.
const LANES_MAX: usize = 16;
/// Blocks that wait for the pool to take them back. Other threads see them as they see what lanes keep.
const LEFT_MAX: u32 = 16;
/// Bytes that may wait so in any case, and the part of what the pool holds: a thread that only frees is not to hold
/// back much.
const LEFT_BYTES_MIN: u64 = 32 * MIB;
const LEFT_SHARE: u64 = 32;

/// Why the fast way to a block ended without one. After the first, `T` is what was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss<T = ()> {
    /// The lane, which is in front, has none of that size.
    Here(T),
    /// It was not looked at.
    Elsewhere,
}

#[derive(Debug)]
pub(super) struct Contents {
    /// The lane used last; one without a key if there is none.
    front: Box<Lane>,
    others: Vec<Box<Lane>>,
    left: List,
    left_len: u32,
    left_bytes: u64,
    limits: Limits,
    /// Nothing is kept any more.
    pub(super) is_closed: bool,
    counts: Counts,
}

impl Contents {
    pub(super) fn new() -> Self {
        Self {
            front: Lane::new(LaneKey::VACANT),
            others: Vec::new(),
            left: None,
            left_len: 0,
            left_bytes: 0,
            limits: Limits {
                small_bytes: SMALL_BYTES_MIN,
                is_asked: false,
                left_bytes: LEFT_BYTES_MIN,
            },
            is_closed: false,
            counts: Counts::default(),
        }
    }

    /// Whether there is a lane of this name, which is then in front.
    #[inline]
    pub(super) fn bring_to_front(&mut self, key: LaneKey) -> bool {
        if self.front.key == key {
            return true;
        }
        let Some(lane) = self.others.iter_mut().find(|lane| lane.key == key) else {
            return false;
        };
        std::mem::swap(&mut self.front, lane);
        true
    }

    /// Puts a new lane in front, unless nothing is to be kept. Gives up lanes that are too many, whose blocks are
    /// left.
    pub(super) fn add(&mut self, lane: Box<Lane>) -> Option<Vec<Box<Lane>>> {
        if self.is_closed {
            return None;
        }
        let mut gone = Vec::new();
        if self.others.len() == LANES_MAX {
            gone = std::mem::take(&mut self.others);
            for lane in &mut gone {
                lane.drain(|record| lane::push(&mut self.left, record));
            }
        }
        let before = std::mem::replace(&mut self.front, lane);
        self.others.push(before);
        Some(gone)
    }

    /// A block of the lane in front, if that is the one named, has one, and the run of counters is of `tag`.
    #[inline]
    pub(super) fn take(
        &mut self,
        key: LaneKey,
        tag: TagId,
        (requested, bytes): (u64, u64),
    ) -> Result<Record, Miss> {
        if self.front.key != key || !self.counts.is_run_of(tag) {
            return Err(Miss::Elsewhere);
        }
        let mut record = self.front.take(bytes).ok_or(Miss::Here(()))?;
        record.size.ask_again((requested, bytes), tag);
        self.counts.allocate(requested, bytes);
        Ok(record)
    }

    /// As [`take`](Self::take), of the lane that is in front, whatever was counted before.
    pub(super) fn take_of_front(&mut self, tag: TagId, sizes: (u64, u64)) -> Result<Record, Miss> {
        self.counts.turn_to(tag);
        self.take(self.front.key, tag, sizes)
    }

    /// Counts a free and keeps the block, unless the lane in front is not for it or the run of counters is of
    /// another tag.
    #[inline]
    pub(super) fn keep(&mut self, record: Record) -> Kept {
        if self.front.key != record.key || !self.counts.is_run_of(record.size.tag()) {
            return Kept::Not(record);
        }
        self.keep_counted(record)
    }

    /// As [`keep`](Self::keep), for a block that the lane in front is for, whatever was counted before.
    pub(super) fn keep_in_front(&mut self, record: Record) -> Kept {
        self.counts.turn_to(record.size.tag());
        self.keep_counted(record)
    }

    #[inline]
    fn keep_counted(&mut self, record: Record) -> Kept {
        self.counts
            .free(record.size.requested(), record.size.allocated());
        match self.front.keep(record, self.limits) {
            Kept::InPlaceOf(other) => {
                self.left_len += 1;
                self.left_bytes += other.size.allocated();
                lane::push(&mut self.left, other);
                self.look_at_left()
            }
            // Where other streams ask for memory, they are to see it at once.
            Kept::Yes if self.limits.is_asked => self.look_at_left(),
            kept => kept,
        }
    }

    /// Whether more may be left.
    #[inline]
    fn look_at_left(&mut self) -> Kept {
        if self.limits.is_asked
            && let Some(older) = self.front.take_older()
        {
            lane::push(&mut self.left, older);
        }
        let is_crowded = self.limits.is_asked
            || self.left_len >= LEFT_MAX
            || self.left_bytes > self.limits.left_bytes;
        if is_crowded && self.left.is_some() {
            Kept::Crowded
        } else {
            Kept::Yes
        }
    }

    /// The pool of what is left, if anything is.
    pub(super) fn pool_of_left(&self) -> Option<Arc<Shared>> {
        self.left.as_ref()?.shared.clone()
    }

    /// Has the pool take back what was left, and places a block in memory that is free for the stream of lane `key`
    /// at once, if need be after the large blocks went back that lanes keep. If there is none: the bytes that the lane
    /// still keeps. Records without a place go to `refused`.
    #[inline]
    pub(super) fn fetch(
        &mut self,
        shared: &Arc<Shared>,
        state: &mut State,
        key: LaneKey,
        wanted: (&Wanted<'_>, TagId),
        refused: &mut List,
    ) -> Result<Record, u64> {
        self.give_left(state, refused);
        if !self.bring_to_front(key) {
            return Err(0);
        }
        if shared.has_threads() {
            self.fold(state);
        }
        let found = self.place(shared, state, wanted);
        found.or_else(|kept| self.fetch_again(shared, state, (wanted, kept), refused))
    }

    /// Places a block after the large blocks went back that lanes keep, if they keep any beside `kept` bytes.
    #[cold]
    #[inline(never)]
    fn fetch_again(
        &mut self,
        shared: &Arc<Shared>,
        state: &mut State,
        (wanted, kept): ((&Wanted<'_>, TagId), u64),
        refused: &mut List,
    ) -> Result<Record, u64> {
        self.learn(state);
        self.leave_hot();
        if self.left.is_none() {
            return Err(kept);
        }
        self.give_all_left(state, refused);
        self.place(shared, state, wanted)
    }

    // Always: it is all that happens to most blocks that no lane had.
    #[inline(always)]
    fn place(
        &mut self,
        shared: &Arc<Shared>,
        state: &mut State,
        (wanted, tag): (&Wanted<'_>, TagId),
    ) -> Result<Record, u64> {
        let kept = self.front.kept_bytes();
        let Some(placed) = state.place(wanted, kept) else {
            return Err(kept);
        };
        self.count(tag, wanted.requested, wanted.bytes);
        let key = self.front.key;
        let spare = || {
            let mut record = state.spares.take(placed.location.owner())?;
            record.shared = Some(shared.clone());
            // As its block is to be kept by no lane where freed memory is overwritten.
            record.key = if shared.config.poison {
                LaneKey::NONE
            } else {
                key
            };
            Some(record)
        };
        let Some(mut record) = self.front.take_blank().or_else(spare) else {
            let found = Found {
                placed,
                memory: wanted.memory,
                bytes: wanted.bytes,
            };
            return Ok(new_record(found, *wanted, tag, shared));
        };
        record.ptr = placed.ptr;
        record.size = Size::new((wanted.requested, wanted.bytes), tag);
        record.location = placed.location;
        Ok(record)
    }

    /// Counts an allocation that no lane served.
    #[inline]
    pub(super) fn count(&mut self, tag: TagId, requested: u64, allocated: u64) {
        self.counts.turn_to(tag);
        self.counts.allocate(requested, allocated);
    }

    /// What was left, the latest first.
    #[inline]
    pub(super) fn take_left(&mut self) -> List {
        self.left_len = 0;
        self.left_bytes = 0;
        self.left.take()
    }

    /// Has the pool take back what was left, in that order, and keeps the records. Those without a place go to
    /// `refused`, to be dropped outside: they hold streams.
    #[inline]
    fn give_left(&mut self, state: &mut State, refused: &mut List) {
        if self.left.is_some() {
            self.give_all_left(state, refused);
        }
    }

    #[inline(never)]
    pub(super) fn give_all_left(&mut self, state: &mut State, refused: &mut List) {
        let mut left = ManuallyDrop::new(lane::reversed(self.take_left()));
        while let Some(record) = lane::pop(&mut left) {
            let record = ManuallyDrop::new(record);
            state.take_back(&record);
            let record = ManuallyDrop::into_inner(record);
            if let Some(record) = self.front.keep_blank(record) {
                self.keep_blank_elsewhere(record, refused);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn keep_blank_elsewhere(&mut self, blank: Record, refused: &mut List) {
        let lane = self.others.iter_mut().find(|lane| lane.key == blank.key);
        let back = match lane {
            Some(lane) => lane.keep_blank(blank),
            None => Some(blank),
        };
        if let Some(blank) = back {
            lane::push(refused, blank);
        }
    }

    /// Leaves the large blocks that lanes keep.
    pub(super) fn leave_hot(&mut self) {
        let left = &mut self.left;
        for lane in self.others.iter_mut().chain([&mut self.front]) {
            lane.drain_hot(|record| lane::push(left, record));
        }
    }

    /// Leaves all that the lane in front keeps, and a block that it has no room for.
    pub(super) fn leave_front(&mut self, record: Record) {
        let left = &mut self.left;
        self.front.drain(|record| lane::push(left, record));
        lane::push(left, record);
    }

    /// Leaves all that lanes keep.
    pub(super) fn leave_all(&mut self) {
        let left = &mut self.left;
        for lane in self.others.iter_mut().chain([&mut self.front]) {
            lane.drain(|record| lane::push(left, record));
        }
    }

    /// Gives up the records of blocks that are gone, by lane.
    pub(super) fn take_blanks(&mut self) -> Vec<Blanks> {
        let lanes = self.others.iter_mut().chain([&mut self.front]);
        lanes.map(|lane| lane.take_blanks()).collect()
    }

    /// Forgets all lanes, which keep no block, but for their records, which come back.
    pub(super) fn forget_lanes(&mut self) -> Vec<Box<Lane>> {
        let mut lanes = std::mem::take(&mut self.others);
        lanes.push(std::mem::replace(
            &mut self.front,
            Lane::new(LaneKey::VACANT),
        ));
        lanes
    }

    /// Folds the counters into the pool's.
    #[inline]
    pub(super) fn fold_counts(&mut self, state: &mut State) {
        self.counts.fold(state);
    }

    /// Folds the counters into the pool's, and learns how much may be kept.
    pub(super) fn fold(&mut self, state: &mut State) {
        self.learn(state);
        self.counts.fold(state);
    }

    /// Learns how much may be kept.
    pub(super) fn learn(&mut self, state: &State) {
        self.limits = Limits {
            small_bytes: SMALL_BYTES_MIN.max(state.bytes_held() / SHARE),
            is_asked: state.fences.are_asked(),
            left_bytes: LEFT_BYTES_MIN.max(state.bytes_held() / LEFT_SHARE),
        };
    }
}
