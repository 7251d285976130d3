//! The blocks that tile a page heap, in a slab.

use crate::memory::free_list::{Link, Linked, NONE, Slab};
use crate::memory::types::{EPOCH_BITS, Fence, Index, OWNER_BITS, StreamIndex, Units};

/// Who has a block. For a free block also the epoch of its owner after which others may touch it, and whether parts of
/// it were freed in other epochs, which its pages keep. Claims of one holder compare as their epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Claim(u64);

/// The holder in the upper bits, below it the epoch, then whether it is mixed.
const HOLDER_SHIFT: u32 = EPOCH_BITS + 1;
const _: () = assert!(OWNER_BITS + HOLDER_SHIFT == u64::BITS);

impl Claim {
    /// A caller, a stitched mapping or the small blocks have it: it is not free.
    pub(super) const TAKEN: Self = Self(u64::MAX << HOLDER_SHIFT);
    /// Nobody has it: its pages were returned to the driver.
    pub(super) const UNMAPPED: Self = Self((u64::MAX - 1) << HOLDER_SHIFT);

    /// Of a free block.
    #[inline]
    pub(crate) fn free_block(fence: Fence) -> Self {
        let claim = Self((fence.owner as u64) << HOLDER_SHIFT | fence.epoch << 1);
        debug_assert_eq!(
            (claim.owner(), claim.epoch()),
            (Some(fence.owner), fence.epoch)
        );
        claim
    }

    /// The owner, if the block is free.
    #[inline]
    pub(crate) fn owner(self) -> Option<StreamIndex> {
        (self < Self::UNMAPPED).then_some(crate::units::to_usize(self.0 >> HOLDER_SHIFT))
    }

    #[inline]
    pub(crate) fn epoch(self) -> u64 {
        self.0 << OWNER_BITS >> (OWNER_BITS + 1)
    }

    #[inline]
    pub(super) fn is_mixed(self) -> bool {
        self.0 & 1 == 1
    }

    #[inline]
    pub(super) fn set_mixed(&mut self, is_mixed: bool) {
        self.0 = self.0 & !1 | u64::from(is_mixed);
    }

    /// The claim of two merged neighbors of one holder: it has the later epoch, which is that of all parts unless pages
    /// keep their own.
    #[inline]
    pub(crate) fn merged(self, other: Self, tracks_page_epochs: bool) -> Self {
        let mut claim = self.max(other);
        claim.set_mixed(tracks_page_epochs && claim.is_mixed());
        claim
    }

    /// Whether both are of one holder.
    #[inline]
    pub(super) fn is_of_holder(self, other: Self) -> bool {
        (self.0 ^ other.0) >> HOLDER_SHIFT == 0
    }
}

/// Aligned so that it never spans two cache lines: a change of a block touches its neighbors, anywhere in the slab.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(crate) struct HeapBlock {
    pub(crate) link: Link,
    pub(crate) start: Units,
    pub(crate) before: Index,
    pub(crate) after: Index,
    pub(super) claim: Claim,
}

const _: () = assert!(size_of::<HeapBlock>() == 32);

impl HeapBlock {
    /// The sentinel in the slot of [`NONE`], in front of the first block and behind the last: its `after` is the first
    /// block, its `before` the last.
    pub(super) const BORDER: Self = Self {
        link: Link::new(0),
        start: 0,
        before: NONE,
        after: NONE,
        claim: Claim::TAKEN,
    };

    #[inline]
    pub(crate) fn end(&self) -> Units {
        self.start + self.link.units
    }
}

impl Linked for HeapBlock {
    #[inline]
    fn link(&self) -> &Link {
        &self.link
    }
    #[inline]
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

pub(crate) type HeapBlocks = Slab<HeapBlock>;

impl HeapBlocks {
    /// Whether the holder of `claim` has block `index`. False for [`NONE`] if the claim is of a free block.
    #[inline]
    pub(crate) fn is_of(&self, index: Index, claim: Claim) -> bool {
        self.at(index).claim.is_of_holder(claim)
    }

    /// Merges block `index` with its next neighbor, and takes the later epoch of both. Returns the units, which the
    /// caller writes.
    #[inline(always)]
    pub(crate) fn absorb_next(&mut self, index: Index, tracks_page_epochs: bool) -> Units {
        let gone_index = self.at(index).after;
        let gone = self.at_mut(gone_index);
        let HeapBlock {
            link, after, claim, ..
        } = *gone;
        // In no page, so that a stale entry of the page map does not match.
        gone.start = Units::MAX;
        let block = self.at_mut(index);
        block.after = after;
        block.claim = block.claim.merged(claim, tracks_page_epochs);
        let units = block.link.units + link.units;
        self.at_mut(after).before = index;
        self.remove(gone_index);
        units
    }
}
