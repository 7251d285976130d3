//! The size and the tag of a block, packed in eight bytes so that a record takes one cache line.

use crate::memory::types::{GRANULARITY, REQUEST_MAX, TagId, Units};

/// Bytes asked for, those rounded up to the granularity, and the tag under which they count.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
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
    pub(crate) fn new((requested, bytes): (u64, u64), tag: TagId) -> Self {
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
    pub(crate) fn is_of(self, bytes: u64) -> bool {
        u64::from(self.units) == bytes / GRANULARITY
    }

    #[inline]
    pub(crate) fn requested(self) -> u64 {
        self.allocated() - u64::from(self.unasked)
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
