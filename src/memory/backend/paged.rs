//! The paged backend: physical pages in one range of addresses, stitched when no free block is large enough.
//!
//! A search tries in this order: a free block of its stream; another stream's free block behind a fence; new pages,
//! while the backend holds little more than was ever in use; free pages from anywhere, stitched; new pages. Small
//! blocks have pages of their own, in a region at the front (`small_region`).
//!
//! Invariant: the page heap's mapped pages are exactly the pages held from the driver.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::device_pages::DevicePages;
use super::mappings::Mappings;
use super::small_region::SmallRegion;
use super::{Backend, SpareMemory, Totals};
use crate::error::Result;
use crate::memory::page_heap::{FreeBlock, PageHeap, SmallHeap};
use crate::memory::streams::Fences;
use crate::memory::types::{
    Fence, GRANULARITY, Index, Location, MappingIndex, PAGE, PAGE_UNITS, Place, Placement, Refusal,
    SMALL_MAX, Search, StreamIndex, UNOWNED,
};

/// The backend takes new pages rather than stitch while it holds at most this many thousandths more than was ever in
/// use: it trades memory for fewer mapping calls.
const SLACK: u64 = 13;

/// Bytes that may be held without stitching if `most` bytes were in use at once.
pub(super) fn with_slack(most: u64) -> u64 {
    most.saturating_add(most / 1000 * SLACK)
}

/// Pages of one device and the blocks in them.
#[derive(Debug)]
pub(crate) struct PagedBackend {
    pub(crate) pages: DevicePages,
    pub(crate) page_heap: PageHeap,
    pub(super) ranges: Mappings,
    /// Whether pages may be mapped a second time. The addresses of a stitched mapping are reused later.
    stitches: bool,
    small: BTreeMap<StreamIndex, SmallHeap>,
    pub(super) region: SmallRegion,
    /// Bytes in blocks.
    pub(crate) in_use: u64,
    /// The most that callers ever had of them. Deferred frees do not count: they are no reason to hold more.
    pub(super) live_peak: u64,
}

impl PagedBackend {
    pub(crate) fn new(pages: DevicePages) -> Self {
        let region = SmallRegion::new(pages.device_bytes());
        Self::with_region(pages, region)
    }

    fn with_region(pages: DevicePages, region: SmallRegion) -> Self {
        Self {
            pages,
            page_heap: PageHeap::starting_at(region.pages),
            region,
            ranges: Mappings::default(),
            stitches: true,
            small: BTreeMap::new(),
            in_use: 0,
            live_peak: 0,
        }
    }

    /// A backend that never maps a page a second time, so that its addresses stay valid for as long as its pages.
    pub(crate) fn unstitched(pages: DevicePages) -> Self {
        Self {
            stitches: false,
            ..Self::with_region(pages, SmallRegion::default())
        }
    }

    #[inline]
    fn count(&mut self, bytes: u64, deferred: u64) {
        self.in_use += bytes;
        self.live_peak = self.live_peak.max(self.in_use.saturating_sub(deferred));
    }

    /// Takes `units` from the front of a free block for `owner`.
    fn place_in(&mut self, free_block: &FreeBlock, units: u64, owner: StreamIndex) -> Placement {
        let index = self.page_heap.take(free_block, free_block.start, units);
        let ptr = self.pages.address(free_block.start * GRANULARITY);
        Placement {
            ptr,
            location: Location::new(owner, Place::Large(index)),
        }
    }

    // Always inlined: the compiler would make it a call, which costs every allocation past the thread cache ten
    // instructions.
    #[inline(always)]
    fn place_large(&mut self, owner: StreamIndex, bytes: u64) -> Option<Placement> {
        let (index, start) = self.page_heap.allocate(owner, bytes / GRANULARITY)?;
        Some(Placement {
            ptr: self.pages.address(start * GRANULARITY),
            location: Location::new(owner, Place::Large(index)),
        })
    }

    fn place_small(&mut self, owner: StreamIndex, bytes: u64) -> Option<Placement> {
        let small = self.small.get_mut(&owner)?;
        let (page, offset, index) = small.allocate(bytes)?;
        Some(Placement {
            ptr: self.pages.address(page as u64 * PAGE + offset),
            location: Location::new(owner, Place::Small(index)),
        })
    }

    // A cold copy of `place_large`, kept out of line so that the hot caller inlines its own.
    #[inline(never)]
    fn place_large_cold(&mut self, search: Search) -> Option<Placement> {
        self.place_large(search.owner, search.bytes)
    }

