//! What a pool holds, under its lock.
//!
//! Invariant: the statistics equal what a walk over the memory sums. Nothing here takes the lock or waits
//! on the host.

use smallvec::SmallVec;

use super::backing::{Backing, Place, Placed, Refusal, Request};
use super::block::{BlockRecord, User};
use super::config::{PoolConfig, ReusePolicy};
use super::fences::{Fence, Fences};
use super::growth::Pages;
use super::memories::{Memories, MemoryIndex};
use super::paged::PagedMemory;
use super::peaks::Peaks;
use super::pending::{Passed, Pending};
use super::segmented::SegmentedMemory;
use super::stats::{Gauge, PoolStats, Usage};
use super::tags::{TagId, TagTable};
use super::territory::Owner;
use crate::driver::{Device, Stream};
use crate::error::Result;

/// An allocation on its way through the ladder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// What the caller asked for, and that rounded to the granularity.
    pub(super) requested: u64,
    pub(super) bytes: u64,
    pub(super) stream: &'a Stream,
    pub(super) memory: MemoryIndex,
}

/// Memory for a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) placed: Placed,
    pub(super) memory: MemoryIndex,
    /// As asked for, rounded.
    pub(super) bytes: u64,
    pub(super) owner: Owner,
    /// What it is counted under.
    pub(super) tag: TagId,
}

#[derive(Debug)]
pub(super) struct State {
    device: Device,
    config: PoolConfig,
    pub(super) memories: Memories,
    pub(super) fences: Fences,
    pub(super) pending: Pending,
    pub(super) usage: Usage,
    pub(super) peaks: Peaks,
    pub(super) tags: TagTable,
    pub(super) counters: Counters,
    segments: Gauge,
    reserved: Gauge,
}

/// What the ladder counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    pub(super) cache_hits: u64,
    pub(super) alloc_retries: u64,
    pub(super) ooms: u64,
    pub(super) syncs: u64,
}

impl State {
    pub(super) fn new(device: &Device, config: &PoolConfig) -> Result<Self> {
        let backing: Box<dyn Backing> = if maps_pages(device, config) {
            Box::new(PagedMemory::new(Pages::new(device, config.limit)?))
        } else {
            Box::new(SegmentedMemory::new(device, config.limit))
        };
        let memories = Memories::new(backing, config.limit);
        Ok(Self::with(device, config, memories))
    }

    /// Takes everything out, and leaves a state of which nothing may be asked.
    pub(super) fn take(&mut self) -> Self {
        let nothing = Self::with(&self.device, &self.config, Memories::none());
        std::mem::replace(self, nothing)
    }

    fn with(device: &Device, config: &PoolConfig, memories: Memories) -> Self {
        Self {
            device: device.clone(),
            config: config.clone(),
            memories,
            fences: Fences::new(),
            pending: Pending::default(),
            usage: Usage::default(),
            peaks: Peaks::default(),
            tags: TagTable::default(),
            counters: Counters::default(),
            segments: Gauge::default(),
            reserved: Gauge::default(),
        }
    }

