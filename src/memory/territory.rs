//! Which bytes of the pages at home are free, and for whom.
//!
//! Every page has one *home* address, and the homes stand side by side in one reserved range: the
//! *territory*. Blocks tile its mapped pages. A free block, a *hole*, belongs to the stream that freed it:
//! that stream may use it at once, another one only after the hole's epoch of its owner. Holes of one owner
//! merge when they touch; holes of different owners do not, since their fences differ.
//!
//! All positions are in units of 512 bytes from the start of the range. Invariants: blocks tile the mapped
//! pages in address order; a hole is filed in the bins of its owner; no two neighbors are holes of one
//! owner or both unmapped; `at_page[p]` is the block that covers the first byte of page `p`. Must not know: addresses,
//! events, how a hole's epoch is waited for.

use smallvec::SmallVec;

use super::arena::GRANULARITY;
use super::bins::{Bins, Index, Link, Links, NONE};
use super::fences::{COMMON, FIRST_EPOCH, Fence};

/// Bytes of a page: the unit in which physical memory is taken, mapped and returned.
pub(super) const PAGE: u64 = 2 << 20;
/// Units of a page.
pub(super) const PAGE_UNITS: u64 = PAGE / GRANULARITY;

/// A stream as the owner of holes: its number in the pool's table of streams.
pub(super) type Owner = usize;

/// Number of a page's home.
pub(super) type PageIndex = usize;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    /// In a caller's hands, or lent to a stitched range or to small blocks.
    Taken,
    /// Free for `owner`; for others after `epoch` of `owner`.
    Hole { owner: Owner, epoch: u64 },
    /// Home of pages that were returned to the driver.
    Unmapped,
}

#[derive(Clone, Copy, Debug)]
struct Block {
    link: Link,
    start: u64,
    before: Index,
    after: Index,
    usage: Use,
}

impl Block {
    fn end(&self) -> u64 {
        self.start + self.link.units
    }
}

/// A hole as others see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hole {
    pub(super) index: Index,
    pub(super) start: u64,
    pub(super) units: u64,
    pub(super) owner: Owner,
    pub(super) epoch: u64,
}

impl Hole {
    /// After what others may touch it.
    pub(super) fn fence(&self) -> Fence {
        Fence {
            owner: self.owner,
            epoch: self.epoch,
        }
    }

    /// The pages that lie in the hole as a whole.
    pub(super) fn whole_pages(&self) -> std::ops::Range<PageIndex> {
        let first = self.start.div_ceil(PAGE_UNITS);
        let end = (self.start + self.units) / PAGE_UNITS;
        page_index(first)..page_index(end.max(first))
    }

    /// The first page whose front of `units` lies in the hole.
    pub(super) fn page_with_front(&self, units: u64) -> Option<PageIndex> {
        let page = self.start.div_ceil(PAGE_UNITS);
        (page * PAGE_UNITS + units <= self.start + self.units).then(|| page_index(page))
    }
}

fn page_index(page: u64) -> PageIndex {
    crate::units::to_usize(page)
}

#[derive(Debug, Default)]
struct Blocks {
    slab: Vec<Block>,
    unused: Vec<Index>,
}

impl Links for Blocks {
    #[inline]
    fn link(&self, index: Index) -> &Link {
        &self.slab[index as usize].link
    }
    #[inline]
    fn link_mut(&mut self, index: Index) -> &mut Link {
        &mut self.slab[index as usize].link
    }
}

impl Blocks {
    fn insert(&mut self, block: Block) -> Index {
        if let Some(index) = self.unused.pop() {
            self.slab[index as usize] = block;
            return index;
        }
        let index = Index::try_from(self.slab.len()).expect("fewer than 2^32 blocks");
        self.slab.push(block);
        index
    }

    #[inline]
    fn at(&mut self, index: Index) -> &mut Block {
        &mut self.slab[index as usize]
    }
}

