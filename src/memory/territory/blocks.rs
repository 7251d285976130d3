//! The blocks that tile a territory, in a slab of indices.

use super::super::bins::{Index, Link, NONE, Units};
use super::super::fences::{EPOCH_BITS, Fence, OWNER_BITS};
use super::super::slab::{Linked, Slab};
use super::Owner;

/// Who has a block; for a hole also after which epoch of its owner others may touch it, and whether parts of it were
/// freed in other epochs, which its pages remember. Claims of one holder compare as their epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Claim(u64);

/// The holder in the upper bits, below it the epoch, then whether it is mixed.
const HOLDER_SHIFT: u32 = EPOCH_BITS + 1;
const _: () = assert!(OWNER_BITS + HOLDER_SHIFT == u64::BITS);

impl Claim {
    /// A caller's, a stitched range's or the small blocks': the block is no hole.
    pub(super) const TAKEN: Self = Self(u64::MAX << HOLDER_SHIFT);
    /// Nobody's: it is the home of pages that were returned to the driver.
    pub(super) const UNMAPPED: Self = Self((u64::MAX - 1) << HOLDER_SHIFT);

    /// Of a hole.
    #[inline]
    pub(super) fn hole(fence: Fence) -> Self {
        let claim = Self((fence.owner as u64) << HOLDER_SHIFT | fence.epoch << 1);
        debug_assert_eq!(
            (claim.owner(), claim.epoch()),
            (Some(fence.owner), fence.epoch)
        );
        claim
    }

    /// The stream for which the block is a hole.
    #[inline]
    pub(super) fn owner(self) -> Option<Owner> {
        (self < Self::UNMAPPED).then_some(crate::units::to_usize(self.0 >> HOLDER_SHIFT))
    }

    #[inline]
    pub(super) fn epoch(self) -> u64 {
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

    /// Of what two neighbors of one holder become: the later epoch. If pages do not remember their own, it is that of
    /// all parts.
    #[inline]
    pub(super) fn merged(self, other: Self, remembers_frees: bool) -> Self {
        let mut claim = self.max(other);
        claim.set_mixed(remembers_frees && claim.is_mixed());
        claim
    }

    /// Whether both are of one holder.
    #[inline]
    pub(super) fn is_of_holder(self, other: Self) -> bool {
        (self.0 ^ other.0) >> HOLDER_SHIFT == 0
    }
}

/// Never across two cache lines: what happens to one block touches it and its neighbors, anywhere in the slab.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(super) struct Block {
    pub(super) link: Link,
    pub(super) start: Units,
    pub(super) before: Index,
    pub(super) after: Index,
    pub(super) claim: Claim,
}

const _: () = assert!(size_of::<Block>() == 32);

impl Block {
    /// What is in front of the first block and behind the last, in the slot of [`NONE`]: so `after` that is the first
    /// block, and `before` it the last.
    pub(super) const BORDER: Self = Self {
        link: Link::new(0),
        start: 0,
        before: NONE,
        after: NONE,
        claim: Claim::TAKEN,
    };

    #[inline]
    pub(super) fn end(&self) -> Units {
        self.start + self.link.units
    }
}

impl Linked for Block {
    #[inline]
    fn link(&self) -> &Link {
        &self.link
    }
    #[inline]
    fn link_mut(&mut self) -> &mut Link {
        &mut self.link
    }
}

pub(super) type Blocks = Slab<Block>;

impl Blocks {
    /// Whether the holder of `claim` has block `index`. It is no hole's for [`NONE`].
    #[inline]
    pub(super) fn is_of(&self, index: Index, claim: Claim) -> bool {
        self.at(index).claim.is_of_holder(claim)
    }

    /// Makes block `index` span its next neighbor too, of which it takes the epoch if that is later; returns its
    /// units then, which are the caller's to write.
    #[inline(always)]
    pub(super) fn absorb_next(&mut self, index: Index, remembers_frees: bool) -> Units {
        let gone_index = self.at(index).after;
        let gone = self.at_mut(gone_index);
        let Block {
            link, after, claim, ..
        } = *gone;
        // In no page, for who reads a note of it.
        gone.start = Units::MAX;
        let block = self.at_mut(index);
        block.after = after;
        block.claim = block.claim.merged(claim, remembers_frees);
        let units = block.link.units + link.units;
        self.at_mut(after).before = index;
        self.remove(gone_index);
        units
    }
}
