//! Freed blocks of one stream, kept by the thread that freed them for its next allocation on that stream.
//!
//! A stream cache keeps blocks of up to [`SMALL_MAX`] in one list for each size, last in, first out, and the two large
//! blocks freed last: one large allocation in four has the size of one of these. What it keeps counts as reserved, not
//! as allocated. It also keeps *free records*, whose blocks went back to the pool, so that the next allocation changes
//! no reference count.
//!
//! Must not know: threads, locks.

use super::list::{List, pop, push};
use super::record::{Home, Record};
use crate::memory::types::{CacheKey, GRANULARITY, SMALL_MAX};
use crate::units::to_usize;

const SIZES: usize = to_usize(SMALL_MAX / GRANULARITY) + 1;

/// Most free records of a stream cache.
const FREE_RECORDS_MAX: usize = 1 << 16;

/// Free records in a vector, not a list: taking one reads nothing of the others, which may not have been touched for
/// long.
pub(crate) type RecordStack<H> = Vec<Record<H>>;

/// The blocks that a thread keeps for one stream.
#[derive(Debug)]
pub(crate) struct StreamCache<H: Home> {
    pub(crate) key: CacheKey,
    /// By size in units: the block freed last, which links to the one before.
    small: [List<H>; SIZES],
    large: LargeSlots<H>,
    small_bytes: u64,
    free_records: RecordStack<H>,
}

/// How much a stream cache may keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of small blocks.
    pub(super) small_bytes: u64,
    /// Whether other streams lack memory: then one large block is enough.
    pub(super) is_contended: bool,
    /// Bytes in the overflow.
    pub(super) overflow_bytes: u64,
}

/// The large blocks freed last.
#[derive(Debug)]
struct LargeSlots<H: Home> {
    newest: List<H>,
    older: List<H>,
}

impl<H: Home> LargeSlots<H> {
    /// The block of exactly `bytes` that was freed last.
    #[inline]
    fn take(&mut self, bytes: u64) -> List<H> {
        let fits = |record: &mut Record<H>| record.size.is_of(bytes);
        self.newest
            .take_if(fits)
            .or_else(|| self.older.take_if(fits))
    }

    /// Keeps a block; returns the one that has no room.
    #[inline]
    fn keep(&mut self, record: Record<H>) -> List<H> {
        let before = self.newest.replace(record)?;
        self.older.replace(before)
    }

    fn drain(&mut self, give: impl FnMut(Record<H>)) {
        let all = [self.older.take(), self.newest.take()];
        all.into_iter().flatten().for_each(give);
    }

    fn bytes(&self) -> u64 {
        let all = [&self.older, &self.newest].into_iter().flatten();
        all.map(|record| record.size.allocated()).sum()
    }
}

/// What became of a block that a stream cache was asked to keep. A block that is returned goes to the pool.
#[derive(Debug)]
pub(crate) enum Kept<H: Home> {
    /// It is kept.
    Yes,
    /// It is kept in place of another block.
    InPlaceOf(Record<H>),
    /// It is kept, and the pool should take the overflow back.
    OverBudget,
    /// The stream cache is full. It should be emptied: its blocks are not of the sizes that the program asks for.
    Full(Record<H>),
    /// The stream cache does not keep such blocks.
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

    /// Takes a block of exactly `bytes`, a rounded size.
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

    /// Takes the older of the large blocks out.
    pub(super) fn take_older(&mut self) -> List<H> {
        self.large.older.take()
    }

    /// Bytes of all blocks kept.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.small_bytes + self.large.bytes()
    }

    /// Gives each large block to `give`: what they merge to might serve a request that none of them fits.
    pub(super) fn drain_large(&mut self, give: impl FnMut(Record<H>)) {
        self.large.drain(give);
    }

    /// Empties the stream cache, each block to `give`.
    pub(crate) fn drain(&mut self, mut give: impl FnMut(Record<H>)) {
        self.large.drain(&mut give);
        if self.small_bytes == 0 {
            return;
        }
        for list in self.small.iter_mut() {
            while let Some(record) = pop(list) {
                give(record);
            }
        }
        self.small_bytes = 0;
    }

    /// Takes the free records out.
    pub(crate) fn take_free_records(&mut self) -> RecordStack<H> {
        std::mem::take(&mut self.free_records)
    }

    /// A free record of this stream.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.free_records.pop()
    }

    /// Keeps a free record. Returns it if it belongs to another stream or there are too many.
    #[inline]
    pub(crate) fn keep_free_record(&mut self, record: Record<H>) -> Option<Record<H>> {
        if record.key != self.key || self.free_records.len() == FREE_RECORDS_MAX {
            return Some(record);
        }
        self.free_records.push(record);
        None
    }
}
