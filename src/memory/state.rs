//! What a pool holds, under its lock.
//!
//! Invariant: the statistics equal what a walk over the memory sums. Nothing here takes the lock or waits
//! on the host.

use std::collections::BTreeMap;
use std::time::Instant;

use smallvec::SmallVec;

use super::backing::{Backing, Place, Placed, REQUEST_MAX, Refusal, Request};
use super::block::{BlockRecord, User};
use super::config::{PoolConfig, ReusePolicy};
use super::decay::Decay;
use super::fences::{COMMON, Fence, Fences};
use super::growth::Pages;
use super::memories::{Memories, MemoryIndex};
use super::paged::PagedMemory;
use super::peaks::Peaks;
use super::pending::{Passed, Pending};
use super::record::Record;
use super::segmented::SegmentedMemory;
use super::spares::Spares;
use super::stats::{Gauge, PoolStats, Usage};
use super::tags::{TagId, TagTable};
use super::territory::Owner;
use super::wanted::{Found, Wanted};
use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::units::StreamId;

#[derive(Debug)]
pub(super) struct State {
    device: Device,
    config: PoolConfig,
    pub(super) memories: Memories,
    pub(super) fences: Fences,
    pub(super) pending: Pending,
    pub(super) decay: Decay,
    pub(super) usage: Usage,
    pub(super) peaks: Peaks,
    pub(super) tags: TagTable,
    pub(super) counters: Counters,
    segments: Gauge,
    reserved: Gauge,
    pub(super) spares: Spares,
    /// Room for blocks that come back; empty in between.
    passed: Vec<Passed>,
    /// Blocks that came back from other streams so far.
    pub(super) came_back: u64,
    /// Whether a change stopped half-way, as whoever looks at a broken pool notes: then only the counters may be looked at.
    pub(super) is_broken: bool,
}

/// What the ladder counts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counters {
    /// Allocations that needed the driver's memory, or a second try.
    pub(super) misses: u64,
    pub(super) alloc_retries: u64,
    pub(super) ooms: u64,
    pub(super) syncs: u64,
}

impl State {
    pub(super) fn new(device: &Device, config: &PoolConfig) -> Result<Self> {
        let limit = config.byte_limit(device);
        let backing: Box<dyn Backing> = if maps_pages(device, config) {
            Box::new(PagedMemory::new(Pages::new(device, limit)?))
        } else {
            Box::new(SegmentedMemory::new(device, limit))
        };
        let memories = Memories::new(backing, limit);
        Ok(Self::with(device, config, memories))
    }

    /// Takes everything out, and leaves a state of which nothing may be asked.
    pub(super) fn take(&mut self) -> Self {
        let no_memory = Box::new(SegmentedMemory::new(&self.device, Some(0)));
        let nothing = Self::with(
            &self.device,
            &self.config,
            Memories::new(no_memory, Some(0)),
        );
        std::mem::replace(self, nothing)
    }

    fn with(device: &Device, config: &PoolConfig, memories: Memories) -> Self {
        Self {
            device: device.clone(),
            config: config.clone(),
            memories,
            fences: Fences::new(config.deterministic),
            pending: Pending::default(),
            decay: Decay::new(config.decay, Instant::now()),
            usage: Usage::default(),
            peaks: Peaks::default(),
            tags: TagTable::default(),
            counters: Counters::default(),
            segments: Gauge::default(),
            reserved: Gauge::default(),
            spares: Spares::default(),
            passed: Vec::new(),
            came_back: 0,
            is_broken: false,
        }
    }

