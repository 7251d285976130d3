//! The blocks that a thread keeps of a pool, so that it can free and allocate without the pool's lock.
//!
//! A [`ThreadCache`] has a [`StreamCache`] per stream. The one used last is in *front*, and only that one serves the
//! fast path. Blocks that a stream cache has no room for go to the *overflow*. The pool takes them back when the
//! thread next holds its lock, before it looks for memory. So a free takes no lock, and a search finds the same memory
//! as if each block had been freed at once. The cache also counts what its thread allocates and frees.
//!
//! Threads that take turns share the contents of one cache, which the thread that makes a call takes over ([`registry`]).
//!
//! # Invariant
//! Nothing here runs foreign code, because that could free a block into the cache while it is being changed. Hence
//! nothing here calls a driver, which may run queued work inside the call. And nothing here drops a record, which may
//! hold the last handle of a stream or a pool: records that find no place are returned, for the caller to drop outside
//! the cache. A panic leaks the records that are being moved.
//!
//! Must not know: which thread may enter a cache, or when.

mod biased_lock;
pub(crate) mod list;
mod owned_cache;
mod record;
mod registry;
mod size;
mod stream_cache;

use std::sync::Arc;

use biased_lock::BiasedLock;
pub(crate) use list::List;
pub(crate) use owned_cache::OwnedCache;
pub(crate) use record::{BlockRecord, Home, Record};
pub(crate) use registry::Registry;
pub(crate) use size::Size;
pub(crate) use stream_cache::{Kept, StreamCache};

use crate::memory::statistics::{Counts, TagTable, Usage};
use crate::memory::types::{CacheKey, TagId};
use crate::units::MIB;
use stream_cache::{Limits, RecordStack};

/// Bytes of small blocks that a stream cache can keep in any case; see [`SHARE`].
const SMALL_BYTES_MIN: u64 = MIB;
/// A stream cache can keep one part in this many of the pool's reserved bytes. Measured: no cost in peak memory.
const SHARE: u64 = 200;
/// Most stream caches behind the one in front. One more and all of them are dropped, because streams come and go.
const STREAM_CACHES_MAX: usize = 16;
/// Most blocks in the overflow. Other threads reach them only by emptying the cache, as with the blocks in stream
/// caches.
const OVERFLOW_MAX: u32 = 16;
/// Most bytes in the overflow: this many, or one part in [`OVERFLOW_SHARE`] of the pool's reserved bytes if that is
/// more. A thread that only frees must not hold back much.
const OVERFLOW_BYTES_MIN: u64 = 32 * MIB;
const OVERFLOW_SHARE: u64 = 32;

/// Why the fast path found no block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss<T = ()> {
    /// The stream cache is in front, but has no block of that size. `T` is the cache that was searched.
    Here(T),
    /// The stream cache was not searched.
    Elsewhere,
}

#[derive(Debug)]
pub(crate) struct ThreadCache<H: Home> {
    /// The stream cache used last. Its key is [`CacheKey::VACANT`] if there is none.
    front: Box<StreamCache<H>>,
    others: Vec<Box<StreamCache<H>>>,
    overflow: List<H>,
    overflow_len: u32,
    overflow_bytes: u64,
    limits: Limits,
    /// A closed cache keeps no more blocks.
    pub(crate) is_closed: bool,
    counts: Counts,
    /// Calls counted up to the last fold.
    calls_folded: u64,
}

