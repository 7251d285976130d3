//! The segmented backend: plain driver allocations, for devices without virtual memory management.
//!
//! Each stream has two tilings, for small and for large blocks, so that small blocks do not pin large segments. A
//! segment serves the stream it was allocated for until it goes back to the driver or the stream is dropped. When
//! memory has run out, it lends blocks to other streams.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::{Backend, SpareMemory, Totals};
use crate::driver::{Device, DevicePtr, Driver};
use crate::error::Result;
use crate::memory::free_list::Tiling;
use crate::memory::streams::Fences;
use crate::memory::types::{
    Fence, Location, Place, Placement, Refusal, Search, SegmentIndex, StreamIndex,
};
use crate::units::{MIB, align_up};

/// Requests up to this size share segments of `SMALL_SEGMENT` bytes.
const SMALL_SEGMENT_MAX: u64 = MIB;
const SMALL_SEGMENT: u64 = 2 * MIB;
/// Larger requests are carved from segments of at least this size.
const LARGE_SEGMENT: u64 = 20 * MIB;
/// Segments above `LARGE_SEGMENT` are rounded up to this.
const SEGMENT_STEP: u64 = 2 * MIB;

/// Bytes of the segment to take when a block of `bytes` finds no room.
fn segment_bytes(bytes: u64) -> u64 {
    if bytes <= SMALL_SEGMENT_MAX {
        SMALL_SEGMENT
    } else if bytes <= LARGE_SEGMENT / 2 {
        LARGE_SEGMENT
    } else {
        // No driver has a size that cannot be rounded up: it will refuse.
        align_up(bytes, SEGMENT_STEP).unwrap_or(bytes)
    }
}

/// Takes the smallest of `segments` whose bytes are in `sizes`.
fn take_smallest(
    segments: &mut Vec<(DevicePtr, u64)>,
    sizes: &RangeInclusive<u64>,
) -> Option<(DevicePtr, u64)> {
    let all = segments.iter().enumerate();
    let fitting = all.filter(|(_, (_, bytes))| sizes.contains(bytes));
    let (index, _) = fitting.min_by_key(|(_, (_, bytes))| *bytes)?;
    Some(segments.remove(index))
}

/// One stream's blocks in one size range, with base and bytes of each segment.
#[derive(Debug)]
struct StreamTilings {
    tiling: Tiling,
    segments: BTreeMap<SegmentIndex, (DevicePtr, u64)>,
    /// Epoch of the last free in each segment.
    freed_at: BTreeMap<SegmentIndex, u64>,
}

impl StreamTilings {
    fn new() -> Self {
        Self {
            tiling: Tiling::new(),
            segments: BTreeMap::new(),
            freed_at: BTreeMap::new(),
        }
    }

    /// The fence after which other streams may touch everything that is free.
    fn fence(&self, owner: StreamIndex) -> Fence {
        let epoch = self.freed_at.values().copied().max().unwrap_or(0);
        Fence { owner, epoch }
    }

    fn remove_if_free(&mut self, segment: SegmentIndex) -> bool {
        let was_free = self.tiling.remove_segment_if_free(segment);
        if was_free {
            self.freed_at.remove(&segment);
        }
        was_free
    }

    fn free_bytes(&self) -> u64 {
        self.tiling.free_blocks().0
    }
}

/// Segments of one device and the blocks in them.
#[derive(Debug)]
pub(crate) struct SegmentedBackend {
    driver: Arc<dyn Driver>,
    limit: u64,
    /// Small and large blocks of each stream.
    tilings: BTreeMap<(StreamIndex, bool), StreamTilings>,
    /// Base and bytes of unowned segments, whose streams were dropped.
    unowned: Vec<(DevicePtr, u64)>,
    /// Base and bytes of segments that private pools left.
    spare: Vec<(DevicePtr, u64)>,
    totals: Totals,
}

