//! The small blocks of one stream, on pages of their own so that they do not pin large blocks.
//!
//! A *small page* is taken from the page heap as a block and returned when no small block lies in it. One such page
//! stays *cached*, so that a program at the edge of a page does not take and return it with every block.

use crate::memory::free_list::Tiling;
use crate::memory::types::{Index, PAGE, PageIndex};

/// A page of the page heap that is divided among small blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SmallPage {
    pub(crate) page: PageIndex,
    /// The block that holds the page in the page heap.
    pub(crate) block: Index,
}

/// A page without a block in use, and the epoch of the last free in it.
#[derive(Clone, Copy, Debug)]
struct CachedPage {
    segment: u32,
    epoch: u64,
}

/// The small blocks of one stream.
#[derive(Debug)]
pub(crate) struct SmallHeap {
    tiling: Tiling,
    /// By the segment index of the tiling.
    leases: Vec<Option<SmallPage>>,
    /// A page without a block in use, kept so that a program at the edge of a page does not take and return one with
    /// every block.
    cached: Option<CachedPage>,
    /// Other streams may touch all free memory after this epoch of the stream.
    freed: u64,
}

impl SmallHeap {
    pub(crate) fn new() -> Self {
        Self {
            tiling: Tiling::new(),
            leases: Vec::new(),
            cached: None,
            freed: 0,
        }
    }

    /// Places a block; returns its page, its offset there and its index.
    pub(crate) fn allocate(&mut self, bytes: u64) -> Option<(PageIndex, u64, Index)> {
        let placement = self.tiling.allocate(bytes)?;
        if self
            .cached
            .is_some_and(|cached| cached.segment == placement.segment)
        {
            self.cached = None;
        }
        let lease = self.leases[placement.segment as usize].expect("a segment in use has a page");
        Some((lease.page, placement.offset, placement.index))
    }

    /// Adds a page in `epoch` of the stream, which may have been made to wait for it.
    pub(crate) fn add(&mut self, lease: SmallPage, epoch: u64) {
        self.freed = self.freed.max(epoch);
        let segment = self.tiling.add_segment(PAGE) as usize;
        if self.leases.len() <= segment {
            self.leases.resize(segment + 1, None);
        }
        self.leases[segment] = Some(lease);
    }

    /// Frees a block in `epoch` of the stream. Returns its page if that is no longer needed.
    pub(crate) fn free(&mut self, index: Index, epoch: u64) -> Option<SmallPage> {
        self.freed = self.freed.max(epoch);
        let segment = self.tiling.segment_of(index);
        self.tiling.free(index);
        if !self.tiling.is_segment_free(segment) {
            return None;
        }
        if self.cached.is_none() {
            self.cached = Some(CachedPage { segment, epoch });
            return None;
        }
        self.remove(segment)
    }

    /// Takes the cached page out, with the epoch of the last free in it.
    pub(crate) fn take_cached(&mut self) -> Option<(SmallPage, u64)> {
        let CachedPage { segment, epoch } = self.cached.take()?;
        Some((self.remove(segment)?, epoch))
    }

    fn remove(&mut self, segment: u32) -> Option<SmallPage> {
        let was_free = self.tiling.remove_segment_if_free(segment);
        assert!(was_free, "only idle pages are returned");
        self.leases[segment as usize].take()
    }

    /// The epoch of the stream after which others may touch what is free.
    pub(crate) fn epoch(&self) -> u64 {
        self.freed
    }

    /// Whether there is no page.
    pub(crate) fn is_empty(&self) -> bool {
        self.leases.iter().all(Option::is_none)
    }

    /// Bytes of the largest free block.
    pub(crate) fn largest_free(&self) -> u64 {
        self.tiling.largest_free()
    }

    /// Free bytes and free blocks in all pages.
    pub(crate) fn free_blocks(&self) -> (u64, u64) {
        self.tiling.free_blocks()
    }

    /// Asserts the invariants; returns (pages, bytes in blocks).
    pub(crate) fn check_invariants(&self) -> (u64, u64) {
        let (held, in_use) = self.tiling.check_invariants();
        let leased = self.leases.iter().flatten().count() as u64;
        assert_eq!(held, leased * PAGE, "leases and segments");
        (leased, in_use)
    }
}