    /// Adds a memory that is set aside.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(super) fn add_private(&mut self) -> Result<MemoryIndex> {
        let (device, config) = (&self.device, &self.config);
        let backing: Box<dyn Backing> = if maps_pages(device, config) {
            Box::new(PagedMemory::unstitched(Pages::lasting(device)?))
        } else {
            // What the limit leaves is said with each request.
            Box::new(SegmentedMemory::new(device, None))
        };
        Ok(self.memories.add(backing))
    }

    /// Takes back what private pools left whose streams have passed, without waiting for any.
    pub(super) fn collect(&mut self) {
        // To know, a deterministic pool waits: that is left for when memory is short.
        if !self.config.deterministic {
            // What the driver does not unmap stays where it is.
            drop(self.memories.collect(&mut self.fences));
        }
    }

    #[inline]
    fn request(&mut self, wanted: Wanted<'_>) -> Request {
        // In a capture no event can be recorded; the pass before it is to need as much memory.
        let is_ordinary = wanted.memory == MemoryIndex::ORDINARY;
        let reuse = if is_ordinary {
            self.config.reuse
        } else {
            ReusePolicy::Never
        };
        Request {
            bytes: wanted.bytes,
            owner: self.fences.owner(wanted.stream),
            reuse,
            pending: self.pending.bytes() + wanted.kept,
            may_borrow: is_ordinary,
            may_return: !wanted.is_captured,
        }
    }

    /// Places a block in ordinary memory that is free for its stream at once, while the thread keeps `kept` bytes for
    /// the stream.
    #[inline]
    pub(super) fn place(&mut self, wanted: &Wanted<'_>, kept: u64) -> Option<Placed> {
        let owner = self.fences.owner(wanted.stream);
        let pending = self.pending.bytes() + kept;
        let ordinary = self.memories.get_mut(MemoryIndex::ORDINARY);
        let placed = ordinary.place(owner, wanted.bytes, pending)?;
        self.decay.take(wanted.bytes);
        Some(placed)
    }

    /// Places a block by all means but waiting on the host.
    pub(super) fn find(&mut self, wanted: Wanted<'_>) -> Result<Found, Refusal> {
        let request = self.request(wanted);
        let found = self.memories.find(wanted.memory, request, &mut self.fences);
        // Even a request that failed may have taken memory on the way.
        self.count_driver();
        Ok(self.hand_out(wanted, found?))
    }

    fn hand_out(&mut self, wanted: Wanted<'_>, placed: Placed) -> Found {
        self.decay.take(wanted.bytes);
        Found {
            placed,
            memory: wanted.memory,
            bytes: wanted.bytes,
        }
    }

    /// Counts an allocation by a thread that has no cache.
    pub(super) fn count(&mut self, tag: TagId, requested: u64, allocated: u64) {
        self.usage.allocate(requested, allocated);
        self.usage.active_blocks.increase(1);
        self.usage.active.increase(allocated);
        self.tags.increase(tag, allocated);
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

    /// Takes a block back that a thread kept, which has counted its free: it is reusable at once. Calls no driver:
    /// [`settle_frees`](Self::settle_frees) does.
    #[inline]
    pub(super) fn take_back(&mut self, record: &BlockRecord) {
        debug_assert!(record.is_plain(), "a lane keeps ordinary blocks");
        let fence = self.fences.stamp(record.location.owner());
        self.give_back(MemoryIndex::ORDINARY, record, fence);
    }

    /// Records the events that are due after frees.
    #[inline]
    pub(super) fn settle_frees(&mut self) {
        self.fences.record_due();
    }

    /// Takes a freed block in: it is reusable at once, or when the streams recorded on it have passed the ends
    /// of their uses, which are their present ends where none was marked. Gives the record back if it is of no more use here.
    pub(super) fn free(&mut self, mut record: Record, counted: Counted) -> Option<Record> {
        if counted == Counted::No {
            self.usage
                .free(record.size.requested(), record.size.allocated());
            self.tags
                .decrease(record.size.tag(), record.size.allocated());
        }
        if matches!(record.location.place(), Place::Lent { .. }) {
            self.send_home(&mut record);
        }
        let users = match &mut record.extras {
            Some(extras) if !extras.users.is_empty() => std::mem::take(&mut extras.users),
            _ => {
                if counted == Counted::No {
                    self.count_inactive(record.size.allocated());
                }
                self.make_reusable(&record);
                self.settle_frees();
                record
                    .extras
                    .take_if(|extras| extras.memory != MemoryIndex::ORDINARY);
                return Some(record);
            }
        };
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
            self.fences.now(record.location.owner())
        } else {
            self.fences.stamp_for_others(record.location.owner())
        };
        self.pending.push(record, fences, freed_at);
        None
    }

    /// Makes a freed block that lies in another stream's memory one of that stream's, which waits for the
    /// stream it was lent to.
    fn send_home(&mut self, record: &mut BlockRecord) {
        let home = self.fences.stream(record.location.owner());
        let home = home.expect("a stream with memory is known").clone();
        let stream = std::mem::replace(&mut record.home, home);
        let users = &mut record.extras.get_or_insert_default().users;
        users.retain(|user| user.stream.id() != record.home.id());
        users.push(User {
            stream,
            until: None,
        });
    }

    /// Makes blocks reusable whose recorded streams are done with them. They come back to their own stream
    /// under any policy; what the policy decides is whether to wait for them on the device.
    pub(super) fn poll_pending(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        let reuse = match self.config.reuse {
            // On the device, because when the host finds out depends on the device's pace.
            _ if self.config.deterministic => ReusePolicy::Wait,
            ReusePolicy::Never => ReusePolicy::OnlyComplete,
            reuse => reuse,
        };
        let mut passed = std::mem::take(&mut self.passed);
        self.pending
            .take_passed(&mut self.fences, reuse, &mut passed);
        self.came_back += passed.len() as u64;
        for Passed { record, fence } in passed.drain(..) {
            if self.config.poison {
                super::poison::ordinary(&self.device, &record);
            }
            #[cfg(asan)]
            super::poison::forbid(&record);
            self.count_inactive(record.size.allocated());
            // Small blocks keep no epochs of their own; a poisoned one was written just now, and one is forbidden from
            // now on.
            let keeps_none = self.config.poison
                || cfg!(asan)
                || matches!(
                    record.location.place(),
                    Place::Small(_) | Place::Lent { .. }
                );
            let fence = fence.filter(|_| !keeps_none);
            self.make_reusable_after(&record, fence);
            if record.memory() == MemoryIndex::ORDINARY {
                self.spares.keep(record);
            }
        }
        self.passed = passed;
        self.settle_frees();
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
        let owner = record.location.owner();
        let memory = record.memory();
        let fence = fence.unwrap_or_else(|| {
            // Captured streams can record no events, and no other stream asks for private memory.
            if memory == MemoryIndex::ORDINARY {
                self.fences.stamp(owner)
            } else {
                self.fences.now(owner)
            }
        });
        self.give_back(memory, record, fence);
    }

    #[inline]
    fn give_back(&mut self, memory: MemoryIndex, record: &BlockRecord, fence: Fence) {
        debug_assert_eq!(
            fence.owner,
            record.location.owner(),
            "a block goes back to its owner"
        );
        self.decay.give(record.size.allocated());
        let backing = self.memories.get_mut(memory);
        backing.free(record.location, record.size.allocated(), fence);
    }

    /// Takes in what a wait on the host has covered; whether blocks were pending that came back thereby.
    /// Their own streams may have work on them that the wait did not cover.
    pub(super) fn take_in_passed(&mut self, passed: &[Fence]) -> bool {
        for fence in passed {
            self.fences.passed(*fence);
        }
        let pending = self.pending.len();
        self.poll_pending();
        self.pending.len() < pending
    }

    /// Makes memory whose past is complete anyone's, and lets go of streams that nobody else holds.
    pub(super) fn settle(&mut self) {
        self.memories.settle(&mut self.fences);
        self.retire();
    }

    fn retire(&mut self) {
        self.spares.clear();
        self.fences.retire(|owner| {
            self.memories.needs_nothing_of(owner) && !self.pending.is_behind(owner)
        });
    }

    /// Lets go of streams that nobody else holds and that have run all they were given: what they left free
    /// becomes anyone's. Other streams are not touched.
    pub(super) fn let_go(&mut self) {
        // Blocks that wait for other streams hold on to their own.
        self.poll_pending();
        self.spares.clear();
        let gone = self.fences.look_at_gone();
        if gone.is_empty() {
            return;
        }
        for owner in gone {
            self.memories.adopt(owner);
        }
        self.retire();
    }

    /// Gives the driver what is idle as a whole and known to be complete, until `keep` bytes are left.
    pub(super) fn release_idle(&mut self, keep: u64) -> Result<()> {
        let outcome = self.memories.release_idle(keep, &mut self.fences);
        self.count_driver();
        outcome
    }

    /// Whether a request may find memory only after idle memory went back to the driver.
    pub(super) fn returning_helps(&self, memory: MemoryIndex) -> bool {
        self.memories.returning_helps(memory)
    }

    /// Bytes that are free or pending behind the present end of each stream whose passing would help.
    pub(super) fn bytes_behind(&mut self, wanted: Wanted<'_>) -> BTreeMap<Owner, u64> {
        let owner = self.fences.owner(wanted.stream);
        let mut behind = self
            .memories
            .bytes_behind(wanted.memory, owner, &self.fences);
        self.pending.add_bytes_behind(&mut behind);
        behind
    }

    /// Closes the present epoch of every stream that idle or pending memory is behind, as
    /// [`Fences::close_epoch`].
    pub(super) fn ends_behind(&mut self) -> Vec<(Fence, Stream)> {
        let ordinary = MemoryIndex::ORDINARY;
        let mut behind = self.memories.bytes_behind(ordinary, COMMON, &self.fences);
        self.pending.add_bytes_behind(&mut behind);
        let owners = behind.into_keys();
        owners
            .filter_map(|owner| self.fences.close_epoch(owner))
            .collect()
    }

    /// Bytes that a request lacks beside what is free for it.
    pub(super) fn missing(&mut self, wanted: Wanted<'_>) -> u64 {
        let owner = self.fences.owner(wanted.stream);
        let memory = self.memories.get(wanted.memory);
        let free = memory.bytes_free_for(owner, &self.fences);
        wanted.bytes.saturating_sub(free)
    }

    /// Bytes that wait behind each stream, the most first.
    pub(super) fn pending_by_stream(&self) -> Vec<(StreamId, u64)> {
        let mut behind = BTreeMap::new();
        self.pending.add_bytes_behind(&mut behind);
        let known = behind
            .into_iter()
            .filter_map(|(owner, bytes)| Some((self.fences.stream(owner)?.id(), bytes)));
        let mut streams: Vec<_> = known.collect();
        streams.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        streams
    }

    /// Why `bytes` can be held at no time, if they cannot.
    pub(super) fn never_holds(&self, bytes: u64) -> Option<Refusal> {
        let total = self.device.properties().total_memory;
        // What is held already may be more than a limit that was lowered.
        let held = self.bytes_held();
        let limit = self.memories.limit();
        if limit.is_some_and(|limit| bytes > limit.max(held)) {
            return Some(Refusal::Limit);
        }
        if bytes > total {
            return Some(Refusal::Size);
        }
        let reason = "an allocation has at most 2 TiB";
        (bytes > REQUEST_MAX).then(|| Refusal::Driver(Error::argument("allocate", reason)))
    }

    /// Bytes that are free, but in parts of segments.
    pub(super) fn split_bytes(&self) -> u64 {
        self.memories.inactive_split().0
    }

    /// Bytes of the largest free block of `memory`, whichever stream's.
    pub(super) fn largest_free(&self, memory: MemoryIndex) -> u64 {
        self.memories.get(memory).largest_free()
    }

    /// The statistics now. The lanes' counters must have been folded in.
    pub(super) fn stats(&self) -> PoolStats {
        let totals = self.memories.totals();
        let (inactive_split_bytes, inactive_split) = if self.is_broken {
            (0, 0)
        } else {
            self.memories.inactive_split()
        };
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
            cache_hits: usage.blocks.increases().saturating_sub(counters.misses),
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
