//! Memory from the driver, divided into blocks.
//!
//! A [`Backend`] places blocks. [`PagedBackend`] maps pages and stitches large blocks from scattered ones;
//! [`SegmentedBackend`] carves plain allocations where the device cannot map pages. [`Heaps`] has the backends of a
//! pool: the default one, and one for each private pool. What a private pool leaves is [`SpareMemory`].
//!
//! Words: a *mapping* gives pages a second address, a *reservation* is a range of addresses that mappings are cut from.
//! Invariant: the mapped pages of a page heap are exactly the pages that its backend holds. Must not know: threads, the
//! pool's lock.

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
mod stitch;

pub(crate) use device_pages::DevicePages;
pub(crate) use heaps::Heaps;
pub(crate) use paged::PagedBackend;
pub(crate) use segments::SegmentedBackend;

/// Memory that lies in no backend's books: held from the driver, complete, and used before more is taken. Private
/// pools leave it when they are gone.
#[derive(Debug, Default)]
pub(crate) struct SpareMemory {
    /// Pages that are mapped nowhere.
    pub(crate) pages: Vec<PageHandle>,
    /// Base and bytes of plain allocations.
    pub(crate) segments: Vec<(DevicePtr, u64)>,
    /// Pages that the driver would not take back and that count as returned: to be offered to it again.
    unreturned: Vec<PageHandle>,
}

impl SpareMemory {
    pub(crate) fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.segments.is_empty() && self.unreturned.is_empty()
    }

    /// How many driver allocations they are, and their bytes.
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
    /// Driver allocations made and given back since the start.
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

    /// Counts a segment that was given back.
    pub(crate) fn returned(&mut self, bytes: u64) {
        self.segments -= 1;
        self.reserved_bytes -= bytes;
        self.device_frees += 1;
    }
}

/// Memory taken from a driver, placed in blocks.
pub(crate) trait Backend: Debug + Send {
    /// Sets the most bytes it may hold from now on; what it holds already stays.
    fn set_limit(&mut self, bytes: u64);

    /// Places a block of `bytes`, as in a [`Search`], in memory that is free for the stream `owner` at once, while
    /// `deferred` bytes wait for other streams. Calls no driver.
    fn place(&mut self, owner: StreamIndex, bytes: u64, deferred: u64) -> Option<Placement>;

    /// Places a block by all means but waiting on the host: other streams' memory as far as the request's
    /// policy allows, new memory, stitching.
    fn find(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal>;

    /// Takes a block of `bytes` back, for its owner at once, for others after `fence`, which is the owner's. Calls no
    /// driver.
    fn free(&mut self, location: Location, bytes: u64, fence: Fence);

    /// Makes free memory whose past is known to be complete anyone's.
    fn merge_complete(&mut self, fences: &mut Fences);

    /// Makes the free memory of `owner` anyone's, a stream that is gone and has run all it was given.
    fn release_stream(&mut self, owner: StreamIndex);

    /// Whether no memory, free or in blocks, belongs to `owner`.
    fn holds_nothing_of(&self, owner: StreamIndex) -> bool;

    /// Gives the driver what is idle as a whole and known to be complete, until at most `keep` bytes are
    /// held.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()>;

    /// Gives up what is idle as a whole and known to be complete, [`passed`](Fences::passed_by_now) if need be, for
    /// another backend to take in. The driver takes nothing back.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()>;

    /// Holds `spares` from now on, to be used before more is taken from the driver.
    fn take_in(&mut self, spares: SpareMemory);

    /// Gives out the spares that were not used.
    fn take_spares(&mut self) -> SpareMemory;

    /// Whether any free memory serves any request. Otherwise some does only after it went back to the
    /// driver.
    fn shares_free_memory(&self) -> bool;

    /// Free bytes by stream whose passing would make them usable by `owner`, or returnable where that helps.
    fn bytes_behind(&self, owner: StreamIndex, fences: &Fences) -> BTreeMap<StreamIndex, u64>;

    /// Free bytes that `owner` can put together for one request as they are.
    fn bytes_free_for(&self, owner: StreamIndex, fences: &Fences) -> u64;

    /// Bytes of the largest free block, whichever stream's.
    fn largest_free(&self) -> u64;

    /// Free blocks in partly used segments, and their bytes: free, but not returnable.
    fn inactive_split(&self) -> (u64, u64);

    fn totals(&self) -> Totals;

    /// Walks every structure and panics if an invariant is broken; returns the bytes in blocks.
    fn check_invariants(&self) -> u64;
}