    /// The smallest free block that fits and that the search may take from another stream.
    fn borrow_free_block(
        &self,
        search: Search,
        units: u64,
        fences: &mut Fences,
    ) -> Option<FreeBlock> {
        let others = self
            .page_heap
            .owners()
            .filter(|owner| *owner != search.owner);
        let fitting = others.filter_map(|owner| self.page_heap.best_fit(owner, units));
        let mut fitting: Vec<FreeBlock> = fitting.collect();
        fitting.sort_by_key(|free_block| free_block.units);
        fitting
            .into_iter()
            .find(|free_block| fences.pass(search.owner, free_block.fence(), search.reuse))
    }

    /// Gives the requester free blocks of other streams whose fences it can pass, so that they merge with its own;
    /// whether there were any. Pages are checked one by one, so a free block that has just grown is not held back as a
    /// whole.
    fn merge_other_streams(&mut self, search: Search, fences: &mut Fences) -> bool {
        let mut gathered = false;
        let owners = self.page_heap.owners();
        for owner in owners.filter(|owner| *owner != search.owner && *owner != UNOWNED) {
            let free_blocks: Vec<FreeBlock> = self.page_heap.free_blocks_from(owner, 1).collect();
            let Some(newest) = free_blocks.iter().map(|free_block| free_block.epoch).max() else {
                continue;
            };
            let reached = fences.reach(search.owner, owner, newest, search.reuse);
            for free_block in free_blocks {
                gathered |= self.merge_from(free_block, reached, search, fences);
            }
        }
        // While no stream lacks memory, free blocks are checked as a whole.
        self.page_heap.tracks_page_epochs = fences.are_contended();
        gathered
    }

    /// Gives the requester the unowned free blocks, so that they merge with its own; whether there were any.
    fn take_unowned(&mut self, search: Search) -> bool {
        let free_blocks: Vec<FreeBlock> = self.page_heap.free_blocks_from(UNOWNED, 1).collect();
        let (owner, epoch) = (search.owner, 0);
        for free_block in &free_blocks {
            let whole = (free_block.start, free_block.units);
            self.page_heap
                .give(free_block, whole, Fence { owner, epoch });
        }
        !free_blocks.is_empty()
    }

    fn merge_from(
        &mut self,
        mut free_block: FreeBlock,
        reached: u64,
        search: Search,
        fences: &mut Fences,
    ) -> bool {
        let whole = (free_block.start, free_block.units);
        let (parts, until) = if free_block.epoch <= reached
            || fences.pass(search.owner, free_block.fence(), search.reuse)
        {
            (SmallVec::from_slice(&[whole]), free_block.epoch)
        } else {
            let parts = self
                .page_heap
                .parts(&free_block, |fence| fence.epoch <= reached);
            (parts, reached)
        };
        // Complete memory becomes unowned: if it became the requester's, its former owner would soon have to wait to
        // get it back. Memory that the requester was made to wait for becomes the requester's.
        let is_complete = fences.is_known_complete(Fence {
            owner: free_block.owner,
            epoch: until,
        });
        let past = if is_complete {
            Fence {
                owner: UNOWNED,
                epoch: 0,
            }
        } else {
            fences.now(search.owner)
        };
        // From the end, so that the rest of the free block stays valid.
        for (start, units) in parts.iter().rev() {
            self.page_heap.give(&free_block, (*start, *units), past);
            free_block.units = start - free_block.start;
        }
        !parts.is_empty()
    }

    /// Places a block in a free block; if there is none, after merging free blocks of other streams.
    fn place_merged(&mut self, search: Search, fences: &mut Fences) -> Option<Placement> {
        if let Some(placement) = self.place_from_other_streams(search, fences) {
            return Some(placement);
        }
        if self.merge_other_streams(search, fences)
            && let Some(placement) = self.place_from_other_streams(search, fences)
        {
            return Some(placement);
        }
        if self.take_unowned(search) {
            return self.place_large_cold(search);
        }
        None
    }

