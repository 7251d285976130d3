//! Stitching: a large request served from free pages that do not lie side by side.
//!
//! The pages are mapped a second time, side by side, in a range of addresses of their own. Nothing is
//! unmapped to do so, so stream order alone makes it safe and no host wait is needed. The last page of a
//! request is rarely needed as a whole: any page whose front is free will do, and the rest of it stays
//! usable at home.

use smallvec::SmallVec;

use super::arena::GRANULARITY;
use super::backing::{Place, Placed, Request};
use super::bins::Index;
use super::fences::{Fence, Fences};
use super::growth::MAPPED_PER_HELD;
use super::packed::Location;
use super::paged::PagedMemory;
use super::ranges::RangeIndex;
use super::territory::{Hole, PAGE, PAGE_UNITS, PageIndex};
use crate::error::Result;
use crate::units::to_usize;

/// Holes that are looked at for the front of a last page before a whole page is used for it.
const FRONTS_MAX: usize = 64;

/// What a request needs: pages as a whole, and the front of one more.
#[derive(Clone, Copy, Debug)]
struct Need {
    whole: usize,
    /// Units of the last page; 0 if the request is a multiple of a page.
    front: u64,
}

impl Need {
    fn of(request: Request) -> Self {
        let units = request.bytes / GRANULARITY;
        Self {
            whole: to_usize(units / PAGE_UNITS),
            front: units % PAGE_UNITS,
        }
    }

    fn pages(self) -> usize {
        self.whole + usize::from(self.front > 0)
    }

    /// Units needed of the page at place `position` of the range.
    fn units_at(self, position: usize) -> u64 {
        if position < self.whole {
            PAGE_UNITS
        } else {
            self.front
        }
    }
}

impl PagedMemory {
    /// Places a request in pages from anywhere, taking new ones only for what is missing; `None` if that
    /// cannot be done, in which case nothing has changed but that new pages may have come in.
    pub(super) fn stitch(&mut self, request: Request, fences: &mut Fences) -> Option<Placed> {
        let need = Need::of(request);
        if need.whole == 0 {
            return None;
        }
        if let Some(placed) = self.reuse_range(request, need, fences) {
            return Some(placed);
        }
        let pages = self.choose_pages(request, need, fences)?;
        self.evict_ranges(MAPPED_PER_HELD * self.pages.bytes_held() / PAGE, fences);
        let ptr = self.pages.map_range(&pages).or_else(|| {
            // A driver may have room for fewer mappings than that.
            self.evict_ranges(self.ranges.pages_mapped as u64 / 2, fences);
            self.pages.map_range(&pages)
        })?;
        let taken = self.take_pages(&pages, need);
        let range = self
            .ranges
            .insert(ptr, pages, taken, fences.now(request.owner));
        Some(Placed {
            ptr,
            location: Location::new(request.owner, Place::Stitched(range)),
        })
    }

    /// An idle range of the right length all of whose pages are free.
    fn reuse_range(&mut self, request: Request, need: Need, fences: &mut Fences) -> Option<Placed> {
        let range = self.ranges.idle_of(need.pages()).find(|range| {
            let free = self.fences_over(*range, need);
            free.is_some_and(|behind| {
                behind
                    .iter()
                    .all(|f| fences.pass(request.owner, *f, request.reuse))
            })
        })?;
        let pages = self.ranges.get(range).pages.clone();
        let taken = self.take_pages(&pages, need);
        self.ranges.revive(range, taken);
        let ptr = self.ranges.get(range).ptr;
        Some(Placed {
            ptr,
            location: Location::new(request.owner, Place::Stitched(range)),
        })
    }

