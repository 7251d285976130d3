//! Memory from the driver, divided into blocks.
//!
//! A [`Backend`] places blocks. [`PagedBackend`] maps pages and stitches large blocks from scattered ones;
//! [`SegmentedBackend`] carves plain allocations where the device cannot map pages. [`Heaps`] has the backends of a
//! pool: the default one, and one for each private pool. What a private pool leaves is [`SpareMemory`].
//!
//! Words: a *stitched mapping* gives pages a second address, a *reservation* is a range of addresses that mappings are
//! cut from. Invariant: the mapped pages of a page heap are exactly the pages that its backend holds. Must not know:
//! threads, the pool's lock.

use std::collections::BTreeMap;
use std::fmt::Debug;

use crate::driver::{DevicePtr, PageHandle};
use crate::error::Result;
use crate::memory::streams::Fences;
use crate::memory::types::{Fence, Location, PAGE, Placement, Refusal, Search, StreamIndex};

mod address_space;
mod device_pages;
mod heaps;
mod mappings;
mod paged;
mod segments;
mod small_region;
mod stitch;

pub(crate) use device_pages::DevicePages;
pub(crate) use heaps::Heaps;
pub(crate) use paged::PagedBackend;
pub(crate) use segments::SegmentedBackend;

/// Memory that no backend places blocks in: held from the driver, complete, and used before new memory is taken.
/// Dropped private pools leave it.
#[derive(Debug, Default)]
pub(crate) struct SpareMemory {
    /// Unmapped pages.
    pub(crate) pages: Vec<PageHandle>,
    /// Base and bytes of plain allocations.
    pub(crate) segments: Vec<(DevicePtr, u64)>,
    /// Pages that the driver refused to take back. They count as returned and are offered again.
    unreturned: Vec<PageHandle>,
}

impl SpareMemory {
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.segments.is_empty() && self.unreturned.is_empty()
    }

    /// The number of driver allocations, and their bytes.
    pub(crate) fn count(&self) -> (u64, u64) {
        let pages = self.pages.len() as u64;
        let segments: u64 = self.segments.iter().map(|(_, bytes)| bytes).sum();
        (pages + self.segments.len() as u64, pages * PAGE + segments)
    }
}

/// Sums over what a backend holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Driver allocations held, and their bytes.
    pub(crate) segments: u64,
    pub(crate) reserved_bytes: u64,
    /// Driver allocations made and returned since the start.
    pub(crate) device_allocs: u64,
    pub(crate) device_frees: u64,
}

impl Totals {
    /// Counts what another backend has taken from the driver.
    fn take_in(&mut self, spares: &SpareMemory) {
        let (segments, bytes) = spares.count();
        self.segments += segments;
        self.reserved_bytes += bytes;
    }

    /// Counts what went to another backend.
    fn give_out(&mut self, spares: &SpareMemory) {
        let (segments, bytes) = spares.count();
        self.segments -= segments;
        self.reserved_bytes -= bytes;
    }

    /// Counts a segment that was returned.
    pub(crate) fn returned(&mut self, bytes: u64) {
        self.segments -= 1;
        self.reserved_bytes -= bytes;
        self.device_frees += 1;
    }
}

/// Memory taken from a driver, placed in blocks.
pub(crate) trait Backend: Debug + Send {
    /// Sets the most bytes that the backend may hold from now on; what it holds already stays.
    fn set_limit(&mut self, bytes: u64);

    /// Places a block of `bytes`, as in a [`Search`], in memory that is free for the stream `owner` at once, while
    /// `deferred` bytes wait for other streams. Calls no driver.
    fn place(&mut self, owner: StreamIndex, bytes: u64, deferred: u64) -> Option<Placement>;

    /// Places a block by all means except waiting on the host: other streams' memory if the reuse policy allows it, new
    /// memory, stitching.
    fn find(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal>;

    /// Takes back a block of `bytes`. Its owner may have the memory at once, other streams after `fence`, which is a
    /// fence of the owner. Calls no driver.
    fn free(&mut self, location: Location, bytes: u64, fence: Fence);

    /// Makes free memory unowned if its last use is known to be complete.
    fn merge_complete(&mut self, fences: &mut Fences);

    /// Makes the free memory of `owner` unowned. That stream was dropped and has run all it was given.
    fn release_stream(&mut self, owner: StreamIndex);

    /// Whether no memory, free or in blocks, belongs to `owner`.
    fn holds_nothing_of(&self, owner: StreamIndex) -> bool;

    /// Returns to the driver what is idle as a whole and known to be complete, until at most `keep` bytes are held.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()>;

    /// Gives up what is idle as a whole and complete (see [`Fences::passed_by_now`]), for another backend to take in.
    /// Returns nothing to the driver.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()>;

    /// Holds `spares` from now on, and uses them before it takes more from the driver.
    fn take_in(&mut self, spares: SpareMemory);

    /// Takes the unused spare memory out.
    fn take_spares(&mut self) -> SpareMemory;

    /// Whether any free memory can serve any search. Otherwise some can only after it went back to the driver.
    fn shares_free_memory(&self) -> bool;

    /// Free bytes by stream whose passing would make them usable by `owner`, or returnable if that helps.
    fn bytes_behind(&self, owner: StreamIndex, fences: &Fences) -> BTreeMap<StreamIndex, u64>;

    /// Free bytes that `owner` can use for one block as they are.
    fn bytes_free_for(&self, owner: StreamIndex, fences: &Fences) -> u64;

    /// Bytes of the largest free block of any stream.
    fn largest_free(&self) -> u64;

    /// Free blocks in partly used segments, and their bytes: free, but not returnable.
    fn inactive_split(&self) -> (u64, u64);

    fn totals(&self) -> Totals;

    /// Walks every structure and panics if an invariant is broken; returns the bytes in blocks.
    fn check_invariants(&self) -> u64;
}