    fn find_large(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal> {
        let units = search.bytes / GRANULARITY;
        if let Some(placement) = self.place_merged(search, fences) {
            return Ok(placement);
        }
        let missing = self.missing_pages(units, search.owner) as u64;
        // Sizes go up to 2^64. Those that saturate here are refused when pages are taken.
        let most = self.live_peak.max(
            self.in_use
                .saturating_sub(search.deferred)
                .saturating_add(search.bytes),
        );
        let held = missing
            .saturating_mul(PAGE)
            .saturating_add(self.pages.bytes_held());
        if held <= with_slack(most) && self.grow_free_block(units, search.owner).is_ok() {
            return Ok(self
                .place_large_cold(search)
                .expect("the free block was grown to fit"));
        }
        if self.stitches
            && let Some(placement) = self.stitch(search, fences)
        {
            return Ok(placement);
        }
        match self.grow_free_block(units, search.owner) {
            Ok(()) => Ok(self
                .place_large_cold(search)
                .expect("the free block was grown to fit")),
            // Out of pages: room among the small blocks is better than none.
            Err(refusal) => self
                .place_small(search.owner, search.bytes)
                .or_else(|| self.borrow_small_block(search, fences))
                .ok_or(refusal),
        }
    }

    fn find_small(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal> {
        if let Some(placement) = self.place_small(search.owner, search.bytes) {
            return Ok(placement);
        }
        match self.lease_small_page(search, fences) {
            Ok(page) => {
                self.small
                    .entry(search.owner)
                    .or_insert_with(SmallHeap::new)
                    .add(page, fences.now(search.owner).epoch);
                Ok(self
                    .place_small(search.owner, search.bytes)
                    .expect("a page was borrowed that fits the request"))
            }
            // Out of pages: room among the large blocks is better than none.
            Err(refusal) => self
                .place_merged(search, fences)
                .or_else(|| self.borrow_small_block(search, fences))
                .ok_or(refusal),
        }
    }

    /// Places a block among the small blocks of another stream. The block is lent: when it is freed it goes back there,
    /// deferred until the borrower has passed.
    fn borrow_small_block(&mut self, search: Search, fences: &mut Fences) -> Option<Placement> {
        if !search.may_borrow {
            return None;
        }
        let fits = |small: &SmallHeap| small.largest_free() >= search.bytes;
        let others = self
            .small
            .iter_mut()
            .filter(|(owner, small)| **owner != search.owner && fits(small));
        for (owner, small) in others {
            let (lender, epoch) = (*owner, small.epoch());
            let fence = Fence {
                owner: lender,
                epoch,
            };
            if fences.pass(search.owner, fence, search.reuse) {
                let (page, offset, index) = small.allocate(search.bytes)?;
                let place = Place::Lent {
                    index,
                    is_small: true,
                };
                return Some(Placement {
                    ptr: self.pages.address(page as u64 * PAGE + offset),
                    location: Location::new(lender, place),
                });
            }
        }
        None
    }

    /// Places a block in a free block of its stream, or of another behind a fence.
    fn place_from_other_streams(
        &mut self,
        search: Search,
        fences: &mut Fences,
    ) -> Option<Placement> {
        self.place_large_cold(search).or_else(|| {
            let units = search.bytes / GRANULARITY;
            let free_block = self.borrow_free_block(search, units, fences)?;
            Some(self.place_in(&free_block, units, search.owner))
        })
    }

    /// Returns the pages without small blocks to the page heap.
    fn return_cached_pages(&mut self) {
        let cached = (self.small.iter_mut())
            .filter_map(|(owner, small)| small.take_cached().map(|cached| (*owner, cached)));
        let cached: SmallVec<[_; 4]> = cached.collect();
        for (owner, (page, epoch)) in cached {
            self.return_small_page(page, Fence { owner, epoch });
        }
        self.return_idle_pages();
    }

    /// Frees a block of the page heap.
    fn free_large(&mut self, index: Index, fence: Fence) {
        self.page_heap.free(index, fence.owner, fence.epoch);
    }

    // This and the next are kept out of line: inlined, they make the large-block path spill registers.
    #[inline(never)]
    fn free_small(&mut self, index: Index, fence: Fence) {
        let small = self.small.get_mut(&fence.owner);
        let small = small.expect("small blocks outlive their blocks");
        if let Some(page) = small.free(index, fence.epoch) {
            self.return_small_page(page, fence);
        }
    }

    #[inline(never)]
    fn free_stitched(&mut self, range: MappingIndex, fence: Fence) {
        for index in self.ranges.release(range, fence) {
            self.free_large(index, fence);
        }
    }
}

impl Backend for PagedBackend {
    fn set_limit(&mut self, bytes: u64) {
        self.pages.set_limit(bytes);
    }

    fn place(&mut self, owner: StreamIndex, bytes: u64, deferred: u64) -> Option<Placement> {
        let found = if bytes <= SMALL_MAX {
            self.place_small(owner, bytes)
        } else {
            self.place_large(owner, bytes)
        }?;
        self.count(bytes, deferred);
        Some(found)
    }

    fn find(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal> {
        let placement = if search.bytes <= SMALL_MAX {
            self.find_small(search, fences)
        } else {
            self.find_large(search, fences)
        };
        placement.inspect(|_| self.count(search.bytes, search.deferred))
    }

    fn free(&mut self, location: Location, bytes: u64, fence: Fence) {
        self.in_use -= bytes;
        match location.place() {
            Place::Large(index) => self.free_large(index, fence),
            Place::Small(index) | Place::Lent { index, .. } => self.free_small(index, fence),
            Place::Stitched(range) => self.free_stitched(range, fence),
        }
    }

    fn merge_complete(&mut self, fences: &mut Fences) {
        self.return_cached_pages();
        self.page_heap
            .merge_complete(|fence| fences.is_complete(fence));
        self.small.retain(|_, small| !small.is_empty());
    }

    fn release_stream(&mut self, owner: StreamIndex) {
        if let Some((page, epoch)) = self.small.get_mut(&owner).and_then(SmallHeap::take_cached) {
            self.return_small_page(page, Fence { owner, epoch });
        }
        self.region.release_stream(owner);
        self.small
            .retain(|small_owner, small| *small_owner != owner || !small.is_empty());
        self.page_heap.merge_complete(|fence| fence.owner == owner);
    }

    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        self.merge_complete(fences);
        self.release_pages(keep, fences)
    }

    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()> {
        self.return_cached_pages();
        self.small.retain(|_, small| !small.is_empty());
        self.give_up_pages(fences, spares)
    }

    fn take_in(&mut self, spares: SpareMemory) {
        self.pages.take_in(spares);
    }

    fn take_spares(&mut self) -> SpareMemory {
        self.pages.take_spares()
    }

    fn shares_free_memory(&self) -> bool {
        true
    }

    fn bytes_behind(&self, owner: StreamIndex, fences: &Fences) -> BTreeMap<StreamIndex, u64> {
        let mut behind = BTreeMap::new();
        let is_behind = |fence: Fence| fence.owner != owner && !fences.is_known_complete(fence);
        for free_block in self
            .page_heap
            .free_blocks()
            .filter(|free_block| is_behind(free_block.fence()))
        {
            *behind.entry(free_block.owner).or_default() += free_block.units * GRANULARITY;
        }
        for fence in self.region.fences().filter(|fence| is_behind(*fence)) {
            *behind.entry(fence.owner).or_default() += PAGE;
        }
        for (owner, small) in &self.small {
            let (bytes, _) = small.free_blocks();
            let (owner, epoch) = (*owner, small.epoch());
            if bytes > 0 && is_behind(Fence { owner, epoch }) {
                *behind.entry(owner).or_default() += bytes;
            }
        }
        behind
    }

    fn bytes_free_for(&self, owner: StreamIndex, fences: &Fences) -> u64 {
        let is_usable = |fence: Fence| fence.owner == owner || fences.is_known_complete(fence);
        let usable = self
            .page_heap
            .free_blocks()
            .filter(|free_block| is_usable(free_block.fence()));
        // Whole pages can be put together from anywhere.
        let at_home: u64 = usable
            .map(|free_block| free_block.whole_pages().len() as u64 * PAGE)
            .sum();
        at_home + self.region.idle_bytes(is_usable) + self.pages.bytes_spare()
    }

    fn holds_nothing_of(&self, owner: StreamIndex) -> bool {
        self.page_heap.has_no_free_block_of(owner)
            && !self.small.contains_key(&owner)
            && self.region.fences().all(|fence| fence.owner != owner)
    }

    fn largest_free(&self) -> u64 {
        let small = self.small.values().map(SmallHeap::largest_free);
        let owners = self.page_heap.owners();
        let at_home = owners.map(|owner| self.page_heap.largest(owner) * GRANULARITY);
        small.chain(at_home).max().unwrap_or(0)
    }

    fn inactive_split(&self) -> (u64, u64) {
        let split = |free_block: FreeBlock| {
            free_block.units - free_block.whole_pages().len() as u64 * PAGE_UNITS
        };
        let at_home = self
            .page_heap
            .free_blocks()
            .map(split)
            .filter(|units| *units > 0);
        let at_home = at_home.fold((0, 0), |(bytes, n), units| {
            (bytes + units * GRANULARITY, n + 1)
        });
        let small = self.small.values().map(SmallHeap::free_blocks);
        small.fold(at_home, |(bytes, n), (more, blocks)| {
            (bytes + more, n + blocks)
        })
    }

    fn totals(&self) -> Totals {
        self.pages.totals()
    }

    fn check_invariants(&self) -> u64 {
        let (mapped, taken) = self.page_heap.check_invariants();
        assert_eq!(
            mapped * GRANULARITY,
            self.pages.bytes_held(),
            "mapped pages"
        );
        let (mut in_blocks, mut leased) = (0, 0);
        for small in self.small.values() {
            let (pages, in_use) = small.check_invariants();
            leased += pages * PAGE;
            in_blocks += in_use;
        }
        in_blocks += taken * GRANULARITY - leased - self.region.idle_bytes(|_| true);
        assert_eq!(in_blocks, self.in_use, "bytes in blocks");
        for range in self.ranges.live() {
            for page in &range.pages {
                assert_eq!(
                    self.page_heap.free_block_over_page(*page),
                    None,
                    "a live range's page is free"
                );
            }
        }
        in_blocks
    }
}
