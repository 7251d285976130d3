//! Segmented memory: plain driver allocations, for devices without virtual memory management.
//!
//! Each stream has two arenas, for small and for large requests, so that small blocks do not pin large
//! segments. A segment serves the stream it was allocated for until it is returned to the driver.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::arena::{Arena, SegmentIndex};
use super::backing::{Backing, Place, Placed, Refusal, Request, Totals};
use super::fences::{Fence, Fences};
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
}

/// Segments of one device and the blocks in them.
#[derive(Debug)]
pub(super) struct SegmentedMemory {
    driver: Arc<dyn Driver>,
    limit: u64,
    /// Small and large blocks of each stream.
    arenas: BTreeMap<(Owner, bool), StreamArena>,
    totals: Totals,
}

impl SegmentedMemory {
    pub(super) fn new(device: &Device, limit: Option<u64>) -> Self {
        Self {
            driver: device.driver().clone(),
            limit: limit.unwrap_or(u64::MAX),
            arenas: BTreeMap::new(),
            totals: Totals::default(),
        }
    }

    fn add_segment(&mut self, bytes: u64, request: Request) -> Result<(), Refusal> {
        if bytes > self.limit.saturating_sub(self.totals.reserved_bytes) {
            return Err(Refusal::Limit);
        }
        let ptr = self.driver.allocate(bytes).map_err(Refusal::Driver)?;
        self.totals.device_allocs += 1;
        self.totals.segments += 1;
        self.totals.reserved_bytes += bytes;
        let key = (request.owner, request.bytes <= SMALL_MAX);
        let arena = self.arenas.entry(key).or_insert_with(StreamArena::new);
        let segment = arena.arena.add_segment(bytes);
        arena.segments.insert(segment, (ptr, bytes));
        Ok(())
    }

    fn place_in_range(&mut self, request: Request, is_small: bool) -> Option<Placed> {
        let owner = request.owner;
        let arena = self.arenas.get_mut(&(owner, is_small))?;
        let placed = arena.arena.allocate(request.bytes)?;
        let (base, _) = arena.segments[&placed.segment];
        let index = placed.index;
        let place = if is_small {
            Place::Small { owner, index }
        } else {
            Place::Large { owner, index }
        };
        Some(Placed {
            ptr: base.offset(placed.offset),
            place,
        })
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

    fn place(&mut self, request: Request) -> Option<Placed> {
        self.place_in_range(request, request.bytes <= SMALL_MAX)
    }

    fn find(&mut self, request: Request, _: &mut Fences) -> Result<Placed, Refusal> {
        if let Some(placed) = self.place(request) {
            return Ok(placed);
        }
        let usual = segment_bytes(request.bytes);
        let added = self.add_segment(usual, request).or_else(|refusal| {
            if usual > request.bytes {
                self.add_segment(request.bytes, request)
            } else {
                Err(refusal)
            }
        });
        match added {
            Ok(()) => Ok(self
                .place(request)
                .expect("a segment was added that fits the request")),
            // Out of memory: room among blocks of the other range is better than none.
            Err(refusal) => self
                .place_in_range(request, request.bytes > SMALL_MAX)
                .ok_or(refusal),
        }
    }

    fn free(&mut self, place: Place, _: u64, fence: Fence) {
        let (key, index) = match place {
            Place::Small { owner, index } => ((owner, true), index),
            Place::Large { owner, index } => ((owner, false), index),
            Place::Stitched(_) => unreachable!("segmented memory stitches nothing"),
        };
        let arena = self
            .arenas
            .get_mut(&key)
            .expect("an arena outlives its blocks");
        let segment = arena.arena.segment_of(index);
        arena.arena.free(index);
        arena.freed_at.insert(segment, fence.epoch);
    }

    fn settle(&mut self, _: &mut Fences) {}

    fn holds_nothing_of(&self, owner: Owner) -> bool {
        [true, false]
            .iter()
            .all(|is_small| !self.arenas.contains_key(&(owner, *is_small)))
    }

    fn release_idle(&mut self, fences: &mut Fences) -> Result<()> {
        let mut outcome = Ok(());
        let mut arenas = std::mem::take(&mut self.arenas);
        for ((owner, _), arena) in &mut arenas {
            for (segment, (ptr, bytes)) in std::mem::take(&mut arena.segments) {
                let epoch = arena.freed_at.get(&segment).copied().unwrap_or(0);
                let is_idle = arena.arena.is_segment_free(segment)
                    && fences.is_complete(Fence {
                        owner: *owner,
                        epoch,
                    });
                let returned = if is_idle {
                    self.give_back(ptr).map(|()| true)
                } else {
                    Ok(false)
                };
                if matches!(returned, Ok(true)) {
                    arena.arena.remove_segment_if_free(segment);
                    self.totals.segments -= 1;
                    self.totals.reserved_bytes -= bytes;
                    self.totals.device_frees += 1;
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

    fn largest_free(&self, owner: Owner) -> u64 {
        let arenas = [true, false].map(|is_small| self.arenas.get(&(owner, is_small)));
        arenas
            .iter()
            .flatten()
            .map(|arena| arena.arena.largest_free())
            .max()
            .unwrap_or(0)
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
        assert_eq!(held, self.totals.reserved_bytes, "reserved bytes");
        in_blocks
    }
}
