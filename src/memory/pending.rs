//! Freed blocks that other streams may still be using.
//!
//! Each waits behind one fence per stream that was recorded on it. Fences are passed in any order, so the
//! list is searched as a whole; it is empty in programs with one stream.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::block::BlockRecord;
use super::config::ReusePolicy;
use super::fences::{Fence, Fences};
use super::territory::Owner;

#[derive(Debug)]
struct Waiting {
    record: Box<BlockRecord>,
    fences: SmallVec<[Fence; 1]>,
}

/// All freed blocks that wait, in order of their frees.
#[derive(Debug, Default)]
pub(super) struct Pending {
    waiting: Vec<Waiting>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of all waiting blocks.
    pub(super) fn bytes(&self) -> u64 {
        self.waiting
            .iter()
            .map(|waiting| waiting.record.allocated)
            .sum()
    }

    /// Adds the bytes that wait behind each stream. A block behind several counts for each.
    pub(super) fn add_bytes_behind(&self, behind: &mut BTreeMap<Owner, u64>) {
        for Waiting { record, fences } in &self.waiting {
            for fence in fences {
                *behind.entry(fence.owner).or_default() += record.allocated;
            }
        }
    }

    /// Whether a block waits for the stream `owner`.
    pub(super) fn is_behind(&self, owner: Owner) -> bool {
        let mut fences = self.waiting.iter().flat_map(|waiting| &waiting.fences);
        fences.any(|fence| fence.owner == owner)
    }

    pub(super) fn push(&mut self, record: Box<BlockRecord>, fences: SmallVec<[Fence; 1]>) {
        self.waiting.push(Waiting { record, fences });
    }

    /// Takes out the blocks whose home streams may have them back, as far as `reuse` allows finding out or
    /// bringing about.
    #[expect(
        clippy::vec_box,
        reason = "a record keeps its box from allocation to allocation"
    )]
    pub(super) fn take_passed(
        &mut self,
        clocks: &mut Fences,
        reuse: ReusePolicy,
    ) -> Vec<Box<BlockRecord>> {
        let passed = |waiting: &mut Waiting| {
            let home = clocks.owner(&waiting.record.home);
            waiting
                .fences
                .retain(|fence| !clocks.pass(home, *fence, reuse));
            waiting.fences.is_empty()
        };
        self.waiting
            .extract_if(.., passed)
            .map(|waiting| waiting.record)
            .collect()
    }
}