    /// The latest fence of each owner over the pages of an idle range; `None` if one is not free.
    fn fences_over(&self, range: RangeIndex, need: Need) -> Option<SmallVec<[Fence; 2]>> {
        let range = self.ranges.get(range);
        let free = |position: usize| {
            let (page, units) = (range.pages[position], need.units_at(position));
            let found = self.territory.hole_or_block(page, units);
            found
                .map_err(|block| range.taken_page.set((position, block)))
                .ok()
        };
        let (position, block) = range.taken_page.get();
        let (page, units) = (range.pages[position], need.units_at(position));
        if self.territory.is_taken_by(block, page, units) {
            return None;
        }
        free(position)?;
        let mut latest: SmallVec<[Fence; 2]> = SmallVec::new();
        let mut near: Option<Hole> = None;
        for (position, page) in range.pages.iter().enumerate() {
            let hole = match near.filter(|hole| hole.has_front(*page, need.units_at(position))) {
                Some(hole) => hole,
                None => free(position)?,
            };
            near = Some(hole);
            let fence = self.territory.fence_of_page(&hole, *page);
            match latest.iter_mut().find(|known| known.owner == fence.owner) {
                Some(known) => known.epoch = known.epoch.max(fence.epoch),
                None => latest.push(fence),
            }
        }
        Some(latest)
    }

    /// Free pages for the request, in the order in which they are to be mapped: that of their homes, so that
    /// neighbors stay neighbors.
    fn choose_pages(
        &mut self,
        request: Request,
        need: Need,
        fences: &mut Fences,
    ) -> Option<Vec<PageIndex>> {
        loop {
            let mut pages = self.free_pages(need.pages(), request, fences);
            let front = self.page_with_free_front(request, need, &pages);
            let whole = pages.len().min(need.whole);
            if whole == need.whole && (need.front == 0 || front.is_some()) {
                pages.truncate(need.whole);
                // Stable, because that finds the runs they come in.
                pages.sort();
                pages.extend(front.filter(|_| need.front > 0));
                return Some(pages);
            }
            if pages.len() == need.pages() {
                pages.sort();
                return Some(pages);
            }
            let have = whole + usize::from(need.front > 0 && front.is_some());
            // Growth can also fit the whole request; the caller tries that when this refuses.
            self.grow(need.pages() - have, request.owner).ok()?;
        }
    }

    /// Up to `count` pages that are free as a whole and may be used by the request: its own stream's
    /// first, those in the largest holes first. Small requests fill the smallest holes, so the pages of an
    /// idle range stay free longest, and the range useful, if they come from large ones. While other streams
    /// ask in vain, pages that only the request's own stream may have go before those.
    pub(super) fn free_pages(
        &self,
        count: usize,
        request: Request,
        fences: &mut Fences,
    ) -> Vec<PageIndex> {
        let mut pages = Vec::new();
        let others = self
            .territory
            .owners()
            .filter(|owner| *owner != request.owner);
        for owner in std::iter::once(request.owner).chain(others) {
            if pages.len() == count {
                break;
            }
            if owner == request.owner && fences.are_asked() {
                let holes: Vec<Hole> = self.territory.largest_holes(owner, PAGE_UNITS).collect();
                pages = self.newest_pages(&holes, fences);
                pages.truncate(count);
                continue;
            }
            for hole in self.territory.largest_holes(owner, PAGE_UNITS) {
                let missing = count - pages.len();
                if missing == 0 {
                    break;
                }
                let whole = hole.whole_pages();
                if fences.pass(request.owner, hole.fence(), request.reuse) {
                    pages.extend(whole.take(missing));
                } else {
                    let reached = fences.reach(request.owner, owner, 0, request.reuse);
                    let passed = whole
                        .filter(|page| self.territory.fence_of_page(&hole, *page).epoch <= reached);
                    pages.extend(passed.take(missing));
                }
            }
        }
        pages
    }

    /// The whole pages of `holes`, those that are complete, which any stream may have, behind the others.
    fn newest_pages(&self, holes: &[Hole], fences: &Fences) -> Vec<PageIndex> {
        let pages = holes.iter().flat_map(|hole| {
            let fence = |page| self.territory.fence_of_page(hole, page);
            hole.whole_pages().map(move |page| (page, fence(page)))
        });
        let (complete, newest): (Vec<_>, Vec<_>) =
            pages.partition(|(_, fence)| fences.is_known_complete(*fence));
        newest
            .into_iter()
            .chain(complete)
            .map(|(page, _)| page)
            .collect()
    }

