//! Lanes: freed blocks kept by the thread that freed them, for its next allocation on the same stream.
//!
//! A lane keeps blocks of up to [`SMALL_MAX`] in one list a size, last in, first out, and the two large
//! blocks freed last, the *hot* ones: one large allocation in four is of the size of one of these. What it
//! holds counts as reserved, not as allocated. It also keeps *blanks*, the records of blocks that went back
//! to the pool, so that the next allocation touches no reference count.
//!
//! Must not know: threads, locks.

use super::arena::GRANULARITY;
use super::record::Record;
use crate::units::{KIB, StreamId, to_usize};

/// Names a lane in the process: a pool and a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LaneKey(u64);

impl LaneKey {
    // No pool has the last number (`Numbers` does not give it out), so no pool and stream have these two.
    /// Of a lane that keeps nothing: no block has it.
    pub(super) const VACANT: Self = Self(u64::MAX);
    /// Of a block that no lane may keep as it is: no lane has it.
    pub(super) const NONE: Self = Self(u64::MAX - 1);

    #[inline]
    pub(super) fn new(pool: PoolId, stream: StreamId) -> Self {
        Self(pool.0 | u64::from(stream.0))
    }
}

/// A pool's number, unique in the process: in the upper half, which leaves the lower one to a stream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PoolId(u64);

impl PoolId {
    pub(super) fn new(number: u32) -> Self {
        Self(u64::from(number) << 32)
    }
}

/// Largest block kept in the lists by size.
pub(super) const SMALL_MAX: u64 = 256 * KIB;
const SIZES: usize = to_usize(SMALL_MAX / GRANULARITY) + 1;

/// Most blanks a lane keeps. As many blocks were in use at once.
const BLANKS_MAX: usize = 1 << 16;

/// A list of records, linked through them.
pub(super) type List = Option<Record>;

/// Records of which nothing need be read to take one: they may have been here for long.
pub(super) type Blanks = Vec<Record>;

/// The blocks that a thread keeps for one stream.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) key: LaneKey,
    /// By size in units: the block freed last, which links to the one before.
    small: [List; SIZES],
    hot: Hot,
    small_bytes: u64,
    blanks: Blanks,
}

/// How much a lane may keep.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Bytes of small blocks.
    pub(super) small_bytes: u64,
    /// Whether other streams ask for memory: then one large block is enough.
    pub(super) is_asked: bool,
    /// Bytes of large blocks that wait for the pool to take them back.
    pub(super) left_bytes: u64,
}

/// The large blocks freed last.
#[derive(Debug, Default)]
struct Hot {
    newest: List,
    older: List,
}

impl Hot {
    /// The block of exactly `bytes` that was freed last.
    #[inline]
    fn take(&mut self, bytes: u64) -> List {
        let fits = |record: &mut Record| record.size.is_of(bytes);
        self.newest
            .take_if(fits)
            .or_else(|| self.older.take_if(fits))
    }

    /// Keeps a block; gives up what has no room.
    #[inline]
    fn keep(&mut self, record: Record) -> List {
        let before = self.newest.replace(record)?;
        self.older.replace(before)
    }

    fn drain(&mut self, give: impl FnMut(Record)) {
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
pub(super) enum Kept {
    /// The lane has it.
    Yes,
    /// The lane has it, in place of another.
    InPlaceOf(Record),
    /// The lane has it, and the pool should take back what is left.
    Crowded,
    /// The lane is full. It should be emptied: what it holds is not what is asked for.
    Full(Record),
    /// The lane is not for such blocks.
    Not(Record),
}

impl Lane {
    pub(super) fn new(key: LaneKey) -> Box<Self> {
        Box::new(Self {
            key,
            small: [const { None }; SIZES],
            hot: Hot::default(),
            small_bytes: 0,
            blanks: Blanks::new(),
        })
    }

    /// Takes a block of exactly `bytes`, which are rounded.
    #[inline]
    pub(super) fn take(&mut self, bytes: u64) -> Option<Record> {
        if bytes > SMALL_MAX {
            return self.hot.take(bytes);
        }
        let list = &mut self.small[to_usize(bytes / GRANULARITY)];
        let record = pop(list)?;
        self.small_bytes -= bytes;
        Some(record)
    }

    /// Keeps a block, within the limits.
    #[inline]
    pub(super) fn keep(&mut self, record: Record, limits: Limits) -> Kept {
        let bytes = record.size.allocated();
        if bytes > SMALL_MAX {
            return match self.hot.keep(record) {
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
    pub(super) fn take_older(&mut self) -> List {
        self.hot.older.take()
    }

    /// Bytes of the blocks here.
    pub(super) fn kept_bytes(&self) -> u64 {
        self.small_bytes + self.hot.bytes()
    }

    /// Gives up the large blocks, each to `give`: a request that none fits might be met by what they merge to.
    pub(super) fn drain_hot(&mut self, give: impl FnMut(Record)) {
        self.hot.drain(give);
    }

    /// Empties the lane, each block to `give`.
    pub(super) fn drain(&mut self, mut give: impl FnMut(Record)) {
        self.hot.drain(&mut give);
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
    pub(super) fn take_blanks(&mut self) -> Blanks {
        std::mem::take(&mut self.blanks)
    }

    /// A record of this stream whose block is gone.
    #[inline]
    pub(super) fn take_blank(&mut self) -> Option<Record> {
        self.blanks.pop()
    }

    /// Keeps the record of a block that is gone. Gives it back if it is another lane's or there are too many.
    #[inline]
    pub(super) fn keep_blank(&mut self, blank: Record) -> Option<Record> {
        if blank.key != self.key || self.blanks.len() == BLANKS_MAX {
            return Some(blank);
        }
        self.blanks.push(blank);
        None
    }
}

/// Takes the record out that was put in last.
#[inline]
pub(super) fn pop(list: &mut List) -> Option<Record> {
    let next = list.as_mut()?.next.take();
    std::mem::replace(list, next)
}

/// Puts a record in, which is in no other list.
#[inline]
pub(super) fn push(list: &mut List, mut record: Record) {
    std::mem::swap(&mut record.next, list);
    // What is replaced is the record's own `next` of before: none, so that there is nothing to drop.
    std::mem::forget(list.replace(record));
}

/// The records from the last to the first.
#[inline]
pub(super) fn reversed(mut list: List) -> List {
    let mut reversed = list.take_if(|first| first.next.is_none());
    while let Some(record) = pop(&mut list) {
        push(&mut reversed, record);
    }
    reversed
}

/// Drops records one after another: a long list would drop them in as deep a recursion.
pub(super) fn drop_all(mut list: List) {
    while let Some(record) = pop(&mut list) {
        drop(record);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::super::config::PoolConfig;
    use super::super::pool::Pool;
    use crate::driver::{Device, HostConfig};
    use crate::units::Numbers;

    #[test]
    fn no_pool_gets_the_number_of_another() {
        let device = Device::host(HostConfig::default()).unwrap();
        let stream = device.create_stream().unwrap();
        let numbers = Numbers::starting_at(u32::MAX - 1, "pools");
        let make = || Pool::numbered(&device, PoolConfig::default(), &numbers);
        let last = make().unwrap();
        // Kept and found again by the thread: the keys of its lanes are none of the reserved ones.
        let ptr = last.allocate(512, &stream).unwrap().ptr();
        assert_eq!(last.allocate(512, &stream).unwrap().ptr(), ptr);
        let panic = catch_unwind(AssertUnwindSafe(make)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert_eq!(message, "all 4294967295 numbers of pools are used up");
        last.check_invariants();
    }
}
