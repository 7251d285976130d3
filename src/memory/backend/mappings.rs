//! Second addresses for pages: the mappings that large blocks are stitched in.
//!
//! A mapping shows a list of pages, from anywhere in the page heap, side by side. It is *live* while a block lies in
//! it; the pages' bytes in the page heap are taken then. When the block is freed, the pages are free in the page heap
//! again, but the mapping stays: a later search for as many pages gets it back without a driver call, if all its pages
//! are free. Nothing is unmapped while work may still touch it.
//!
//! Invariant: a live mapping has taken its pages in the page heap, so at most one mapping of a page is live. Must not
//! know: how pages are chosen.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};

use smallvec::SmallVec;

use crate::driver::DevicePtr;
use crate::memory::free_list::NONE;
use crate::memory::types::{Fence, Index, MappingIndex, PAGE, PageIndex};

/// Pages mapped side by side, at addresses outside the page heap.
#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) ptr: DevicePtr,
    pub(crate) pages: Vec<PageIndex>,
    /// While live: the blocks taken in the page heap. Empty otherwise.
    pub(crate) taken: SmallVec<[Index; 4]>,
    /// When idle: the fence after which the mapping may be removed.
    fence: Fence,
    /// When it was last freed, counted in frees of mappings.
    freed_at: u64,
    /// When it was mapped, counted in mappings made.
    mapped_at: u64,
    /// A page that was not free at the last check, by its place in the mapping, and the block that lay over it. The
    /// next check begins with them.
    pub(super) taken_page: Cell<(usize, Index)>,
}

impl Range {
    pub(super) fn is_live(&self) -> bool {
        !self.taken.is_empty()
    }

    /// The fence after which the mapping may be removed.
    pub(crate) fn fence(&self) -> Fence {
        self.fence
    }

    /// Bytes of the mapping.
    pub(crate) fn bytes(&self) -> u64 {
        self.pages.len() as u64 * PAGE
    }
}

/// All mappings of a pool.
#[derive(Debug, Default)]
pub(crate) struct Mappings {
    table: Vec<Option<Range>>,
    vacant: Vec<MappingIndex>,
    /// Mappings that are not live, by number of pages, in the order in which they were mapped.
    idle: HashMap<usize, Vec<MappingIndex>>,
    /// The same, ordered by when they were freed.
    by_age: BTreeMap<u64, MappingIndex>,
    frees: u64,
    mapped: u64,
    /// Pages in all mappings, counted as often as they are mapped.
    pub(super) pages_mapped: usize,
}

impl Mappings {
    pub(crate) fn get(&self, index: MappingIndex) -> &Range {
        self.table[index as usize]
            .as_ref()
            .expect("a range that is in use exists")
    }

    fn get_mut(&mut self, index: MappingIndex) -> &mut Range {
        self.table[index as usize]
            .as_mut()
            .expect("a range that is in use exists")
    }