    /// A page outside `chosen` whose front is free, if possible one that is not free as a whole.
    fn page_with_free_front(
        &self,
        request: Request,
        need: Need,
        chosen: &[PageIndex],
    ) -> Option<PageIndex> {
        if need.front == 0 {
            return None;
        }
        let whole = &chosen[..chosen.len().min(need.whole)];
        let usable = |hole: Hole| {
            let page = hole.page_with_front(need.front)?;
            (!whole.contains(&page)).then_some(page)
        };
        let holes = self.territory.holes_from(request.owner, need.front);
        holes.take(FRONTS_MAX).find_map(usable)
    }

    /// Takes pages at home, neighbors in one block.
    fn take_pages(&mut self, pages: &[PageIndex], need: Need) -> SmallVec<[Index; 4]> {
        let mut taken = SmallVec::new();
        let mut position = 0;
        while position < pages.len() {
            let first = pages[position];
            let hole = self
                .territory
                .hole_over_front(first, need.units_at(position))
                .expect("chosen pages are free");
            let (start, mut units) = (first as u64 * PAGE_UNITS, need.units_at(position));
            position += 1;
            while let Some(page) = pages.get(position) {
                let more = need.units_at(position);
                let adjacent = *page as u64 * PAGE_UNITS == start + units;
                if !adjacent || start + units + more > hole.start + hole.units {
                    break;
                }
                units += more;
                position += 1;
            }
            taken.push(self.territory.take(&hole, start, units));
        }
        taken
    }

    /// Unmaps the oldest idle ranges, as far as their work is complete, until `most` pages are mapped.
    fn evict_ranges(&mut self, most: u64, fences: &mut Fences) {
        while self.ranges.pages_mapped as u64 > most {
            let Some(oldest) = self.ranges.oldest_idle() else {
                return;
            };
            if !self.remove_range(oldest, fences).unwrap_or(false) {
                return;
            }
        }
    }

    /// Unmaps an idle range if its last use is known to be complete; whether it was.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses; the mapping is then kept.
    pub(super) fn remove_range(&mut self, index: RangeIndex, fences: &mut Fences) -> Result<bool> {
        if !fences.ask_complete(self.ranges.get(index).fence()) {
            return Ok(false);
        }
        self.pages.unmap_range(self.ranges.get(index))?;
        self.ranges.remove(index);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::backing::Backing;
    use super::super::config::ReusePolicy;
    use super::super::growth::Pages;
    use super::*;
    use crate::driver::{Device, HostConfig};

    #[test]
    fn pages_that_any_stream_may_have_are_taken_last() {
        let device = Device::host(HostConfig::default()).unwrap();
        let mut memory = PagedMemory::new(Pages::new(&device, None).unwrap());
        let mut fences = Fences::new(false);
        let owner = fences.owner(&device.create_stream().unwrap());
        let place = |memory: &mut PagedMemory, fences: &mut Fences, pages: u64| {
            let request = Request {
                bytes: pages * PAGE,
                owner,
                reuse: ReusePolicy::OnlyComplete,
                pending: 0,
                may_borrow: true,
                may_return: true,
            };
            let placed = memory.find(request, fences).unwrap();
            (placed.location, request.bytes)
        };
        let (all, bytes) = place(&mut memory, &mut fences, 4);
        memory.territory.remembers_frees = true;
        memory.free(all, bytes, fences.now(owner));
        let (fence, _) = fences.close_epoch(owner).unwrap();
        fences.passed(fence);
        // The first two pages once more, in an epoch that nobody has waited for.
        let (two, bytes) = place(&mut memory, &mut fences, 2);
        memory.free(two, bytes, fences.now(owner));
        let mut holes: Vec<Hole> = memory.territory.holes_from(owner, PAGE_UNITS).collect();
        assert_eq!(holes.len(), 1, "all of it is one hole");
        assert_eq!(memory.newest_pages(&holes, &fences), [0, 1, 2, 3]);
        // And the last two, after that.
        let (fence, _) = fences.close_epoch(owner).unwrap();
        fences.passed(fence);
        let hole = holes.pop().unwrap();
        let index = memory.territory.take(&hole, 2 * PAGE_UNITS, 2 * PAGE_UNITS);
        let newest = fences.now(owner);
        memory.territory.free(index, owner, newest.epoch);
        let holes: Vec<Hole> = memory.territory.holes_from(owner, PAGE_UNITS).collect();
        assert_eq!(memory.newest_pages(&holes, &fences), [2, 3, 0, 1]);
    }
}
