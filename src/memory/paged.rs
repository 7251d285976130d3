//! Paged memory: physical pages in one range of addresses, stitched when no hole is large enough.
//!
//! A request takes, in order: a hole of its stream; another stream's hole behind a fence; new pages, while
//! what is held stays within a small slack of the most that was ever in use; free pages from anywhere,
//! stitched; new pages. Small requests get pages of their own.
//!
//! Invariant: the territory's mapped pages are exactly the pages held from the driver.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::arena::GRANULARITY;
use super::backing::{Backing, Place, Placed, Refusal, Request, SpareMemory, Totals};
use super::bins::Index;
use super::fences::{COMMON, Fence, Fences};
use super::growth::Pages;
use super::packed::Location;
use super::ranges::{RangeIndex, Ranges};
use super::small::{Lease, SmallBlocks};
use super::territory::{Hole, Owner, PAGE, PAGE_UNITS, Territory};
use crate::error::Result;
use crate::units::KIB;

/// Requests up to this size share pages with other small ones.
const SMALL_MAX: u64 = 256 * KIB;
/// New pages are preferred to stitching while what is held exceeds the most ever in use by at most so many
/// thousandths: memory traded against mapping calls.
const SLACK: u64 = 13;

/// What may be held without stitching where `most` bytes were in use at once.
pub(super) fn with_slack(most: u64) -> u64 {
    most.saturating_add(most / 1000 * SLACK)
}

/// Pages of one device and the blocks in them.
#[derive(Debug)]
pub(super) struct PagedMemory {
    pub(super) pages: Pages,
    pub(super) territory: Territory,
    pub(super) ranges: Ranges,
    /// Whether pages may be mapped a second time. The addresses of a range are given up at some time.
    stitches: bool,
    small: BTreeMap<Owner, SmallBlocks>,
    /// Bytes in blocks.
    pub(super) in_use: u64,
    /// The most that callers ever had of them. What waits for other streams does not count: that it is there
    /// is no reason to hold more.
    pub(super) live_peak: u64,
}

impl PagedMemory {
    pub(super) fn new(pages: Pages) -> Self {
        Self {
            pages,
            territory: Territory::new(),
            ranges: Ranges::default(),
            stitches: true,
            small: BTreeMap::new(),
            in_use: 0,
            live_peak: 0,
        }
    }

    /// Memory whose addresses hold for as long as its pages: it maps none a second time.
    pub(super) fn unstitched(pages: Pages) -> Self {
        Self {
            stitches: false,
            ..Self::new(pages)
        }
    }

    #[inline]
    fn count(&mut self, bytes: u64, pending: u64) {
        self.in_use += bytes;
        self.live_peak = self.live_peak.max(self.in_use.saturating_sub(pending));
    }

    /// Takes `units` from the front of a hole for `owner`.
    fn place_in(&mut self, hole: &Hole, units: u64, owner: Owner) -> Placed {
        let index = self.territory.take(hole, hole.start, units);
        let ptr = self.pages.home(hole.start * GRANULARITY);
        Placed {
            ptr,
            location: Location::new(owner, Place::Large(index)),
        }
    }

    // Always, since the compiler would not: a call costs every allocation past the lane ten instructions.
    #[inline(always)]
    fn large_at_hand(&mut self, owner: Owner, bytes: u64) -> Option<Placed> {
        let (index, start) = self.territory.allocate(owner, bytes / GRANULARITY)?;
        Some(Placed {
            ptr: self.pages.home(start * GRANULARITY),
            location: Location::new(owner, Place::Large(index)),
        })
    }

    fn small_at_hand(&mut self, owner: Owner, bytes: u64) -> Option<Placed> {
        let small = self.small.get_mut(&owner)?;
        let (page, offset, index) = small.allocate(bytes)?;
        Some(Placed {
            ptr: self.pages.home(page as u64 * PAGE + offset),
            location: Location::new(owner, Place::Small(index)),
        })
    }

    // Never, as it is for what lies at hand nowhere: it would keep `large_at_hand` from the place where it counts.
    #[inline(never)]
    fn place_large(&mut self, request: Request) -> Option<Placed> {
        self.large_at_hand(request.owner, request.bytes)
    }

    fn place_small(&mut self, request: Request) -> Option<Placed> {
        self.small_at_hand(request.owner, request.bytes)
    }

