//! What the allocator's rooms have in common: sizes, identities, fences, places and requests.
//!
//! Plain data: nothing here owns memory, takes a lock or calls a driver.

mod fence;
mod ids;
mod place;
mod request;

pub(crate) use fence::{EPOCH_BITS, FIRST_EPOCH, Fence, OWNER_BITS, UNOWNED};
pub(crate) use ids::{
    CacheKey, HeapId, MappingIndex, PageIndex, PoolId, SegmentIndex, StreamIndex, TagId,
};
pub(crate) use place::{Location, Place, Placement};
pub(crate) use request::{Counted, Refusal, Request, Search};

use crate::units::{KIB, align_up};

/// Bytes in a unit: the size and the offset of every block are multiples of it.
pub(crate) const GRANULARITY: u64 = 512;

/// A size or an offset in units of [`GRANULARITY`], as blocks store it. A page heap or a segment has fewer than 2^32
/// units, which is 2 TiB, so a block's entry takes half a cache line.
pub(crate) type Units = u32;

/// The index of a block in its slab.
pub(crate) type Index = u32;

/// Bytes of a page: the unit in which physical memory is taken, mapped and returned.
pub(crate) const PAGE: u64 = 2 << 20;
/// Units of a page.
pub(crate) const PAGE_UNITS: u64 = PAGE / GRANULARITY;
/// Most pages of a page heap.
pub(crate) const PAGES_MAX: u64 = Units::MAX as u64 / PAGE_UNITS;

/// Most bytes of one allocation, whatever the device has: offsets within segments and page heaps are stored in 32 bits.
pub(crate) const REQUEST_MAX: u64 = PAGES_MAX * PAGE;

/// Largest small block. Thread caches keep small blocks in lists by size, and page heaps keep them on pages of their
/// own.
pub(crate) const SMALL_MAX: u64 = 256 * KIB;

/// Bytes that a request takes in the pool; `None` if it cannot be rounded in 64 bits.
#[inline]
pub(crate) fn rounded(bytes: u64) -> Option<u64> {
    align_up(bytes, GRANULARITY)
}
