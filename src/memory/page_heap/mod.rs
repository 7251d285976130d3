//! Which bytes of the mapped pages are free, and for whom.
//!
//! The pages of a heap stand side by side in one reserved range of addresses. Blocks tile the mapped pages. A *free
//! block* belongs to the stream that freed it: that stream may use it at once, other streams only after its fence. Free
//! blocks of one owner merge when they touch. Free blocks of different owners do not, because their fences differ.
//!
//! All offsets are in units of 512 bytes from the start of the range. Invariants: blocks tile the mapped pages in
//! address order, and a block keeps its start as long as it lives; a free block is filed in the bins of its owner; no
//! two neighbors are free blocks of one owner, or both unmapped.
//!
//! `page_map` finds the block over a page, `page_epochs` remembers when each page was freed, and `small_pages` divides
//! pages among small blocks. Must not know: addresses, events, how a fence is passed.

mod blocks;
mod free_block;
mod invariants;
mod page_epochs;
mod page_map;
mod small_pages;

use std::ops::Range;

use smallvec::SmallVec;

use crate::memory::free_list::{Bins, Link, Links, NONE};
use crate::memory::types::{
    FIRST_EPOCH, Fence, Index, PAGE_UNITS, PageIndex, StreamIndex, UNOWNED, Units,
};
use crate::units::to_usize;
use blocks::{Claim, HeapBlock, HeapBlocks};
pub(crate) use free_block::FreeBlock;
use page_epochs::PageEpochs;
use page_map::PageMap;
pub(crate) use small_pages::{SmallHeap, SmallPage};

/// Units of a page, as blocks store it.
const PAGE_LEN: Units = 1 << PAGE_UNITS.trailing_zeros();
/// Blocks of whole pages, of at least this many units, begin on a page if their free block allows it. When freed, they
/// leave whole pages, which can be stitched. For smaller blocks that costs more than it gains.
const ON_PAGE_MIN: Units = 6 * PAGE_LEN;

/// An offset or a size as blocks store it. Everything in a page heap fits.
fn stored(units: u64) -> Units {
    Units::try_from(units).expect("a page heap has fewer than 2^32 units")
}

/// The page in which position `at` lies.
#[inline]
const fn page_of(at: Units) -> PageIndex {
    (at / PAGE_LEN) as PageIndex
}

/// Where a page begins.
fn begin_of(page: PageIndex) -> Units {
    stored(page as u64 * PAGE_UNITS)
}

/// The pages that `start..end` touches, and those that it covers as a whole.
fn pages_between(start: Units, end: Units) -> (Range<PageIndex>, Range<PageIndex>) {
    let rounded_up = |at: Units| at.div_ceil(PAGE_LEN) as PageIndex;
    (
        page_of(start)..rounded_up(end),
        rounded_up(start)..page_of(end),
    )
}

/// The blocks of all mapped pages of a pool.
#[derive(Debug)]
pub(crate) struct PageHeap {
    blocks: HeapBlocks,
    /// Free blocks by owner.
    bins: Vec<Bins>,
    page_map: PageMap,
    freed: PageEpochs,
    /// Whether pages keep their own epochs. Otherwise a free block that grows takes the latest epoch as a whole.
    pub(crate) tracks_page_epochs: bool,
}

impl PageHeap {
    /// A page heap whose first `unmapped` pages are not mapped.
    pub(crate) fn starting_at(unmapped: PageIndex) -> Self {
        let mut heap = Self {
            blocks: HeapBlocks::new(HeapBlock::BORDER),
            bins: Vec::new(),
            page_map: PageMap::default(),
            freed: PageEpochs::default(),
            tracks_page_epochs: false,
        };
        if unmapped > 0 {
            let (_, index) = heap.extend(unmapped);
            heap.unmap(index);
        }
        heap
    }

    /// Pages of the heap, mapped or not.
    pub(crate) fn pages(&self) -> PageIndex {
        self.page_map.len()
    }

    #[inline]
    fn free_block(&self, index: Index) -> Option<FreeBlock> {
        let block = self.blocks.at(index);
        Some(FreeBlock {
            index,
            start: u64::from(block.start),
            units: u64::from(block.link.units),
            owner: block.claim.owner()?,
            epoch: block.claim.epoch(),
            is_mixed: block.claim.is_mixed(),
        })
    }