    /// Idle mappings of `pages` pages, the one mapped first first. The order does not depend on what was freed
    /// when, so a program that comes to the same state again finds the same mapping.
    pub(super) fn idle_of(&self, pages: usize) -> impl Iterator<Item = MappingIndex> + '_ {
        self.idle.get(&pages).into_iter().flatten().copied()
    }

    /// Adds a mapping, live at once with the blocks `taken` in the page heap.
    pub(crate) fn insert(
        &mut self,
        ptr: DevicePtr,
        pages: Vec<PageIndex>,
        taken: SmallVec<[Index; 4]>,
        fence: Fence,
    ) -> MappingIndex {
        debug_assert!(!taken.is_empty());
        self.pages_mapped += pages.len();
        self.mapped += 1;
        let range = Some(Range {
            ptr,
            pages,
            taken,
            fence,
            freed_at: 0,
            mapped_at: self.mapped,
            taken_page: Cell::new((0, NONE)),
        });
        if let Some(index) = self.vacant.pop() {
            self.table[index as usize] = range;
            return index;
        }
        let index = MappingIndex::try_from(self.table.len()).expect("fewer than 2^32 ranges");
        self.table.push(range);
        index
    }

    /// Makes an idle mapping live with the blocks `taken` in the page heap.
    pub(super) fn revive(&mut self, index: MappingIndex, taken: SmallVec<[Index; 4]>) {
        debug_assert!(!taken.is_empty());
        self.remove_idle(index);
        self.get_mut(index).taken = taken;
    }

    /// Makes a live mapping idle; returns the blocks it had taken in the page heap.
    pub(crate) fn release(&mut self, index: MappingIndex, fence: Fence) -> SmallVec<[Index; 4]> {
        self.frees += 1;
        let frees = self.frees;
        let range = self.get_mut(index);
        range.fence = fence;
        range.freed_at = frees;
        let taken = std::mem::take(&mut range.taken);
        let (pages, place) = self.place_of(index);
        self.idle.entry(pages).or_default().insert(place, index);
        self.by_age.insert(frees, index);
        taken
    }

    /// Where an idle mapping is filed: its number of pages, and its order among those.
    fn place_of(&self, index: MappingIndex) -> (usize, usize) {
        let Range {
            pages, mapped_at, ..
        } = self.get(index);
        let mapped_before = |other: &MappingIndex| self.get(*other).mapped_at < *mapped_at;
        let indices = self.idle.get(&pages.len());
        let place = indices.map_or(0, |indices| indices.partition_point(mapped_before));
        (pages.len(), place)
    }

    fn remove_idle(&mut self, index: MappingIndex) {
        let (pages, place) = self.place_of(index);
        let indices = self.idle.get_mut(&pages).expect("an idle range is listed");
        let removed = indices.remove(place);
        debug_assert_eq!(removed, index, "the list is in order");
        if indices.is_empty() {
            self.idle.remove(&pages);
        }
        let freed_at = self.get(index).freed_at;
        self.by_age.remove(&freed_at);
    }

    /// The idle mapping that was freed longest ago.
    pub(super) fn oldest_idle(&self) -> Option<MappingIndex> {
        self.by_age.values().next().copied()
    }

    /// Idle mappings that map any page for which `is_leaving` holds, in a fixed order.
    pub(super) fn idle_over(&self, is_leaving: impl Fn(PageIndex) -> bool) -> Vec<MappingIndex> {
        let idle = self.idle.values().flatten().copied();
        let mut over: Vec<_> = idle
            .filter(|index| self.get(*index).pages.iter().any(|page| is_leaving(*page)))
            .collect();
        over.sort_unstable();
        over
    }

    /// Removes an idle mapping from the table after the caller has unmapped it.
    pub(crate) fn remove(&mut self, index: MappingIndex) {
        self.remove_idle(index);
        let range = self.table[index as usize]
            .take()
            .expect("a range that is in use exists");
        self.pages_mapped -= range.pages.len();
        self.vacant.push(index);
    }

    /// Every live mapping.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Range> {
        self.table.iter().flatten().filter(|range| range.is_live())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;

    #[test]
    fn idle_ranges_keep_the_order_of_their_mapping_and_the_one_freed_first_is_oldest() {
        let mut ranges = Mappings::default();
        let fence = Fence { owner: 1, epoch: 1 };
        let ptr = DevicePtr(PAGE);
        let mut insert = |pages| ranges.insert(ptr, pages, smallvec![0], fence);
        let [a, b, c] = [vec![0, 1], vec![2, 3], vec![4, 5]].map(&mut insert);
        let other = insert(vec![6]);
        for index in [c, a, other, b] {
            ranges.release(index, fence);
        }
        let idle = |ranges: &Mappings| ranges.idle_of(2).collect::<Vec<_>>();
        assert_eq!(idle(&ranges), [a, b, c]);
        assert_eq!(ranges.oldest_idle(), Some(c));
        // A reused slot of the table says nothing about the order.
        ranges.remove(a);
        let d = ranges.insert(ptr, vec![0, 1], smallvec![0], fence);
        ranges.release(d, fence);
        assert_eq!((d, idle(&ranges)), (a, vec![b, c, d]));
        assert_eq!(ranges.pages_mapped, 7);
    }
}
