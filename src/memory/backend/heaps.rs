//! The heaps of a pool: the default one, and one for each private pool.
//!
//! Heaps keep blocks and pages apart and share everything else: the lock, the streams' clocks, the limit, the
//! statistics. A private heap keeps its pages for as long as a graph may run on them. Once it is *released*, nothing
//! new is placed in it, and its idle memory is *collected* after the streams that its graphs were launched on have
//! passed the point where they were at the release: a launched graph outlives its handle. Collected memory is spare
//! memory of the default heap, which lends it to a private heap that needs more. Spare memory is used before new memory
//! is taken from the driver, and goes back to the driver first.
//!
//! Must not know: what is captured, and when.

use std::collections::BTreeMap;

use super::{Backend, SpareMemory, Totals};
use crate::error::Result;
use crate::memory::streams::Fences;
use crate::memory::types::{Fence, HeapId, Placement, Refusal, Search, StreamIndex, UNOWNED};

#[derive(Debug)]
struct Private {
    backend: Box<dyn Backend>,
    /// Streams that graphs were launched on.
    launched: Vec<StreamIndex>,
    /// Once released: the fences to pass before a page may go.
    released: Option<Vec<Fence>>,
}

/// All heaps of a pool.
#[derive(Debug)]
pub(crate) struct Heaps {
    default: Box<dyn Backend>,
    private: Vec<Option<Private>>,
    /// Most bytes that all heaps may hold; `None` leaves it to the device.
    limit: Option<u64>,
    /// What they held when the limit was set: setting a lower limit takes nothing away.
    held_at_limit: u64,
    /// What heaps that no longer exist have taken and returned.
    gone: Totals,
}

impl Heaps {
    pub(crate) fn new(default: Box<dyn Backend>, limit: Option<u64>) -> Self {
        Self {
            default,
            private: Vec::new(),
            limit,
            held_at_limit: 0,
            gone: Totals::default(),
        }
    }

    /// Every heap, the default one first.
    fn all(&self) -> impl Iterator<Item = &dyn Backend> {
        let private = self.private.iter().flatten();
        std::iter::once(&*self.default).chain(private.map(|heap| &*heap.backend))
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn Backend>> {
        let private = self.private.iter_mut().flatten();
        std::iter::once(&mut self.default).chain(private.map(|heap| &mut heap.backend))
    }

    /// Adds a private heap.
    pub(crate) fn add(&mut self, backend: Box<dyn Backend>) -> HeapId {
        let heap = Some(Private {
            backend,
            launched: Vec::new(),
            released: None,
        });
        let slot = match self.private.iter().position(Option::is_none) {
            Some(vacant) => {
                self.private[vacant] = heap;
                vacant
            }
            None => {
                self.private.push(heap);
                self.private.len() - 1
            }
        };
        HeapId::private(slot)
    }

    pub(crate) fn get(&self, index: HeapId) -> &dyn Backend {
        if index == HeapId::DEFAULT {
            return &*self.default;
        }
        let heap = self.private[index.slot()].as_ref();
        &*heap
            .expect("a memory outlives its users and blocks")
            .backend
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, index: HeapId) -> &mut dyn Backend {
        if index == HeapId::DEFAULT {
            return &mut *self.default;
        }
        let heap = self.private[index.slot()].as_mut();
        &mut *heap
            .expect("a memory outlives its users and blocks")
            .backend
    }

    pub(crate) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Sets the most bytes that all heaps may hold from now on; what they hold already stays.
    pub(crate) fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit;
        self.held_at_limit = self.totals().reserved_bytes;
    }

    /// As [`Backend::find`], within what the limit leaves to this heap.
    pub(crate) fn find(
        &mut self,
        index: HeapId,
        search: Search,
        fences: &mut Fences,
    ) -> Result<Placement, Refusal> {
        let is_default = index == HeapId::DEFAULT;
        if !is_default {
            let spares = self.default.take_spares();
            self.get_mut(index).take_in(spares);
        }
        let left = self.limit.map_or(u64::MAX, |limit| {
            let others = self.totals().reserved_bytes - self.get(index).totals().reserved_bytes;
            limit.saturating_sub(others)
        });
        let backend = self.get_mut(index);
        backend.set_limit(left);
        let found = backend.find(search, fences);
        if !is_default {
            let spares = backend.take_spares();
            self.default.take_in(spares);
        }
        if search.may_return && found.is_ok() {
            self.return_surplus(fences);
        }
        found
    }

    /// Returns idle memory while the heaps hold more than the limit: it may have been lowered below what a private pool
    /// held that is dropped by now.
    fn return_surplus(&mut self, fences: &mut Fences) {
        if let Some(limit) = self.limit
            && self.totals().reserved_bytes > limit
        {
            // What the driver refuses to take back is offered again later.
            drop(self.release_idle(limit, fences));
        }
    }

    /// Notes that a graph on a private heap was launched on a stream, which has it for as long as it runs.
    pub(crate) fn note_launch(&mut self, index: HeapId, owner: StreamIndex) {
        let heap = self.private[index.slot()].as_mut();
        let launched = &mut heap.expect("a graph keeps its memory").launched;
        if !launched.contains(&owner) {
            launched.push(owner);
        }
    }

    /// Releases a private heap: nothing will be placed in it again, and no graph on it launched.
    pub(crate) fn release(&mut self, index: HeapId, fences: &mut Fences) {
        let heap = self.private[index.slot()].as_mut();
        let heap = heap.expect("a memory is released once");
        let launched = std::mem::take(&mut heap.launched).into_iter();
        heap.released = Some(launched.map(|owner| fences.end(owner)).collect());
        self.drop_empty();
    }