impl<H: Home> ThreadCache<H> {
    pub(crate) fn new(is_closed: bool) -> Self {
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
            is_closed,
            counts: Counts::default(),
            calls_folded: 0,
        }
    }

    /// Brings the stream cache `key` to the front; returns whether there is one.
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

    /// Puts a new stream cache in front. If there are too many behind it, moves their blocks to the overflow and
    /// returns them, to be dropped outside the cache. Returns `None` if the cache is closed.
    pub(crate) fn add(&mut self, cache: Box<StreamCache<H>>) -> Option<Vec<Box<StreamCache<H>>>> {
        if self.is_closed {
            return None;
        }
        let mut removed = Vec::new();
        if self.others.len() == STREAM_CACHES_MAX {
            removed = std::mem::take(&mut self.others);
            for cache in &mut removed {
                cache.drain(|record| list::push(&mut self.overflow, record));
            }
        }
        let before = std::mem::replace(&mut self.front, cache);
        self.others.push(before);
        Some(removed)
    }

    /// Takes a block from the front stream cache. Misses if the front is not `key`, if it has no block of that size, or
    /// if the thread is counting under another tag.
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
        record.size.set_request((requested, bytes), tag);
        self.counts.allocate(requested, bytes);
        Ok(record)
    }

    /// Takes a block from the front stream cache, whatever its key, and switches the counters to `tag` first.
    pub(crate) fn take_in_front(
        &mut self,
        tag: TagId,
        sizes: (u64, u64),
    ) -> Result<Record<H>, Miss> {
        self.counts.turn_to(tag);
        self.take(self.front.key, tag, sizes)
    }

    /// Counts a free and keeps the block in the front stream cache. Returns [`Kept::Not`] if the front belongs to
    /// another stream, or if the thread is counting under another tag.
    #[inline]
    pub(crate) fn keep(&mut self, record: Record<H>) -> Kept<H> {
        if self.front.key != record.key || !self.counts.is_run_of(record.size.tag()) {
            return Kept::Not(record);
        }
        self.keep_counted(record)
    }

    /// As [`keep`](Self::keep), for a block that belongs in the front stream cache; switches the counters to its tag
    /// first.
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
            // Under contention, other streams should see the memory at once.
            Kept::Yes if self.limits.is_contended => self.check_overflow(),
            kept => kept,
        }
    }

    /// Whether the pool should take the overflow back now. Under contention, only one large block stays.
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

    /// The pool that the overflow belongs to; `None` if the overflow is empty.
    pub(crate) fn overflow_home(&self) -> Option<Arc<H>> {
        self.overflow.as_ref()?.shared.clone()
    }

    #[inline]
    pub(crate) fn has_overflow(&self) -> bool {
        self.overflow.is_some()
    }

    /// Bytes of the blocks in the front stream cache.
    #[inline]
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.front.kept_bytes()
    }

    /// Takes a free record from the front stream cache.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.front.take_free_record()
    }

    /// Keeps a free record in the stream cache of its stream. A record without a place goes to `refused`, to be dropped
    /// outside the cache: it holds its stream.
    #[inline]
    pub(crate) fn keep_free_record(&mut self, record: Record<H>, refused: &mut List<H>) {
        if let Some(record) = self.front.keep_free_record(record) {
            self.keep_free_record_elsewhere(record, refused);
        }
    }

    /// Counts an allocation that no stream cache served.
    #[inline]
    pub(crate) fn count(&mut self, tag: TagId, requested: u64, allocated: u64) {
        self.counts.turn_to(tag);
        self.counts.allocate(requested, allocated);
    }

    /// Takes the overflow, the block freed last first.
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
        let rejected = match cache {
            Some(cache) => cache.keep_free_record(record),
            None => Some(record),
        };
        if let Some(record) = rejected {
            list::push(refused, record);
        }
    }

    /// Moves the large blocks of all stream caches to the overflow.
    pub(crate) fn overflow_large(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain_large(|record| list::push(overflow, record));
        }
    }

    /// Moves all blocks of the front stream cache to the overflow, and then `record`, for which it has no room.
    pub(crate) fn overflow_front(&mut self, record: Record<H>) {
        let overflow = &mut self.overflow;
        self.front.drain(|record| list::push(overflow, record));
        list::push(overflow, record);
    }

    /// Moves all blocks of all stream caches to the overflow.
    pub(crate) fn overflow_all(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain(|record| list::push(overflow, record));
        }
    }

    /// Takes the free records of every stream cache.
    pub(crate) fn take_free_records(&mut self) -> Vec<RecordStack<H>> {
        let caches = self.others.iter_mut().chain([&mut self.front]);
        caches.map(|cache| cache.take_free_records()).collect()
    }

    /// Removes all stream caches, which must hold no blocks. The caller drops them, and their free records, outside the
    /// cache.
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
        self.calls_folded += self.counts.calls();
        self.counts.fold_into(usage, tags);
    }

    /// Allocations and frees counted so far.
    pub(crate) fn calls(&self) -> u64 {
        self.calls_folded + self.counts.calls()
    }

    /// Sets the limits for a pool that has reserved `held` bytes. `is_contended`: other streams want memory that they
    /// could not get.
    pub(crate) fn set_limits(&mut self, held: u64, is_contended: bool) {
        self.limits = Limits {
            small_bytes: SMALL_BYTES_MIN.max(held / SHARE),
            is_contended,
            overflow_bytes: OVERFLOW_BYTES_MIN.max(held / OVERFLOW_SHARE),
        };
    }
}
