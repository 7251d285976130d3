//! A slab: blocks in a vector, addressed by index, with vacated slots used again. Slot 0 is a sentinel that every null
//! link points to, so links can be written without a check.
//!
//! Must not know: what blocks are, except for the link by which they are filed.

use super::bins::{Link, Links};
use crate::memory::types::Index;

/// A block that can be filed in bins.
pub(crate) trait Linked: Copy {
    fn link(&self) -> &Link;
    fn link_mut(&mut self) -> &mut Link;
}

#[derive(Debug)]
pub(crate) struct Slab<B> {
    slots: Vec<B>,
    unused: Vec<Index>,
}

impl<B: Linked> Links for Slab<B> {
    #[inline]
    fn link(&self, index: Index) -> &Link {
        self.at(index).link()
    }
    #[inline]
    fn link_mut(&mut self, index: Index) -> &mut Link {
        self.at_mut(index).link_mut()
    }
}

impl<B: Linked> Slab<B> {
    /// One without blocks, with `none` in place of one.
    pub(crate) fn new(none: B) -> Self {
        Self {
            slots: vec![none],
            unused: Vec::new(),
        }
    }

    #[inline]
    pub(crate) fn insert(&mut self, block: B) -> Index {
        let index = self.vacant();
        *self.at_mut(index) = block;
        index
    }

    /// A place for a block, with whatever in it. The caller puts one there.
    #[inline]
    pub(crate) fn vacant(&mut self) -> Index {
        self.unused.pop().unwrap_or_else(|| self.grow())
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self) -> Index {
        let index = Index::try_from(self.slots.len()).expect("fewer than 2^32 blocks");
        self.slots.push(self.slots[0]);
        index
    }

    #[inline]
    pub(crate) fn remove(&mut self, index: Index) {
        self.unused.push(index);
    }

    #[inline]
    pub(crate) fn at(&self, index: Index) -> &B {
        &self.slots[index as usize]
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, index: Index) -> &mut B {
        &mut self.slots[index as usize]
    }

    /// Blocks there are.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - 1 - self.unused.len()
    }
}