/// The blocks of all mapped pages of a pool.
#[derive(Debug)]
pub(super) struct Territory {
    blocks: Blocks,
    /// Holes by owner.
    bins: Vec<Bins>,
    at_page: Vec<Index>,
    /// By page and owner: the latest free that touched it, if that was past the owner's first epoch.
    freed_at: Vec<SmallVec<[Fence; 2]>>,
    last: Index,
}

impl Territory {
    pub(super) fn new() -> Self {
        Self {
            blocks: Blocks::default(),
            bins: Vec::new(),
            at_page: Vec::new(),
            freed_at: Vec::new(),
            last: NONE,
        }
    }

    /// Pages that have a home, mapped or not.
    pub(super) fn pages(&self) -> PageIndex {
        self.at_page.len()
    }

    fn bins_of(&mut self, owner: Owner) -> &mut Bins {
        while self.bins.len() <= owner {
            self.bins.push(Bins::new());
        }
        &mut self.bins[owner]
    }

    fn file(&mut self, index: Index, owner: Owner) {
        self.bins_of(owner);
        self.bins[owner].insert(&mut self.blocks, index);
    }

    fn unfile(&mut self, index: Index, owner: Owner) {
        self.bins[owner].remove(&mut self.blocks, index);
    }

    fn hole(&self, index: Index) -> Option<Hole> {
        let Block {
            link, start, usage, ..
        } = self.blocks.slab[index as usize];
        let Use::Hole { owner, epoch } = usage else {
            return None;
        };
        Some(Hole {
            index,
            start,
            units: link.units,
            owner,
            epoch,
        })
    }

    /// The hole of `owner` that fits `units` best.
    pub(super) fn best_fit(&self, owner: Owner, units: u64) -> Option<Hole> {
        let index = self.bins.get(owner)?.find(&self.blocks, units)?;
        self.hole(index)
    }

