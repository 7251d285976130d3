//! The memories of a pool: the ordinary one, and one for each private pool.
//!
//! They keep blocks, holes and pages apart and share everything else: the lock, the streams' clocks, the
//! limit, the statistics. A private memory keeps its pages for as long as a graph may run on them. Once it
//! is *released* nothing new is placed in it, and what falls idle in it is *collected*: not before the streams
//! that its graphs were launched on have passed the point where they were at the release, as launched graphs
//! outlive their handle. What was collected is spare memory of the ordinary one, which lends it to a private one
//! that needs more. Spare memory goes before new memory is taken from the driver, and goes back to the driver
//! first.
//!
//! Must not know: what is captured, and when.

use std::collections::BTreeMap;

use super::backing::{Backing, Placed, Refusal, Request, SpareMemory, Totals};
use super::fences::{COMMON, Fence, Fences};
use super::territory::Owner;
use crate::error::Result;

/// The number of a memory in its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MemoryIndex(u32);

impl MemoryIndex {
    pub(super) const ORDINARY: Self = Self(0);

    /// Of a private memory: its place in the list of these.
    fn slot(self) -> usize {
        self.0 as usize - 1
    }
}

#[derive(Debug)]
struct Private {
    backing: Box<dyn Backing>,
    /// Streams that graphs were launched on.
    launched: Vec<Owner>,
    /// Once released: what has to be passed before a page may go.
    released: Option<Vec<Fence>>,
}

/// All memories of a pool.
#[derive(Debug)]
pub(super) struct Memories {
    ordinary: Box<dyn Backing>,
    private: Vec<Option<Private>>,
    /// Most bytes that all of them may hold, if that is not left to the device.
    limit: Option<u64>,
    /// What they held when the limit was set: a lower one does not take it away.
    held_at_limit: u64,
    /// What memories that are gone have taken and given back.
    gone: Totals,
}

impl Memories {
    pub(super) fn new(ordinary: Box<dyn Backing>, limit: Option<u64>) -> Self {
        Self {
            ordinary,
            private: Vec::new(),
            limit,
            held_at_limit: 0,
            gone: Totals::default(),
        }
    }

    /// Every memory, the ordinary one first.
    fn all(&self) -> impl Iterator<Item = &dyn Backing> {
        let private = self.private.iter().flatten();
        std::iter::once(&*self.ordinary).chain(private.map(|memory| &*memory.backing))
    }

    fn all_mut(&mut self) -> impl Iterator<Item = &mut Box<dyn Backing>> {
        let private = self.private.iter_mut().flatten();
        std::iter::once(&mut self.ordinary).chain(private.map(|memory| &mut memory.backing))
    }

    /// Adds a private memory.
    pub(super) fn add(&mut self, backing: Box<dyn Backing>) -> MemoryIndex {
        let memory = Some(Private {
            backing,
            launched: Vec::new(),
            released: None,
        });
        let slot = match self.private.iter().position(Option::is_none) {
            Some(vacant) => {
                self.private[vacant] = memory;
                vacant
            }
            None => {
                self.private.push(memory);
                self.private.len() - 1
            }
        };
        MemoryIndex(u32::try_from(slot + 1).expect("fewer private pools than 2^32"))
    }

    pub(super) fn get(&self, index: MemoryIndex) -> &dyn Backing {
        if index == MemoryIndex::ORDINARY {
            return &*self.ordinary;
        }
        let memory = self.private[index.slot()].as_ref();
        &*memory
            .expect("a memory outlives its users and blocks")
            .backing
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: MemoryIndex) -> &mut dyn Backing {
        if index == MemoryIndex::ORDINARY {
            return &mut *self.ordinary;
        }
        let memory = self.private[index.slot()].as_mut();
        &mut *memory
            .expect("a memory outlives its users and blocks")
            .backing
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// Sets the most bytes that all memories may hold from now on; what they hold already stays.
    pub(super) fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit;
        self.held_at_limit = self.totals().reserved_bytes;
    }

