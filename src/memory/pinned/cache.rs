//! Which parts of pinned memory are free, waiting or taken.
//!
//! A *segment* is what the driver pinned at once. Blocks are parts of segments: a request takes the free part that
//! fits it best, and what is left over of it stays free. Small requests have segments of their own, so that a small
//! block does not keep a large segment pinned.
//!
//! A part is *free* at once when its block is freed, or *waiting*: streams were still using it. Whether those have
//! passed is asked when nothing free fits a request or memory goes back, and never otherwise.
//!
//! Must not know: locks, the driver's memory.

use std::collections::{BTreeMap, VecDeque};

use smallvec::SmallVec;

use crate::driver::{DevicePtr, Event};
use crate::memory::free_list::Tiling;
use crate::memory::types::{Index, REQUEST_MAX, SegmentIndex};
use crate::units::{KIB, MIB, StreamId, align_up};

/// Requests are rounded up to this: what the system pins at least.
pub(super) const GRANULARITY: u64 = 4 * KIB;
/// Largest request that takes memory where small ones are.
const SMALL_AREA_MAX: u64 = MIB;

/// A part of a segment that is taken.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: u64,
    is_small: bool,
    index: Index,
}

/// A driver allocation that is out of the cache.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: u64,
    is_small: bool,
}

/// The last use of an area by one stream.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) stream: StreamId,
    pub(super) event: Event,
}

pub(super) type Uses = SmallVec<[Use; 1]>;

/// Forgets the uses that are over; whether all are. An event that cannot be asked counts as not complete.
pub(super) fn have_passed(uses: &mut Uses) -> bool {
    uses.retain(|used| !used.event.is_complete().unwrap_or(false));
    uses.is_empty()
}

/// Bytes that a request of `bytes`, not 0, takes; `None` if no segment can be as large.
pub(super) fn area_bytes(bytes: u64) -> Option<u64> {
    align_up(bytes, GRANULARITY).filter(|bytes| *bytes <= REQUEST_MAX)
}

/// A segment that the driver has just pinned for a request of as many bytes.
pub(super) fn new_segment(ptr: DevicePtr, bytes: u64) -> Segment {
    let is_small = bytes <= SMALL_AREA_MAX;
    Segment {
        ptr,
        bytes,
        is_small,
    }
}

/// The segments of small or of large requests.
#[derive(Debug)]
struct Part {
    tiling: Tiling,
    /// Base and bytes.
    segments: BTreeMap<SegmentIndex, (DevicePtr, u64)>,
}

impl Part {
    fn new() -> Self {
        Self {
            tiling: Tiling::new(),
            segments: BTreeMap::new(),
        }
    }

    /// Bytes and number of every segment in which no block lies.
    fn idle(&self) -> impl Iterator<Item = (u64, SegmentIndex)> {
        let all = self.segments.iter();
        let idle = all.filter(|(segment, _)| self.tiling.is_segment_free(**segment));
        idle.map(|(segment, (_, bytes))| (*bytes, *segment))
    }
}

/// All segments of a pool.
#[derive(Debug)]
pub(super) struct Cache {
    small: Part,
    large: Part,
    /// Oldest first.
    waiting: VecDeque<(Area, Uses)>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            small: Part::new(),
            large: Part::new(),
            waiting: VecDeque::new(),
        }
    }
}

impl Cache {
    fn part(&mut self, is_small: bool) -> &mut Part {
        if is_small {
            &mut self.small
        } else {
            &mut self.large
        }
    }

    /// Takes in a segment, free as a whole.
    pub(super) fn add(&mut self, segment: Segment) {
        let part = self.part(segment.is_small);
        let index = part.tiling.add_segment(segment.bytes);
        part.segments.insert(index, (segment.ptr, segment.bytes));
    }

    /// Takes an area back.
    pub(super) fn put(&mut self, area: Area, uses: Uses) {
        if uses.is_empty() {
            self.part(area.is_small).tiling.free(area.index);
        } else {
            self.waiting.push_back((area, uses));
        }
    }

