//! The size and the tag of a block, packed into eight bytes so that a record fits in one cache line.

use crate::memory::types::{GRANULARITY, REQUEST_MAX, TagId, Units};

/// The bytes requested, the bytes allocated (rounded up to the granularity), and the tag they count under.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    units: Units,
    /// Bytes allocated beyond the request: less than a unit.
    padding: u16,
    tag: TagId,
}

const _: () = assert!(GRANULARITY <= 1 << u16::BITS);
const _: () = assert!(REQUEST_MAX / GRANULARITY <= Units::MAX as u64);

impl Size {
    /// `bytes` is `requested` rounded up. It fits: larger requests are refused before a block is made.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "both are bounded by the assertions above"
    )]
    pub(crate) fn new((requested, bytes): (u64, u64), tag: TagId) -> Self {
        debug_assert!(bytes <= REQUEST_MAX && requested.next_multiple_of(GRANULARITY) == bytes);
        Self {
            units: (bytes / GRANULARITY) as Units,
            padding: (bytes - requested) as u16,
            tag,
        }
    }

    /// Changes the request and the tag; the allocated size stays the same.
    #[inline]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "padding is less than a unit"
    )]
    pub(super) fn set_request(&mut self, (requested, bytes): (u64, u64), tag: TagId) {
        debug_assert_eq!(bytes, self.allocated());
        self.padding = (bytes - requested) as u16;
        self.tag = tag;
    }

    /// Whether `bytes`, a multiple of the granularity, are allocated.
    #[inline]
    pub(crate) fn is_of(self, bytes: u64) -> bool {
        u64::from(self.units) == bytes / GRANULARITY
    }

    #[inline]
    pub(crate) fn requested(self) -> u64 {
        self.allocated() - u64::from(self.padding)
    }

    #[inline]
    pub(crate) fn allocated(self) -> u64 {
        u64::from(self.units) * GRANULARITY
    }

    #[inline]
    pub(crate) fn tag(self) -> TagId {
        self.tag
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
}
