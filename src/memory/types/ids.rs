//! Identities: streams, pages, heaps, pools, tags.

use crate::units::StreamId;

/// A stream as the owner of memory: its number in the pool's table of streams.
pub(crate) type StreamIndex = usize;

/// The number of a page in its page heap.
pub(crate) type PageIndex = usize;

/// The index of a stitched mapping in its table.
pub(crate) type MappingIndex = u32;

/// The index of a segment in its tiling.
pub(crate) type SegmentIndex = u32;

/// The number of a heap in its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HeapId(u32);

impl HeapId {
    pub(crate) const DEFAULT: Self = Self(0);

    /// The private heap in slot `slot` of the pool's list.
    pub(crate) fn private(slot: usize) -> Self {
        Self(u32::try_from(slot + 1).expect("fewer private pools than 2^32"))
    }

    /// The slot of a private heap.
    pub(crate) fn slot(self) -> usize {
        self.0 as usize - 1
    }
}

/// The number of a pool, unique in the process. It takes the upper half of the word; the lower half is free for the
/// number of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PoolId(u64);

impl PoolId {
    pub(crate) fn new(number: u32) -> Self {
        Self(u64::from(number) << 32)
    }
}

/// A pool and one of its streams: names the stream cache that keeps their blocks, unique in the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CacheKey(u64);

impl CacheKey {
    // `Numbers` never gives out the last number, so no pool and stream have these two keys.
    /// Of a stream cache that keeps nothing. No block has it.
    pub(crate) const VACANT: Self = Self(u64::MAX);
    /// Of a block that no stream cache may keep as it is.
    pub(crate) const NONE: Self = Self(u64::MAX - 1);

    #[inline]
    pub(crate) fn new(pool: PoolId, stream: StreamId) -> Self {
        Self(pool.0 | u64::from(stream.0))
    }
}

/// The number of a tag, the same in every pool of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TagId(pub(crate) u16);

impl TagId {
    /// Of blocks allocated outside any scope.
    pub(crate) const NONE: Self = Self(0);
    /// Of blocks allocated under a name that came when there were too many.
    pub(crate) const OTHER: Self = Self(1);
}
