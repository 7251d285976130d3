//! Stitching: a large block from free pages that do not lie side by side.
//!
//! The pages are mapped a second time, side by side, at addresses of their own. Nothing is unmapped to do so, so stream
//! order alone makes it safe, without a wait on the host. The last page of a block is rarely needed as a whole: any
//! page whose front is free will do, and the rest of it stays usable in the page heap.

use smallvec::SmallVec;

use super::device_pages::MAPPED_PER_HELD;
use super::paged::PagedBackend;
use crate::error::Result;
use crate::memory::page_heap::FreeBlock;
use crate::memory::streams::Fences;
use crate::memory::types::{
    Fence, GRANULARITY, Index, Location, MappingIndex, PAGE, PAGE_UNITS, PageIndex, Place,
    Placement, Search,
};
use crate::units::to_usize;

/// Free blocks to check for the front of a last page before a whole page is used for it.
const FRONTS_MAX: usize = 64;

/// What a block needs: whole pages, and the front of one more.
#[derive(Clone, Copy, Debug)]
struct Need {
    whole: usize,
    /// Units of the last page; 0 if the block is a multiple of a page.
    front: u64,
}

impl Need {
    fn of(search: Search) -> Self {
        let units = search.bytes / GRANULARITY;
        Self {
            whole: to_usize(units / PAGE_UNITS),
            front: units % PAGE_UNITS,
        }
    }

    fn pages(self) -> usize {
        self.whole + usize::from(self.front > 0)
    }

    /// Units needed of the page at place `position` of the mapping.
    fn units_at(self, position: usize) -> u64 {
        if position < self.whole {
            PAGE_UNITS
        } else {
            self.front
        }
    }
}

impl PagedBackend {
    /// Places a block in pages from anywhere, and takes new ones only for what is missing. `None` if that is
    /// impossible; then nothing has changed, except that new pages may have been taken.
    pub(super) fn stitch(&mut self, search: Search, fences: &mut Fences) -> Option<Placement> {
        let need = Need::of(search);
        if need.whole == 0 {
            return None;
        }
        if let Some(placement) = self.reuse_range(search, need, fences) {
            return Some(placement);
        }
        let pages = self.choose_pages(search, need, fences)?;
        self.evict_ranges(MAPPED_PER_HELD * self.pages.bytes_held() / PAGE, fences);
        let ptr = self.pages.map_range(&pages).or_else(|| {
            // The driver may allow fewer mappings than that.
            self.evict_ranges(self.ranges.pages_mapped as u64 / 2, fences);
            self.pages.map_range(&pages)
        })?;
        let taken = self.take_pages(&pages, need);
        let range = self
            .ranges
            .insert(ptr, pages, taken, fences.now(search.owner));
        Some(Placement {
            ptr,
            location: Location::new(search.owner, Place::Stitched(range)),
        })
    }

    /// An idle mapping of the right length whose pages are all free.
    fn reuse_range(
        &mut self,
        search: Search,
        need: Need,
        fences: &mut Fences,
    ) -> Option<Placement> {
        let range = self.ranges.idle_of(need.pages()).find(|range| {
            let free = self.fences_over(*range, need);
            free.is_some_and(|behind| {
                behind
                    .iter()
                    .all(|f| fences.pass(search.owner, *f, search.reuse))
            })
        })?;
        let pages = self.ranges.get(range).pages.clone();
        let taken = self.take_pages(&pages, need);
        self.ranges.revive(range, taken);
        let ptr = self.ranges.get(range).ptr;
        Some(Placement {
            ptr,
            location: Location::new(search.owner, Place::Stitched(range)),
        })
    }

