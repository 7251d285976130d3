//! Lanes: freed blocks kept by the thread that freed them, for its next allocation on the same stream.
//!
//! A lane keeps blocks of up to [`SMALL_MAX`] in one list a size, last in, first out, and the two large
//! blocks freed last, the *hot* ones: one large allocation in four is of the size of one of these. What it
//! holds counts as reserved, not as allocated. It also keeps *blanks*, the records of blocks that went back
//! to the pool, so that the next allocation touches no reference count.
//!
//! Must not know: threads, locks.

use super::list::{List, pop, push};
use super::record::{Home, Record};
use crate::memory::types::{CacheKey, GRANULARITY, SMALL_MAX};
use crate::units::to_usize;

const SIZES: usize = to_usize(SMALL_MAX / GRANULARITY) + 1;

/// Most blanks a lane keeps. As many blocks were in use at once.
const FREE_RECORDS_MAX: usize = 1 << 16;

/// Records of which nothing need be read to take one: they may have been here for long.
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

/// How much a lane may keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Bytes of small blocks.
    pub(super) small_bytes: u64,
    /// Whether other streams ask for memory: then one large block is enough.
    pub(super) is_contended: bool,
    /// Bytes of large blocks that wait for the pool to take them back.
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

    /// Keeps a block; gives up what has no room.
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

/// What became of a block that a lane was to keep. What comes back goes to the pool.
#[derive(Debug)]
pub(crate) enum Kept<H: Home> {
    /// The lane has it.
    Yes,
    /// The lane has it, in place of another.
    InPlaceOf(Record<H>),
    /// The lane has it, and the pool should take back what is left.
    OverBudget,
    /// The lane is full. It should be emptied: what it holds is not what is asked for.
    Full(Record<H>),
    /// The lane is not for such blocks.
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

    /// Takes a block of exactly `bytes`, which are rounded.
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

    /// Gives up the older of the large blocks.
    pub(super) fn take_older(&mut self) -> List<H> {
        self.large.older.take()
    }

    /// Bytes of the blocks here.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.small_bytes + self.large.bytes()
    }

    /// Gives up the large blocks, each to `give`: a request that none fits might be met by what they merge to.
    pub(super) fn drain_large(&mut self, give: impl FnMut(Record<H>)) {
        self.large.drain(give);
    }

    /// Empties the lane, each block to `give`.
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

    /// Gives up the records whose blocks are gone.
    pub(crate) fn take_free_records(&mut self) -> RecordStack<H> {
        std::mem::take(&mut self.free_records)
    }

    /// A record of this stream whose block is gone.
    #[inline]
    pub(crate) fn take_free_record(&mut self) -> Option<Record<H>> {
        self.free_records.pop()
    }

    /// Keeps the record of a block that is gone. Gives it back if it is another lane's or there are too many.
    #[inline]
    pub(crate) fn keep_free_record(&mut self, record: Record<H>) -> Option<Record<H>> {
        if record.key != self.key || self.free_records.len() == FREE_RECORDS_MAX {
            return Some(record);
        }
        self.free_records.push(record);
        None
    }
}
