//! What a pool holds, under its lock.
//!
//! Invariant: the statistics equal what a walk over the memory sums. Nothing here takes the lock or waits
//! on the host.

use std::collections::BTreeMap;
use std::time::Instant;

use smallvec::SmallVec;

use super::backing::{Backing, Place, Placed, Refusal, Request};
use super::block::BlockRecord;
use super::config::{PoolConfig, ReusePolicy};
use super::decay::Decay;
use super::fences::{Fence, Fences};
use super::growth::Pages;
use super::paged::PagedMemory;
use super::peaks::Peaks;
use super::pending::{Passed, Pending};
use super::segmented::SegmentedMemory;
use super::stats::{Gauge, PoolStats, Usage};
use super::tags::{TagId, TagTable};
use super::territory::Owner;
use crate::driver::{Device, Stream};
use crate::error::Result;
use crate::units::StreamId;

/// An allocation on its way through the ladder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// What the caller asked for, and that rounded to the granularity.
    pub(super) requested: u64,
    pub(super) bytes: u64,
    pub(super) stream: &'a Stream,
}

/// Memory for a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) placed: Placed,
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
    limit: Option<u64>,
    backing: Box<dyn Backing>,
    pub(super) fences: Fences,
    pub(super) pending: Pending,
    pub(super) decay: Decay,
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
        let properties = device.properties();
        let page = super::territory::PAGE;
        let can_map = properties.virtual_memory && page.is_multiple_of(properties.page_granularity);
        let limit = config.byte_limit(device);
        let backing: Box<dyn Backing> = if can_map && !config.contiguous {
            Box::new(PagedMemory::new(Pages::new(device, limit)?))
        } else {
            Box::new(SegmentedMemory::new(device, limit))
        };
        Ok(Self {
            device: device.clone(),
            config: config.clone(),
            limit,
            backing,
            fences: Fences::new(config.deterministic),
            pending: Pending::default(),
            decay: Decay::new(config.decay, Instant::now()),
            usage: Usage::default(),
            peaks: Peaks::default(),
            tags: TagTable::default(),
            counters: Counters::default(),
            segments: Gauge::default(),
            reserved: Gauge::default(),
        })
    }

    fn request(&mut self, wanted: Wanted<'_>, reuse: ReusePolicy) -> Request {
        Request {
            bytes: wanted.bytes,
            owner: self.fences.owner(wanted.stream),
            reuse,
            pending: self.pending.bytes(),
        }
    }

    /// Places a block in memory that is free for its stream at once.
    pub(super) fn place(&mut self, wanted: Wanted<'_>) -> Option<Found> {
        let request = self.request(wanted, self.config.reuse);
        let placed = self.backing.place(request)?;
        Some(self.hand_out(wanted, request.owner, placed))
    }

    /// Places a block by all means but waiting on the host.
    pub(super) fn find(&mut self, wanted: Wanted<'_>) -> Result<Found, Refusal> {
        let request = self.request(wanted, self.config.reuse);
        let found = self.backing.find(request, &mut self.fences);
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
        self.decay.take(wanted.bytes);
        Found {
            placed,
            bytes: wanted.bytes,
            owner,
            tag,
        }
    }

    fn count_driver(&mut self) {
        let totals = self.backing.totals();
        self.segments.set(totals.segments);
        self.reserved.set(totals.reserved_bytes);
    }

    /// Driver allocations so far.
    pub(super) fn device_allocs(&self) -> u64 {
        self.backing.totals().device_allocs
    }

    /// Bytes held from the driver.
    pub(super) fn bytes_held(&self) -> u64 {
        self.backing.totals().reserved_bytes
    }

    /// Takes over what a thread's lanes have counted.
    pub(super) fn fold(&mut self, usage: &mut Usage, tags: &mut TagTable) {
        self.usage.fold(usage);
        self.tags.fold(tags);
    }

    /// Takes a freed block in: it is reusable at once, or when the streams recorded on it have passed their
    /// present end. Gives the record back if it is of no more use here.
    pub(super) fn free(
        &mut self,
        mut record: Box<BlockRecord>,
        counted: Counted,
    ) -> Option<Box<BlockRecord>> {
        if counted == Counted::No {
            self.usage.free(record.requested, record.allocated);
            self.tags.decrease(record.tag, record.allocated);
        }
        if let Place::Lent { lender, .. } = record.place {
            self.send_home(&mut record, lender, counted);
        }
        let Some(extras) = record.extras.take() else {
            if counted == Counted::No {
                self.count_inactive(record.allocated);
            }
            self.make_reusable(&record);
            return Some(record);
        };
        let now = |stream: &Stream| {
            let owner = self.fences.owner(stream);
            self.fences.stamp_for_others(owner)
        };
        let fences: SmallVec<[Fence; 1]> = extras.users.iter().map(now).collect();
        let freed_at = self.fences.stamp_for_others(record.owner);
        self.pending.push(record, fences, freed_at);
        None
    }

    /// Makes a freed block that lies in another stream's memory one of that stream's, which waits for the
    /// stream it was lent to.
    fn send_home(&mut self, record: &mut BlockRecord, lender: Owner, counted: Counted) {
        let Some(home) = self.fences.stream(lender) else {
            unreachable!("a stream with memory is known");
        };
        let borrower = std::mem::replace(&mut record.home, home.clone());
        record.owner = lender;
        let users = &mut record.extras.get_or_insert_default().users;
        users.retain(|user| user.id() != record.home.id());
        users.push(borrower);
        if counted == Counted::Yes {
            // What a lane counts as freed it counts as no longer active, which this block still is.
            self.usage.active_blocks.increase(1);
            self.usage.active.increase(record.allocated);
        }
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
        for passed in self.pending.take_passed(&mut self.fences, reuse) {
            let Passed { record, fence } = passed;
            if self.config.poison {
                super::pool::poison(&self.device, &record);
            }
            self.count_inactive(record.allocated);
            // Small blocks keep no epochs of their own; a poisoned one was written just now.
            let keeps_none = matches!(record.place, Place::Small { .. } | Place::Lent { .. });
            match fence.filter(|_| !self.config.poison && !keeps_none) {
                Some(fence) => self.put_back(&record, fence),
                None => self.make_reusable(&record),
            }
        }
    }

    fn count_inactive(&mut self, bytes: u64) {
        self.usage.active_blocks.decrease(1);
        self.usage.active.decrease(bytes);
    }

    fn make_reusable(&mut self, record: &BlockRecord) {
        let fence = self.fences.stamp(record.owner);
        self.put_back(record, fence);
    }

    fn put_back(&mut self, record: &BlockRecord, fence: Fence) {
        self.decay.give(record.allocated);
        self.backing.free(record.place, record.allocated, fence);
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
        self.backing.settle(&mut self.fences);
        self.fences
            .retire(|owner| self.backing.holds_nothing_of(owner) && !self.pending.is_behind(owner));
    }

    /// Gives the driver what is idle as a whole and known to be complete, until `keep` bytes are left.
    pub(super) fn release_idle(&mut self, keep: u64) -> Result<()> {
        let outcome = self.backing.release_idle(keep, &mut self.fences);
        self.count_driver();
        outcome
    }

    /// Whether a request may find memory only after idle memory went back to the driver.
    pub(super) fn returning_helps(&self) -> bool {
        !self.backing.shares_free_memory()
    }

    /// Bytes that are free or pending behind the present end of each stream whose passing would help.
    pub(super) fn bytes_behind(&mut self, wanted: Wanted<'_>) -> BTreeMap<Owner, u64> {
        let owner = self.fences.owner(wanted.stream);
        let mut behind = self.backing.bytes_behind(owner, &self.fences);
        self.pending.add_bytes_behind(&mut behind);
        behind
    }

    /// Bytes that a request lacks beside what is free for it.
    pub(super) fn missing(&mut self, wanted: Wanted<'_>) -> u64 {
        let owner = self.fences.owner(wanted.stream);
        let free = self.backing.bytes_free_for(owner, &self.fences);
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
        if self.limit.is_some_and(|limit| bytes > limit.max(held)) {
            return Some(Refusal::Limit);
        }
        (bytes > total).then_some(Refusal::Size)
    }

    pub(super) fn limit(&self) -> Option<u64> {
        self.limit
    }

    pub(super) fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit;
        self.backing.set_limit(limit.unwrap_or(u64::MAX));
    }

    /// Bytes of the largest free block of any stream.
    pub(super) fn largest_free(&self) -> u64 {
        self.backing.largest_free()
    }

    /// Bytes that are free, but in parts of segments.
    pub(super) fn split_bytes(&self) -> u64 {
        self.backing.inactive_split().0
    }

    /// The statistics now. The lanes' counters must have been folded in.
    pub(super) fn stats(&self) -> PoolStats {
        let totals = self.backing.totals();
        let (inactive_split_bytes, inactive_split) = self.backing.inactive_split();
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
        let in_blocks = self.backing.check_invariants();
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
            self.backing.totals().reserved_bytes
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

/// Whether a free has gone into some counters already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counted {
    /// A lane has counted it.
    Yes,
    No,
}