    /// Takes an area of `bytes` that no stream uses any more.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Area> {
        let is_small = bytes <= SMALL_AREA_MAX;
        let found = self.take_free(bytes, is_small);
        if found.is_some() || !self.look_at_waiting() {
            return found;
        }
        self.take_free(bytes, is_small)
    }

    /// As [`take`](Self::take), small areas among large ones and the other way round if need be.
    pub(super) fn take_anywhere(&mut self, bytes: u64) -> Option<Area> {
        let found = self.take(bytes);
        found.or_else(|| self.take_free(bytes, bytes > SMALL_AREA_MAX))
    }

    fn take_free(&mut self, bytes: u64, is_small: bool) -> Option<Area> {
        let part = self.part(is_small);
        let placed = part.tiling.allocate(bytes)?;
        let (base, _) = part.segments[&placed.segment];
        Some(Area {
            ptr: base.offset(placed.offset),
            bytes,
            is_small,
            index: placed.index,
        })
    }

    /// Frees what streams have passed; whether there was any.
    pub(super) fn look_at_waiting(&mut self) -> bool {
        let before = self.waiting.len();
        for (area, mut uses) in std::mem::take(&mut self.waiting) {
            have_passed(&mut uses);
            self.put(area, uses);
        }
        self.waiting.len() < before
    }

    /// Takes a segment out in which no block lies: the smallest of at least `bytes`, or the largest, so that few go.
    pub(super) fn take_idle(&mut self, bytes: u64) -> Option<Segment> {
        let of = |part: &Part, is_small| -> Vec<_> {
            let idle = part.idle();
            idle.map(|(bytes, index)| (bytes, index, is_small))
                .collect()
        };
        let mut idle = of(&self.small, true);
        idle.append(&mut of(&self.large, false));
        let enough = idle.iter().filter(|(held, ..)| *held >= bytes);
        let found = enough.min_by_key(|(held, ..)| *held);
        let found = found.or_else(|| idle.iter().max_by_key(|(held, ..)| *held));
        let (_, index, is_small) = *found?;
        let part = self.part(is_small);
        let was_free = part.tiling.remove_segment_if_free(index);
        debug_assert!(was_free, "segment {index} is idle");
        let (ptr, bytes) = part.segments.remove(&index)?;
        Some(Segment {
            ptr,
            bytes,
            is_small,
        })
    }

    /// Takes every area that streams may still be using.
    pub(super) fn take_waiting(&mut self) -> VecDeque<(Area, Uses)> {
        std::mem::take(&mut self.waiting)
    }

    /// Bytes of areas that streams used when they were freed, and were not asked about since.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.waiting.iter().map(|(area, _)| area.bytes).sum()
    }

    /// Bytes of the largest part that is free.
    pub(super) fn largest_free(&self) -> u64 {
        let parts = [&self.small, &self.large];
        let largest = parts.map(|part| part.tiling.largest_free());
        largest.into_iter().max().unwrap_or(0)
    }

    /// Asserts that every structure is sound; returns the bytes in segments, and those in blocks or waiting.
    pub(super) fn check_invariants(&self) -> (u64, u64) {
        let (mut held, mut taken) = (0, 0);
        for part in [&self.small, &self.large] {
            let (bytes, in_blocks) = part.tiling.check_invariants();
            let sum: u64 = part.segments.values().map(|(_, bytes)| bytes).sum();
            assert_eq!(bytes, sum, "bytes in segments");
            held += bytes;
            taken += in_blocks;
        }
        (held, taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache_of(segments: &[u64]) -> Cache {
        let mut cache = Cache::default();
        let mut base = 0;
        for bytes in segments {
            base += 1 << 40;
            cache.add(new_segment(DevicePtr(base), *bytes));
        }
        cache
    }

    #[test]
    fn requests_are_rounded_to_what_the_system_pins() {
        for (bytes, area) in [(1, 4 * KIB), (4 * KIB, 4 * KIB), (5000, 8 * KIB)] {
            assert_eq!(area_bytes(bytes), Some(area), "{bytes}");
        }
        assert_eq!(area_bytes(MIB + 1), Some(MIB + 4 * KIB));
        assert_eq!(area_bytes(REQUEST_MAX), Some(REQUEST_MAX));
        for bytes in [REQUEST_MAX + 1, 1 << 46, 1 << 63, u64::MAX] {
            assert_eq!(area_bytes(bytes), None, "{bytes}");
        }
    }

    #[test]
    fn the_best_fit_is_split_and_comes_together_again() {
        let mut cache = cache_of(&[64 * MIB, 16 * MIB]);
        let first = cache.take(10 * MIB).unwrap();
        let second = cache.take(5 * MIB).unwrap();
        assert_eq!(first.ptr, DevicePtr(2 << 40), "the smaller segment");
        assert_eq!(second.ptr, first.ptr.offset(10 * MIB), "the rest of it");
        assert_eq!(cache.take(20 * MIB).unwrap().ptr, DevicePtr(1 << 40));
        assert_eq!(cache.check_invariants(), (80 * MIB, 35 * MIB));
        cache.put(first, Uses::new());
        cache.put(second, Uses::new());
        assert_eq!(cache.take(16 * MIB).unwrap().ptr, DevicePtr(2 << 40));
    }

    #[test]
    fn small_areas_stay_out_of_large_segments_unless_there_is_nothing_else() {
        let mut cache = cache_of(&[64 * MIB]);
        assert!(cache.take(MIB).is_none());
        let small = cache.take_anywhere(MIB).unwrap();
        assert!(cache.take_idle(0).is_none(), "it lies in the only segment");
        cache.put(small, Uses::new());
        assert_eq!(cache.take_idle(0).unwrap().bytes, 64 * MIB);
    }

    #[test]
    fn few_segments_go_for_the_bytes_that_are_wanted() {
        let mut cache = cache_of(&[4 * MIB, 32 * MIB, 8 * MIB, 64 * KIB]);
        let mut go = |bytes| cache.take_idle(bytes).map(|segment| segment.bytes);
        assert_eq!(go(5 * MIB), Some(8 * MIB), "the smallest that suffices");
        assert_eq!(go(40 * MIB), Some(32 * MIB), "else the largest");
        assert_eq!(go(1), Some(64 * KIB));
        assert_eq!((go(1), go(1)), (Some(4 * MIB), None));
    }
}
