//! Deferred frees: blocks that other streams may still be using.
//!
//! A block waits behind one fence for each stream that was recorded on it. Fences are passed in any order, so the whole
//! list is searched. It is empty in programs with one stream.

use std::collections::BTreeMap;

use super::fences::Fences;
use crate::memory::config::ReusePolicy;
use crate::memory::types::{Fence, StreamIndex};
use smallvec::SmallVec;

#[derive(Debug)]
struct Waiting<R> {
    record: R,
    bytes: u64,
    /// The streams that used the block and are not known to have passed.
    fences: SmallVec<[Fence; 1]>,
    /// The home stream at the free.
    freed_at: Fence,
    /// Whether a stream was passed by making the home stream wait for it.
    is_awaited: bool,
}

/// A block that its home stream may have back.
#[derive(Debug)]
pub(crate) struct Returned<R> {
    pub(crate) record: R,
    /// After what others may touch it, if that is not as late as now: where all streams are complete, what
    /// the home stream was given since the free does not matter.
    pub(crate) fence: Option<Fence>,
}

/// All freed blocks that wait, in order of their frees.
#[derive(Debug)]
pub(crate) struct DeferredFrees<R> {
    waiting: Vec<Waiting<R>>,
    /// Bytes of all of them.
    bytes: u64,
}

impl<R> Default for DeferredFrees<R> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            bytes: 0,
        }
    }
}

impl<R> DeferredFrees<R> {
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Bytes of all waiting blocks.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds the bytes that wait behind each stream. A block behind several counts for each.
    pub(crate) fn add_bytes_behind(&self, behind: &mut BTreeMap<StreamIndex, u64>) {
        for Waiting { bytes, fences, .. } in &self.waiting {
            for fence in fences {
                *behind.entry(fence.owner).or_default() += bytes;
            }
        }
    }

    /// Whether a block waits for the stream `owner`.
    pub(crate) fn is_behind(&self, owner: StreamIndex) -> bool {
        let mut fences = self.waiting.iter().flat_map(|waiting| &waiting.fences);
        fences.any(|fence| fence.owner == owner)
    }

    /// Adds a block of `bytes` that was freed at `freed_at`, a fence of its home stream, and waits behind `fences`.
    pub(crate) fn push(
        &mut self,
        record: R,
        bytes: u64,
        fences: SmallVec<[Fence; 1]>,
        freed_at: Fence,
    ) {
        self.bytes += bytes;
        self.waiting.push(Waiting {
            record,
            bytes,
            fences,
            freed_at,
            is_awaited: false,
        });
    }

    /// Takes out the blocks whose home streams may have them back, as far as `reuse` allows finding out or
    /// bringing about, to the end of `passed`.
    pub(crate) fn take_passed(
        &mut self,
        clocks: &mut Fences,
        reuse: ReusePolicy,
        passed: &mut Vec<Returned<R>>,
    ) {
        let has_passed = |waiting: &mut Waiting<R>| {
            let home = waiting.freed_at.owner;
            waiting.fences.retain(|fence| {
                let may_pass = clocks.pass(home, *fence, reuse);
                waiting.is_awaited |= may_pass && !clocks.is_known_complete(*fence);
                !may_pass
            });
            waiting.fences.is_empty()
        };
        for waiting in self.waiting.extract_if(.., has_passed) {
            self.bytes -= waiting.bytes;
            passed.push(Returned {
                record: waiting.record,
                fence: (!waiting.is_awaited).then_some(waiting.freed_at),
            });
        }
    }
}
