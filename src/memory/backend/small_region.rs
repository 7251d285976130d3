//! The region of small pages: pages divided among small blocks lie together at the front of the page heap.
//!
//! Small blocks live longer than most large ones. Pages of theirs among large blocks would cut the free memory that
//! large blocks need, so that more of it has to be stitched. A small page that is no longer needed stays in the region,
//! for the next stream that needs one, until memory is short. When the region is full, small pages are taken from free
//! memory anywhere.

use super::paged::PagedBackend;
use crate::memory::page_heap::SmallPage;
use crate::memory::streams::Fences;
use crate::memory::types::{
    Fence, PAGE, PAGE_UNITS, PageIndex, Refusal, Search, StreamIndex, UNOWNED,
};
use crate::units::to_usize;

/// The region has addresses for one part in this many of the device's memory.
const SHARE: u64 = 16;

/// The region, and its pages without a small block.
#[derive(Debug, Default)]
pub(crate) struct SmallRegion {
    /// Pages of the region, mapped or not.
    pub(super) pages: PageIndex,
    /// Each with the fence after which other streams may touch it.
    idle: Vec<(SmallPage, Fence)>,
    /// Pages that were returned to the page heap. Large blocks may have them, or the driver.
    returned: Vec<PageIndex>,
}

impl SmallRegion {
    /// A region for a device with `total` bytes.
    pub(super) fn new(total: u64) -> Self {
        Self {
            pages: to_usize(total / PAGE / SHARE),
            ..Self::default()
        }
    }

    fn contains(&self, page: PageIndex) -> bool {
        page < self.pages
    }

    /// Bytes of idle pages that pass `is_usable`.
    pub(super) fn idle_bytes(&self, is_usable: impl Fn(Fence) -> bool) -> u64 {
        let usable = self.idle.iter().filter(|(_, fence)| is_usable(*fence));
        usable.count() as u64 * PAGE
    }

    /// The fences of idle pages.
    pub(super) fn fences(&self) -> impl Iterator<Item = Fence> + '_ {
        self.idle.iter().map(|(_, fence)| *fence)
    }

    /// Makes the idle pages of a stream unowned. Its work is complete.
    pub(super) fn release_stream(&mut self, owner: StreamIndex) {
        let of_owner = self
            .idle
            .iter_mut()
            .filter(|(_, fence)| fence.owner == owner);
        for (_, fence) in of_owner {
            *fence = Fence {
                owner: UNOWNED,
                epoch: 0,
            };
        }
    }

    /// An idle page that the requester may use: of its own stream, or of another behind a fence.
    fn take(&mut self, search: Search, fences: &mut Fences) -> Option<SmallPage> {
        let own = |(_, fence): &(SmallPage, Fence)| fence.owner == search.owner;
        let at = self.idle.iter().rposition(own).or_else(|| {
            let mut idle = self.idle.iter();
            idle.position(|(_, fence)| fences.pass(search.owner, *fence, search.reuse))
        })?;
        Some(self.idle.swap_remove(at).0)
    }
}

impl PagedBackend {
    /// Takes a whole page for small blocks: in the region while that has room, else from free memory anywhere.
    pub(super) fn lease_small_page(
        &mut self,
        search: Search,
        fences: &mut Fences,
    ) -> Result<SmallPage, Refusal> {
        if let Some(page) = self.region.take(search, fences) {
            return Ok(page);
        }
        if let Some(page) = self.take_returned(search, fences) {
            return Ok(page);
        }
        if let Some(page) = self.grow_region(search.owner) {
            return Ok(page);
        }
        loop {
            if let Some(page) = self.free_pages(1, search, fences).pop() {
                return Ok(self.small_page(page));
            }
            self.grow(1, search.owner)?;
        }
    }

    /// A page of the region that is free in the page heap.
    fn take_returned(&mut self, search: Search, fences: &mut Fences) -> Option<SmallPage> {
        let mut may_take = |page: PageIndex| {
            let free_block = self.page_heap.free_block_over_page(page)?;
            let fence = self.page_heap.fence_of_page(&free_block, page);
            let is_usable =
                fence.owner == search.owner || fences.pass(search.owner, fence, search.reuse);
            is_usable.then_some(page)
        };
        let page = (self.region.returned.iter()).find_map(|page| may_take(*page))?;
        self.region.returned.retain(|returned| *returned != page);
        Some(self.small_page(page))
    }

    /// Maps new pages in the region. Returns the first of them; the others are idle. `None` if the region is full or
    /// there are no new pages.
    fn grow_region(&mut self, owner: StreamIndex) -> Option<SmallPage> {
        let first = self.page_heap.unmapped(1)?;
        if !self.region.contains(first) {
            return None;
        }
        let unmapped = self
            .page_heap
            .unmapped_from(first)
            .min(self.region.pages - first);
        let count = self.batch().clamp(1, unmapped);
        let count = match self.pages.take(first, count) {
            Ok(()) => count,
            Err(_) => self.pages.take(first, 1).ok().map(|()| 1)?,
        };
        self.region
            .returned
            .retain(|page| *page < first || first + count <= *page);
        self.page_heap.remap(first, count, owner);
        let mut pages = (first..first + count).map(|page| self.small_page(page));
        let page = pages.next();
        let new = Fence { owner, epoch: 0 };
        let others: Vec<_> = pages.map(|page| (page, new)).collect();
        self.region.idle.extend(others);
        page
    }

    /// Takes a free page out of the page heap.
    fn small_page(&mut self, page: PageIndex) -> SmallPage {
        let free_block = self
            .page_heap
            .free_block_over_page(page)
            .expect("the page was found free");
        let start = page as u64 * PAGE_UNITS;
        let block = self.page_heap.take(&free_block, start, PAGE_UNITS);
        SmallPage { page, block }
    }

    /// Takes back a page without a small block.
    pub(super) fn return_small_page(&mut self, page: SmallPage, fence: Fence) {
        if self.region.contains(page.page) {
            self.region.idle.push((page, fence));
        } else {
            self.page_heap.free(page.block, fence.owner, fence.epoch);
        }
    }

    /// Returns all idle pages of the region to the page heap, where large blocks can have them.
    pub(super) fn return_idle_pages(&mut self) {
        for (page, fence) in std::mem::take(&mut self.region.idle) {
            self.page_heap.free(page.block, fence.owner, fence.epoch);
            self.region.returned.push(page.page);
        }
    }
}
