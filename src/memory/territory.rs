//! Which bytes of the pages at home are free, and for whom.
//!
//! Every page has one *home* address, and the homes stand side by side in one reserved range: the
//! *territory*. Blocks tile its mapped pages. A free block, a *hole*, belongs to the stream that freed it:
//! that stream may use it at once, another one only after the hole's epoch of its owner. Holes of one owner
//! merge when they touch; holes of different owners do not, since their fences differ.
//!
//! All positions are in units of 512 bytes from the start of the range. Invariants: blocks tile the mapped
//! pages in address order, and each keeps its start as long as it lives; a hole is filed in the bins of its
//! owner; no two neighbors are holes of one owner or both unmapped. Must not know: addresses, events, how a
//! hole's epoch is waited for.

mod blocks;
mod hole;
mod invariants;

use std::ops::Range;

use smallvec::SmallVec;

use blocks::{Block, Blocks, Claim};
pub(super) use hole::Hole;

use super::arena::GRANULARITY;
use super::bins::{Bins, Index, Link, Links, NONE, Units};
use super::fences::{COMMON, FIRST_EPOCH, Fence};
use super::freed::Freed;
use super::starts::Starts;

/// Bytes of a page: the unit in which physical memory is taken, mapped and returned.
pub(super) const PAGE: u64 = 2 << 20;
/// Units of a page.
pub(super) const PAGE_UNITS: u64 = PAGE / GRANULARITY;
/// The same, as blocks store it.
const PAGE_LEN: Units = 1 << PAGE_UNITS.trailing_zeros();
/// Most pages that may have a home.
pub(super) const PAGES_MAX: u64 = Units::MAX as u64 / PAGE_UNITS;
/// Least units of blocks that begin on a page if they are whole pages and their hole allows it, so that they leave whole
/// pages when they are freed, which can be stitched. For smaller ones it would gain less than it costs.
const ON_PAGE_MIN: Units = 6 * PAGE_LEN;

/// A stream as the owner of holes: its number in the pool's table of streams.
pub(super) type Owner = usize;

/// Number of a page's home.
pub(super) type PageIndex = usize;

