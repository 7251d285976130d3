//! What a thread has counted since it was last folded into the pool's counters.
//!
//! Most allocations and frees in a row are of one tag, so the counters are those of a *run*. They are added to the
//! tag's when another tag comes along.

use super::gauge::Usage;
use super::tags::TagTable;
use crate::memory::types::TagId;

/// Counters of one thread.
#[derive(Debug, Default)]
pub(crate) struct Counts {
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
    pub(crate) fn is_run_of(&self, tag: TagId) -> bool {
        self.tag == tag
    }

    /// Makes the run one of `tag`.
    #[inline]
    pub(crate) fn turn_to(&mut self, tag: TagId) {
        if tag != self.tag {
            self.end_run(tag);
        }
    }

    /// Counts an allocation under the tag of the run.
    #[inline]
    pub(crate) fn allocate(&mut self, requested: u64, allocated: u64) {
        self.run.allocate(requested, allocated);
    }

    /// Counts a free under the tag of the run.
    #[inline]
    pub(crate) fn free(&mut self, requested: u64, allocated: u64) {
        self.run.free(requested, allocated);
    }

    #[cold]
    #[inline(never)]
    fn end_run(&mut self, next: TagId) {
        self.tags.fold_one(self.tag, &self.run.allocated);
        self.before.fold(&mut self.run);
        self.tag = next;
    }

    /// Allocations and frees counted since the last fold.
    pub(crate) fn calls(&self) -> u64 {
        self.run.calls() + self.before.calls()
    }

    /// Adds everything to the counters of a pool.
    pub(crate) fn fold_into(&mut self, usage: &mut Usage, tags: &mut TagTable) {
        if !self.before.is_empty() {
            usage.fold(&mut self.before);
            tags.fold(&mut self.tags);
        }
        if !self.run.is_empty() {
            tags.fold_one(self.tag, &self.run.allocated);
            usage.fold(&mut self.run);
        }
    }
}