impl SegmentedBackend {
    pub(crate) fn new(device: &Device, limit: Option<u64>) -> Self {
        Self {
            driver: device.driver().clone(),
            limit: limit.unwrap_or(u64::MAX),
            tilings: BTreeMap::new(),
            unowned: Vec::new(),
            spare: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes a new segment from the driver, after returning as much spare memory, if there is any.
    fn allocate_segment(&mut self, bytes: u64, search: Search) -> Result<(), Refusal> {
        if search.may_return {
            let held = self.totals.reserved_bytes;
            // What the driver does not take back stays spare.
            drop(self.release_spares(held.saturating_sub(bytes)));
        }
        if bytes > self.limit.saturating_sub(self.totals.reserved_bytes) {
            return Err(Refusal::Limit);
        }
        let ptr = self.driver.allocate(bytes).map_err(Refusal::Driver)?;
        self.totals.device_allocs += 1;
        self.totals.segments += 1;
        self.totals.reserved_bytes += bytes;
        self.add_segment((ptr, bytes), search);
        Ok(())
    }

    /// Takes the smallest unowned segment of these sizes, otherwise the smallest spare one; whether there was one.
    fn inherit(&mut self, sizes: &RangeInclusive<u64>, search: Search) -> bool {
        let of_streams = take_smallest(&mut self.unowned, sizes);
        let segment = of_streams.or_else(|| take_smallest(&mut self.spare, sizes));
        let is_found = segment.is_some();
        if let Some(segment) = segment {
            self.add_segment(segment, search);
        }
        is_found
    }

    /// Returns spare segments to the driver, the smallest first, until at most `keep` bytes are held or none is left.
    fn release_spares(&mut self, keep: u64) -> Result<()> {
        while self.totals.reserved_bytes > keep
            && let Some((ptr, bytes)) = take_smallest(&mut self.spare, &(0..=u64::MAX))
        {
            if let Err(error) = self.give_back(ptr) {
                self.spare.push((ptr, bytes));
                return Err(error);
            }
            self.totals.returned(bytes);
        }
        Ok(())
    }

    fn add_segment(&mut self, (ptr, bytes): (DevicePtr, u64), search: Search) {
        let key = (search.owner, search.bytes <= SMALL_SEGMENT_MAX);
        let tiling = self.tilings.entry(key).or_insert_with(StreamTilings::new);
        let segment = tiling.tiling.add_segment(bytes);
        tiling.segments.insert(segment, (ptr, bytes));
    }

    fn place_in_range(
        &mut self,
        owner: StreamIndex,
        bytes: u64,
        is_small: bool,
    ) -> Option<Placement> {
        let tiling = self.tilings.get_mut(&(owner, is_small))?;
        let placement = tiling.tiling.allocate(bytes)?;
        let (base, _) = tiling.segments[&placement.segment];
        let place = if is_small {
            Place::Small(placement.index)
        } else {
            Place::Large(placement.index)
        };
        Some(Placement {
            ptr: base.offset(placement.offset),
            location: Location::new(owner, place),
        })
    }

    /// Places a block in a segment of another stream. The block is lent: when it is freed it goes back there, deferred
    /// until the borrower has passed.
    fn borrow(&mut self, search: Search, fences: &mut Fences) -> Option<Placement> {
        if !search.may_borrow {
            return None;
        }
        let fits = |tiling: &StreamTilings| tiling.tiling.largest_free() >= search.bytes;
        let others = self
            .tilings
            .iter_mut()
            .filter(|((owner, _), tiling)| *owner != search.owner && fits(tiling));
        for ((owner, is_small), tiling) in others {
            if fences.pass(search.owner, tiling.fence(*owner), search.reuse) {
                let placement = tiling.tiling.allocate(search.bytes)?;
                let (base, _) = tiling.segments[&placement.segment];
                let place = Place::Lent {
                    index: placement.index,
                    is_small: *is_small,
                };
                return Some(Placement {
                    ptr: base.offset(placement.offset),
                    location: Location::new(*owner, place),
                });
            }
        }
        None
    }

    /// Returns unowned segments to the driver until at most `keep` bytes are held.
    fn release_left(&mut self, keep: u64) -> Result<()> {
        let mut outcome = Ok(());
        for (ptr, bytes) in std::mem::take(&mut self.unowned) {
            let is_surplus = self.totals.reserved_bytes > keep;
            let returned = if is_surplus {
                self.give_back(ptr).map(|()| true)
            } else {
                Ok(false)
            };
            if matches!(returned, Ok(true)) {
                self.totals.returned(bytes);
            } else {
                self.unowned.push((ptr, bytes));
            }
            outcome = outcome.and(returned.map(drop));
        }
        outcome
    }

    #[expect(
        unsafe_code,
        reason = "returning memory is a promise that nothing uses it"
    )]
    fn give_back(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: no block lies in the segment, and the work of its stream up to the last free in it is
        // known to be complete.
        unsafe { self.driver.free(ptr) }
    }
}

