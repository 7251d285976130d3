//! Where a block lies.

use std::num::NonZero;

use super::{Index, MappingIndex, OWNER_BITS, StreamIndex};
use crate::driver::DevicePtr;

/// Where a block lies, to be handed back when it is freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In the small blocks of its owner.
    Small(Index),
    /// At home in the page heap, or in a large segment of its owner.
    Large(Index),
    /// In the memory of its owner, but for another stream, when memory was short.
    Lent { index: Index, is_small: bool },
    /// In a stitched range.
    Stitched(MappingIndex),
}

/// Memory for a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Placement {
    pub(crate) ptr: DevicePtr,
    pub(crate) location: Location,
}

/// In whose memory a block lies, and where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location(
    /// The index in the upper half, below it the number of the stream, then the kind of place, which is not 0: so what
    /// may be nowhere takes no more room, and goes in a register.
    NonZero<u64>,
);

const KIND_BITS: u32 = 3;
const _: () = assert!(OWNER_BITS + KIND_BITS <= u32::BITS);

impl Location {
    #[inline]
    pub(crate) fn new(owner: StreamIndex, place: Place) -> Self {
        let (kind, index) = match place {
            Place::Small(index) => (1, index),
            Place::Large(index) => (2, index),
            Place::Stitched(range) => (3, range),
            Place::Lent { index, is_small } => (4 + u64::from(is_small), index),
        };
        debug_assert!(owner < 1 << OWNER_BITS);
        let word = u64::from(index) << u32::BITS | (owner as u64) << KIND_BITS | kind;
        Self(NonZero::new(word).expect("kinds count from 1"))
    }

    /// The number, in the pool, of the stream whose memory it is: that of the block's home, unless it is lent.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the index is in the upper half"
    )]
    pub(crate) fn owner(self) -> StreamIndex {
        (self.0.get() as u32 >> KIND_BITS) as StreamIndex
    }

    #[inline]
    pub(crate) fn place(self) -> Place {
        let index = (self.0.get() >> u32::BITS) as u32;
        match self.0.get() & ((1 << KIND_BITS) - 1) {
            1 => Place::Small(index),
            2 => Place::Large(index),
            3 => Place::Stitched(index),
            kind => Place::Lent {
                index,
                is_small: kind > 4,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_what_they_were_made_of() {
        let lent = |index, is_small| Place::Lent { index, is_small };
        for index in [0, 77, u32::MAX] {
            let places = [
                Place::Small(index),
                Place::Large(index),
                Place::Stitched(index),
            ];
            for place in places
                .into_iter()
                .chain([lent(index, true), lent(index, false)])
            {
                for owner in [0, 5, (1 << OWNER_BITS) - 1] {
                    let location = Location::new(owner, place);
                    assert_eq!((location.owner(), location.place()), (owner, place));
                }
            }
        }
    }
}
