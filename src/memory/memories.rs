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
        let others = self.totals().reserved_bytes - self.get(index).totals().reserved_bytes;
        let left = self.limit.unwrap_or(u64::MAX).saturating_sub(others);
        let backing = self.get_mut(index);
        backing.set_limit(left);
        backing.find(request, fences)
    }

    /// Says that nothing will be placed in a private memory again, and that graphs on it may run until
    /// `ends` are passed.
    pub(super) fn release(&mut self, index: MemoryIndex, ends: Vec<Fence>) {
        let memory = self.private[index.slot()].as_mut();
        memory.expect("a memory is released once").released = Some(ends);
        self.drop_empty();
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
    }

    /// As [`Backing::adopt`].
    pub(super) fn adopt(&mut self, owner: Owner) {
        for backing in self.all_mut() {
            backing.adopt(owner);
        }
    }

    /// Whether a request for this memory may find room only after idle memory went back to the driver: its
    /// own, where streams do not share, or that of another memory.
    pub(super) fn returning_helps(&self, index: MemoryIndex) -> bool {
        let is_released = |memory: &Private| memory.released.is_some();
        index != MemoryIndex::ORDINARY
            || !self.get(index).shares_free_memory()
            || self.private.iter().flatten().any(is_released)
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
        let private = self.private.iter().flatten();
        let mut ends = private.flat_map(|memory| memory.released.iter().flatten());
        self.all().all(|backing| backing.holds_nothing_of(owner))
            && ends.all(|end| end.owner != owner)
    }

    /// Gives the driver what is idle as a whole and known to be complete, until at most `keep` bytes are held:
    /// in released memories whose graphs have run, then in the ordinary one.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused is kept.
    pub(super) fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let mut outcome = Ok(());
        for memory in self.private.iter_mut().flatten() {
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
        let keep = keep.saturating_sub(self.private_bytes());
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

    /// Bytes held for private pools.
    pub(super) fn private_bytes(&self) -> u64 {
        let private = self.private.iter().flatten();
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
        self.all().map(Backing::check_invariants).sum()
    }
}