    /// Adds a memory that is set aside.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn add_private(&mut self) -> Result<MemoryIndex> {
        let (device, config) = (&self.device, &self.config);
        let backing: Box<dyn Backing> = if maps_pages(device, config) {
            let pages = Pages::lasting(device, config.limit)?;
            Box::new(PagedMemory::unstitched(pages))
        } else {
            Box::new(SegmentedMemory::new(device, config.limit))
        };
        Ok(self.memories.add(backing))
    }

    /// Lets go of a memory that was set aside.
    pub(super) fn release_memory(&mut self, memory: MemoryIndex) {
        self.memories.release(memory, self.fences.ends());
    }

    fn request(&mut self, wanted: Wanted<'_>) -> Request {
        // In a capture no event can be recorded; the pass before it is to need as much memory.
        let reuse = match wanted.memory {
            MemoryIndex::ORDINARY => self.config.reuse,
            _ => ReusePolicy::Never,
        };
        Request {
            bytes: wanted.bytes,
            owner: self.fences.owner(wanted.stream),
            reuse,
            pending: self.pending.bytes(),
        }
    }

    /// Places a block in memory that is free for its stream at once.
    pub(super) fn place(&mut self, wanted: Wanted<'_>) -> Option<Found> {
        let request = self.request(wanted);
        let placed = self.memories.get_mut(wanted.memory).place(request)?;
        Some(self.hand_out(wanted, request.owner, placed))
    }

    /// Places a block by all means but waiting on the host.
    pub(super) fn find(&mut self, wanted: Wanted<'_>) -> Result<Found, Refusal> {
        let request = self.request(wanted);
        let found = self.memories.find(wanted.memory, request, &mut self.fences);
        // Even a request that failed may have taken memory on the way.
        self.count_driver();
        Ok(self.hand_out(wanted, request.owner, found?))
    }

    fn hand_out(&mut self, wanted: Wanted<'_>, owner: Owner, placed: Placed) -> Found {
        let tag = TagId::current();
        self.usage.allocate(wanted.requested, wanted.bytes);
        self.usage.active_blocks.increase(1);
        self.usage.active.increase(wanted.bytes);
        self.tags.increase(tag, wanted.bytes);
        Found {
            placed,
            memory: wanted.memory,
            bytes: wanted.bytes,
            owner,
            tag,
        }
    }

    fn count_driver(&mut self) {
        let totals = self.memories.totals();
        self.segments.set(totals.segments);
        self.reserved.set(totals.reserved_bytes);
    }

    /// Driver allocations so far.
    pub(super) fn device_allocs(&self) -> u64 {
        self.memories.totals().device_allocs
    }

    /// Bytes held from the driver.
    pub(super) fn bytes_held(&self) -> u64 {
        self.memories.totals().reserved_bytes
    }

    /// Takes over what a thread's lanes have counted.
    pub(super) fn fold(&mut self, usage: &mut Usage, tags: &mut TagTable) {
        self.usage.fold(usage);
        self.tags.fold(tags);
    }

    /// Takes a freed block in: it is reusable at once, or when the streams recorded on it have passed the ends
    /// of their uses, which are their present ends where none was marked. Gives the record back if it is of no more use here.
    pub(super) fn free(
        &mut self,
        mut record: Box<BlockRecord>,
        counted: Counted,
    ) -> Option<Box<BlockRecord>> {
        if counted == Counted::No {
            self.usage.free(record.requested, record.allocated);
            self.tags.decrease(record.tag, record.allocated);
        }
        let users = match &mut record.extras {
            Some(extras) => std::mem::take(&mut extras.users),
            None => SmallVec::new(),
        };
        if users.is_empty() {
            if counted == Counted::No {
                self.count_inactive(record.allocated);
            }
            self.make_reusable(&record);
            record.extras = None;
            return Some(record);
        }
        let is_private = record.memory() != MemoryIndex::ORDINARY;
        let end = |user: &User| {
            user.until.unwrap_or_else(|| {
                let owner = self.fences.owner(&user.stream);
                if is_private {
                    self.fences.now(owner)
                } else {
                    self.fences.stamp_for_others(owner)
                }
            })
        };
        let fences: SmallVec<[Fence; 1]> = users.iter().map(end).collect();
        let freed_at = if is_private {
            self.fences.now(record.owner)
        } else {
            self.fences.stamp_for_others(record.owner)
        };
        self.pending.push(record, fences, freed_at);
        None
    }

    /// Makes blocks reusable whose recorded streams are done with them, as far as `reuse` allows finding
    /// out or bringing about.
    pub(super) fn poll_pending(&mut self, reuse: ReusePolicy) {
        if self.pending.is_empty() {
            return;
        }
        for passed in self.pending.take_passed(&mut self.fences, reuse) {
            let Passed { record, fence } = passed;
            if self.config.poison {
                super::poison::ordinary(&self.device, &record);
            }
            self.count_inactive(record.allocated);
            // Small blocks keep no epochs of their own; a poisoned one was written just now.
            let keeps_none = self.config.poison || matches!(record.place, Place::Small { .. });
            let fence = fence.filter(|_| !keeps_none);
            self.make_reusable_after(&record, fence);
        }
    }

    fn count_inactive(&mut self, bytes: u64) {
        self.usage.active_blocks.decrease(1);
        self.usage.active.decrease(bytes);
    }

    fn make_reusable(&mut self, record: &BlockRecord) {
        self.make_reusable_after(record, None);
    }

    /// Gives a block's memory back, to others after `fence`; by default after what its home stream has been
    /// given so far.
    fn make_reusable_after(&mut self, record: &BlockRecord, fence: Option<Fence>) {
        let owner = record.owner;
        let memory = record.memory();
        let fence = fence.unwrap_or_else(|| {
            // Captured streams can record no events, and no other stream asks for private memory.
            if memory == MemoryIndex::ORDINARY {
                self.fences.stamp(owner)
            } else {
                self.fences.now(owner)
            }
        });
        let backing = self.memories.get_mut(memory);
        backing.free(record.place, record.allocated, fence);
    }

    /// Takes in what a wait on the host has covered; whether blocks were pending that came back thereby.
    /// Their own streams may have work on them that the wait did not cover.
    pub(super) fn take_in_passed(&mut self, passed: &[Fence]) -> bool {
        for fence in passed {
            self.fences.passed(*fence);
        }
        let pending = self.pending.len();
        self.poll_pending(ReusePolicy::OnlyComplete);
        self.pending.len() < pending
    }

    /// Makes memory whose past is complete anyone's, and lets go of streams that nobody else holds.
    pub(super) fn settle(&mut self) {
        self.memories.settle(&mut self.fences);
        self.fences.retire(|owner| {
            self.memories.needs_nothing_of(owner) && !self.pending.is_behind(owner)
        });
    }

    /// Gives the driver what is idle as a whole and known to be complete.
    pub(super) fn release_idle(&mut self) -> Result<()> {
        let outcome = self.memories.release_idle(&mut self.fences);
        self.count_driver();
        outcome
    }

    /// Bytes of the largest free block of `memory` that `stream` could use.
    pub(super) fn largest_free(&mut self, memory: MemoryIndex, stream: &Stream) -> u64 {
        let owner = self.fences.owner(stream);
        self.memories.get(memory).largest_free(owner)
    }

    /// The statistics now. The lanes' counters must have been folded in.
    pub(super) fn stats(&self) -> PoolStats {
        let totals = self.memories.totals();
        let (inactive_split_bytes, inactive_split) = self.memories.inactive_split();
        let counters = self.counters;
        let usage = self.peaks.completed(&self.usage);
        PoolStats {
            allocation: usage.blocks.stat(),
            segment: self.segments.stat(),
            active: usage.active_blocks.stat(),
            requested_bytes: usage.requested.stat(),
            allocated_bytes: usage.allocated.stat(),
            active_bytes: usage.active.stat(),
            reserved_bytes: self.reserved.stat(),
            private_reserved_bytes: self.memories.private_bytes(),
            inactive_split,
            inactive_split_bytes,
            cache_hits: counters.cache_hits + usage.lane_hits,
            num_alloc_retries: counters.alloc_retries,
            num_ooms: counters.ooms,
            num_sync_all_streams: counters.syncs,
            num_device_alloc: totals.device_allocs,
            num_device_free: totals.device_frees,
        }
    }

    /// Sets every peak to the present value.
    pub(super) fn reset_peaks(&mut self) {
        self.peaks.reset_overall(&mut self.usage);
        self.usage.reset_peaks();
        self.segments.reset_peak();
        self.reserved.reset_peak();
        self.tags.reset_peaks();
    }

    /// Asserts that every structure is sound and that the counters equal what a walk sums. The lanes must
    /// be empty and their counters folded in.
    pub(super) fn check_invariants(&self) {
        let in_blocks = self.memories.check_invariants();
        let stats = self.stats();
        assert_eq!(stats.active_bytes.current, in_blocks, "active bytes");
        let pending = self.pending.bytes();
        assert_eq!(
            stats.allocated_bytes.current + pending,
            in_blocks,
            "allocated and pending bytes"
        );
        let blocks = stats.allocation.current + self.pending.len() as u64;
        assert_eq!(stats.active.current, blocks, "active blocks");
        assert_eq!(
            stats.reserved_bytes.current,
            self.memories.totals().reserved_bytes
        );
        assert!(stats.requested_bytes.current <= stats.allocated_bytes.current);
        assert!(
            in_blocks <= stats.reserved_bytes.current,
            "active bytes exceed the reserved ones"
        );
        let tagged: u64 = self
            .tags
            .snapshot()
            .iter()
            .map(|tag| tag.allocated_bytes.current)
            .sum();
        assert_eq!(tagged, stats.allocated_bytes.current, "bytes by tag");
    }
}

/// Whether memory is to be taken as pages.
fn maps_pages(device: &Device, config: &PoolConfig) -> bool {
    let properties = device.properties();
    let is_whole = super::territory::PAGE.is_multiple_of(properties.page_granularity);
    properties.virtual_memory && is_whole && !config.contiguous
}

/// Whether a free has gone into some counters already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    /// A lane has counted it.
    Yes,
    No,
}
