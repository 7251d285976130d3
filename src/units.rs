//! Byte units, alignment, and newtypes for numbers that must not be confused.
//!
//! Sizes are `u64` bytes everywhere. An identifier gets a newtype as soon as two kinds of identifier can appear
//! in one signature. This module knows nothing of devices or memory.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};

/// 1,024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1,024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1,024 MiB.
pub const GIB: u64 = 1 << 30;

/// Rounds `bytes` up to a multiple of `alignment`; `None` if that does not fit in 64 bits.
///
/// # Panics
/// If `alignment` is not a power of two.
#[must_use]
#[inline]
pub const fn align_up(bytes: u64, alignment: u64) -> Option<u64> {
    assert!(
        alignment.is_power_of_two(),
        "alignment must be a power of two"
    );
    match bytes.checked_add(alignment - 1) {
        Some(sum) => Some(sum & !(alignment - 1)),
        None => None,
    }
}

/// Converts a byte or element count to `usize`. The crate builds only on 64-bit targets, so this is lossless.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "lib.rs refuses targets where it could truncate"
)]
pub const fn to_usize(count: u64) -> usize {
    count as usize
}

/// Index of a device among those of its driver, from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceOrdinal(pub u32);

/// Identity of a stream, unique in the process. Unlike a driver handle, it is never reused after the stream is gone.
/// A process can make at most 2³² − 1 streams: making one more panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u32);

/// Hands out unique 32-bit identifiers.
///
/// 64-bit identifiers need no such type: they are drawn with `fetch_add`, since no process lives to see them wrap.
#[derive(Debug)]
pub(crate) struct Numbers {
    /// The next number. Stops at `u32::MAX`, which is never given out.
    next: AtomicU32,
    /// What the numbers name, for the panic message.
    what: &'static str,
}

impl Numbers {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self::starting_at(0, what)
    }

    /// As if `next` numbers had already been given out.
    pub(crate) const fn starting_at(next: u32, what: &'static str) -> Self {
        Self {
            next: AtomicU32::new(next),
            what,
        }
    }

    /// A number that was not given out before.
    ///
    /// # Panics
    /// If all numbers are used up: a reused number would name two things at once.
    pub(crate) fn next(&self) -> u32 {
        // Relaxed: the number only has to be unique.
        let drawn = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                next.checked_add(1)
            });
        drawn.unwrap_or_else(|last| panic!("all {last} numbers of {} are used up", self.what))
    }
}

/// A byte count that displays in the largest unit that does not exceed it, with one decimal: `1.5 GiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 5] = [
            (1 << 50, "PiB"),
            (1 << 40, "TiB"),
            (GIB, "GiB"),
            (MIB, "MiB"),
            (KIB, "KiB"),
        ];
        match UNITS.iter().find(|(unit, _)| self.0 >= *unit) {
            // Display only: 53 bits of mantissa are far more than one decimal shows.
            #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
            Some((unit, name)) => write!(f, "{:.1} {name}", self.0 as f64 / *unit as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn align_up_at_the_ends_of_the_range() {
        assert_eq!(align_up(0, 512), Some(0));
        assert_eq!(align_up(1, 512), Some(512));
        assert_eq!(align_up(512, 512), Some(512));
        assert_eq!(align_up(u64::MAX, 512), None);
        assert_eq!(align_up(u64::MAX - 511, 512), Some(u64::MAX - 511));
    }

    #[test]
    fn the_last_number_is_given_out_once_and_then_none() {
        let numbers = Numbers::starting_at(u32::MAX - 2, "tests");
        assert_eq!(
            [numbers.next(), numbers.next()],
            [u32::MAX - 2, u32::MAX - 1]
        );
        for _ in 0..2 {
            let panic = std::panic::catch_unwind(|| numbers.next()).unwrap_err();
            let message = panic.downcast_ref::<String>().unwrap();
            assert_eq!(message, "all 4294967295 numbers of tests are used up");
        }
    }

    #[test]
    fn threads_never_draw_the_same_number() {
        let numbers = Numbers::new("tests");
        let draw = || (0..1000).map(|_| numbers.next()).collect::<Vec<u32>>();
        let mut drawn: Vec<u32> = std::thread::scope(|scope| {
            let threads = [(); 4].map(|()| scope.spawn(draw));
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap())
                .collect()
        });
        drawn.sort_unstable();
        assert!(drawn.into_iter().eq(0..4000));
    }

    #[test]
    fn bytes_display_in_the_largest_unit_below() {
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(1536).to_string(), "1.5 KiB");
        assert_eq!(Bytes(u64::MAX).to_string(), "16384.0 PiB");
    }
}
