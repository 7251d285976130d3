//! What a pool holds, under its lock.
//!
//! Invariant: the statistics equal what a walk over the memory sums. Nothing here takes the lock or waits
//! on the host.

use smallvec::SmallVec;

use super::backing::{Backing, Placed, Refusal, Request};
use super::block::BlockRecord;
use super::config::{PoolConfig, ReusePolicy};
use super::fences::{Fence, Fences};
use super::growth::Pages;
use super::paged::PagedMemory;
use super::pending::Pending;
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
    backing: Box<dyn Backing>,
    pub(super) fences: Fences,
    pub(super) pending: Pending,
    pub(super) usage: Usage,
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
        let backing: Box<dyn Backing> = if can_map && !config.contiguous {
            Box::new(PagedMemory::new(Pages::new(device, config.limit)?))
        } else {
            Box::new(SegmentedMemory::new(device, config.limit))
        };
        Ok(Self {
            device: device.clone(),
            config: config.clone(),
            backing,
            fences: Fences::new(),
            pending: Pending::default(),
            usage: Usage::default(),
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
        let Some(extras) = record.extras.take() else {
            if counted == Counted::No {
                self.count_inactive(record.allocated);
            }
            self.make_reusable(&record);
            return Some(record);
        };
        let now = |stream: &Stream| {
            let owner = self.fences.owner(stream);
            self.fences.now(owner)
        };
        let fences: SmallVec<[Fence; 1]> = extras.users.iter().map(now).collect();
        self.pending.push(record, fences);
        None
    }

    /// Makes blocks reusable whose recorded streams are done with them, as far as `reuse` allows finding
    /// out or bringing about.
    pub(super) fn poll_pending(&mut self, reuse: ReusePolicy) {
        if self.pending.is_empty() {
            return;
        }
        for record in self.pending.take_passed(&mut self.fences, reuse) {
            if self.config.poison {
                super::pool::poison(&self.device, &record);
            }
            self.count_inactive(record.allocated);
            self.make_reusable(&record);
        }
    }

    fn count_inactive(&mut self, bytes: u64) {
        self.usage.active_blocks.decrease(1);
        self.usage.active.decrease(bytes);
    }

    fn make_reusable(&mut self, record: &BlockRecord) {
        let fence = self.fences.now(record.owner);
        self.backing.free(record.place, record.allocated, fence);
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
        self.backing.settle(&mut self.fences);
        self.fences
            .retire(|owner| self.backing.holds_nothing_of(owner) && !self.pending.is_behind(owner));
    }

    /// Gives the driver what is idle as a whole and known to be complete.
    pub(super) fn release_idle(&mut self) -> Result<()> {
        let outcome = self.backing.release_idle(&mut self.fences);
        self.count_driver();
        outcome
    }

    /// Bytes of the largest free block that `stream` could use.
    pub(super) fn largest_free(&mut self, stream: &Stream) -> u64 {
        let owner = self.fences.owner(stream);
        self.backing.largest_free(owner)
    }

    /// The statistics now. The lanes' counters must have been folded in.
    pub(super) fn stats(&self) -> PoolStats {
        let totals = self.backing.totals();
        let (inactive_split_bytes, inactive_split) = self.backing.inactive_split();
        let counters = self.counters;
        PoolStats {
            allocation: self.usage.blocks.stat(),
            segment: self.segments.stat(),
            active: self.usage.active_blocks.stat(),
            requested_bytes: self.usage.requested.stat(),
            allocated_bytes: self.usage.allocated.stat(),
            active_bytes: self.usage.active.stat(),
            reserved_bytes: self.reserved.stat(),
            inactive_split,
            inactive_split_bytes,
            cache_hits: counters.cache_hits + self.usage.lane_hits,
            num_alloc_retries: counters.alloc_retries,
            num_ooms: counters.ooms,
            num_sync_all_streams: counters.syncs,
            num_device_alloc: totals.device_allocs,
            num_device_free: totals.device_frees,
        }
    }

    /// Sets every peak to the present value.
    pub(super) fn reset_peaks(&mut self) {
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
