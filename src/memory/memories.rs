//! The memories of a pool: the ordinary one, and one for each private pool.
//!
//! They keep blocks, holes and pages apart and share everything else: the lock, the streams' clocks, the
//! limit, the statistics. A private memory keeps its pages for as long as a graph may run on them. Once it
//! is *released* nothing new is placed in it, and its pages go back to the driver as they fall idle, not
//! before every stream has passed the point where it was at the release: launched graphs outlive their handle.
//!
//! Must not know: what is captured, and when.

use std::collections::BTreeMap;

use super::backing::{Backing, Placed, Refusal, Request, Totals};
use super::fences::{COMMON, Fence, Fences};
use super::territory::Owner;
use crate::error::Result;

/// A memory's place in the list of its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MemoryIndex(u32);

impl MemoryIndex {
    pub(super) const ORDINARY: Self = Self(0);

    fn slot(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug)]
struct Memory {
    backing: Box<dyn Backing>,
    /// Once released: what has to be passed before a page may go.
    released: Option<Vec<Fence>>,
}

/// All memories of a pool, the ordinary one first.
#[derive(Debug)]
pub(super) struct Memories {
    list: Vec<Option<Memory>>,
    /// Most bytes that all of them may hold, if that is not left to the device.
    limit: Option<u64>,
    /// What they held when the limit was set: a lower one does not take it away.
    held_at_limit: u64,
    /// What memories that are gone have taken and given back.
    gone: Totals,
}

impl Memories {
    pub(super) fn new(ordinary: Box<dyn Backing>, limit: Option<u64>) -> Self {
        let ordinary = Memory {
            backing: ordinary,
            released: None,
        };
        Self {
            list: vec![Some(ordinary)],
            limit,
            held_at_limit: 0,
            gone: Totals::default(),
        }
    }

    /// No memory at all, for a pool that is gone.
    pub(super) fn none() -> Self {
        Self {
            list: Vec::new(),
            limit: None,
            held_at_limit: 0,
            gone: Totals::default(),
        }
    }

    /// Adds a private memory.
    pub(super) fn add(&mut self, backing: Box<dyn Backing>) -> MemoryIndex {
        let memory = Some(Memory {
            backing,
            released: None,
        });
        let slot = match self.list.iter().position(Option::is_none) {
            Some(vacant) => {
                self.list[vacant] = memory;
                vacant
            }
            None => {
                self.list.push(memory);
                self.list.len() - 1
            }
        };
        MemoryIndex(u32::try_from(slot).expect("fewer private pools than 2^32"))
    }

    pub(super) fn get(&self, index: MemoryIndex) -> &dyn Backing {
        let memory = self.list[index.slot()].as_ref();
        &*memory
            .expect("a memory outlives its users and blocks")
            .backing
    }

    #[inline]
    pub(super) fn get_mut(&mut self, index: MemoryIndex) -> &mut dyn Backing {
        let memory = self.list[index.slot()].as_mut();
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
        let others = self.totals().reserved_bytes - self.get(index).totals().reserved_bytes;
        let left = self.limit.unwrap_or(u64::MAX).saturating_sub(others);
        let backing = self.get_mut(index);
        backing.set_limit(left);
        backing.find(request, fences)
    }

    /// Says that nothing will be placed in a private memory again, and that graphs on it may run until
    /// `ends` are passed.
    pub(super) fn release(&mut self, index: MemoryIndex, ends: Vec<Fence>) {
        let memory = self.list[index.slot()].as_mut();
        memory.expect("a memory is released once").released = Some(ends);
        self.drop_empty();
    }

    /// Forgets released memories that hold nothing.
    fn drop_empty(&mut self) {
        for slot in &mut self.list {
            let is_empty = |memory: &mut Memory| {
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
        for memory in self.list.iter_mut().flatten() {
            memory.backing.settle(fences);
        }
    }

    /// As [`Backing::adopt`].
    pub(super) fn adopt(&mut self, owner: Owner) {
        for memory in self.list.iter_mut().flatten() {
            memory.backing.adopt(owner);
        }
    }

    /// Whether a request for this memory may find room only after idle memory went back to the driver: its
    /// own, where streams do not share, or that of another memory.
    pub(super) fn returning_helps(&self, index: MemoryIndex) -> bool {
        let is_released = |memory: &Memory| memory.released.is_some();
        index != MemoryIndex::ORDINARY
            || !self.get(index).shares_free_memory()
            || self.list.iter().flatten().any(is_released)
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
        for (slot, memory) in self.list.iter().enumerate() {
            let Some(memory) = memory else { continue };
            let is_returned = slot == MemoryIndex::ORDINARY.slot() || memory.released.is_some();
            if slot == index.slot() || !is_returned {
                continue;
            }
            // The requester's own as well: idle memory is returned only once it is complete.
            for (owner, bytes) in memory.backing.bytes_behind(COMMON, fences) {
                *behind.entry(owner).or_default() += bytes;
            }
            let ends = memory.released.iter().flatten();
            for end in ends.filter(|end| !fences.is_known_complete(**end)) {
                *behind.entry(end.owner).or_default() += memory.backing.totals().reserved_bytes;
            }
        }
        behind
    }

    /// Whether nothing here belongs to `owner` or waits for it.
    pub(super) fn needs_nothing_of(&self, owner: Owner) -> bool {
        self.list.iter().flatten().all(|memory| {
            let mut ends = memory.released.iter().flatten();
            memory.backing.holds_nothing_of(owner) && ends.all(|end| end.owner != owner)
        })
    }

    /// Gives the driver what is idle as a whole and known to be complete, until at most `keep` bytes are held:
    /// in released memories whose graphs have run, then in the ordinary one.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    pub(super) fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let mut outcome = Ok(());
        for memory in self.list.iter_mut().flatten() {
            let Some(ends) = &mut memory.released else {
                continue;
            };
            ends.retain(|end| !fences.is_complete(*end));
            // Nothing will be placed there again.
            if ends.is_empty() {
                outcome = outcome.and(memory.backing.release_idle(0, fences));
            }
        }
        self.drop_empty();
        let others = self.private_bytes();
        if let Some(Some(ordinary)) = self.list.first_mut() {
            let keep = keep.saturating_sub(others);
            outcome = outcome.and(ordinary.backing.release_idle(keep, fences));
        }
        outcome
    }

    /// Free blocks in partly used segments, and their bytes.
    pub(super) fn inactive_split(&self) -> (u64, u64) {
        let parts = self.list.iter().flatten();
        let parts = parts.map(|memory| memory.backing.inactive_split());
        parts.fold((0, 0), |(bytes, n), (more, blocks)| {
            (bytes + more, n + blocks)
        })
    }

    /// Sums over all memories, those that are gone included.
    pub(super) fn totals(&self) -> Totals {
        let parts = self.list.iter().flatten();
        parts.fold(self.gone, |sum, memory| {
            let part = memory.backing.totals();
            Totals {
                segments: sum.segments + part.segments,
                reserved_bytes: sum.reserved_bytes + part.reserved_bytes,
                device_allocs: sum.device_allocs + part.device_allocs,
                device_frees: sum.device_frees + part.device_frees,
            }
        })
    }

    /// Bytes held for private pools.
    pub(super) fn private_bytes(&self) -> u64 {
        let private = self.list.iter().skip(1).flatten();
        private
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
        let parts = self.list.iter().flatten();
        parts.map(|memory| memory.backing.check_invariants()).sum()
    }
}