    /// Whether a released heap still holds something.
    pub(crate) fn has_released(&self) -> bool {
        let mut private = self.private.iter().flatten();
        private.any(|heap| heap.released.is_some())
    }

    /// Makes idle memory of released heaps spare memory if their streams have passed.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused stays where it is.
    pub(crate) fn collect(&mut self, fences: &mut Fences) -> Result<()> {
        if !self.has_released() {
            return Ok(());
        }
        let mut spares = SpareMemory::default();
        let mut outcome = Ok(());
        for heap in self.private.iter_mut().flatten() {
            let Some(ends) = &mut heap.released else {
                continue;
            };
            ends.retain(|end| !fences.passed_by_now(*end));
            if ends.is_empty() {
                outcome = outcome.and(heap.backend.give_up(fences, &mut spares));
            }
        }
        if !spares.is_empty() {
            self.default.take_in(spares);
        }
        self.drop_empty();
        outcome
    }

    /// Drops released heaps that hold nothing.
    fn drop_empty(&mut self) {
        for slot in &mut self.private {
            let is_empty =
                |heap: &mut Private| heap.released.is_some() && heap.backend.totals().segments == 0;
            if let Some(heap) = slot.take_if(is_empty) {
                let totals = heap.backend.totals();
                self.gone.device_allocs += totals.device_allocs;
                self.gone.device_frees += totals.device_frees;
            }
        }
    }

    /// As [`Backend::merge_complete`].
    pub(crate) fn merge_complete(&mut self, fences: &mut Fences) {
        for backend in self.all_mut() {
            backend.merge_complete(fences);
        }
        // What the driver does not unmap stays where it is.
        drop(self.collect(fences));
    }

    /// As [`Backend::release_stream`].
    pub(crate) fn release_stream(&mut self, owner: StreamIndex) {
        for backend in self.all_mut() {
            backend.release_stream(owner);
        }
        for heap in self.private.iter_mut().flatten() {
            heap.launched.retain(|stream| *stream != owner);
        }
    }

    /// Whether a search in this heap can find room only after idle memory went back to the driver: its own, if streams
    /// do not share, or that of another heap.
    pub(crate) fn returning_helps(&self, index: HeapId) -> bool {
        index != HeapId::DEFAULT || !self.get(index).shares_free_memory() || self.has_released()
    }

    /// Free bytes by stream whose passing would make them usable by `owner` in this heap, or returnable if that helps.
    pub(crate) fn bytes_behind(
        &self,
        index: HeapId,
        owner: StreamIndex,
        fences: &Fences,
    ) -> BTreeMap<StreamIndex, u64> {
        let mut behind = self.get(index).bytes_behind(owner, fences);
        // The requester's own as well: idle memory is returned only once it is complete.
        let mut add_returnable = |backend: &dyn Backend, ends: &[Fence]| {
            for (owner, bytes) in backend.bytes_behind(UNOWNED, fences) {
                *behind.entry(owner).or_default() += bytes;
            }
            for end in ends.iter().filter(|end| !fences.is_known_complete(**end)) {
                *behind.entry(end.owner).or_default() += backend.totals().reserved_bytes;
            }
        };
        if index != HeapId::DEFAULT {
            add_returnable(&*self.default, &[]);
        }
        // No search is in a released heap.
        for heap in self.private.iter().flatten() {
            if let Some(ends) = &heap.released {
                add_returnable(&*heap.backend, ends);
            }
        }
        behind
    }

    /// Whether nothing here belongs to `owner` or waits for it.
    pub(crate) fn needs_nothing_of(&self, owner: StreamIndex) -> bool {
        let wait = |heap: &Private| {
            let mut ends = heap.released.iter().flatten();
            heap.launched.contains(&owner) || ends.any(|end| end.owner == owner)
        };
        self.all().all(|backend| backend.holds_nothing_of(owner))
            && !self.private.iter().flatten().any(wait)
    }

    /// Returns to the driver what is idle as a whole and known to be complete, until at most `keep` bytes are held:
    /// spare memory first, then that of the default heap.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    pub(crate) fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let outcome = self.collect(fences);
        let others = self.totals().reserved_bytes - self.default.totals().reserved_bytes;
        let keep = keep.saturating_sub(others);
        outcome.and(self.default.release_idle(keep, fences))
    }

    /// Free blocks in partly used segments, and their bytes.
    pub(crate) fn inactive_split(&self) -> (u64, u64) {
        let parts = self.all().map(Backend::inactive_split);
        parts.fold((0, 0), |(bytes, n), (more, blocks)| {
            (bytes + more, n + blocks)
        })
    }

    /// Sums over all heaps, including those that no longer exist.
    pub(crate) fn totals(&self) -> Totals {
        self.all().fold(self.gone, |sum, backend| {
            let part = backend.totals();
            Totals {
                segments: sum.segments + part.segments,
                reserved_bytes: sum.reserved_bytes + part.reserved_bytes,
                device_allocs: sum.device_allocs + part.device_allocs,
                device_frees: sum.device_frees + part.device_frees,
            }
        })
    }

    /// Bytes held for private pools that still have a handle or a graph.
    pub(crate) fn private_bytes(&self) -> u64 {
        let private = self.private.iter().flatten();
        private
            .filter(|heap| heap.released.is_none())
            .map(|heap| heap.backend.totals().reserved_bytes)
            .sum()
    }

    /// Walks every structure and panics if an invariant is broken; returns the bytes in blocks.
    pub(crate) fn check_invariants(&self) -> u64 {
        let total = self.totals().reserved_bytes;
        let most = self.limit.map(|limit| limit.max(self.held_at_limit));
        assert!(
            most.is_none_or(|most| total <= most),
            "{total} bytes exceed {most:?}"
        );
        self.all().map(Backend::check_invariants).sum()
    }
}
