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
    #[inline]
    pub(super) fn allocate(&mut self, tag: TagId, requested: u64, allocated: u64) {
        if tag != self.tag {
            self.end_run(tag);
        }
        self.run.allocate(requested, allocated);
    }

    #[inline]
    pub(super) fn free(&mut self, tag: TagId, requested: u64, allocated: u64) {
        if tag != self.tag {
            self.end_run(tag);
        }
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
