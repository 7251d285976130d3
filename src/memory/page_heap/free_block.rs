//! A free block, as a search sees it.

use std::ops::Range;

use crate::memory::types::{Fence, Index, PAGE_UNITS, PageIndex, StreamIndex};
use crate::units::to_usize;

/// A free block, as a search sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FreeBlock {
    pub(crate) index: Index,
    pub(crate) start: u64,
    pub(crate) units: u64,
    pub(crate) owner: StreamIndex,
    pub(crate) epoch: u64,
    /// Parts were freed in earlier epochs: see [`fence_of_page`](super::PageHeap::fence_of_page).
    pub(super) is_mixed: bool,
}

impl FreeBlock {
    /// The fence after which other streams may touch it.
    pub(crate) fn fence(&self) -> Fence {
        Fence {
            owner: self.owner,
            epoch: self.epoch,
        }
    }

    /// The pages that the free block touches.
    pub(crate) fn pages(&self) -> Range<PageIndex> {
        let end = (self.start + self.units).div_ceil(PAGE_UNITS);
        to_usize(self.start / PAGE_UNITS)..to_usize(end)
    }

    /// The pages that lie in the free block as a whole.
    pub(crate) fn whole_pages(&self) -> Range<PageIndex> {
        let first = self.start.div_ceil(PAGE_UNITS);
        let end = (self.start + self.units) / PAGE_UNITS;
        to_usize(first)..to_usize(end.max(first))
    }

    /// Whether the first `units` of `page` lie in the free block.
    pub(crate) fn has_front(&self, page: PageIndex, units: u64) -> bool {
        let start = page as u64 * PAGE_UNITS;
        self.start <= start && start + units <= self.start + self.units
    }

    /// The first page whose front of `units` lies in the free block.
    pub(crate) fn page_with_front(&self, units: u64) -> Option<PageIndex> {
        let page = self.start.div_ceil(PAGE_UNITS);
        (page * PAGE_UNITS + units <= self.start + self.units).then(|| to_usize(page))
    }
}
