//! The core of a pool: what its lock guards.
//!
//! Invariant: the statistics equal what a walk over the heaps sums up. Nothing here takes the lock, or waits on the
//! host unless the pool is deterministic.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::time::Instant;

use smallvec::SmallVec;

use super::block::User;
use super::free_records::FreeRecords;
use super::poison;
use super::shared::{BlockRecord, List, Record, Shared, ThreadCache};
use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::backend::{Backend, DevicePages, Heaps, PagedBackend, SegmentedBackend};
use crate::memory::config::{PoolConfig, ReusePolicy};
use crate::memory::decay::Decay;
use crate::memory::statistics::{Gauge, Peaks, PoolStats, TagTable, Usage};
use crate::memory::streams::{DeferredFrees, Fences, Returned};
use crate::memory::thread_cache::list;
use crate::memory::types::{
    Counted, Fence, HeapId, PAGE, Place, Placement, REQUEST_MAX, Refusal, Request, Search,
    StreamIndex, TagId, UNOWNED,
};
use crate::units::StreamId;

#[derive(Debug)]
pub(crate) struct Core {
    device: Device,
    config: PoolConfig,
    pub(crate) heaps: Heaps,
    pub(crate) fences: Fences,
    pub(crate) deferred: DeferredFrees<Record>,
    pub(crate) decay: Decay,
    pub(crate) usage: Usage,
    pub(crate) peaks: Peaks,
    pub(crate) tags: TagTable,
    pub(crate) counters: Counters,
    segments: Gauge,
    reserved: Gauge,
    pub(crate) free_records: FreeRecords<Shared>,
    /// Scratch for deferred frees that are returned; empty between calls.
    passed: Vec<Returned<Record>>,
    /// Deferred frees that were returned so far.
    pub(super) returned: u64,
    /// Whether a change stopped half-way. `look` sets it on a broken pool; then only the counters may be read.
    pub(crate) is_broken: bool,
}

/// What allocations past the thread caches count.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    /// Allocations that needed the driver's memory, or a second try.
    pub(super) misses: u64,
    pub(super) alloc_retries: u64,
    pub(crate) ooms: u64,
    pub(super) syncs: u64,
}

impl Core {
    pub(crate) fn new(device: &Device, config: &PoolConfig) -> Result<Self> {
        let limit = config.byte_limit(device);
        let backend: Box<dyn Backend> = if maps_pages(device, config) {
            Box::new(PagedBackend::new(DevicePages::new(device, limit)?))
        } else {
            Box::new(SegmentedBackend::new(device, limit))
        };
        let heaps = Heaps::new(backend, limit);
        Ok(Self::with(device, config, heaps))
    }

    /// Moves everything out, and leaves an empty placeholder that must not be used.
    pub(crate) fn take(&mut self) -> Self {
        let no_memory = Box::new(SegmentedBackend::new(&self.device, Some(0)));
        let nothing = Self::with(&self.device, &self.config, Heaps::new(no_memory, Some(0)));
        std::mem::replace(self, nothing)
    }

    fn with(device: &Device, config: &PoolConfig, heaps: Heaps) -> Self {
        Self {
            device: device.clone(),
            config: config.clone(),
            heaps,
            fences: Fences::new(config.deterministic),
            deferred: DeferredFrees::default(),
            decay: Decay::new(config.decay, Instant::now()),
            usage: Usage::default(),
            peaks: Peaks::default(),
            tags: TagTable::default(),
            counters: Counters::default(),
            segments: Gauge::default(),
            reserved: Gauge::default(),
            free_records: FreeRecords::default(),
            passed: Vec::new(),
            returned: 0,
            is_broken: false,
        }
    }