    /// As [`Backing::find`], within what the limit leaves to this memory.
    pub(super) fn find(
        &mut self,
        index: MemoryIndex,
        request: Request,
        fences: &mut Fences,
    ) -> Result<Placed, Refusal> {
        let is_ordinary = index == MemoryIndex::ORDINARY;
        if !is_ordinary {
            let spares = self.ordinary.take_spares();
            self.get_mut(index).take_in(spares);
        }
        let left = self.limit.map_or(u64::MAX, |limit| {
            let others = self.totals().reserved_bytes - self.get(index).totals().reserved_bytes;
            limit.saturating_sub(others)
        });
        let backing = self.get_mut(index);
        backing.set_limit(left);
        let found = backing.find(request, fences);
        if !is_ordinary {
            let spares = backing.take_spares();
            self.ordinary.take_in(spares);
        }
        if request.may_return && found.is_ok() {
            self.return_surplus(fences);
        }
        found
    }

    /// Gives idle memory back while more is held than the limit allows, as after the limit was lowered below what a
    /// private pool held that is gone by now.
    fn return_surplus(&mut self, fences: &mut Fences) {
        if let Some(limit) = self.limit
            && self.totals().reserved_bytes > limit
        {
            // What the driver does not take back now is offered again.
            drop(self.release_idle(limit, fences));
        }
    }

    /// Notes that a graph on a private memory was launched on a stream, which has it for as long as it runs.
    pub(super) fn note_launch(&mut self, index: MemoryIndex, owner: Owner) {
        let memory = self.private[index.slot()].as_mut();
        let launched = &mut memory.expect("a graph keeps its memory").launched;
        if !launched.contains(&owner) {
            launched.push(owner);
        }
    }

    /// Says that nothing will be placed in a private memory again and no graph on it launched.
    pub(super) fn release(&mut self, index: MemoryIndex, fences: &mut Fences) {
        let memory = self.private[index.slot()].as_mut();
        let memory = memory.expect("a memory is released once");
        let launched = std::mem::take(&mut memory.launched).into_iter();
        memory.released = Some(launched.map(|owner| fences.end(owner)).collect());
        self.drop_empty();
    }

    /// Whether a released memory still holds something.
    pub(super) fn has_released(&self) -> bool {
        let mut private = self.private.iter().flatten();
        private.any(|memory| memory.released.is_some())
    }

    /// Makes spare what is idle in released memories and whose streams have passed.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused stays where it is.
    pub(super) fn collect(&mut self, fences: &mut Fences) -> Result<()> {
        if !self.has_released() {
            return Ok(());
        }
        let mut spares = SpareMemory::default();
        let mut outcome = Ok(());
        for memory in self.private.iter_mut().flatten() {
            let Some(ends) = &mut memory.released else {
                continue;
            };
            ends.retain(|end| !fences.passed_by_now(*end));
            if ends.is_empty() {
                outcome = outcome.and(memory.backing.give_up(fences, &mut spares));
            }
        }
        if !spares.is_empty() {
            self.ordinary.take_in(spares);
        }
        self.drop_empty();
        outcome
    }

    /// Forgets released memories that hold nothing.
    fn drop_empty(&mut self) {
        for slot in &mut self.private {
            let is_empty = |memory: &mut Private| {
                memory.released.is_some() && memory.backing.totals().segments == 0
            };
            if let Some(memory) = slot.take_if(is_empty) {
                let totals = memory.backing.totals();
                self.gone.device_allocs += totals.device_allocs;
                self.gone.device_frees += totals.device_frees;
            }
        }
    }

    /// As [`Backing::settle`].
    pub(super) fn settle(&mut self, fences: &mut Fences) {
        for backing in self.all_mut() {
            backing.settle(fences);
        }
        // What the driver does not unmap stays where it is.
        drop(self.collect(fences));
    }

    /// As [`Backing::adopt`].
    pub(super) fn adopt(&mut self, owner: Owner) {
        for backing in self.all_mut() {
            backing.adopt(owner);
        }
        for memory in self.private.iter_mut().flatten() {
            memory.launched.retain(|stream| *stream != owner);
        }
    }

