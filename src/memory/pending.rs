//! Freed blocks that other streams may still be using.
//!
//! Each waits behind one fence per stream that was recorded on it. Fences are passed in any order, so the
//! list is searched as a whole; it is empty in programs with one stream.

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
    /// Bytes of all of them.
    bytes: u64,
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
        self.bytes
    }

    /// Whether a block waits for the stream `owner`.
    pub(super) fn is_behind(&self, owner: Owner) -> bool {
        let mut fences = self.waiting.iter().flat_map(|waiting| &waiting.fences);
        fences.any(|fence| fence.owner == owner)
    }

    pub(super) fn push(&mut self, record: Box<BlockRecord>, fences: SmallVec<[Fence; 1]>) {
        self.bytes += record.allocated;
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
        let passed = self.waiting.extract_if(.., passed);
        let records: Vec<Box<BlockRecord>> = passed.map(|waiting| waiting.record).collect();
        self.bytes -= records.iter().map(|record| record.allocated).sum::<u64>();
        records
    }
}