/// A position or a size as blocks store it. What does not fit lies in no territory.
fn stored(units: u64) -> Units {
    Units::try_from(units).expect("a territory has fewer than 2^32 units")
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

/// The pages that what lies from `start` to `end` touches, and those of them that it fills.
fn pages_between(start: Units, end: Units) -> (Range<PageIndex>, Range<PageIndex>) {
    let rounded_up = |at: Units| at.div_ceil(PAGE_LEN) as PageIndex;
    (
        page_of(start)..rounded_up(end),
        rounded_up(start)..page_of(end),
    )
}

/// The blocks of all mapped pages of a pool.
#[derive(Debug)]
pub(super) struct Territory {
    blocks: Blocks,
    /// Holes by owner.
    bins: Vec<Bins>,
    starts: Starts,
    freed: Freed,
    /// Whether pages are to remember when they were freed. Otherwise all of a hole that grows takes the latest epoch.
    pub(super) remembers_frees: bool,
}

impl Territory {
    pub(super) fn new() -> Self {
        Self {
            blocks: Blocks::new(Block::BORDER),
            bins: Vec::new(),
            starts: Starts::default(),
            freed: Freed::default(),
            remembers_frees: false,
        }
    }

    /// Pages that have a home, mapped or not.
    pub(super) fn pages(&self) -> PageIndex {
        self.starts.len()
    }

    #[inline]
    fn hole(&self, index: Index) -> Option<Hole> {
        let block = self.blocks.at(index);
        Some(Hole {
            index,
            start: u64::from(block.start),
            units: u64::from(block.link.units),
            owner: block.claim.owner()?,
            epoch: block.claim.epoch(),
            is_mixed: block.claim.is_mixed(),
        })
    }

    /// The hole of `owner` that fits `units` best.
    pub(super) fn best_fit(&self, owner: Owner, units: u64) -> Option<Hole> {
        let units = Units::try_from(units).ok()?;
        let index = self.bins.get(owner)?.find(&self.blocks, units)?;
        self.hole(index)
    }

    /// Holes of `owner` of at least `units`, smallest bins first.
    pub(super) fn holes_from(&self, owner: Owner, units: u64) -> impl Iterator<Item = Hole> + '_ {
        let bins = self.bins.get(owner).zip(Units::try_from(units).ok());
        let indices = bins
            .into_iter()
            .flat_map(|(bins, units)| bins.iter_from(&self.blocks, units));
        indices.filter_map(|(index, _)| self.hole(index))
    }

    /// Holes of `owner` of at least `units`, the largest first.
    pub(super) fn largest_holes(
        &self,
        owner: Owner,
        units: u64,
    ) -> impl Iterator<Item = Hole> + '_ {
        let bins = self.bins.get(owner).zip(Units::try_from(units).ok());
        let indices = bins
            .into_iter()
            .flat_map(|(bins, units)| bins.largest_first(&self.blocks, units));
        indices.filter_map(|(index, _)| self.hole(index))
    }

    /// Streams that own or owned holes.
    pub(super) fn owners(&self) -> Range<Owner> {
        0..self.bins.len()
    }

    /// The hole in which page `page` lies as a whole, if it does.
    pub(super) fn hole_over_page(&self, page: PageIndex) -> Option<Hole> {
        self.hole_over_front(page, PAGE_UNITS)
    }

    /// The hole in which the first `units` of page `page` lie, if they do.
    pub(super) fn hole_over_front(&self, page: PageIndex, units: u64) -> Option<Hole> {
        self.hole_or_block(page, units).ok()
    }

    /// As [`hole_over_front`](Self::hole_over_front); otherwise the block that covers the first byte of `page`.
    pub(super) fn hole_or_block(&self, page: PageIndex, units: u64) -> Result<Hole, Index> {
        let block = self.over(page);
        let hole = self.hole(block);
        hole.filter(|hole| hole.has_front(page, units)).ok_or(block)
    }

    /// Whether `block`, which may be gone by now, is in use and lies in the first `units` of `page`: the quick way to
    /// know that those are not free.
    pub(super) fn is_taken_by(&self, block: Index, page: PageIndex, units: u64) -> bool {
        let (block, at) = (self.blocks.at(block), page as u64 * PAGE_UNITS);
        block.claim == Claim::TAKEN
            && u64::from(block.start) < at + units
            && u64::from(block.end()) > at
    }

    /// The block that covers the first byte of `page`.
    fn over(&self, page: PageIndex) -> Index {
        let at = begin_of(page);
        if let Some(noted) = self.starts.noted(page)
            && self.blocks.at(noted).start == at
        {
            return noted;
        }
        let holds = |page, index| page_of(self.blocks.at(index).start) == page;
        let first = self.blocks.at(NONE).after;
        let mut index = self.starts.before(page, holds).unwrap_or(first);
        // From there on blocks lie without a gap.
        while self.blocks.at(index).end() <= at {
            index = self.blocks.at(index).after;
            self.starts
                .note(page_of(self.blocks.at(index).start), index);
        }
        index
    }

    /// After what others may touch the part of `hole` that lies in `page`. A hole grows by frees of
    /// different times; its pages remember theirs.
    pub(super) fn fence_of_page(&self, hole: &Hole, page: PageIndex) -> Fence {
        if !hole.is_mixed {
            return hole.fence();
        }
        // None is noted of the first epoch.
        let epoch = self.freed.epoch(page, hole.owner);
        Fence {
            owner: hole.owner,
            epoch: epoch.unwrap_or(hole.epoch.min(FIRST_EPOCH)),
        }
    }

    /// Notes in their pages when holes of `owner`, which are about to become one, were freed.
    #[inline(never)]
    fn mix(&mut self, holes: [Index; 3], owner: Owner) {
        for index in holes.into_iter().filter(|index| *index != NONE) {
            let hole = self.blocks.at_mut(index);
            let was_mixed = hole.claim.is_mixed();
            hole.claim.set_mixed(true);
            let epoch = hole.claim.epoch();
            if was_mixed || epoch <= FIRST_EPOCH {
                continue;
            }
            let fence = Fence { owner, epoch };
            let (touched, whole) = pages_between(hole.start, hole.end());
            self.freed.note(touched, whole, fence);
        }
    }

    /// The parts of `hole` whose pages `may_touch`, as large as possible: (start, units) of each.
    pub(super) fn parts(
        &self,
        hole: &Hole,
        mut may_touch: impl FnMut(Fence) -> bool,
    ) -> SmallVec<[(u64, u64); 4]> {
        let mut parts: SmallVec<[(u64, u64); 4]> = SmallVec::new();
        if !hole.is_mixed {
            parts.extend(may_touch(hole.fence()).then_some((hole.start, hole.units)));
            return parts;
        }
        let end = hole.start + hole.units;
        for page in hole.pages() {
            if !may_touch(self.fence_of_page(hole, page)) {
                continue;
            }
            let page = page as u64;
            let from = hole.start.max(page * PAGE_UNITS);
            let units = end.min((page + 1) * PAGE_UNITS) - from;
            match parts.last_mut() {
                Some((start, before)) if *start + *before == from => *before += units,
                _ => parts.push((from, units)),
            }
        }
        parts
    }

    /// Takes `units` out of the hole of `owner` that fits them best: at its front, or large blocks of whole pages on
    /// a page. The block and its start.
    // Always, as `PagedMemory::large_at_hand`.
    #[inline(always)]
    pub(super) fn allocate(&mut self, owner: Owner, units: u64) -> Option<(Index, u64)> {
        let units = Units::try_from(units).ok()?;
        let hole = self.bins.get_mut(owner)?.take(&mut self.blocks, units)?;
        if units >= ON_PAGE_MIN {
            return Some(self.take_on_page(hole, owner, units));
        }
        let start = self.blocks.at(hole).start;
        self.take_front(hole, owner, units);
        Some((hole, u64::from(start)))
    }

    #[inline(never)]
    fn take_on_page(&mut self, hole: Index, owner: Owner, units: Units) -> (Index, u64) {
        let Block { start, .. } = *self.blocks.at(hole);
        let page = start.next_multiple_of(PAGE_LEN);
        let fits = page + units <= self.blocks.at(hole).end();
        let at = if units.is_multiple_of(PAGE_LEN) && fits {
            page
        } else {
            start
        };
        (self.take_part(hole, owner, (at, units)), u64::from(at))
    }

    /// Takes `units` from `start` on out of `hole`; what is left on either side stays its owner's.
    pub(super) fn take(&mut self, hole: &Hole, start: u64, units: u64) -> Index {
        debug_assert!(hole.start <= start && start + units <= hole.start + hole.units && units > 0);
        self.bins[hole.owner].remove(&mut self.blocks, hole.index);
        self.take_part(hole.index, hole.owner, (stored(start), stored(units)))
    }

    /// Takes `units` from `start` on out of a hole that is not filed.
    fn take_part(&mut self, hole: Index, owner: Owner, (start, units): (Units, Units)) -> Index {
        let mut taken = hole;
        if start > self.blocks.at(hole).start {
            taken = self.cut(hole, start);
            self.bins[owner].insert(&mut self.blocks, hole);
        }
        self.take_front(taken, owner, units);
        taken
    }

    /// Makes the front of a hole that is not filed a block of `units`.
    // Always, as `PagedMemory::large_at_hand`.
    #[inline(always)]
    fn take_front(&mut self, hole: Index, owner: Owner, units: Units) {
        let Block { link, start, .. } = *self.blocks.at(hole);
        if units < link.units {
            let rest = self.cut(hole, start + units);
            self.bins[owner].insert(&mut self.blocks, rest);
        }
        self.blocks.at_mut(hole).claim = Claim::TAKEN;
    }

    /// Cuts block `index`, which is not filed, in two at `at`; returns the second part, of the same holder.
    #[inline(always)]
    fn cut(&mut self, index: Index, at: Units) -> Index {
        let second = self.blocks.vacant();
        let first = self.blocks.at_mut(index);
        let block = *first;
        debug_assert!(block.start < at && at < block.end());
        first.link.units = at - block.start;
        first.after = second;
        *self.blocks.at_mut(second) = Block {
            link: Link::new(block.end() - at),
            start: at,
            before: index,
            ..block
        };
        self.blocks.at_mut(block.after).before = second;
        self.starts.note(page_of(at), second);
        second
    }

    /// Frees block `index` for `owner`, for others from its `epoch` on.
    ///
    /// # Panics
    /// If the block is not taken: a double free inside the crate.
    pub(super) fn free(&mut self, index: Index, owner: Owner, epoch: u64) {
        if owner >= self.bins.len() {
            self.bins.resize_with(owner + 1, Bins::new);
        }
        let block = self.blocks.at_mut(index);
        assert_eq!(block.claim, Claim::TAKEN, "block {index} is freed twice");
        let claim = Claim::hole(Fence { owner, epoch });
        block.claim = claim;
        let (before, after) = (block.before, block.after);
        let continues = self.blocks.is_of(before, claim);
        let goes_on = self.blocks.is_of(after, claim);
        if self.remembers_frees {
            let of = |is: bool, index| if is { index } else { NONE };
            self.mix([of(continues, before), index, of(goes_on, after)], owner);
        }
        let bins = &mut self.bins[owner];
        if goes_on {
            bins.remove(&mut self.blocks, after);
            let units = self.blocks.absorb_next(index, self.remembers_frees);
            self.blocks.at_mut(index).link.units = units;
        }
        if continues {
            let units = self.blocks.absorb_next(before, self.remembers_frees);
            bins.resize(&mut self.blocks, before, units);
        } else {
            bins.insert(&mut self.blocks, index);
        }
    }

    /// Units of the hole of `owner` at the very end of the territory; growth continues it.
    pub(super) fn last_hole_units(&self, owner: Owner) -> u64 {
        let claim = Claim::hole(Fence { owner, epoch: 0 });
        let last = self.blocks.at(NONE).before;
        if self.blocks.is_of(last, claim) {
            u64::from(self.blocks.link(last).units)
        } else {
            0
        }
    }

    /// Adds `count` mapped pages at the end, free for `owner`; returns the first.
    pub(super) fn append(&mut self, count: usize, owner: Owner) -> PageIndex {
        let first = self.starts.len();
        let (start, end) = (begin_of(first), begin_of(first + count));
        let before = self.blocks.at(NONE).before;
        let index = self.blocks.insert(Block {
            link: Link::new(end - start),
            start,
            before,
            after: NONE,
            claim: Claim::TAKEN,
        });
        self.blocks.at_mut(before).after = index;
        self.blocks.at_mut(NONE).before = index;
        self.starts.extend(first + count);
        self.starts.note(first, index);
        self.freed.extend(first + count);
        // Memory that was never used has no past: epoch 0 is complete from the start.
        self.free(index, owner, 0);
        first
    }

    /// Declares the pages of a taken block unmapped; their homes merge with unmapped neighbors.
    pub(super) fn unmap(&mut self, index: Index) {
        let block = self.blocks.at_mut(index);
        assert_eq!(block.claim, Claim::TAKEN, "only taken pages are returned");
        block.claim = Claim::UNMAPPED;
        assert!(block.start.is_multiple_of(PAGE_LEN) && block.link.units.is_multiple_of(PAGE_LEN));
        let Block { before, after, .. } = *block;
        if self.blocks.is_of(after, Claim::UNMAPPED) {
            let units = self.blocks.absorb_next(index, false);
            self.blocks.at_mut(index).link.units = units;
        }
        if self.blocks.is_of(before, Claim::UNMAPPED) {
            let units = self.blocks.absorb_next(before, false);
            self.blocks.at_mut(before).link.units = units;
        }
    }

    /// The first of `count` homes side by side whose pages were returned.
    pub(super) fn unmapped(&self, count: usize) -> Option<PageIndex> {
        let units = count as u64 * PAGE_UNITS;
        let fits =
            |block: &&Block| block.claim == Claim::UNMAPPED && u64::from(block.link.units) >= units;
        let mut blocks = self.in_order().map(|(_, block)| block);
        blocks.find(fits).map(|block| page_of(block.start))
    }

    /// Declares `count` unmapped pages from home `first` on mapped again, free for `owner`.
    pub(super) fn remap(&mut self, first: PageIndex, count: usize, owner: Owner) {
        let index = self.over(first);
        let (start, end) = (begin_of(first), begin_of(first + count));
        let block = *self.blocks.at(index);
        assert!(
            block.claim == Claim::UNMAPPED && block.start == start,
            "homes are settled from the front"
        );
        if block.end() > end {
            self.cut(index, end);
        }
        self.blocks.at_mut(index).claim = Claim::TAKEN;
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

    /// Every block, in the order of addresses.
    fn in_order(&self) -> impl Iterator<Item = (Index, &Block)> {
        let at = |index: Index| (index != NONE).then(|| (index, self.blocks.at(index)));
        let first = self.blocks.at(NONE).after;
        std::iter::successors(at(first), move |(_, block)| at(block.after))
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
        let largest = self
            .bins
            .get(owner)
            .and_then(|bins| bins.largest(&self.blocks));
        largest.map_or(0, u64::from)
    }

    /// Start, in units, of a taken block.
    pub(super) fn start(&self, index: Index) -> u64 {
        u64::from(self.blocks.at(index).start)
    }
}

#[cfg(test)]
mod tests;
