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

mod biased_lock;
pub(crate) mod list;
mod owned_cache;
mod record;
mod size;
mod stream_cache;

use std::sync::Arc;

use biased_lock::BiasedLock;
pub(crate) use list::List;
pub(crate) use owned_cache::OwnedCache;
pub(crate) use record::{BlockRecord, Home, Record};
pub(crate) use size::Size;
pub(crate) use stream_cache::{Kept, StreamCache};

use crate::memory::statistics::{Counts, TagTable, Usage};
use crate::memory::types::{CacheKey, TagId};
use crate::units::MIB;
use stream_cache::{Limits, RecordStack};

/// Bytes of small blocks that every lane may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A lane may keep one part in this many of what the pool holds: measured to cost nothing in peak memory.
const SHARE: u64 = 200;
/// Lanes beside the one in front, before they are forgotten: streams may come and go.
const STREAM_CACHES_MAX: usize = 16;
/// Blocks that wait for the pool to take them back. Other threads see them as they see what lanes keep.
const OVERFLOW_MAX: u32 = 16;
/// Bytes that may wait so in any case, and the part of what the pool holds: a thread that only frees is not to hold
/// back much.
const OVERFLOW_BYTES_MIN: u64 = 32 * MIB;
const OVERFLOW_SHARE: u64 = 32;

/// Why the fast way to a block ended without one. After the first, `T` is what was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss<T = ()> {
    /// The lane, which is in front, has none of that size.
    Here(T),
    /// It was not looked at.
    Elsewhere,
}

#[derive(Debug)]
pub(crate) struct ThreadCache<H: Home> {
    /// The lane used last; one without a key if there is none.
    front: Box<StreamCache<H>>,
    others: Vec<Box<StreamCache<H>>>,
    overflow: List<H>,
    overflow_len: u32,
    overflow_bytes: u64,
    limits: Limits,
    /// Nothing is kept any more.
    pub(crate) is_closed: bool,
    counts: Counts,
}

impl<H: Home> ThreadCache<H> {
    pub(crate) fn new() -> Self {
        Self {
            front: StreamCache::new(CacheKey::VACANT),
            others: Vec::new(),
            overflow: None,
            overflow_len: 0,
            overflow_bytes: 0,
            limits: Limits {
                small_bytes: SMALL_BYTES_MIN,
                is_contended: false,
                overflow_bytes: OVERFLOW_BYTES_MIN,
            },
            is_closed: false,
            counts: Counts::default(),
        }
    }

    /// Whether there is a lane of this name, which is then in front.
    #[inline]
    pub(crate) fn bring_to_front(&mut self, key: CacheKey) -> bool {
        if self.front.key == key {
            return true;
        }
        let Some(cache) = self.others.iter_mut().find(|cache| cache.key == key) else {
            return false;
        };
        std::mem::swap(&mut self.front, cache);
        true
    }

    /// Puts a new lane in front, unless nothing is to be kept. Gives up lanes that are too many, whose blocks are
    /// left.
    pub(crate) fn add(&mut self, cache: Box<StreamCache<H>>) -> Option<Vec<Box<StreamCache<H>>>> {
        if self.is_closed {
            return None;
        }
        let mut gone = Vec::new();
        if self.others.len() == STREAM_CACHES_MAX {
            gone = std::mem::take(&mut self.others);
            for cache in &mut gone {
                cache.drain(|record| list::push(&mut self.overflow, record));
            }
        }
        let before = std::mem::replace(&mut self.front, cache);
        self.others.push(before);
        Some(gone)
    }

    /// A block of the lane in front, if that is the one named, has one, and the run of counters is of `tag`.
    #[inline]
    pub(crate) fn take(
        &mut self,
        key: CacheKey,
        tag: TagId,
        (requested, bytes): (u64, u64),
    ) -> Result<Record<H>, Miss> {
        if self.front.key != key || !self.counts.is_run_of(tag) {
            return Err(Miss::Elsewhere);
        }
        let mut record = self.front.take(bytes).ok_or(Miss::Here(()))?;
        record.size.ask_again((requested, bytes), tag);
        self.counts.allocate(requested, bytes);
        Ok(record)
    }

    /// As [`take`](Self::take), of the lane that is in front, whatever was counted before.
    pub(crate) fn take_in_front(
        &mut self,
        tag: TagId,
        sizes: (u64, u64),
    ) -> Result<Record<H>, Miss> {
        self.counts.turn_to(tag);
        self.take(self.front.key, tag, sizes)
    }

    /// Counts a free and keeps the block, unless the lane in front is not for it or the run of counters is of
    /// another tag.
    #[inline]
    pub(crate) fn keep(&mut self, record: Record<H>) -> Kept<H> {
        if self.front.key != record.key || !self.counts.is_run_of(record.size.tag()) {
            return Kept::Not(record);
        }
        self.keep_counted(record)
    }

