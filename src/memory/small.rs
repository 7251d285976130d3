//! Small blocks of one stream: an arena whose segments are borrowed pages.
//!
//! Keeping small blocks on pages of their own keeps them from pinning large ones.

use super::arena::Arena;
use super::bins::Index;
use super::territory::{PAGE, PageIndex};

/// A page lent by the territory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lease {
    pub(super) page: PageIndex,
    /// The block that holds the page in the territory.
    pub(super) block: Index,
}

/// A segment without a block in use, and the epoch of the last free in it.
#[derive(Clone, Copy, Debug)]
struct Spare {
    segment: u32,
    epoch: u64,
}

/// The small blocks of one stream.
#[derive(Debug)]
pub(super) struct SmallBlocks {
    arena: Arena,
    /// By the arena's segment index.
    leases: Vec<Option<Lease>>,
    /// A lease without a block in use, kept so that a program at the brink does not borrow and return a
    /// page for every block.
    spare: Option<Spare>,
    /// After this epoch of the stream all free memory may be touched by others.
    freed: u64,
}

impl SmallBlocks {
    pub(super) fn new() -> Self {
        Self {
            arena: Arena::new(),
            leases: Vec::new(),
            spare: None,
            freed: 0,
        }
    }

    /// Places a block; returns its page, its offset there and its index.
    pub(super) fn allocate(&mut self, bytes: u64) -> Option<(PageIndex, u64, Index)> {
        let placed = self.arena.allocate(bytes)?;
        if self
            .spare
            .is_some_and(|spare| spare.segment == placed.segment)
        {
            self.spare = None;
        }
        let lease = self.leases[placed.segment as usize].expect("a segment in use is leased");
        Some((lease.page, placed.offset, placed.index))
    }

    /// Takes a borrowed page in, in `epoch` of the stream: it may have been made to wait for the page.
    pub(super) fn add(&mut self, lease: Lease, epoch: u64) {
        self.freed = self.freed.max(epoch);
        let segment = self.arena.add_segment(PAGE) as usize;
        if self.leases.len() <= segment {
            self.leases.resize(segment + 1, None);
        }
        self.leases[segment] = Some(lease);
    }

    /// Frees a block in `epoch` of the stream; returns a page that is no longer needed, if that makes one.
    pub(super) fn free(&mut self, index: Index, epoch: u64) -> Option<Lease> {
        self.freed = self.freed.max(epoch);
        let segment = self.arena.segment_of(index);
        self.arena.free(index);
        if !self.arena.is_segment_free(segment) {
            return None;
        }
        if self.spare.is_none() {
            self.spare = Some(Spare { segment, epoch });
            return None;
        }
        self.remove(segment)
    }

    /// Gives up the page that is kept although no block uses it; with the epoch of the last free in it.
    pub(super) fn take_spare(&mut self) -> Option<(Lease, u64)> {
        let Spare { segment, epoch } = self.spare.take()?;
        Some((self.remove(segment)?, epoch))
    }

    fn remove(&mut self, segment: u32) -> Option<Lease> {
        let was_free = self.arena.remove_segment_if_free(segment);
        assert!(was_free, "only idle pages are returned");
        self.leases[segment as usize].take()
    }

    /// The epoch of the stream after which others may touch what is free.
    pub(super) fn epoch(&self) -> u64 {
        self.freed
    }

    /// Whether no page is borrowed.
    pub(super) fn is_empty(&self) -> bool {
        self.leases.iter().all(Option::is_none)
    }

    /// Bytes of the largest free block.
    pub(super) fn largest_free(&self) -> u64 {
        self.arena.largest_free()
    }

    /// Free bytes and free blocks in leased pages.
    pub(super) fn free_blocks(&self) -> (u64, u64) {
        self.arena.free_blocks()
    }

    /// Asserts the invariants; returns (leased pages, bytes in blocks).
    pub(super) fn check_invariants(&self) -> (u64, u64) {
        let (held, in_use) = self.arena.check_invariants();
        let leased = self.leases.iter().flatten().count() as u64;
        assert_eq!(held, leased * PAGE, "leases and segments");
        (leased, in_use)
    }
}