    /// The first hole that fits and that the request may take from another stream.
    fn borrow(&self, request: Request, units: u64, fences: &mut Fences) -> Option<Hole> {
        let others = self
            .territory
            .owners()
            .filter(|owner| *owner != request.owner);
        let fitting = others.filter_map(|owner| self.territory.best_fit(owner, units));
        let mut fitting: Vec<Hole> = fitting.collect();
        fitting.sort_by_key(|hole| hole.units);
        fitting
            .into_iter()
            .find(|hole| fences.pass(request.owner, hole.fence(), request.reuse))
    }

    /// Makes holes of other streams the requester's, where their fences can be passed, so that they merge
    /// with its own; whether there were any. Pages pass one by one: those of a hole that only grew just now
    /// are not held back by the free that it grew by.
    fn gather(&mut self, request: Request, fences: &mut Fences) -> bool {
        let mut gathered = false;
        let owners = self.territory.owners();
        for owner in owners.filter(|owner| *owner != request.owner && *owner != COMMON) {
            let holes: Vec<Hole> = self.territory.holes_from(owner, 1).collect();
            let Some(newest) = holes.iter().map(|hole| hole.epoch).max() else {
                continue;
            };
            let reached = fences.reach(request.owner, owner, newest, request.reuse);
            for hole in holes {
                gathered |= self.gather_from(hole, reached, request, fences);
            }
        }
        // As long as all that is asked for can be had, holes pass as a whole.
        self.territory.remembers_frees = fences.are_asked();
        gathered
    }

    /// Makes what is anyone's the requester's, so that it merges with its own; whether there was any.
    fn take_common(&mut self, request: Request) -> bool {
        let holes: Vec<Hole> = self.territory.holes_from(COMMON, 1).collect();
        let (owner, epoch) = (request.owner, 0);
        for hole in &holes {
            let whole = (hole.start, hole.units);
            self.territory.give(hole, whole, Fence { owner, epoch });
        }
        !holes.is_empty()
    }

    fn gather_from(
        &mut self,
        mut hole: Hole,
        reached: u64,
        request: Request,
        fences: &mut Fences,
    ) -> bool {
        let whole = (hole.start, hole.units);
        let (parts, until) =
            if hole.epoch <= reached || fences.pass(request.owner, hole.fence(), request.reuse) {
                (SmallVec::from_slice(&[whole]), hole.epoch)
            } else {
                let parts = self.territory.parts(&hole, |fence| fence.epoch <= reached);
                (parts, reached)
            };
        // What is complete has no past to wait for, and becomes anyone's: were it all the requester's, its
        // former owner would soon have to ask for it back. What the requester was made to wait for has the
        // requester's own past.
        let is_complete = fences.is_known_complete(Fence {
            owner: hole.owner,
            epoch: until,
        });
        let past = if is_complete {
            Fence {
                owner: COMMON,
                epoch: 0,
            }
        } else {
            fences.now(request.owner)
        };
        // From the end, so that what is left of the hole keeps its place.
        for (start, units) in parts.iter().rev() {
            self.territory.give(&hole, (*start, *units), past);
            hole.units = start - hole.start;
        }
        !parts.is_empty()
    }

    /// Places a block in a hole, after merging what other streams freed with its own where there is none.
    fn place_merged(&mut self, request: Request, fences: &mut Fences) -> Option<Placed> {
        if let Some(placed) = self.place_at_home(request, fences) {
            return Some(placed);
        }
        if self.gather(request, fences)
            && let Some(placed) = self.place_at_home(request, fences)
        {
            return Some(placed);
        }
        if self.take_common(request) {
            return self.place_large(request);
        }
        None
    }

    fn find_large(&mut self, request: Request, fences: &mut Fences) -> Result<Placed, Refusal> {
        let units = request.bytes / GRANULARITY;
        if let Some(placed) = self.place_merged(request, fences) {
            return Ok(placed);
        }
        let missing = self.missing_pages(units, request.owner) as u64;
        // Requests may be of any size up to 2^64: those that saturate here are refused by growth.
        let most = self.live_peak.max(
            self.in_use
                .saturating_sub(request.pending)
                .saturating_add(request.bytes),
        );
        let held = missing
            .saturating_mul(PAGE)
            .saturating_add(self.pages.bytes_held());
        if held <= with_slack(most) && self.grow_hole(units, request.owner).is_ok() {
            return Ok(self.place_large(request).expect("a hole was grown to fit"));
        }
        if self.stitches
            && let Some(placed) = self.stitch(request, fences)
        {
            return Ok(placed);
        }
        match self.grow_hole(units, request.owner) {
            Ok(()) => Ok(self.place_large(request).expect("a hole was grown to fit")),
            // Out of pages: room among the small blocks is better than none.
            Err(refusal) => self
                .place_small(request)
                .or_else(|| self.borrow_small(request, fences))
                .ok_or(refusal),
        }
    }