    /// Whether a request for this memory may find room only after idle memory went back to the driver: its
    /// own, where streams do not share, or that of another memory.
    pub(super) fn returning_helps(&self, index: MemoryIndex) -> bool {
        index != MemoryIndex::ORDINARY
            || !self.get(index).shares_free_memory()
            || self.has_released()
    }

    /// Free bytes by stream whose passing would make them usable by `owner` in this memory, or returnable
    /// where that helps.
    pub(super) fn bytes_behind(
        &self,
        index: MemoryIndex,
        owner: Owner,
        fences: &Fences,
    ) -> BTreeMap<Owner, u64> {
        let mut behind = self.get(index).bytes_behind(owner, fences);
        // The requester's own as well: idle memory is returned only once it is complete.
        let mut add_returnable = |backing: &dyn Backing, ends: &[Fence]| {
            for (owner, bytes) in backing.bytes_behind(COMMON, fences) {
                *behind.entry(owner).or_default() += bytes;
            }
            for end in ends.iter().filter(|end| !fences.is_known_complete(**end)) {
                *behind.entry(end.owner).or_default() += backing.totals().reserved_bytes;
            }
        };
        if index != MemoryIndex::ORDINARY {
            add_returnable(&*self.ordinary, &[]);
        }
        // A request is for none that is released.
        for memory in self.private.iter().flatten() {
            if let Some(ends) = &memory.released {
                add_returnable(&*memory.backing, ends);
            }
        }
        behind
    }

    /// Whether nothing here belongs to `owner` or waits for it.
    pub(super) fn needs_nothing_of(&self, owner: Owner) -> bool {
        let waits = |memory: &Private| {
            let mut ends = memory.released.iter().flatten();
            memory.launched.contains(&owner) || ends.any(|end| end.owner == owner)
        };
        self.all().all(|backing| backing.holds_nothing_of(owner))
            && !self.private.iter().flatten().any(waits)
    }

    /// Gives the driver what is idle as a whole and known to be complete, until at most `keep` bytes are held:
    /// what released memories left, then in the ordinary one.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    pub(super) fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let outcome = self.collect(fences);
        let others = self.totals().reserved_bytes - self.ordinary.totals().reserved_bytes;
        let keep = keep.saturating_sub(others);
        outcome.and(self.ordinary.release_idle(keep, fences))
    }

    /// Free blocks in partly used segments, and their bytes.
    pub(super) fn inactive_split(&self) -> (u64, u64) {
        let parts = self.all().map(Backing::inactive_split);
        parts.fold((0, 0), |(bytes, n), (more, blocks)| {
            (bytes + more, n + blocks)
        })
    }

    /// Sums over all memories, those that are gone included.
    pub(super) fn totals(&self) -> Totals {
        self.all().fold(self.gone, |sum, backing| {
            let part = backing.totals();
            Totals {
                segments: sum.segments + part.segments,
                reserved_bytes: sum.reserved_bytes + part.reserved_bytes,
                device_allocs: sum.device_allocs + part.device_allocs,
                device_frees: sum.device_frees + part.device_frees,
            }
        })
    }

    /// Bytes held for private pools that are there: a handle or a graph is.
    pub(super) fn private_bytes(&self) -> u64 {
        let private = self.private.iter().flatten();
        private
            .filter(|memory| memory.released.is_none())
            .map(|memory| memory.backing.totals().reserved_bytes)
            .sum()
    }

    /// Walks every structure and panics if an invariant is broken; returns the bytes in blocks.
    pub(super) fn check_invariants(&self) -> u64 {
        let total = self.totals().reserved_bytes;
        let most = self.limit.map(|limit| limit.max(self.held_at_limit));
        assert!(
            most.is_none_or(|most| total <= most),
            "{total} bytes exceed {most:?}"
        );
        self.all().map(Backing::check_invariants).sum()
    }
}
