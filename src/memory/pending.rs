//! Freed blocks that other streams may still be using.
//!
//! Each waits behind one fence per stream that was recorded on it. Fences are passed in any order, so the
//! list is searched as a whole; it is empty in programs with one stream.

use std::collections::BTreeMap;

use smallvec::SmallVec;

use super::config::ReusePolicy;
use super::fences::{Fence, Fences};
use super::record::Record;
use super::territory::Owner;

#[derive(Debug)]
struct Waiting {
    record: Record,
    /// The streams that used the block and are not known to have passed.
    fences: SmallVec<[Fence; 1]>,
    /// The home stream at the free.
    freed_at: Fence,
    /// Whether a stream was passed by making the home stream wait for it.
    is_awaited: bool,
}

/// A block that its home stream may have back.
#[derive(Debug)]
pub(super) struct Passed {
    pub(super) record: Record,
    /// After what others may touch it, if that is not as late as now: where all streams are complete, what
    /// the home stream was given since the free does not matter.
    pub(super) fence: Option<Fence>,
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

    /// Adds the bytes that wait behind each stream. A block behind several counts for each.
    pub(super) fn add_bytes_behind(&self, behind: &mut BTreeMap<Owner, u64>) {
        for Waiting { record, fences, .. } in &self.waiting {
            for fence in fences {
                *behind.entry(fence.owner).or_default() += record.size.allocated();
            }
        }
    }

    /// Whether a block waits for the stream `owner`.
    pub(super) fn is_behind(&self, owner: Owner) -> bool {
        let mut fences = self.waiting.iter().flat_map(|waiting| &waiting.fences);
        fences.any(|fence| fence.owner == owner)
    }

    pub(super) fn push(&mut self, record: Record, fences: SmallVec<[Fence; 1]>, freed_at: Fence) {
        self.bytes += record.size.allocated();
        self.waiting.push(Waiting {
            record,
            fences,
            freed_at,
            is_awaited: false,
        });
    }

    /// Takes out the blocks whose home streams may have them back, as far as `reuse` allows finding out or
    /// bringing about, to the end of `passed`.
    pub(super) fn take_passed(
        &mut self,
        clocks: &mut Fences,
        reuse: ReusePolicy,
        passed: &mut Vec<Passed>,
    ) {
        let has_passed = |waiting: &mut Waiting| {
            let home = waiting.record.location.owner();
            waiting.fences.retain(|fence| {
                let may_pass = clocks.pass(home, *fence, reuse);
                waiting.is_awaited |= may_pass && !clocks.is_known_complete(*fence);
                !may_pass
            });
            waiting.fences.is_empty()
        };
        for waiting in self.waiting.extract_if(.., has_passed) {
            self.bytes -= waiting.record.size.allocated();
            passed.push(Passed {
                record: waiting.record,
                fence: (!waiting.is_awaited).then_some(waiting.freed_at),
            });
        }
    }
}