    fn find_small(&mut self, request: Request, fences: &mut Fences) -> Result<Placed, Refusal> {
        if let Some(placed) = self.place_small(request) {
            return Ok(placed);
        }
        match self.lease(request, fences) {
            Ok(lease) => {
                self.small
                    .entry(request.owner)
                    .or_insert_with(SmallBlocks::new)
                    .add(lease, fences.now(request.owner).epoch);
                Ok(self
                    .place_small(request)
                    .expect("a page was borrowed that fits the request"))
            }
            // Out of pages: room among the large blocks is better than none.
            Err(refusal) => self
                .place_merged(request, fences)
                .or_else(|| self.borrow_small(request, fences))
                .ok_or(refusal),
        }
    }

    /// Places a block among the small blocks of another stream. It is lent: freed, it goes back there, and
    /// that stream waits for the borrower.
    fn borrow_small(&mut self, request: Request, fences: &mut Fences) -> Option<Placed> {
        if !request.may_borrow {
            return None;
        }
        let fits = |small: &SmallBlocks| small.largest_free() >= request.bytes;
        let others = self
            .small
            .iter_mut()
            .filter(|(owner, small)| **owner != request.owner && fits(small));
        for (owner, small) in others {
            let (lender, epoch) = (*owner, small.epoch());
            let fence = Fence {
                owner: lender,
                epoch,
            };
            if fences.pass(request.owner, fence, request.reuse) {
                let (page, offset, index) = small.allocate(request.bytes)?;
                let place = Place::Lent {
                    index,
                    is_small: true,
                };
                return Some(Placed {
                    ptr: self.pages.home(page as u64 * PAGE + offset),
                    location: Location::new(lender, place),
                });
            }
        }
        None
    }

    /// Places a block in a hole of its stream, or of another behind a fence.
    fn place_at_home(&mut self, request: Request, fences: &mut Fences) -> Option<Placed> {
        self.place_large(request).or_else(|| {
            let units = request.bytes / GRANULARITY;
            let hole = self.borrow(request, units, fences)?;
            Some(self.place_in(&hole, units, request.owner))
        })
    }

    /// Borrows a page for small blocks: whole, and from the smallest hole that has one.
    fn lease(&mut self, request: Request, fences: &mut Fences) -> Result<Lease, Refusal> {
        loop {
            if let Some(page) = self.free_pages(1, request, fences).pop() {
                let hole = self
                    .territory
                    .hole_over_page(page)
                    .expect("the page was found free");
                let block = self
                    .territory
                    .take(&hole, page as u64 * PAGE_UNITS, PAGE_UNITS);
                return Ok(Lease { page, block });
            }
            self.grow(1, request.owner)?;
        }
    }

    /// Returns pages that are kept for small blocks although none lies in them.
    fn return_spares(&mut self) {
        for (owner, small) in &mut self.small {
            if let Some((lease, epoch)) = small.take_spare() {
                self.territory.free(lease.block, *owner, epoch);
            }
        }
    }

    /// Takes blocks back at home.
    fn free_home(&mut self, index: Index, fence: Fence) {
        self.territory.free(index, fence.owner, fence.epoch);
    }

    // Never, nor the next: they would have large blocks saved registers for.
    #[inline(never)]
    fn free_small(&mut self, index: Index, fence: Fence) {
        let small = self.small.get_mut(&fence.owner);
        let small = small.expect("small blocks outlive their blocks");
        if let Some(lease) = small.free(index, fence.epoch) {
            self.free_home(lease.block, fence);
        }
    }

    #[inline(never)]
    fn free_stitched(&mut self, range: RangeIndex, fence: Fence) {
        for index in self.ranges.release(range, fence) {
            self.free_home(index, fence);
        }
    }
}