    /// The free block of `owner` that fits `units` best.
    pub(crate) fn best_fit(&self, owner: StreamIndex, units: u64) -> Option<FreeBlock> {
        let units = Units::try_from(units).ok()?;
        let index = self.bins.get(owner)?.find(&self.blocks, units)?;
        self.free_block(index)
    }

    /// Free blocks of `owner` of at least `units`, smallest bins first.
    pub(crate) fn free_blocks_from(
        &self,
        owner: StreamIndex,
        units: u64,
    ) -> impl Iterator<Item = FreeBlock> + '_ {
        let bins = self.bins.get(owner).zip(Units::try_from(units).ok());
        let indices = bins
            .into_iter()
            .flat_map(|(bins, units)| bins.iter_from(&self.blocks, units));
        indices.filter_map(|(index, _)| self.free_block(index))
    }

    /// Free blocks of `owner` of at least `units`, the largest first.
    pub(crate) fn largest_free_blocks(
        &self,
        owner: StreamIndex,
        units: u64,
    ) -> impl Iterator<Item = FreeBlock> + '_ {
        let bins = self.bins.get(owner).zip(Units::try_from(units).ok());
        let indices = bins
            .into_iter()
            .flat_map(|(bins, units)| bins.largest_first(&self.blocks, units));
        indices.filter_map(|(index, _)| self.free_block(index))
    }

    /// Streams that have or had free blocks.
    pub(crate) fn owners(&self) -> Range<StreamIndex> {
        0..self.bins.len()
    }

    /// The free block in which page `page` lies as a whole, if it does.
    pub(crate) fn free_block_over_page(&self, page: PageIndex) -> Option<FreeBlock> {
        self.free_block_over_front(page, PAGE_UNITS)
    }

    /// The free block in which the first `units` of page `page` lie, if they do.
    pub(crate) fn free_block_over_front(&self, page: PageIndex, units: u64) -> Option<FreeBlock> {
        self.free_block_or_taken(page, units).ok()
    }

    /// As [`free_block_over_front`](Self::free_block_over_front); otherwise the block that covers the first byte of
    /// `page`.
    pub(crate) fn free_block_or_taken(
        &self,
        page: PageIndex,
        units: u64,
    ) -> Result<FreeBlock, Index> {
        let block = self.over(page);
        let free_block = self.free_block(block);
        free_block
            .filter(|free_block| free_block.has_front(page, units))
            .ok_or(block)
    }

    /// Whether `block`, which may be stale, is in use and lies in the first `units` of `page`: a quick check that they
    /// are not free.
    pub(crate) fn is_taken_by(&self, block: Index, page: PageIndex, units: u64) -> bool {
        let (block, at) = (self.blocks.at(block), page as u64 * PAGE_UNITS);
        block.claim == Claim::TAKEN
            && u64::from(block.start) < at + units
            && u64::from(block.end()) > at
    }

    /// The block that covers the first byte of `page`.
    fn over(&self, page: PageIndex) -> Index {
        let at = begin_of(page);
        if let Some(noted) = self.page_map.noted(page)
            && self.blocks.at(noted).start == at
        {
            return noted;
        }
        let holds = |page, index| page_of(self.blocks.at(index).start) == page;
        let first = self.blocks.at(NONE).after;
        let mut index = self.page_map.before(page, holds).unwrap_or(first);
        // Blocks follow each other without a gap.
        while self.blocks.at(index).end() <= at {
            index = self.blocks.at(index).after;
            self.page_map
                .note(page_of(self.blocks.at(index).start), index);
        }
        index
    }

    /// The fence after which others may touch the part of `free_block` that lies in `page`. A free block grows by frees
    /// of different times; its pages keep their own epochs.
    pub(crate) fn fence_of_page(&self, free_block: &FreeBlock, page: PageIndex) -> Fence {
        if !free_block.is_mixed {
            return free_block.fence();
        }
        // The first epoch is never recorded.
        let epoch = self.freed.epoch(page, free_block.owner);
        Fence {
            owner: free_block.owner,
            epoch: epoch.unwrap_or(free_block.epoch.min(FIRST_EPOCH)),
        }
    }

    /// Records in their pages when these free blocks of `owner`, which are about to merge, were freed.
    #[inline(never)]
    fn mix(&mut self, free_blocks: [Index; 3], owner: StreamIndex) {
        for index in free_blocks.into_iter().filter(|index| *index != NONE) {
            let free_block = self.blocks.at_mut(index);
            let was_mixed = free_block.claim.is_mixed();
            free_block.claim.set_mixed(true);
            let epoch = free_block.claim.epoch();
            if was_mixed || epoch <= FIRST_EPOCH {
                continue;
            }
            let fence = Fence { owner, epoch };
            let (touched, whole) = pages_between(free_block.start, free_block.end());
            self.freed.note(touched, whole, fence);
        }
    }

    /// The parts of `free_block` whose pages `may_touch`, as large as possible: (start, units) of each.
    pub(crate) fn parts(
        &self,
        free_block: &FreeBlock,
        mut may_touch: impl FnMut(Fence) -> bool,
    ) -> SmallVec<[(u64, u64); 4]> {
        let mut parts: SmallVec<[(u64, u64); 4]> = SmallVec::new();
        if !free_block.is_mixed {
            parts.extend(
                may_touch(free_block.fence()).then_some((free_block.start, free_block.units)),
            );
            return parts;
        }
        let end = free_block.start + free_block.units;
        for page in free_block.pages() {
            if !may_touch(self.fence_of_page(free_block, page)) {
                continue;
            }
            let page = page as u64;
            let from = free_block.start.max(page * PAGE_UNITS);
            let units = end.min((page + 1) * PAGE_UNITS) - from;
            match parts.last_mut() {
                Some((start, before)) if *start + *before == from => *before += units,
                _ => parts.push((from, units)),
            }
        }
        parts
    }

    /// Takes `units` out of the free block of `owner` that fits best: at its front, or on a page for large blocks of
    /// whole pages. Returns the block and its start.
    // Always inlined, for the reason given at `PagedBackend::place_large`.
    #[inline(always)]
    pub(crate) fn allocate(&mut self, owner: StreamIndex, units: u64) -> Option<(Index, u64)> {
        let units = Units::try_from(units).ok()?;
        let free_block = self.bins.get_mut(owner)?.take(&mut self.blocks, units)?;
        if units >= ON_PAGE_MIN {
            return Some(self.take_on_page(free_block, owner, units));
        }
        let start = self.blocks.at(free_block).start;
        self.take_front(free_block, owner, units);
        Some((free_block, u64::from(start)))
    }

    #[inline(never)]
    fn take_on_page(
        &mut self,
        free_block: Index,
        owner: StreamIndex,
        units: Units,
    ) -> (Index, u64) {
        let HeapBlock { start, .. } = *self.blocks.at(free_block);
        let page = start.next_multiple_of(PAGE_LEN);
        let fits = page + units <= self.blocks.at(free_block).end();
        let at = if units.is_multiple_of(PAGE_LEN) && fits {
            page
        } else {
            start
        };
        (
            self.take_part(free_block, owner, (at, units)),
            u64::from(at),
        )
    }

    /// Takes `units` from `start` on out of `free_block`. The rest on either side stays with its owner.
    pub(crate) fn take(&mut self, free_block: &FreeBlock, start: u64, units: u64) -> Index {
        debug_assert!(
            free_block.start <= start
                && start + units <= free_block.start + free_block.units
                && units > 0
        );
        self.bins[free_block.owner].remove(&mut self.blocks, free_block.index);
        self.take_part(
            free_block.index,
            free_block.owner,
            (stored(start), stored(units)),
        )
    }

    /// Takes `units` from `start` on out of a free block that is not filed.
    fn take_part(
        &mut self,
        free_block: Index,
        owner: StreamIndex,
        (start, units): (Units, Units),
    ) -> Index {
        let mut taken = free_block;
        if start > self.blocks.at(free_block).start {
            taken = self.cut(free_block, start);
            self.bins[owner].insert(&mut self.blocks, free_block);
        }
        self.take_front(taken, owner, units);
        taken
    }

    /// Makes a block of `units` of the front of a free block that is not filed.
    // Always inlined, for the reason given at `PagedBackend::place_large`.
    #[inline(always)]
    fn take_front(&mut self, free_block: Index, owner: StreamIndex, units: Units) {
        let HeapBlock { link, start, .. } = *self.blocks.at(free_block);
        if units < link.units {
            let rest = self.cut(free_block, start + units);
            self.bins[owner].insert(&mut self.blocks, rest);
        }
        self.blocks.at_mut(free_block).claim = Claim::TAKEN;
    }

    /// Splits block `index`, which is not filed, at `at`. Returns the second part, which has the same holder.
    #[inline(always)]
    fn cut(&mut self, index: Index, at: Units) -> Index {
        let second = self.blocks.vacant();
        let first = self.blocks.at_mut(index);
        let block = *first;
        debug_assert!(block.start < at && at < block.end());
        first.link.units = at - block.start;
        first.after = second;
        *self.blocks.at_mut(second) = HeapBlock {
            link: Link::new(block.end() - at),
            start: at,
            before: index,
            ..block
        };
        self.blocks.at_mut(block.after).before = second;
        self.page_map.note(page_of(at), second);
        second
    }

    /// Frees block `index` for `owner`. Other streams may have it after `epoch`.
    ///
    /// # Panics
    /// If the block is not taken: a double free inside the crate.
    pub(crate) fn free(&mut self, index: Index, owner: StreamIndex, epoch: u64) {
        if owner >= self.bins.len() {
            self.bins.resize_with(owner + 1, Bins::new);
        }
        let block = self.blocks.at_mut(index);
        assert_eq!(block.claim, Claim::TAKEN, "block {index} is freed twice");
        let claim = Claim::free_block(Fence { owner, epoch });
        block.claim = claim;
        let (before, after) = (block.before, block.after);
        let continues = self.blocks.is_of(before, claim);
        let goes_on = self.blocks.is_of(after, claim);
        if self.tracks_page_epochs {
            let of = |is: bool, index| if is { index } else { NONE };
            self.mix([of(continues, before), index, of(goes_on, after)], owner);
        }
        let bins = &mut self.bins[owner];
        if goes_on {
            bins.remove(&mut self.blocks, after);
            let units = self.blocks.absorb_next(index, self.tracks_page_epochs);
            self.blocks.at_mut(index).link.units = units;
        }
        if continues {
            let units = self.blocks.absorb_next(before, self.tracks_page_epochs);
            bins.resize(&mut self.blocks, before, units);
        } else {
            bins.insert(&mut self.blocks, index);
        }
    }

    /// Units of the free block of `owner` at the very end of the page heap, which growth extends.
    pub(crate) fn last_free_units(&self, owner: StreamIndex) -> u64 {
        let claim = Claim::free_block(Fence { owner, epoch: 0 });
        let last = self.blocks.at(NONE).before;
        if self.blocks.is_of(last, claim) {
            u64::from(self.blocks.link(last).units)
        } else {
            0
        }
    }

    /// Adds `count` mapped pages at the end, free for `owner`; returns the first.
    pub(crate) fn append(&mut self, count: usize, owner: StreamIndex) -> PageIndex {
        let (first, index) = self.extend(count);
        // Memory that was never used: epoch 0 is complete from the start.
        self.free(index, owner, 0);
        first
    }

    /// Adds a taken block of `count` pages at the end; returns its first page, and the block.
    fn extend(&mut self, count: usize) -> (PageIndex, Index) {
        let first = self.page_map.len();
        let (start, end) = (begin_of(first), begin_of(first + count));
        let before = self.blocks.at(NONE).before;
        let index = self.blocks.insert(HeapBlock {
            link: Link::new(end - start),
            start,
            before,
            after: NONE,
            claim: Claim::TAKEN,
        });
        self.blocks.at_mut(before).after = index;
        self.blocks.at_mut(NONE).before = index;
        self.page_map.extend(first + count);
        self.page_map.note(first, index);
        self.freed.extend(first + count);
        (first, index)
    }

    /// Marks the pages of a taken block unmapped, and merges them with unmapped neighbors.
    pub(crate) fn unmap(&mut self, index: Index) {
        let block = self.blocks.at_mut(index);
        assert_eq!(block.claim, Claim::TAKEN, "only taken pages are returned");
        block.claim = Claim::UNMAPPED;
        assert!(block.start.is_multiple_of(PAGE_LEN) && block.link.units.is_multiple_of(PAGE_LEN));
        let HeapBlock { before, after, .. } = *block;
        if self.blocks.is_of(after, Claim::UNMAPPED) {
            let units = self.blocks.absorb_next(index, false);
            self.blocks.at_mut(index).link.units = units;
        }
        if self.blocks.is_of(before, Claim::UNMAPPED) {
            let units = self.blocks.absorb_next(before, false);
            self.blocks.at_mut(before).link.units = units;
        }
    }

    /// The first of `count` adjacent unmapped pages.
    pub(crate) fn unmapped(&self, count: usize) -> Option<PageIndex> {
        let units = count as u64 * PAGE_UNITS;
        let fits = |block: &&HeapBlock| {
            block.claim == Claim::UNMAPPED && u64::from(block.link.units) >= units
        };
        let mut blocks = self.in_order().map(|(_, block)| block);
        blocks.find(fits).map(|block| page_of(block.start))
    }

    /// Adjacent unmapped pages from `first` on, where unmapped pages begin.
    pub(crate) fn unmapped_from(&mut self, first: PageIndex) -> usize {
        let index = self.over(first);
        to_usize(u64::from(self.blocks.at(index).link.units) / PAGE_UNITS)
    }

    /// Marks `count` unmapped pages from `first` on mapped again, free for `owner`.
    pub(crate) fn remap(&mut self, first: PageIndex, count: usize, owner: StreamIndex) {
        let index = self.over(first);
        let (start, end) = (begin_of(first), begin_of(first + count));
        let block = *self.blocks.at(index);
        assert!(
            block.claim == Claim::UNMAPPED && block.start == start,
            "unmapped pages are mapped again from the front"
        );
        if block.end() > end {
            self.cut(index, end);
        }
        self.blocks.at_mut(index).claim = Claim::TAKEN;
        self.free(index, owner, 0);
    }

    /// Gives a part of a free block to another owner and merges it with that owner's free blocks.
    pub(crate) fn give(
        &mut self,
        free_block: &FreeBlock,
        (start, units): (u64, u64),
        fence: Fence,
    ) {
        let index = self.take(free_block, start, units);
        self.free(index, fence.owner, fence.epoch);
    }

    /// Makes free blocks unowned whose last use is complete, so that they merge whoever freed them.
    pub(crate) fn merge_complete(&mut self, mut is_complete: impl FnMut(Fence) -> bool) {
        let free_blocks: Vec<FreeBlock> = self
            .free_blocks()
            .filter(|free_block| free_block.owner != UNOWNED)
            .collect();
        let (owner, epoch) = (UNOWNED, 0);
        let past = Fence { owner, epoch };
        for free_block in free_blocks {
            if is_complete(free_block.fence()) {
                self.give(&free_block, (free_block.start, free_block.units), past);
            }
        }
    }

    /// Every block, in the order of addresses.
    fn in_order(&self) -> impl Iterator<Item = (Index, &HeapBlock)> {
        let at = |index: Index| (index != NONE).then(|| (index, self.blocks.at(index)));
        let first = self.blocks.at(NONE).after;
        std::iter::successors(at(first), move |(_, block)| at(block.after))
    }

    /// Whether `owner` has no free block.
    pub(crate) fn has_no_free_block_of(&self, owner: StreamIndex) -> bool {
        self.largest(owner) == 0
    }

    /// Every free block.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = FreeBlock> + '_ {
        let all = self
            .bins
            .iter()
            .flat_map(|bins| bins.iter_from(&self.blocks, 1));
        all.filter_map(|(index, _)| self.free_block(index))
    }

    /// Units of the largest free block of `owner`.
    pub(crate) fn largest(&self, owner: StreamIndex) -> u64 {
        let largest = self
            .bins
            .get(owner)
            .and_then(|bins| bins.largest(&self.blocks));
        largest.map_or(0, u64::from)
    }

    /// Start, in units, of a taken block.
    pub(crate) fn start(&self, index: Index) -> u64 {
        u64::from(self.blocks.at(index).start)
    }
}

#[cfg(test)]
mod tests;
