//! What a thread keeps of a pool: a stream cache for each stream, an overflow, counters.
//!
//! The stream cache that was used last is in *front*, and the fast path uses only that one. Large blocks that it has no
//! room for go to the *overflow*. The pool takes the overflow back when the thread next holds its lock, before it looks
//! for memory. So a free takes no lock, and an allocation finds what it would have found if blocks were freed at once.
//!
//! Records are generic over their [`Home`], so nothing here knows the pool. Nothing here runs foreign code either,
//! because that could free a block of this very cache while it is being changed: it calls no driver, and drops no
//! record, which may hold the last handle of a stream or a pool. Records without a place are returned, for the caller
//! to drop outside. A panic leaks the records that are on their way.
//!
//! Must not know: who may enter (that is `owned_cache` and its caller), locks.

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

/// Bytes of small blocks that every stream cache may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A stream cache may keep one part in this many of what the pool holds. Measured: costs no peak memory.
const SHARE: u64 = 200;
/// Stream caches behind the one in front. When there are more, all of them are dropped: streams come and go.
const STREAM_CACHES_MAX: usize = 16;
/// Most blocks in the overflow. Other threads cannot use them before the pool has taken them back.
const OVERFLOW_MAX: u32 = 16;
/// Bytes that may be in the overflow in any case, and one part in so many of what the pool holds: a thread that only
/// frees must not hold back much.
const OVERFLOW_BYTES_MIN: u64 = 32 * MIB;
const OVERFLOW_SHARE: u64 = 32;

/// Why the fast path found no block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss<T = ()> {
    /// The stream cache in front is the right one, but has no block of that size. `T` is the cache.
    Here(T),
    /// The stream cache in front was not looked at.
    Elsewhere,
}

#[derive(Debug)]
pub(crate) struct ThreadCache<H: Home> {
    /// The stream cache used last; a vacant one if there is none.
    front: Box<StreamCache<H>>,
    others: Vec<Box<StreamCache<H>>>,
    overflow: List<H>,
    overflow_len: u32,
    overflow_bytes: u64,
    limits: Limits,
    /// Whether the cache keeps nothing any more.
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

    /// Brings the stream cache `key` to the front; whether there is one.
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

    /// Puts a new stream cache in front, unless the cache is closed. Returns the stream caches that are dropped for it;
    /// their blocks go to the overflow.
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

    /// A block of the stream cache in front, if that is `key`, has one, and the run of counters is of `tag`.
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

    /// As [`take`](Self::take), for the stream cache that is in front, whatever was counted before.
    pub(crate) fn take_in_front(
        &mut self,
        tag: TagId,
        sizes: (u64, u64),
    ) -> Result<Record<H>, Miss> {
        self.counts.turn_to(tag);
        self.take(self.front.key, tag, sizes)
    }

    /// Counts a free and keeps the block, unless the stream cache in front is not the block's or the run of counters is
    /// of another tag.
    #[inline]
    pub(crate) fn keep(&mut self, record: Record<H>) -> Kept<H> {
        if self.front.key != record.key || !self.counts.is_run_of(record.size.tag()) {
            return Kept::Not(record);
        }
        self.keep_counted(record)
    }

    /// As [`keep`](Self::keep), for a block that the stream cache in front is for, whatever was counted before.
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
            // Other streams lack memory: let them see this block at once.
            Kept::Yes if self.limits.is_contended => self.check_overflow(),
            kept => kept,
        }
    }

    /// Whether the pool should take the overflow back.
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

    /// The pool of the blocks in the overflow, if there are any.
    pub(crate) fn overflow_home(&self) -> Option<Arc<H>> {
        self.overflow.as_ref()?.shared.clone()
    }

    /// Whether the overflow has blocks.
    #[inline]
    pub(crate) fn has_overflow(&self) -> bool {
        self.overflow.is_some()
    }

    /// Bytes that the stream cache in front keeps.
    #[inline]
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.front.kept_bytes()
    }

    /// A free record of the stream cache in front.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.front.take_free_record()
    }

    /// Keeps a free record in the stream cache of its stream. One without a place goes to `refused`, for the caller to
    /// drop outside, because it holds its stream.
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

    /// Takes the overflow out, the latest block first.
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

    /// Moves the large blocks of all stream caches to the overflow.
    pub(crate) fn overflow_large(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain_large(|record| list::push(overflow, record));
        }
    }

    /// Moves all blocks of the stream cache in front to the overflow, and a block that it has no room for.
    pub(crate) fn overflow_front(&mut self, record: Record<H>) {
        let overflow = &mut self.overflow;
        self.front.drain(|record| list::push(overflow, record));
        list::push(overflow, record);
    }

    /// Moves all blocks to the overflow.
    pub(crate) fn overflow_all(&mut self) {
        let overflow = &mut self.overflow;
        for cache in self.others.iter_mut().chain([&mut self.front]) {
            cache.drain(|record| list::push(overflow, record));
        }
    }

    /// Takes the free records out, by stream cache.
    pub(crate) fn take_free_records(&mut self) -> Vec<RecordStack<H>> {
        let caches = self.others.iter_mut().chain([&mut self.front]);
        caches.map(|cache| cache.take_free_records()).collect()
    }

    /// Takes all stream caches out. They keep no block any more, only free records.
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

    /// Sets how much may be kept, for a pool that holds `held` bytes. `is_contended` says whether other streams lack
    /// memory.
    pub(crate) fn set_limits(&mut self, held: u64, is_contended: bool) {
        self.limits = Limits {
            small_bytes: SMALL_BYTES_MIN.max(held / SHARE),
            is_contended,
            overflow_bytes: OVERFLOW_BYTES_MIN.max(held / OVERFLOW_SHARE),
        };
    }
}
