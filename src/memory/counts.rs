//! What a thread has counted since it told the pool.
//!
//! Most runs of allocations and frees are of one tag, so the counters are those of a *run*: they are booked
//! under its tag when another tag comes along.

use super::state::State;
use super::stats::Usage;
use super::tags::{TagId, TagTable};

/// Counters of one thread.
#[derive(Debug, Default)]
pub(super) struct Counts {
    run: Usage,
    /// The tag of the run.
    tag: TagId,
    /// The runs before.
    before: Usage,
    tags: TagTable,
}

impl Counts {
    /// Whether the run is one of `tag`.
    #[inline]
    pub(super) fn is_run_of(&self, tag: TagId) -> bool {
        self.tag == tag
    }

    /// Makes the run one of `tag`.
    #[inline]
    pub(super) fn turn_to(&mut self, tag: TagId) {
        if tag != self.tag {
            self.end_run(tag);
        }
    }

    /// Counts an allocation under the tag of the run.
    #[inline]
    pub(super) fn allocate(&mut self, requested: u64, allocated: u64) {
        self.run.allocate(requested, allocated);
    }

    /// Counts a free under the tag of the run.
    #[inline]
    pub(super) fn free(&mut self, requested: u64, allocated: u64) {
        self.run.free(requested, allocated);
    }

    #[cold]
    #[inline(never)]
    fn end_run(&mut self, next: TagId) {
        self.tags.fold_one(self.tag, &self.run.allocated);
        self.before.fold(&mut self.run);
        self.tag = next;
    }

    /// Books everything in the pool.
    pub(super) fn fold(&mut self, state: &mut State) {
        if !self.before.is_empty() {
            state.fold(&mut self.before, &mut self.tags);
        }
        if !self.run.is_empty() {
            state.tags.fold_one(self.tag, &self.run.allocated);
            state.usage.fold(&mut self.run);
        }
    }
}