    /// Holes of `owner` of at least `units`, smallest bins first.
    pub(super) fn holes_from(&self, owner: Owner, units: u64) -> impl Iterator<Item = Hole> + '_ {
        let bins = self.bins.get(owner);
        let indices = bins
            .into_iter()
            .flat_map(move |bins| bins.iter_from(&self.blocks, units));
        indices.filter_map(|(index, _)| self.hole(index))
    }

    /// Streams that own or owned holes.
    pub(super) fn owners(&self) -> std::ops::Range<Owner> {
        0..self.bins.len()
    }

    /// The hole in which page `page` lies as a whole, if it does.
    pub(super) fn hole_over_page(&self, page: PageIndex) -> Option<Hole> {
        self.hole_over_front(page, PAGE_UNITS)
    }

    /// The hole in which the first `units` of page `page` lie, if they do.
    pub(super) fn hole_over_front(&self, page: PageIndex, units: u64) -> Option<Hole> {
        let hole = self.hole(self.at_page[page])?;
        (page as u64 * PAGE_UNITS + units <= hole.start + hole.units).then_some(hole)
    }

    /// After what others may touch the part of `hole` that lies in `page`. A hole grows by frees of
    /// different times; its pages remember theirs.
    pub(super) fn fence_of_page(&self, hole: &Hole, page: PageIndex) -> Fence {
        // Of one owner the latest free stands for all earlier ones; none is noted of the first epoch.
        let mut freed = self.freed_at[page].iter();
        let freed = freed.find(|freed| freed.owner == hole.owner);
        freed.copied().unwrap_or(Fence {
            owner: hole.owner,
            epoch: hole.epoch.min(FIRST_EPOCH),
        })
    }

    /// Notes a free of `units` from `start` on, in all pages it touches.
    fn note_free(&mut self, (start, units): (u64, u64), fence: Fence) {
        // The epochs of a stream that nobody asked about never move on: nothing to note.
        if fence.epoch <= FIRST_EPOCH {
            return;
        }
        self.note_later_free((start, units), fence);
    }

    #[inline(never)]
    fn note_later_free(&mut self, (start, units): (u64, u64), fence: Fence) {
        let end = start + units;
        for page in start / PAGE_UNITS..end.div_ceil(PAGE_UNITS) {
            let freed = &mut self.freed_at[page_index(page)];
            if start <= page * PAGE_UNITS && (page + 1) * PAGE_UNITS <= end {
                // What came before is covered: the page was taken as a whole.
                freed.clear();
                freed.push(fence);
                continue;
            }
            match freed.iter_mut().find(|freed| freed.owner == fence.owner) {
                Some(freed) => freed.epoch = freed.epoch.max(fence.epoch),
                None => freed.push(fence),
            }
        }
    }

    /// The parts of `hole` whose pages `may_touch`, as large as possible: (start, units) of each.
    pub(super) fn parts(
        &self,
        hole: &Hole,
        mut may_touch: impl FnMut(Fence) -> bool,
    ) -> SmallVec<[(u64, u64); 4]> {
        let mut parts: SmallVec<[(u64, u64); 4]> = SmallVec::new();
        let end = hole.start + hole.units;
        for page in hole.start / PAGE_UNITS..end.div_ceil(PAGE_UNITS) {
            if !may_touch(self.fence_of_page(hole, page_index(page))) {
                continue;
            }
            let from = hole.start.max(page * PAGE_UNITS);
            let units = end.min((page + 1) * PAGE_UNITS) - from;
            match parts.last_mut() {
                Some((start, before)) if *start + *before == from => *before += units,
                _ => parts.push((from, units)),
            }
        }
        parts
    }

    /// Takes `units` from `start` on out of `hole`; what is left on either side stays its owner's.
    pub(super) fn take(&mut self, hole: &Hole, start: u64, units: u64) -> Index {
        debug_assert!(hole.start <= start && start + units <= hole.start + hole.units && units > 0);
        self.unfile(hole.index, hole.owner);
        let mut index = hole.index;
        if start > hole.start {
            let taken = self.cut(index, start);
            self.file(index, hole.owner);
            index = taken;
        }
        if hole.start + hole.units > start + units {
            let rest = self.cut(index, start + units);
            self.file(rest, hole.owner);
        }
        self.blocks.at(index).usage = Use::Taken;
        index
    }

    /// Cuts block `index` in two at `at`; returns the second part, of the same usage, not filed.
    fn cut(&mut self, index: Index, at: u64) -> Index {
        let block = *self.blocks.at(index);
        debug_assert!(block.start < at && at < block.end());
        let second = self.blocks.insert(Block {
            link: Link::new(block.end() - at),
            start: at,
            before: index,
            after: block.after,
            usage: block.usage,
        });
        let first = self.blocks.at(index);
        first.link = Link::new(at - block.start);
        first.after = second;
        self.set_before(block.after, second);
        self.claim_pages(second, at, block.end());
        second
    }

    fn set_before(&mut self, index: Index, before: Index) {
        if index == NONE {
            self.last = before;
        } else {
            self.blocks.at(index).before = before;
        }
    }

    /// Notes block `index` as the one at the first byte of every page that begins in `from..to`.
    fn claim_pages(&mut self, index: Index, from: u64, to: u64) {
        let (first, end) = (from.div_ceil(PAGE_UNITS), to.div_ceil(PAGE_UNITS));
        if first == end {
            return;
        }
        self.at_page[page_index(first)..page_index(end)].fill(index);
    }

    /// Frees block `index` for `owner`, for others from its `epoch` on.
    ///
    /// # Panics
    /// If the block is not taken: a double free inside the crate.
    pub(super) fn free(&mut self, index: Index, owner: Owner, epoch: u64) {
        let Block {
            link,
            start,
            before,
            after,
            usage,
        } = *self.blocks.at(index);
        assert_eq!(usage, Use::Taken, "block {index} is freed twice");
        self.blocks.at(index).usage = Use::Hole { owner, epoch };
        self.note_free((start, link.units), Fence { owner, epoch });
        let mut merged = index;
        if self.is_hole_of(after, owner) {
            self.unfile(after, owner);
            self.absorb_next(merged);
        }
        if self.is_hole_of(before, owner) {
            self.unfile(before, owner);
            self.absorb_next(before);
            merged = before;
        }
        self.file(merged, owner);
    }

    fn is_hole_of(&self, index: Index, owner: Owner) -> bool {
        index != NONE
            && matches!(self.blocks.slab[index as usize].usage, Use::Hole { owner: o, .. } if o == owner)
    }

    /// Makes block `index` span its next neighbor too; of two epochs the later one holds for both.
    fn absorb_next(&mut self, index: Index) {
        let gone_index = self.blocks.at(index).after;
        let gone = *self.blocks.at(gone_index);
        let block = self.blocks.at(index);
        block.link = Link::new(block.link.units + gone.link.units);
        block.after = gone.after;
        if let (Use::Hole { epoch, .. }, Use::Hole { epoch: other, .. }) =
            (&mut block.usage, gone.usage)
        {
            *epoch = other.max(*epoch);
        }
        self.set_before(gone.after, index);
        self.claim_pages(index, gone.start, gone.end());
        self.blocks.unused.push(gone_index);
    }

    /// Units of the hole of `owner` at the very end of the territory; growth continues it.
    pub(super) fn last_hole_units(&self, owner: Owner) -> u64 {
        if self.is_hole_of(self.last, owner) {
            self.blocks.link(self.last).units
        } else {
            0
        }
    }

    /// Adds `count` mapped pages at the end, free for `owner`; returns the first.
    pub(super) fn append(&mut self, count: usize, owner: Owner) -> PageIndex {
        let first = self.at_page.len();
        let start = first as u64 * PAGE_UNITS;
        let units = count as u64 * PAGE_UNITS;
        let before = self.last;
        let usage = Use::Taken;
        let index = self.blocks.insert(Block {
            link: Link::new(units),
            start,
            before,
            after: NONE,
            usage,
        });
        if before != NONE {
            self.blocks.at(before).after = index;
        }
        self.last = index;
        self.at_page.resize(first + count, index);
        self.freed_at.resize(first + count, SmallVec::new());
        // Memory that was never used has no past: epoch 0 is complete from the start.
        self.free(index, owner, 0);
        first
    }

    /// Declares the pages of a taken block unmapped; their homes merge with unmapped neighbors.
    pub(super) fn unmap(&mut self, index: Index) {
        let block = self.blocks.at(index);
        assert_eq!(block.usage, Use::Taken, "only taken pages are returned");
        assert!(
            block.start.is_multiple_of(PAGE_UNITS) && block.link.units.is_multiple_of(PAGE_UNITS)
        );
        block.usage = Use::Unmapped;
        let Block { before, after, .. } = *block;
        if self.is_unmapped(after) {
            self.absorb_next(index);
        }
        if self.is_unmapped(before) {
            self.absorb_next(before);
        }
    }

    fn is_unmapped(&self, index: Index) -> bool {
        index != NONE && self.blocks.slab[index as usize].usage == Use::Unmapped
    }

    /// The first of `count` homes side by side whose pages were returned.
    pub(super) fn unmapped(&self, count: usize) -> Option<PageIndex> {
        let units = count as u64 * PAGE_UNITS;
        let fits = |block: &&Block| block.usage == Use::Unmapped && block.link.units >= units;
        let mut blocks = self
            .at_page
            .iter()
            .map(|index| &self.blocks.slab[*index as usize]);
        blocks
            .find(fits)
            .map(|block| page_index(block.start / PAGE_UNITS))
    }

    /// Declares `count` unmapped pages from home `first` on mapped again, free for `owner`.
    pub(super) fn remap(&mut self, first: PageIndex, count: usize, owner: Owner) {
        let index = self.at_page[first];
        let (start, units) = (first as u64 * PAGE_UNITS, count as u64 * PAGE_UNITS);
        let block = *self.blocks.at(index);
        assert!(
            block.usage == Use::Unmapped && block.start == start,
            "homes are settled from the front"
        );
        if block.link.units > units {
            self.cut(index, start + units);
        }
        self.blocks.at(index).usage = Use::Taken;
        self.free(index, owner, 0);
    }

    /// Gives a part of a hole to another owner, with whose holes it merges.
    pub(super) fn give(&mut self, hole: &Hole, (start, units): (u64, u64), fence: Fence) {
        let index = self.take(hole, start, units);
        self.free(index, fence.owner, fence.epoch);
    }

    /// Makes holes whose past is complete anyone's, so that they merge whoever freed them.
    pub(super) fn settle(&mut self, mut is_complete: impl FnMut(Fence) -> bool) {
        let holes: Vec<Hole> = self.holes().filter(|hole| hole.owner != COMMON).collect();
        let (owner, epoch) = (COMMON, 0);
        let past = Fence { owner, epoch };
        for hole in holes {
            if is_complete(hole.fence()) {
                self.give(&hole, (hole.start, hole.units), past);
            }
        }
    }

    /// Whether `owner` has no hole.
    pub(super) fn has_no_hole_of(&self, owner: Owner) -> bool {
        self.largest(owner) == 0
    }

    /// Every hole.
    pub(super) fn holes(&self) -> impl Iterator<Item = Hole> + '_ {
        let all = self
            .bins
            .iter()
            .flat_map(|bins| bins.iter_from(&self.blocks, 1));
        all.filter_map(|(index, _)| self.hole(index))
    }

    /// Units of the largest hole of `owner`.
    pub(super) fn largest(&self, owner: Owner) -> u64 {
        self.bins
            .get(owner)
            .and_then(|bins| bins.largest(&self.blocks))
            .unwrap_or(0)
    }

    /// Start, in units, of a taken block.
    pub(super) fn start(&self, index: Index) -> u64 {
        self.blocks.slab[index as usize].start
    }

    /// Asserts the module's invariants; returns (mapped units, taken units).
    pub(super) fn check_invariants(&self) -> (u64, u64) {
        let mut filed = std::collections::HashMap::new();
        for (owner, bins) in self.bins.iter().enumerate() {
            bins.check_invariants(&self.blocks);
            filed.extend(
                bins.iter_from(&self.blocks, 1)
                    .map(|(index, _)| (index, owner)),
            );
        }
        let (mut mapped, mut taken, mut walked, mut at) = (0, 0, 0, 0);
        let mut before = NONE;
        let mut index = self.at_page.first().copied().unwrap_or(NONE);
        while index != NONE {
            let block = &self.blocks.slab[index as usize];
            assert_eq!(
                (block.start, block.before),
                (at, before),
                "block {index} is out of place"
            );
            assert!(block.link.units > 0, "block {index} is empty");
            match block.usage {
                Use::Taken => taken += block.link.units,
                Use::Hole { owner, .. } => {
                    assert_eq!(filed.get(&index), Some(&owner), "filing of block {index}");
                    assert!(
                        !self.is_hole_of(before, owner),
                        "holes {before} and {index} touch"
                    );
                }
                Use::Unmapped => assert!(!self.is_unmapped(before), "homes touch at {index}"),
            }
            if !matches!(block.usage, Use::Hole { .. }) {
                assert!(
                    !filed.contains_key(&index),
                    "block {index} is filed but no hole"
                );
            }
            if block.usage != Use::Unmapped {
                mapped += block.link.units;
            }
            let pages = block.start.div_ceil(PAGE_UNITS)..block.end().div_ceil(PAGE_UNITS);
            for page in pages {
                assert_eq!(
                    self.at_page[page_index(page)],
                    index,
                    "block at page {page}"
                );
            }
            walked += 1;
            at = block.end();
            before = index;
            index = block.after;
        }
        assert_eq!(before, self.last, "the last block");
        assert_eq!(
            at,
            self.at_page.len() as u64 * PAGE_UNITS,
            "the blocks end with the pages"
        );
        assert_eq!(
            walked + self.blocks.unused.len(),
            self.blocks.slab.len(),
            "a block leaked"
        );
        (mapped, taken)
    }
}

#[cfg(test)]
mod tests;