impl Backend for SegmentedBackend {
    fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    fn place(&mut self, owner: StreamIndex, bytes: u64, _: u64) -> Option<Placement> {
        self.place_in_range(owner, bytes, bytes <= SMALL_SEGMENT_MAX)
    }

    fn find(&mut self, search: Search, fences: &mut Fences) -> Result<Placement, Refusal> {
        let Search {
            owner,
            bytes,
            deferred,
            ..
        } = search;
        if let Some(found) = self.place(owner, bytes, deferred) {
            return Ok(found);
        }
        let usual = segment_bytes(search.bytes);
        // An unowned segment that would stay mostly empty is taken only if there is nothing else. Above the limit, it
        // is exchanged for a smaller one.
        let is_above = self.totals.reserved_bytes > self.limit;
        let has_segment = !is_above && self.inherit(&(usual..=usual.saturating_mul(2)), search);
        let added = if has_segment {
            Ok(())
        } else {
            self.allocate_segment(usual, search)
        };
        let added = added.or_else(|refusal| {
            if self.inherit(&(search.bytes..=u64::MAX), search) {
                Ok(())
            } else if usual > search.bytes {
                self.allocate_segment(search.bytes, search)
            } else {
                Err(refusal)
            }
        });
        match added {
            Ok(()) => Ok(self
                .place(owner, bytes, deferred)
                .expect("a segment was added that fits the request")),
            // Out of memory: room among blocks of the other size range or of another stream is better than none.
            Err(refusal) => self
                .place_in_range(owner, bytes, bytes > SMALL_SEGMENT_MAX)
                .or_else(|| self.borrow(search, fences))
                .ok_or(refusal),
        }
    }

    fn free(&mut self, location: Location, _: u64, fence: Fence) {
        let (is_small, index) = match location.place() {
            Place::Small(index) => (true, index),
            Place::Large(index) => (false, index),
            Place::Lent { index, is_small } => (is_small, index),
            Place::Stitched(_) => unreachable!("segmented memory stitches nothing"),
        };
        let tiling = self
            .tilings
            .get_mut(&(fence.owner, is_small))
            .expect("a tiling outlives its blocks");
        let segment = tiling.tiling.segment_of(index);
        tiling.tiling.free(index);
        // A deferred free can be returned with an epoch before that of later frees.
        let freed_at = tiling.freed_at.entry(segment).or_default();
        *freed_at = fence.epoch.max(*freed_at);
    }

    fn merge_complete(&mut self, _: &mut Fences) {}

    fn release_stream(&mut self, owner: StreamIndex) {
        for is_small in [true, false] {
            let Some(tiling) = self.tilings.get_mut(&(owner, is_small)) else {
                continue;
            };
            // A segment with a lent block stays until the block is returned.
            for (segment, memory) in std::mem::take(&mut tiling.segments) {
                if tiling.remove_if_free(segment) {
                    self.unowned.push(memory);
                } else {
                    tiling.segments.insert(segment, memory);
                }
            }
        }
        self.tilings.retain(|_, tiling| !tiling.segments.is_empty());
    }

