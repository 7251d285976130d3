//! Segmented memory: plain driver allocations, for devices without virtual memory management.
//!
//! Each stream has two arenas, for small and for large requests, so that small blocks do not pin large
//! segments. A segment serves the stream it was allocated for until it is returned to the driver or that stream
//! is gone; when there is no more memory, it lends blocks to others.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::arena::{Arena, SegmentIndex};
use super::backing::{Backing, Place, Placed, Refusal, Request, SpareMemory, Totals};
use super::fences::{Fence, Fences};
use super::packed::Location;
use super::territory::Owner;
use crate::driver::{Device, DevicePtr, Driver};
use crate::error::Result;
use crate::units::{MIB, align_up};

/// Requests up to this size share segments of `SMALL_SEGMENT` bytes.
const SMALL_MAX: u64 = MIB;
const SMALL_SEGMENT: u64 = 2 * MIB;
/// Larger requests are carved from segments of at least this size.
const LARGE_SEGMENT: u64 = 20 * MIB;
/// Segments above `LARGE_SEGMENT` are rounded up to this.
const SEGMENT_STEP: u64 = 2 * MIB;

/// Bytes of the segment that is asked for when a request of `bytes` finds no room.
fn segment_bytes(bytes: u64) -> u64 {
    if bytes <= SMALL_MAX {
        SMALL_SEGMENT
    } else if bytes <= LARGE_SEGMENT / 2 {
        LARGE_SEGMENT
    } else {
        // A size that cannot be rounded up is more than any driver has: it will refuse.
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
struct StreamArena {
    arena: Arena,
    segments: BTreeMap<SegmentIndex, (DevicePtr, u64)>,
    /// Epoch of the last free in each segment.
    freed_at: BTreeMap<SegmentIndex, u64>,
}

impl StreamArena {
    fn new() -> Self {
        Self {
            arena: Arena::new(),
            segments: BTreeMap::new(),
            freed_at: BTreeMap::new(),
        }
    }

    /// After what other streams may touch all that is free.
    fn fence(&self, owner: Owner) -> Fence {
        let epoch = self.freed_at.values().copied().max().unwrap_or(0);
        Fence { owner, epoch }
    }

    fn remove_if_free(&mut self, segment: SegmentIndex) -> bool {
        let was_free = self.arena.remove_segment_if_free(segment);
        if was_free {
            self.freed_at.remove(&segment);
        }
        was_free
    }

    fn free_bytes(&self) -> u64 {
        self.arena.free_blocks().0
    }
}

/// Segments of one device and the blocks in them.
#[derive(Debug)]
pub(super) struct SegmentedMemory {
    driver: Arc<dyn Driver>,
    limit: u64,
    /// Small and large blocks of each stream.
    arenas: BTreeMap<(Owner, bool), StreamArena>,
    /// Base and bytes of segments that streams which are gone have left: anyone's.
    left: Vec<(DevicePtr, u64)>,
    /// Base and bytes of segments that private pools left.
    spare: Vec<(DevicePtr, u64)>,
    totals: Totals,
}

impl SegmentedMemory {
    pub(super) fn new(device: &Device, limit: Option<u64>) -> Self {
        Self {
            driver: device.driver().clone(),
            limit: limit.unwrap_or(u64::MAX),
            arenas: BTreeMap::new(),
            left: Vec::new(),
            spare: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes a new segment from the driver, in exchange for as much as private pools left, if they left any.
    fn allocate_segment(&mut self, bytes: u64, request: Request) -> Result<(), Refusal> {
        if request.may_return {
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
        self.add_segment((ptr, bytes), request);
        Ok(())
    }

    /// Takes over the smallest segment of these sizes that was left, by streams before private pools; whether there was
    /// one.
    fn inherit(&mut self, sizes: &RangeInclusive<u64>, request: Request) -> bool {
        let of_streams = take_smallest(&mut self.left, sizes);
        let segment = of_streams.or_else(|| take_smallest(&mut self.spare, sizes));
        let is_found = segment.is_some();
        if let Some(segment) = segment {
            self.add_segment(segment, request);
        }
        is_found
    }

    /// Gives spare segments back to the driver, the smallest first, until at most `keep` bytes are held or none is left.
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

    fn add_segment(&mut self, (ptr, bytes): (DevicePtr, u64), request: Request) {
        let key = (request.owner, request.bytes <= SMALL_MAX);
        let arena = self.arenas.entry(key).or_insert_with(StreamArena::new);
        let segment = arena.arena.add_segment(bytes);
        arena.segments.insert(segment, (ptr, bytes));
    }

    fn place_in_range(&mut self, owner: Owner, bytes: u64, is_small: bool) -> Option<Placed> {
        let arena = self.arenas.get_mut(&(owner, is_small))?;
        let placed = arena.arena.allocate(bytes)?;
        let (base, _) = arena.segments[&placed.segment];
        let place = if is_small {
            Place::Small(placed.index)
        } else {
            Place::Large(placed.index)
        };
        Some(Placed {
            ptr: base.offset(placed.offset),
            location: Location::new(owner, place),
        })
    }

    /// Places a block in a segment of another stream. It is lent: freed, it goes back there, and that stream
    /// waits for the borrower.
    fn borrow(&mut self, request: Request, fences: &mut Fences) -> Option<Placed> {
        if !request.may_borrow {
            return None;
        }
        let fits = |arena: &StreamArena| arena.arena.largest_free() >= request.bytes;
        let others = self
            .arenas
            .iter_mut()
            .filter(|((owner, _), arena)| *owner != request.owner && fits(arena));
        for ((owner, is_small), arena) in others {
            if fences.pass(request.owner, arena.fence(*owner), request.reuse) {
                let placed = arena.arena.allocate(request.bytes)?;
                let (base, _) = arena.segments[&placed.segment];
                let place = Place::Lent {
                    index: placed.index,
                    is_small: *is_small,
                };
                return Some(Placed {
                    ptr: base.offset(placed.offset),
                    location: Location::new(*owner, place),
                });
            }
        }
        None
    }

    /// Gives the driver what was left, until at most `keep` bytes are held.
    fn release_left(&mut self, keep: u64) -> Result<()> {
        let mut outcome = Ok(());
        for (ptr, bytes) in std::mem::take(&mut self.left) {
            let is_surplus = self.totals.reserved_bytes > keep;
            let returned = if is_surplus {
                self.give_back(ptr).map(|()| true)
            } else {
                Ok(false)
            };
            if matches!(returned, Ok(true)) {
                self.totals.returned(bytes);
            } else {
                self.left.push((ptr, bytes));
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

impl Backing for SegmentedMemory {
    fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    fn place(&mut self, owner: Owner, bytes: u64, _: u64) -> Option<Placed> {
        self.place_in_range(owner, bytes, bytes <= SMALL_MAX)
    }

    fn find(&mut self, request: Request, fences: &mut Fences) -> Result<Placed, Refusal> {
        let Request {
            owner,
            bytes,
            pending,
            ..
        } = request;
        if let Some(found) = self.place(owner, bytes, pending) {
            return Ok(found);
        }
        let usual = segment_bytes(request.bytes);
        // Of what was left, none that would stay mostly empty, unless there is nothing else. Above the limit, what was
        // left is exchanged for less.
        let is_above = self.totals.reserved_bytes > self.limit;
        let has_segment = !is_above && self.inherit(&(usual..=usual.saturating_mul(2)), request);
        let added = if has_segment {
            Ok(())
        } else {
            self.allocate_segment(usual, request)
        };
        let added = added.or_else(|refusal| {
            if self.inherit(&(request.bytes..=u64::MAX), request) {
                Ok(())
            } else if usual > request.bytes {
                self.allocate_segment(request.bytes, request)
            } else {
                Err(refusal)
            }
        });
        match added {
            Ok(()) => Ok(self
                .place(owner, bytes, pending)
                .expect("a segment was added that fits the request")),
            // Out of memory: room among blocks of the other range is better than none, and so is another
            // stream's.
            Err(refusal) => self
                .place_in_range(owner, bytes, bytes > SMALL_MAX)
                .or_else(|| self.borrow(request, fences))
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
        let arena = self
            .arenas
            .get_mut(&(fence.owner, is_small))
            .expect("an arena outlives its blocks");
        let segment = arena.arena.segment_of(index);
        arena.arena.free(index);
        // What waited for other streams comes back with an epoch that may lie before that of later frees.
        let freed_at = arena.freed_at.entry(segment).or_default();
        *freed_at = fence.epoch.max(*freed_at);
    }

    fn settle(&mut self, _: &mut Fences) {}

    fn adopt(&mut self, owner: Owner) {
        for is_small in [true, false] {
            let Some(arena) = self.arenas.get_mut(&(owner, is_small)) else {
                continue;
            };
            // A segment with a block in it that is lent stays until that is back.
            for (segment, memory) in std::mem::take(&mut arena.segments) {
                if arena.remove_if_free(segment) {
                    self.left.push(memory);
                } else {
                    arena.segments.insert(segment, memory);
                }
            }
        }
        self.arenas.retain(|_, arena| !arena.segments.is_empty());
    }

    fn holds_nothing_of(&self, owner: Owner) -> bool {
        [true, false]
            .iter()
            .all(|is_small| !self.arenas.contains_key(&(owner, *is_small)))
    }

    fn release_idle(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        let mut outcome = self.release_spares(keep);
        outcome = outcome.and(self.release_left(keep));
        let mut arenas = std::mem::take(&mut self.arenas);
        for ((owner, _), arena) in &mut arenas {
            for (segment, (ptr, bytes)) in std::mem::take(&mut arena.segments) {
                let epoch = arena.freed_at.get(&segment).copied().unwrap_or(0);
                let is_idle = self.totals.reserved_bytes > keep
                    && arena.arena.is_segment_free(segment)
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
                    arena.remove_if_free(segment);
                    self.totals.returned(bytes);
                } else {
                    arena.segments.insert(segment, (ptr, bytes));
                    outcome = outcome.and(returned.map(drop));
                }
            }
        }
        arenas.retain(|_, arena| !arena.segments.is_empty());
        self.arenas = arenas;
        outcome
    }

    fn give_up(&mut self, fences: &mut Fences, spares: &mut SpareMemory) -> Result<()> {
        let mut given = SpareMemory {
            segments: std::mem::take(&mut self.left),
            ..SpareMemory::default()
        };
        for ((owner, _), arena) in &mut self.arenas {
            for (segment, memory) in std::mem::take(&mut arena.segments) {
                let epoch = arena.freed_at.get(&segment).copied().unwrap_or(0);
                let owner = *owner;
                let is_idle = arena.arena.is_segment_free(segment)
                    && fences.passed_by_now(Fence { owner, epoch });
                if is_idle && arena.remove_if_free(segment) {
                    given.segments.push(memory);
                } else {
                    arena.segments.insert(segment, memory);
                }
            }
        }
        self.arenas.retain(|_, arena| !arena.segments.is_empty());
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

    fn bytes_behind(&self, _: Owner, fences: &Fences) -> BTreeMap<Owner, u64> {
        let mut behind = BTreeMap::new();
        for ((owner, _), arena) in &self.arenas {
            let bytes = arena.free_bytes();
            // The requester's own as well: idle segments are returned only once they are complete.
            if bytes > 0 && !fences.is_known_complete(arena.fence(*owner)) {
                *behind.entry(*owner).or_default() += bytes;
            }
        }
        behind
    }

    fn bytes_free_for(&self, _: Owner, _: &Fences) -> u64 {
        0
    }

    fn largest_free(&self) -> u64 {
        let arenas = self.arenas.values();
        let largest = arenas.map(|arena| arena.arena.largest_free());
        let left = self.left.iter().chain(&self.spare);
        let left = left.map(|(_, bytes)| *bytes);
        largest.chain(left).max().unwrap_or(0)
    }

    fn inactive_split(&self) -> (u64, u64) {
        let splits = self
            .arenas
            .values()
            .map(|arena| arena.arena.inactive_split());
        splits.fold((0, 0), |(bytes, count), (more, blocks)| {
            (bytes + more, count + blocks)
        })
    }

    fn totals(&self) -> Totals {
        self.totals
    }

    fn check_invariants(&self) -> u64 {
        let (mut held, mut in_blocks) = (0, 0);
        for arena in self.arenas.values() {
            let (bytes, in_use) = arena.arena.check_invariants();
            let sum: u64 = arena.segments.values().map(|(_, bytes)| bytes).sum();
            assert_eq!(bytes, sum, "segment bytes of an arena");
            held += bytes;
            in_blocks += in_use;
        }
        let left = self.left.iter().chain(&self.spare);
        let left: u64 = left.map(|(_, bytes)| bytes).sum();
        assert_eq!(held + left, self.totals.reserved_bytes, "reserved bytes");
        in_blocks
    }
}