    /// The latest fence of each owner over the pages of an idle mapping; `None` if one is not free.
    fn fences_over(&self, range: MappingIndex, need: Need) -> Option<SmallVec<[Fence; 2]>> {
        let range = self.ranges.get(range);
        let free = |position: usize| {
            let (page, units) = (range.pages[position], need.units_at(position));
            let found = self.page_heap.free_block_or_taken(page, units);
            found
                .map_err(|block| range.taken_page.set((position, block)))
                .ok()
        };
        let (position, block) = range.taken_page.get();
        let (page, units) = (range.pages[position], need.units_at(position));
        if self.page_heap.is_taken_by(block, page, units) {
            return None;
        }
        free(position)?;
        let mut latest: SmallVec<[Fence; 2]> = SmallVec::new();
        let mut near: Option<FreeBlock> = None;
        for (position, page) in range.pages.iter().enumerate() {
            let free_block = match near
                .filter(|free_block| free_block.has_front(*page, need.units_at(position)))
            {
                Some(free_block) => free_block,
                None => free(position)?,
            };
            near = Some(free_block);
            let fence = self.page_heap.fence_of_page(&free_block, *page);
            match latest.iter_mut().find(|known| known.owner == fence.owner) {
                Some(known) => known.epoch = known.epoch.max(fence.epoch),
                None => latest.push(fence),
            }
        }
        Some(latest)
    }

    /// Free pages for the block, in the order of their addresses in the page heap, so that neighbors stay neighbors.
    fn choose_pages(
        &mut self,
        search: Search,
        need: Need,
        fences: &mut Fences,
    ) -> Option<Vec<PageIndex>> {
        loop {
            let mut pages = self.free_pages(need.pages(), search, fences);
            let front = self.page_with_free_front(search, need, &pages);
            let whole = pages.len().min(need.whole);
            if whole == need.whole && (need.front == 0 || front.is_some()) {
                pages.truncate(need.whole);
                // A stable sort, because it makes use of the runs that the pages come in.
                pages.sort();
                pages.extend(front.filter(|_| need.front > 0));
                return Some(pages);
            }
            if pages.len() == need.pages() {
                pages.sort();
                return Some(pages);
            }
            let have = whole + usize::from(need.front > 0 && front.is_some());
            // Growth can also serve the whole block. The caller tries that when this refuses.
            self.grow(need.pages() - have, search.owner).ok()?;
        }
    }

    /// Up to `count` pages that are free as a whole and that the requester may use: those of its own stream first, from
    /// the largest free blocks first. Small blocks fill the smallest free blocks, so pages from large ones stay free
    /// longest, and their mapping stays useful. While other streams lack memory, pages that only the requester may have
    /// go first.
    pub(super) fn free_pages(
        &self,
        count: usize,
        search: Search,
        fences: &mut Fences,
    ) -> Vec<PageIndex> {
        let mut pages = Vec::new();
        let others = self
            .page_heap
            .owners()
            .filter(|owner| *owner != search.owner);
        for owner in std::iter::once(search.owner).chain(others) {
            if pages.len() == count {
                break;
            }
            if owner == search.owner && fences.are_contended() {
                let free_blocks: Vec<FreeBlock> = self
                    .page_heap
                    .largest_free_blocks(owner, PAGE_UNITS)
                    .collect();
                pages = self.newest_pages(&free_blocks, fences);
                pages.truncate(count);
                continue;
            }
            for free_block in self.page_heap.largest_free_blocks(owner, PAGE_UNITS) {
                let missing = count - pages.len();
                if missing == 0 {
                    break;
                }
                let whole = free_block.whole_pages();
                if fences.pass(search.owner, free_block.fence(), search.reuse) {
                    pages.extend(whole.take(missing));
                } else {
                    let reached = fences.reach(search.owner, owner, 0, search.reuse);
                    let passed = whole.filter(|page| {
                        self.page_heap.fence_of_page(&free_block, *page).epoch <= reached
                    });
                    pages.extend(passed.take(missing));
                }
            }
        }
        pages
    }

    /// The whole pages of `free_blocks`. Complete pages, which any stream may have, come last.
    fn newest_pages(&self, free_blocks: &[FreeBlock], fences: &Fences) -> Vec<PageIndex> {
        let pages = free_blocks.iter().flat_map(|free_block| {
            let fence = |page| self.page_heap.fence_of_page(free_block, page);
            free_block
                .whole_pages()
                .map(move |page| (page, fence(page)))
        });
        let (complete, newest): (Vec<_>, Vec<_>) =
            pages.partition(|(_, fence)| fences.is_known_complete(*fence));
        newest
            .into_iter()
            .chain(complete)
            .map(|(page, _)| page)
            .collect()
    }

