//! The blocks that tile a territory, in a slab of indices.

use super::super::bins::{Index, Link, NONE};
use super::super::slab::{Linked, Slab};
use super::Owner;

/// Who has a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holder(u32);

impl Holder {
    /// A caller, a stitched range or the small blocks: the block is no hole.
    pub(super) const TAKEN: Self = Self(u32::MAX);
    /// Nobody: it is the home of pages that were returned to the driver.
    pub(super) const UNMAPPED: Self = Self(u32::MAX - 1);

    /// The stream for which the block is a hole.
    #[inline]
    pub(super) fn stream(owner: Owner) -> Self {
        Self(u32::try_from(owner).expect("fewer streams than 2^32 - 2"))
    }

    /// The owner of a hole.
    #[inline]
    pub(super) fn owner(self) -> Option<Owner> {
        (self.0 < Self::UNMAPPED.0).then_some(self.0 as Owner)
    }
}

/// In a cache line of its own: what happens to one block touches it and its neighbors, anywhere in the slab.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Block {
    pub(super) link: Link,
    pub(super) start: u64,
    /// Of a hole: after which epoch of its owner others may touch it.
    pub(super) epoch: u64,
    /// Of a hole: parts of it were freed in other epochs, which its pages remember.
    pub(super) is_mixed: bool,
    pub(super) before: Index,
    pub(super) after: Index,
    pub(super) holder: Holder,
}

impl Block {
    #[inline]
    pub(super) fn end(&self) -> u64 {
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
    /// Whether block `index` is there and `holder` has it.
    #[inline]
    pub(super) fn is_of(&self, index: Index, holder: Holder) -> bool {
        index != NONE && self.at(index).holder == holder
    }
}