    /// Adds a private heap.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub(crate) fn add_private(&mut self) -> Result<HeapId> {
        let (device, config) = (&self.device, &self.config);
        let backend: Box<dyn Backend> = if maps_pages(device, config) {
            Box::new(PagedBackend::unstitched(DevicePages::lasting(device)?))
        } else {
            // Each search states what the limit leaves.
            Box::new(SegmentedBackend::new(device, None))
        };
        Ok(self.heaps.add(backend))
    }

    /// Notes that a graph on a private heap is about to be launched on `stream`.
    pub(crate) fn note_launch(&mut self, heap: HeapId, stream: &Stream) {
        let owner = self.fences.owner(stream);
        self.heaps.note_launch(heap, owner);
    }

    /// Releases a private heap.
    pub(crate) fn release_memory(&mut self, heap: HeapId) {
        self.heaps.release(heap, &mut self.fences);
    }

    /// Collects what released private heaps left and whose streams have passed, without waiting for any.
    pub(crate) fn collect(&mut self) {
        // A deterministic pool would have to wait to know. It does so only when memory is short.
        if !self.config.deterministic {
            // What the driver does not unmap stays where it is.
            drop(self.heaps.collect(&mut self.fences));
        }
    }

    #[inline]
    fn search(&mut self, request: Request<'_>) -> Search {
        // No event can be recorded in a capture, and the warm-up before it must need as much memory.
        let is_default = request.heap == HeapId::DEFAULT;
        let reuse = if is_default {
            self.config.reuse
        } else {
            ReusePolicy::Never
        };
        Search {
            bytes: request.bytes,
            owner: self.fences.owner(request.stream),
            reuse,
            deferred: self.deferred.bytes() + request.kept,
            may_borrow: is_default,
            may_return: !request.is_captured,
        }
    }

    /// Places a block in the default heap that is free for its stream at once, while the thread keeps `kept` bytes for
    /// the stream.
    #[inline]
    pub(crate) fn place(&mut self, request: &Request<'_>, kept: u64) -> Option<Placement> {
        let owner = self.fences.owner(request.stream);
        let deferred = self.deferred.bytes() + kept;
        let default = self.heaps.get_mut(HeapId::DEFAULT);
        let placement = default.place(owner, request.bytes, deferred)?;
        self.decay.take(request.bytes);
        Some(placement)
    }

    /// Places a block by all means except waiting on the host.
    pub(crate) fn find(&mut self, request: Request<'_>) -> Result<Placement, Refusal> {
        let search = self.search(request);
        let found = self.heaps.find(request.heap, search, &mut self.fences);
        // A search that failed may have taken memory before.
        self.count_driver();
        let placement = found?;
        self.decay.take(request.bytes);
        Ok(placement)
    }

    /// Counts an allocation by a thread that has no cache.
    pub(crate) fn count(&mut self, tag: TagId, requested: u64, allocated: u64) {
        self.usage.allocate(requested, allocated);
        self.usage.active_blocks.increase(1);
        self.usage.active.increase(allocated);
        self.tags.increase(tag, allocated);
    }

    fn count_driver(&mut self) {
        let totals = self.heaps.totals();
        self.segments.set(totals.segments);
        self.reserved.set(totals.reserved_bytes);
    }

    /// Driver allocations so far.
    pub(crate) fn device_allocs(&self) -> u64 {
        self.heaps.totals().device_allocs
    }

    /// Bytes held from the driver.
    pub(crate) fn bytes_held(&self) -> u64 {
        self.heaps.totals().reserved_bytes
    }

    /// Folds a thread's counters in, and tells its cache how much it may keep.
    pub(crate) fn fold(&mut self, cache: &mut ThreadCache) {
        self.set_limits(cache);
        cache.fold_counts(&mut self.usage, &mut self.tags);
    }

    /// Tells a thread's cache how much it may keep.
    pub(crate) fn set_limits(&self, cache: &mut ThreadCache) {
        cache.set_limits(self.bytes_held(), self.fences.are_contended());
    }

    /// Takes back the overflow of a thread, in the order of the frees. The cache keeps the records; those without a
    /// place go to `refused`, for the caller to drop outside, because they hold streams.
    #[inline(never)]
    pub(crate) fn take_overflow(&mut self, cache: &mut ThreadCache, refused: &mut List) {
        let mut overflow = ManuallyDrop::new(list::reversed(cache.take_overflow()));
        while let Some(record) = list::pop(&mut overflow) {
            let record = ManuallyDrop::new(record);
            self.take_back(&record);
            cache.keep_free_record(ManuallyDrop::into_inner(record), refused);
        }
    }

    /// Takes back a block that a thread kept and whose free it has counted: the block is reusable at once. Calls no
    /// driver; [`record_due_events`](Self::record_due_events) does.
    #[inline]
    pub(super) fn take_back(&mut self, record: &BlockRecord) {
        debug_assert!(
            record.is_plain(),
            "a stream cache keeps blocks of the default heap"
        );
        let fence = self.fences.stamp(record.location.owner());
        self.give_back(HeapId::DEFAULT, record, fence);
    }

    /// Records the events that are due after frees.
    #[inline]
    pub(super) fn record_due_events(&mut self) {
        self.fences.record_due();
    }

    /// Takes back a freed block. It is reusable at once, or once the streams recorded on it have passed the ends of
    /// their uses: the ends that were marked, otherwise where the streams are now. Returns the record if nothing here
    /// needs it.
    pub(crate) fn free(&mut self, mut record: Record, counted: Counted) -> Option<Record> {
        if counted == Counted::No {
            self.usage
                .free(record.size.requested(), record.size.allocated());
            self.tags
                .decrease(record.size.tag(), record.size.allocated());
        }
        if matches!(record.location.place(), Place::Lent { .. }) {
            self.return_to_lender(&mut record);
        }
        let users = match &mut record.extras {
            Some(extras) if !extras.users.is_empty() => std::mem::take(&mut extras.users),
            _ => {
                if counted == Counted::No {
                    self.count_inactive(record.size.allocated());
                }
                self.make_reusable(&record);
                self.record_due_events();
                record
                    .extras
                    .take_if(|extras| extras.heap != HeapId::DEFAULT);
                return Some(record);
            }
        };
        let is_private = record.heap() != HeapId::DEFAULT;
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
        let bytes = record.size.allocated();
        self.deferred.push(record, bytes, fences, freed_at);
        None
    }

    /// Makes a freed block that was lent a block of its lender again, deferred until the borrower has passed.
    fn return_to_lender(&mut self, record: &mut BlockRecord) {
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

    /// Makes deferred blocks reusable whose recorded streams have passed. They return to their own stream under any
    /// policy; the policy decides whether to make that stream wait on the device.
    pub(super) fn poll_deferred(&mut self) {
        if self.deferred.is_empty() {
            return;
        }
        let reuse = match self.config.reuse {
            // On the device: when the host finds out depends on how far the device is.
            _ if self.config.deterministic => ReusePolicy::Wait,
            ReusePolicy::Never => ReusePolicy::OnlyComplete,
            reuse => reuse,
        };
        let mut passed = std::mem::take(&mut self.passed);
        self.deferred
            .take_passed(&mut self.fences, reuse, &mut passed);
        self.returned += passed.len() as u64;
        for Returned { record, fence } in passed.drain(..) {
            if self.config.poison {
                poison::in_default_heap(&record, record.heap());
            }
            #[cfg(asan)]
            poison::forbid(&record, record.heap());
            self.count_inactive(record.size.allocated());
            // Small blocks have no epochs of their own, a poisoned block was written just now, and a forbidden one is
            // marked from now on.
            let keeps_none = self.config.poison
                || cfg!(asan)
                || matches!(
                    record.location.place(),
                    Place::Small(_) | Place::Lent { .. }
                );
            let fence = fence.filter(|_| !keeps_none);
            self.make_reusable_after(&record, fence);
            if record.heap() == HeapId::DEFAULT {
                self.free_records.keep(record);
            }
        }
        self.passed = passed;
        self.record_due_events();
    }

    fn count_inactive(&mut self, bytes: u64) {
        self.usage.active_blocks.decrease(1);
        self.usage.active.decrease(bytes);
    }

    fn make_reusable(&mut self, record: &BlockRecord) {
        self.make_reusable_after(record, None);
    }

    /// Returns a block's memory to its heap. Other streams may have it after `fence`, by default after everything that
    /// its home stream was given so far.
    fn make_reusable_after(&mut self, record: &BlockRecord, fence: Option<Fence>) {
        let owner = record.location.owner();
        let heap = record.heap();
        let fence = fence.unwrap_or_else(|| {
            // Captured streams cannot record events, and no other stream asks for memory of a private heap.
            if heap == HeapId::DEFAULT {
                self.fences.stamp(owner)
            } else {
                self.fences.now(owner)
            }
        });
        self.give_back(heap, record, fence);
    }

    #[inline]
    fn give_back(&mut self, heap: HeapId, record: &BlockRecord, fence: Fence) {
        debug_assert_eq!(
            fence.owner,
            record.location.owner(),
            "a block goes back to its owner"
        );
        self.decay.give(record.size.allocated());
        let backend = self.heaps.get_mut(heap);
        backend.free(record.location, record.size.allocated(), fence);
    }

    /// Notes what a wait on the host has covered. Returns whether that returned deferred blocks; their own streams may
    /// have work on them that the wait did not cover.
    pub(super) fn take_in_passed(&mut self, passed: &[Fence]) -> bool {
        for fence in passed {
            self.fences.passed(*fence);
        }
        let deferred = self.deferred.len();
        self.poll_deferred();
        self.deferred.len() < deferred
    }

    /// Makes free memory unowned if its last use is complete, and retires streams that nobody else holds.
    pub(crate) fn merge_complete(&mut self) {
        self.heaps.merge_complete(&mut self.fences);
        self.retire();
    }

    fn retire(&mut self) {
        self.free_records.clear();
        self.fences
            .retire(|owner| self.heaps.needs_nothing_of(owner) && !self.deferred.is_behind(owner));
    }

    /// Retires streams that nobody else holds and that have run all they were given: their free memory becomes unowned.
    /// Other streams are not touched.
    pub(super) fn retire_idle_streams(&mut self) {
        // Deferred blocks keep their home streams.
        self.poll_deferred();
        self.free_records.clear();
        let gone = self.fences.find_gone();
        if gone.is_empty() {
            return;
        }
        for owner in gone {
            self.heaps.release_stream(owner);
        }
        self.retire();
    }

    /// Returns to the driver what is idle as a whole and known to be complete, until `keep` bytes are held.
    pub(crate) fn release_idle(&mut self, keep: u64) -> Result<()> {
        let outcome = self.heaps.release_idle(keep, &mut self.fences);
        self.count_driver();
        outcome
    }

    /// Whether a search can find memory only after idle memory went back to the driver.
    pub(crate) fn returning_helps(&self, heap: HeapId) -> bool {
        self.heaps.returning_helps(heap)
    }

    /// Bytes that are free or deferred behind the present end of each stream whose passing would help.
    pub(crate) fn bytes_behind(&mut self, request: Request<'_>) -> BTreeMap<StreamIndex, u64> {
        let owner = self.fences.owner(request.stream);
        let mut behind = self.heaps.bytes_behind(request.heap, owner, &self.fences);
        self.deferred.add_bytes_behind(&mut behind);
        behind
    }

    /// Closes the present epoch of every stream that idle or deferred memory waits for, as
    /// [`Fences::close_epoch`].
    pub(super) fn ends_behind(&mut self) -> Vec<(Fence, Stream)> {
        let default = HeapId::DEFAULT;
        let mut behind = self.heaps.bytes_behind(default, UNOWNED, &self.fences);
        self.deferred.add_bytes_behind(&mut behind);
        let owners = behind.into_keys();
        owners
            .filter_map(|owner| self.fences.close_epoch(owner))
            .collect()
    }

    /// Bytes that a request lacks beyond what is free for it.
    pub(crate) fn missing(&mut self, request: Request<'_>) -> u64 {
        let owner = self.fences.owner(request.stream);
        let heap = self.heaps.get(request.heap);
        let free = heap.bytes_free_for(owner, &self.fences);
        request.bytes.saturating_sub(free)
    }

    /// Deferred bytes behind each stream, the most first.
    pub(super) fn deferred_by_stream(&self) -> Vec<(StreamId, u64)> {
        let mut behind = BTreeMap::new();
        self.deferred.add_bytes_behind(&mut behind);
        let known = behind
            .into_iter()
            .filter_map(|(owner, bytes)| Some((self.fences.stream(owner)?.id(), bytes)));
        let mut streams: Vec<_> = known.collect();
        streams.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
        streams
    }

    /// Why `bytes` can never be held, if they cannot.
    pub(super) fn never_holds(&self, bytes: u64) -> Option<Refusal> {
        let total = self.device.properties().total_memory;
        // The pool may hold more than a limit that was lowered.
        let held = self.bytes_held();
        let limit = self.heaps.limit();
        if limit.is_some_and(|limit| bytes > limit.max(held)) {
            return Some(Refusal::Limit);
        }
        if bytes > total {
            return Some(Refusal::Size);
        }
        let reason = "an allocation has at most 2 TiB";
        (bytes > REQUEST_MAX).then(|| Refusal::Driver(Error::argument("allocate", reason)))
    }

    /// Free bytes in segments that are partly in use.
    pub(super) fn split_bytes(&self) -> u64 {
        self.heaps.inactive_split().0
    }

    /// Bytes of the largest free block of `heap`, whichever stream owns it.
    pub(crate) fn largest_free(&self, heap: HeapId) -> u64 {
        self.heaps.get(heap).largest_free()
    }

    /// The statistics now. The threads' counters must have been folded in.
    pub(crate) fn stats(&self) -> PoolStats {
        let totals = self.heaps.totals();
        let (inactive_split_bytes, inactive_split) = if self.is_broken {
            (0, 0)
        } else {
            self.heaps.inactive_split()
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
            private_reserved_bytes: self.heaps.private_bytes(),
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
    pub(crate) fn reset_peaks(&mut self) {
        self.peaks.reset_overall(&mut self.usage);
        self.usage.reset_peaks();
        self.segments.reset_peak();
        self.reserved.reset_peak();
        self.tags.reset_peaks();
    }

    /// Asserts that every structure is sound and that the counters equal what a walk sums up. The thread caches must be
    /// empty and their counters folded in.
    pub(crate) fn check_invariants(&self) {
        let in_blocks = self.heaps.check_invariants();
        let stats = self.stats();
        assert_eq!(stats.active_bytes.current, in_blocks, "active bytes");
        let deferred = self.deferred.bytes();
        assert_eq!(
            stats.allocated_bytes.current + deferred,
            in_blocks,
            "allocated and pending bytes"
        );
        let blocks = stats.allocation.current + self.deferred.len() as u64;
        assert_eq!(stats.active.current, blocks, "active blocks");
        assert_eq!(
            stats.reserved_bytes.current,
            self.heaps.totals().reserved_bytes
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

/// Whether the pool takes memory as pages.
fn maps_pages(device: &Device, config: &PoolConfig) -> bool {
    let properties = device.properties();
    let is_whole = PAGE.is_multiple_of(properties.page_granularity);
    properties.virtual_memory && is_whole && !config.contiguous
}