    fn holds_nothing_of(&self, owner: StreamIndex) -> bool {
        [true, false]
            .iter()
            .all(|is_small| !self.tilings.contains_key(&(owner, *is_small)))
    }

    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let mut outcome = self.release_spares(keep);
        outcome = outcome.and(self.release_left(keep));
        let mut tilings = std::mem::take(&mut self.tilings);
        for ((owner, _), tiling) in &mut tilings {
            for (segment, (ptr, bytes)) in std::mem::take(&mut tiling.segments) {
                let epoch = tiling.freed_at.get(&segment).copied().unwrap_or(0);
                let is_idle = self.totals.reserved_bytes > keep
                    && tiling.tiling.is_segment_free(segment)
                    && fences.ask_complete(Fence {
                        owner: *owner,
                        epoch,
                    });
                let returned = if is_idle {
                    self.give_back(ptr).map(|()| true)
                } else {
                    Ok(false)
                };
                if matches!(returned, Ok(true)) {
                    tiling.remove_if_free(segment);
                    self.totals.returned(bytes);
                } else {
                    tiling.segments.insert(segment, (ptr, bytes));
                    outcome = outcome.and(returned.map(drop));
                }
            }
        }
        tilings.retain(|_, tiling| !tiling.segments.is_empty());
        self.tilings = tilings;
        outcome
    }

    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()> {
        let mut given = SpareMemory {
            segments: std::mem::take(&mut self.unowned),
            ..SpareMemory::default()
        };
        for ((owner, _), tiling) in &mut self.tilings {
            for (segment, memory) in std::mem::take(&mut tiling.segments) {
                let epoch = tiling.freed_at.get(&segment).copied().unwrap_or(0);
                let owner = *owner;
                let is_idle = tiling.tiling.is_segment_free(segment)
                    && fences.passed_by_now(Fence { owner, epoch });
                if is_idle && tiling.remove_if_free(segment) {
                    given.segments.push(memory);
                } else {
                    tiling.segments.insert(segment, memory);
                }
            }
        }
        self.tilings.retain(|_, tiling| !tiling.segments.is_empty());
        self.totals.give_out(&given);
        spares.segments.append(&mut given.segments);
        Ok(())
    }

    fn take_in(&mut self, spares: SpareMemory) {
        self.totals.take_in(&spares);
        self.spare.extend(spares.segments);
    }

    fn take_spares(&mut self) -> SpareMemory {
        let spares = SpareMemory {
            segments: std::mem::take(&mut self.spare),
            ..SpareMemory::default()
        };
        self.totals.give_out(&spares);
        spares
    }

    fn shares_free_memory(&self) -> bool {
        false
    }

    fn bytes_behind(&self, _: StreamIndex, fences: &Fences) -> BTreeMap<StreamIndex, u64> {
        let mut behind = BTreeMap::new();
        for ((owner, _), tiling) in &self.tilings {
            let bytes = tiling.free_bytes();
            // The requester's own as well: idle segments are returned only once they are complete.
            if bytes > 0 && !fences.is_known_complete(tiling.fence(*owner)) {
                *behind.entry(*owner).or_default() += bytes;
            }
        }
        behind
    }

    fn bytes_free_for(&self, _: StreamIndex, _: &Fences) -> u64 {
        0
    }

    fn largest_free(&self) -> u64 {
        let tilings = self.tilings.values();
        let largest = tilings.map(|tiling| tiling.tiling.largest_free());
        let unowned = self.unowned.iter().chain(&self.spare);
        let unowned = unowned.map(|(_, bytes)| *bytes);
        largest.chain(unowned).max().unwrap_or(0)
    }

    fn inactive_split(&self) -> (u64, u64) {
        let splits = self
            .tilings
            .values()
            .map(|tiling| tiling.tiling.inactive_split());
        splits.fold((0, 0), |(bytes, count), (more, blocks)| {
            (bytes + more, count + blocks)
        })
    }

    fn totals(&self) -> Totals {
        self.totals
    }

    fn check_invariants(&self) -> u64 {
        let (mut held, mut in_blocks) = (0, 0);
        for tiling in self.tilings.values() {
            let (bytes, in_use) = tiling.tiling.check_invariants();
            let sum: u64 = tiling.segments.values().map(|(_, bytes)| bytes).sum();
            assert_eq!(bytes, sum, "segment bytes of a tiling");
            held += bytes;
            in_blocks += in_use;
        }
        let unowned = self.unowned.iter().chain(&self.spare);
        let unowned: u64 = unowned.map(|(_, bytes)| bytes).sum();
        assert_eq!(held + unowned, self.totals.reserved_bytes, "reserved bytes");
        in_blocks
    }
}
