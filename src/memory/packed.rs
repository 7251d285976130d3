//! What a block's record says in half the room: a record takes one cache line.

use std::num::NonZero;

use super::arena::GRANULARITY;
use super::backing::{Place, REQUEST_MAX};
use super::bins::Units;
use super::fences::OWNER_BITS;
use super::tags::TagId;
use super::territory::Owner;

/// Bytes asked for, those rounded up to the granularity, and the tag under which they count.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    units: Units,
    /// Bytes of the last unit that were not asked for.
    unasked: u16,
    tag: TagId,
}

const _: () = assert!(GRANULARITY <= 1 << u16::BITS);
const _: () = assert!(REQUEST_MAX / GRANULARITY <= Units::MAX as u64);

impl Size {
    /// `bytes` are those requested, rounded up. They fit: larger requests are refused before there is a block.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "both are bounded by the assertions above"
    )]
    pub(super) fn new((requested, bytes): (u64, u64), tag: TagId) -> Self {
        debug_assert!(bytes <= REQUEST_MAX && requested.next_multiple_of(GRANULARITY) == bytes);
        Self {
            units: (bytes / GRANULARITY) as Units,
            unasked: (bytes - requested) as u16,
            tag,
        }
    }

    /// Makes it that of another request for as many bytes.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "less than a unit was not asked for"
    )]
    pub(super) fn ask_again(&mut self, (requested, bytes): (u64, u64), tag: TagId) {
        debug_assert_eq!(bytes, self.allocated());
        self.unasked = (bytes - requested) as u16;
        self.tag = tag;
    }

    /// Whether it is that of a block of `bytes`.
    #[inline]
    pub(super) fn is_of(self, bytes: u64) -> bool {
        u64::from(self.units) == bytes / GRANULARITY
    }

    #[inline]
    pub(super) fn requested(self) -> u64 {
        self.allocated() - u64::from(self.unasked)
    }

    #[inline]
    pub(super) fn allocated(self) -> u64 {
        u64::from(self.units) * GRANULARITY
    }

    #[inline]
    pub(super) fn tag(self) -> TagId {
        self.tag
    }
}

/// In whose memory a block lies, and where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Location(
    /// The index in the upper half, below it the number of the stream, then the kind of place, which is not 0: so what
    /// may be nowhere takes no more room, and goes in a register.
    NonZero<u64>,
);

const KIND_BITS: u32 = 3;
const _: () = assert!(OWNER_BITS + KIND_BITS <= u32::BITS);

impl Location {
    #[inline]
    pub(super) fn new(owner: Owner, place: Place) -> Self {
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
    pub(super) fn owner(self) -> Owner {
        (self.0.get() as u32 >> KIND_BITS) as Owner
    }

    #[inline]
    pub(super) fn place(self) -> Place {
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
    fn sizes_are_what_they_were_made_of() {
        for requested in [1, 511, 512, 513, 1 << 20, REQUEST_MAX - 1, REQUEST_MAX] {
            let bytes = u64::next_multiple_of(requested, GRANULARITY);
            let size = Size::new((requested, bytes), TagId::NONE);
            assert_eq!((size.requested(), size.allocated()), (requested, bytes));
        }
    }

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