    /// A page outside `chosen` whose front is free, preferably one that is not free as a whole.
    fn page_with_free_front(
        &self,
        search: Search,
        need: Need,
        chosen: &[PageIndex],
    ) -> Option<PageIndex> {
        if need.front == 0 {
            return None;
        }
        let whole = &chosen[..chosen.len().min(need.whole)];
        let usable = |free_block: FreeBlock| {
            let page = free_block.page_with_front(need.front)?;
            (!whole.contains(&page)).then_some(page)
        };
        let free_blocks = self.page_heap.free_blocks_from(search.owner, need.front);
        free_blocks.take(FRONTS_MAX).find_map(usable)
    }

    /// Takes pages in the page heap, neighbors in one block.
    fn take_pages(&mut self, pages: &[PageIndex], need: Need) -> SmallVec<[Index; 4]> {
        let mut taken = SmallVec::new();
        let mut position = 0;
        while position < pages.len() {
            let first = pages[position];
            let free_block = self
                .page_heap
                .free_block_over_front(first, need.units_at(position))
                .expect("chosen pages are free");
            let (start, mut units) = (first as u64 * PAGE_UNITS, need.units_at(position));
            position += 1;
            while let Some(page) = pages.get(position) {
                let more = need.units_at(position);
                let adjacent = *page as u64 * PAGE_UNITS == start + units;
                if !adjacent || start + units + more > free_block.start + free_block.units {
                    break;
                }
                units += more;
                position += 1;
            }
            taken.push(self.page_heap.take(&free_block, start, units));
        }
        taken
    }

    /// Unmaps the oldest idle mappings whose work is complete, until `most` pages are mapped.
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

    /// Unmaps an idle mapping if its last use is known to be complete; whether it was.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses; the mapping is then kept.
    pub(super) fn remove_range(
        &mut self,
        index: MappingIndex,
        fences: &mut Fences,
    ) -> Result<bool> {
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
    use super::*;
    use crate::driver::{Device, HostConfig};
    use crate::memory::backend::Backend;
    use crate::memory::backend::device_pages::DevicePages;
    use crate::memory::config::ReusePolicy;

    #[test]
    fn pages_that_any_stream_may_have_are_taken_last() {
        // So small that it has no region of small pages: its pages have numbers from 0 on.
        let device = Device::host(HostConfig {
            capacity: 8 * PAGE,
            ..HostConfig::default()
        });
        let device = device.unwrap();
        let mut memory = PagedBackend::new(DevicePages::new(&device, None).unwrap());
        let mut fences = Fences::new(false);
        let owner = fences.owner(&device.create_stream().unwrap());
        let place = |memory: &mut PagedBackend, fences: &mut Fences, pages: u64| {
            let search = Search {
                bytes: pages * PAGE,
                owner,
                reuse: ReusePolicy::OnlyComplete,
                deferred: 0,
                may_borrow: true,
                may_return: true,
            };
            let placement = memory.find(search, fences).unwrap();
            (placement.location, search.bytes)
        };
        let (all, bytes) = place(&mut memory, &mut fences, 4);
        memory.page_heap.tracks_page_epochs = true;
        memory.free(all, bytes, fences.now(owner));
        let (fence, _) = fences.close_epoch(owner).unwrap();
        fences.passed(fence);
        // The first two pages once more, in an epoch that nobody has waited for.
        let (two, bytes) = place(&mut memory, &mut fences, 2);
        memory.free(two, bytes, fences.now(owner));
        let mut free_blocks: Vec<FreeBlock> = memory
            .page_heap
            .free_blocks_from(owner, PAGE_UNITS)
            .collect();
        assert_eq!(free_blocks.len(), 1, "all of it is one free block");
        assert_eq!(memory.newest_pages(&free_blocks, &fences), [0, 1, 2, 3]);
        // And the last two, after that.
        let (fence, _) = fences.close_epoch(owner).unwrap();
        fences.passed(fence);
        let free_block = free_blocks.pop().unwrap();
        let index = memory
            .page_heap
            .take(&free_block, 2 * PAGE_UNITS, 2 * PAGE_UNITS);
        let newest = fences.now(owner);
        memory.page_heap.free(index, owner, newest.epoch);
        let free_blocks: Vec<FreeBlock> = memory
            .page_heap
            .free_blocks_from(owner, PAGE_UNITS)
            .collect();
        assert_eq!(memory.newest_pages(&free_blocks, &fences), [2, 3, 0, 1]);
    }
}