    /// As [`keep`](Self::keep), for a block that the lane in front is for, whatever was counted before.
    pub(crate) fn keep_in_front(&mut self, record: Record<H>) -> Kept<H> {
        self.counts.turn_to(record.size.tag());
        self.keep_counted(record)
    }

    #[inline]
    fn keep_counted(&mut self, record: Record<H>) -> Kept<H> {
        self.counts
            .free(record.size.requested(), record.size.allocated());
        match self.front.keep(record, self.limits) {
            Kept::InPlaceOf(other) => {
                self.overflow_len += 1;
                self.overflow_bytes += other.size.allocated();
                list::push(&mut self.overflow, other);
                self.check_overflow()
            }
            // Where other streams ask for memory, they are to see it at once.
            Kept::Yes if self.limits.is_contended => self.check_overflow(),
            kept => kept,
        }
    }

    /// Whether more may be left.
    #[inline]
    fn check_overflow(&mut self) -> Kept<H> {
        if self.limits.is_contended
            && let Some(older) = self.front.take_older()
        {
            list::push(&mut self.overflow, older);
        }
        let is_over_budget = self.limits.is_contended
            || self.overflow_len >= OVERFLOW_MAX
            || self.overflow_bytes > self.limits.overflow_bytes;
        if is_over_budget && self.overflow.is_some() {
            Kept::OverBudget
        } else {
            Kept::Yes
        }
    }

    /// The pool of what is left, if anything is.
    pub(crate) fn overflow_home(&self) -> Option<Arc<H>> {
        self.overflow.as_ref()?.shared.clone()
    }

    /// Whether blocks wait for the pool to take them back.
    #[inline]
    pub(crate) fn has_overflow(&self) -> bool {
        self.overflow.is_some()
    }

    /// Bytes that the lane in front keeps.
    #[inline]
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.front.kept_bytes()
    }

    /// A record of the lane in front whose block is gone.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.front.take_free_record()
    }

    /// Keeps the record of a block that is gone, in the lane of its stream. One without a place goes to `refused`, to be
    /// dropped outside: it holds its stream.
    #[inline]
    pub(crate) fn keep_free_record(&mut self, record: Record<H>, refused: &mut List<H>) {
        if let Some(record) = self.front.keep_free_record(record) {
            self.keep_free_record_elsewhere(record, refused);
        }
    }

    /// Counts an allocation that no lane served.
    #[inline]
    pub(crate) fn count(&mut self, tag: TagId, requested: u64, allocated: u64) {
        self.counts.turn_to(tag);
        self.counts.allocate(requested, allocated);
    }

    /// What was left, the latest first.
    #[inline]
    pub(crate) fn take_overflow(&mut self) -> List<H> {
        self.overflow_len = 0;
        self.overflow_bytes = 0;
        self.overflow.take()
    }

    #[cold]
    #[inline(never)]
    fn keep_free_record_elsewhere(&mut self, record: Record<H>, refused: &mut List<H>) {
        let cache = self.others.iter_mut().find(|cache| cache.key == record.key);
        let back = match cache {
            Some(cache) => cache.keep_free_record(record),
            None => Some(record),
        };
        if let Some(record) = back {
            list::push(refused, record);
        }
    }

    /// Leaves the large blocks that lanes keep.
    pub(crate) fn overflow_large(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain_large(|record| list::push(overflow, record));
        }
    }

    /// Leaves all that the lane in front keeps, and a block that it has no room for.
    pub(crate) fn overflow_front(&mut self, record: Record<H>) {
        let overflow = &mut self.overflow;
        self.front.drain(|record| list::push(overflow, record));
        list::push(overflow, record);
    }

    /// Leaves all that lanes keep.
    pub(crate) fn overflow_all(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain(|record| list::push(overflow, record));
        }
    }

    /// Gives up the records of blocks that are gone, by lane.
    pub(crate) fn take_free_records(&mut self) -> Vec<RecordStack<H>> {
        let caches = self.others.iter_mut().chain([&mut self.front]);
        caches.map(|cache| cache.take_free_records()).collect()
    }

    /// Forgets all lanes, which keep no block, but for their records, which come back.
    pub(crate) fn forget_stream_caches(&mut self) -> Vec<Box<StreamCache<H>>> {
        let mut caches = std::mem::take(&mut self.others);
        caches.push(std::mem::replace(
            &mut self.front,
            StreamCache::new(CacheKey::VACANT),
        ));
        caches
    }

    /// Folds the counters into the pool's.
    #[inline]
    pub(crate) fn fold_counts(&mut self, usage: &mut Usage, tags: &mut TagTable) {
        self.counts.fold_into(usage, tags);
    }

    /// Sets how much may be kept, for a pool that holds `held` bytes; `is_contended` says whether other streams ask for
    /// memory.
    pub(crate) fn set_limits(&mut self, held: u64, is_contended: bool) {
        self.limits = Limits {
            small_bytes: SMALL_BYTES_MIN.max(held / SHARE),
            is_contended,
            overflow_bytes: OVERFLOW_BYTES_MIN.max(held / OVERFLOW_SHARE),
        };
    }
}