impl Backing for PagedMemory {
    fn set_limit(&mut self, bytes: u64) {
        self.pages.set_limit(bytes);
    }

    fn place(&mut self, owner: Owner, bytes: u64, pending: u64) -> Option<Placed> {
        let found = if bytes <= SMALL_MAX {
            self.small_at_hand(owner, bytes)
        } else {
            self.large_at_hand(owner, bytes)
        }?;
        self.count(bytes, pending);
        Some(found)
    }

    fn find(&mut self, request: Request, fences: &mut Fences) -> Result<Placed, Refusal> {
        let placed = if request.bytes <= SMALL_MAX {
            self.find_small(request, fences)
        } else {
            self.find_large(request, fences)
        };
        placed.inspect(|_| self.count(request.bytes, request.pending))
    }

    fn free(&mut self, location: Location, bytes: u64, fence: Fence) {
        self.in_use -= bytes;
        match location.place() {
            Place::Large(index) => self.free_home(index, fence),
            Place::Small(index) | Place::Lent { index, .. } => self.free_small(index, fence),
            Place::Stitched(range) => self.free_stitched(range, fence),
        }
    }

    fn settle(&mut self, fences: &mut Fences) {
        self.return_spares();
        self.territory.settle(|fence| fences.is_complete(fence));
        self.small.retain(|_, small| !small.is_empty());
    }

    fn adopt(&mut self, owner: Owner) {
        if let Some((lease, epoch)) = self.small.get_mut(&owner).and_then(SmallBlocks::take_spare) {
            self.territory.free(lease.block, owner, epoch);
        }
        self.small
            .retain(|small_owner, small| *small_owner != owner || !small.is_empty());
        self.territory.settle(|fence| fence.owner == owner);
    }

    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        self.settle(fences);
        self.release_pages(keep, fences)
    }

    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()> {
        self.return_spares();
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

    fn bytes_behind(&self, owner: Owner, fences: &Fences) -> BTreeMap<Owner, u64> {
        let mut behind = BTreeMap::new();
        let is_behind = |fence: Fence| fence.owner != owner && !fences.is_known_complete(fence);
        for hole in self
            .territory
            .holes()
            .filter(|hole| is_behind(hole.fence()))
        {
            *behind.entry(hole.owner).or_default() += hole.units * GRANULARITY;
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

    fn bytes_free_for(&self, owner: Owner, fences: &Fences) -> u64 {
        let is_usable = |fence: Fence| fence.owner == owner || fences.is_known_complete(fence);
        let usable = self
            .territory
            .holes()
            .filter(|hole| is_usable(hole.fence()));
        // Whole pages can be put together from anywhere.
        let at_home: u64 = usable
            .map(|hole| hole.whole_pages().len() as u64 * PAGE)
            .sum();
        at_home + self.pages.bytes_spare()
    }

    fn holds_nothing_of(&self, owner: Owner) -> bool {
        self.territory.has_no_hole_of(owner) && !self.small.contains_key(&owner)
    }

    fn largest_free(&self) -> u64 {
        let small = self.small.values().map(SmallBlocks::largest_free);
        let owners = self.territory.owners();
        let at_home = owners.map(|owner| self.territory.largest(owner) * GRANULARITY);
        small.chain(at_home).max().unwrap_or(0)
    }

    fn inactive_split(&self) -> (u64, u64) {
        let split = |hole: Hole| hole.units - hole.whole_pages().len() as u64 * PAGE_UNITS;
        let at_home = self.territory.holes().map(split).filter(|units| *units > 0);
        let at_home = at_home.fold((0, 0), |(bytes, n), units| {
            (bytes + units * GRANULARITY, n + 1)
        });
        let small = self.small.values().map(SmallBlocks::free_blocks);
        small.fold(at_home, |(bytes, n), (more, blocks)| {
            (bytes + more, n + blocks)
        })
    }

    fn totals(&self) -> Totals {
        self.pages.totals()
    }

    fn check_invariants(&self) -> u64 {
        let (mapped, taken) = self.territory.check_invariants();
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
        in_blocks += taken * GRANULARITY - leased;
        assert_eq!(in_blocks, self.in_use, "bytes in blocks");
        for range in self.ranges.live() {
            for page in &range.pages {
                assert_eq!(
                    self.territory.hole_over_page(*page),
                    None,
                    "a live range's page is free"
                );
            }
        }
        in_blocks
    }
}
