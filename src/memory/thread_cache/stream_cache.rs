//! The stream cache: freed blocks that a thread keeps for its next allocation on the same stream.
//!
//! Blocks of up to [`SMALL_MAX`] are kept in one list per size, last in, first out. Of larger blocks, only the two
//! freed last are kept, in two slots: one large allocation in four has the size of one of these. Kept blocks count as
//! reserved, not as allocated. A stream cache also keeps *free records*: the records of blocks that went back to the
//! pool. An allocation that reuses one touches no reference count.
//!
//! Must not know: threads, locks.

use super::list::{List, pop, push};
use super::record::{Home, Record};
use crate::memory::types::{CacheKey, GRANULARITY, SMALL_MAX};
use crate::units::to_usize;

const SIZES: usize = to_usize(SMALL_MAX / GRANULARITY) + 1;

/// Most free records of a stream cache. To have that many, the thread had as many blocks in use at once.
const FREE_RECORDS_MAX: usize = 1 << 16;

/// A stack of free records. Unlike a [`List`], it can be popped without reading the record, which has likely left the
/// processor's caches.
pub(crate) type RecordStack<H> = Vec<Record<H>>;

/// The blocks that a thread keeps for one stream.
#[derive(Debug)]
pub(crate) struct StreamCache<H: Home> {
    pub(crate) key: CacheKey,
    /// By size in units: a list that starts with the block freed last.
    small: [List<H>; SIZES],
    large: LargeSlots<H>,
    small_bytes: u64,
    free_records: RecordStack<H>,
}

/// How much a thread cache can keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most bytes of small blocks in one stream cache.
    pub(super) small_bytes: u64,
    /// Whether other streams want memory that they could not get. Then a stream cache keeps only one large block.
    pub(super) is_contended: bool,
    /// Most bytes of large blocks in the overflow.
    pub(super) overflow_bytes: u64,
}

/// The large blocks freed last.
#[derive(Debug)]
struct LargeSlots<H: Home> {
    newest: List<H>,
    older: List<H>,
}

impl<H: Home> LargeSlots<H> {
    /// Takes a block of exactly `bytes`, of two the one freed last.
    #[inline]
    fn take(&mut self, bytes: u64) -> List<H> {
        let fits = |record: &mut Record<H>| record.size.is_of(bytes);
        self.newest
            .take_if(fits)
            .or_else(|| self.older.take_if(fits))
    }

    /// Keeps a block and returns the one that it displaces.
    #[inline]
    fn keep(&mut self, record: Record<H>) -> List<H> {
        let previous = self.newest.replace(record)?;
        self.older.replace(previous)
    }

    fn drain(&mut self, sink: impl FnMut(Record<H>)) {
        let all = [self.older.take(), self.newest.take()];
        all.into_iter().flatten().for_each(sink);
    }

    fn bytes(&self) -> u64 {
        let all = [&self.older, &self.newest].into_iter().flatten();
        all.map(|record| record.size.allocated()).sum()
    }
}

/// The outcome of keeping a block. A record that is returned goes to the pool.
#[derive(Debug)]
pub(crate) enum Kept<H: Home> {
    /// The block was kept.
    Yes,
    /// The block was kept and displaced this one.
    InPlaceOf(Record<H>),
    /// The block was kept, and the pool should take back the overflow.
    OverBudget,
    /// The stream cache is full. Empty it: it holds other sizes than the thread allocates.
    Full(Record<H>),
    /// This cache cannot keep the block.
    Not(Record<H>),
}

impl<H: Home> StreamCache<H> {
    pub(crate) fn new(key: CacheKey) -> Box<Self> {
        Box::new(Self {
            key,
            small: [const { None }; SIZES],
            large: LargeSlots {
                newest: None,
                older: None,
            },
            small_bytes: 0,
            free_records: RecordStack::new(),
        })
    }

    /// Takes a block of exactly `bytes`, a multiple of [`GRANULARITY`].
    #[inline]
    pub(crate) fn take(&mut self, bytes: u64) -> Option<Record<H>> {
        if bytes > SMALL_MAX {
            return self.large.take(bytes);
        }
        let list = &mut self.small[to_usize(bytes / GRANULARITY)];
        let record = pop(list)?;
        self.small_bytes -= bytes;
        Some(record)
    }

    /// Keeps a block, within the limits.
    #[inline]
    pub(crate) fn keep(&mut self, record: Record<H>, limits: Limits) -> Kept<H> {
        let bytes = record.size.allocated();
        if bytes > SMALL_MAX {
            return match self.large.keep(record) {
                None => Kept::Yes,
                Some(other) => Kept::InPlaceOf(other),
            };
        }
        if self.small_bytes + bytes > limits.small_bytes {
            return Kept::Full(record);
        }
        self.small_bytes += bytes;
        push(&mut self.small[to_usize(bytes / GRANULARITY)], record);
        Kept::Yes
    }

    /// Takes the older of the two large blocks.
    pub(super) fn take_older(&mut self) -> List<H> {
        self.large.older.take()
    }

    /// Bytes of all kept blocks.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.small_bytes + self.large.bytes()
    }

    /// Passes the large blocks to `sink`. Merged with their neighbors, they may serve a request that none of them fits.
    pub(super) fn drain_large(&mut self, sink: impl FnMut(Record<H>)) {
        self.large.drain(sink);
    }

    /// Passes all blocks to `sink`.
    pub(crate) fn drain(&mut self, mut sink: impl FnMut(Record<H>)) {
        self.large.drain(&mut sink);
        if self.small_bytes == 0 {
            return;
        }
        for list in self.small.iter_mut() {
            while let Some(record) = pop(list) {
                sink(record);
            }
        }
        self.small_bytes = 0;
    }

    /// Takes all free records.
    pub(crate) fn take_free_records(&mut self) -> RecordStack<H> {
        std::mem::take(&mut self.free_records)
    }

    /// Takes a free record, which is of this stream.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.free_records.pop()
    }

    /// Keeps a free record. Returns it if it belongs to another stream cache or if there are too many.
    #[inline]
    pub(crate) fn keep_free_record(&mut self, record: Record<H>) -> Option<Record<H>> {
        if record.key != self.key || self.free_records.len() == FREE_RECORDS_MAX {
            return Some(record);
        }
        self.free_records.push(record);
        None
    }
}
