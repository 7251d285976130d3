//! Areas of pinned memory that nobody holds, by size.
//!
//! An area is *free* at once, or *waiting*: freed while streams were still using it. Whether those have
//! passed is asked when an area of the size is wanted, the oldest first, and never otherwise.
//!
//! Must not know: locks, the driver's memory.

use std::collections::{BTreeMap, VecDeque};

use smallvec::SmallVec;

use crate::driver::{DevicePtr, Event};
use crate::units::{KIB, MIB, StreamId, align_up};

/// Least size: what the system pins at least.
const SIZE_MIN: u64 = 4 * KIB;
/// Up to this size areas are powers of two; above it, there are eight sizes to a doubling.
const POWERS_MAX: u64 = MIB;

/// A driver allocation.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: u64,
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

/// Bytes of the area for a request of `bytes`; `None` if that does not fit in 64 bits.
pub(super) fn area_bytes(bytes: u64) -> Option<u64> {
    let power = bytes.max(SIZE_MIN).checked_next_power_of_two()?;
    if power <= POWERS_MAX {
        return Some(power);
    }
    // Between two powers of two lie eight steps, each a sixteenth of the upper one.
    align_up(bytes, power / 16)
}

#[derive(Debug, Default)]
struct Class {
    free: Vec<Area>,
    waiting: VecDeque<(Area, Uses)>,
}

/// All cached areas.
#[derive(Debug, Default)]
pub(super) struct Cache {
    classes: BTreeMap<u64, Class>,
}

impl Cache {
    /// Files an area under its size.
    pub(super) fn put(&mut self, area: Area, uses: Uses) {
        let class = self.classes.entry(area.bytes).or_default();
        if uses.is_empty() {
            class.free.push(area);
        } else {
            class.waiting.push_back((area, uses));
        }
    }

    /// Takes an area of exactly `bytes` that no stream uses any more.
    pub(super) fn take(&mut self, bytes: u64) -> Option<Area> {
        let class = self.classes.get_mut(&bytes)?;
        if let Some(area) = class.free.pop() {
            return Some(area);
        }
        let passed = |(_, uses): &mut (Area, Uses)| have_passed(uses);
        let index = class.waiting.iter_mut().position(passed)?;
        class.waiting.remove(index).map(|(area, _)| area)
    }

    /// Takes every area that no stream uses any more.
    pub(super) fn take_idle(&mut self) -> Vec<Area> {
        let mut idle = Vec::new();
        for class in self.classes.values_mut() {
            idle.append(&mut class.free);
            for (area, mut uses) in std::mem::take(&mut class.waiting) {
                if have_passed(&mut uses) {
                    idle.push(area);
                } else {
                    class.waiting.push_back((area, uses));
                }
            }
        }
        idle
    }

    /// Takes every area that streams may still be using.
    pub(super) fn take_waiting(&mut self) -> Vec<(Area, Uses)> {
        let classes = self.classes.values_mut();
        classes.flat_map(|class| class.waiting.drain(..)).collect()
    }

    /// Bytes of areas that streams used when they were freed.
    pub(super) fn waiting_bytes(&self) -> u64 {
        let waiting = self.classes.values().flat_map(|class| &class.waiting);
        waiting.map(|(area, _)| area.bytes).sum()
    }

    /// Bytes of the largest area that was free at once.
    pub(super) fn largest_free(&self) -> u64 {
        let mut classes = self.classes.iter().rev();
        classes
            .find(|(_, class)| !class.free.is_empty())
            .map_or(0, |(bytes, _)| *bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_are_powers_of_two_and_then_eighths() {
        let sizes = [
            (1, 4 * KIB),
            (4 * KIB, 4 * KIB),
            (4 * KIB + 1, 8 * KIB),
            (MIB, MIB),
            (MIB + 1, MIB + MIB / 8),
            (2 * MIB, 2 * MIB),
            (2 * MIB + 1, 2 * MIB + MIB / 4),
        ];
        for (bytes, area) in sizes {
            assert_eq!(area_bytes(bytes), Some(area), "{bytes}");
        }
        assert_eq!(area_bytes(1 << 63), Some(1 << 63));
        assert_eq!(area_bytes((1 << 63) + 1), None);
        for bytes in (1..200_000_000).step_by(1_234_567) {
            let area = area_bytes(bytes).expect("it fits");
            assert!(area >= bytes && area - bytes <= (bytes / 8).max(bytes.min(MIB) + SIZE_MIN));
        }
    }
}
