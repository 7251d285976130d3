//! Measures how long the device takes between two points of a stream.
//!
//! ```text
//! start   clock = now
//! stop    total = total + (now − clock), in nanoseconds
//! ```
//!
//! Uses two small kernels around the work rather than events: they are part of the stream, so a captured step is timed
//! at each replay, and nothing has to be queried before the totals are read. The resolution depends on the device, from
//! 32 nanoseconds to a microsecond.
//!
//! Numeric notes. The clock keeps 52 bits, which f64 represents exactly; differences are modulo 2⁵².
//!
//! Twin: [`Stopwatch`].

use std::sync::LazyLock;
use std::time::Instant;

use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::device::{push_optional, push_spans};
use crate::launch::{Span, enqueue};

/// Bits of the time that are kept.
const MASK: u64 = (1 << 52) - 1;

/// Without a `total`, writes the current time to `clock`. With a `total`, adds the time since `clock` to it. Both are
/// f64.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if an operand is not a single f64, or is of another
/// stream.
pub(crate) fn stopwatch(stream: &Stream, clock: &Span, total: Option<&Span>) -> Result<()> {
    for span in [Some(clock), total].into_iter().flatten() {
        span.check_stream("stopwatch", stream)?;
        span.check_dtype("stopwatch", DType::F64)?;
        span.check_len("stopwatch", 1)?;
    }
    let (clock, total) = (*clock, total.copied());
    enqueue(stream, Stopwatch { clock, total })
}

#[derive(Debug)]
struct Stopwatch {
    clock: Span,
    total: Option<Span>,
}

/// Nanoseconds since a fixed point in time, no later than the first call.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the lower bits are what is kept"
)]
fn nanoseconds() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    START.elapsed().as_nanos() as u64 & MASK
}

/// `total` plus the time from `clock` to `now`.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "times are whole numbers below 2^52"
)]
fn added(total: f64, clock: f64, now: u64) -> f64 {
    total + (now.wrapping_sub(clock as u64) & MASK) as f64
}

impl Kernel for Stopwatch {
    fn entry(&self) -> &'static str {
        "stopwatch"
    }

    fn elements(&self) -> u64 {
        1
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.clock]);
        push_optional(into, self.total.as_ref());
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(1)
    }

    unsafe fn run(&self) {
        let now = nanoseconds();
        // SAFETY: only this kernel accesses the clock now.
        let clock = &mut unsafe { self.clock.slice_mut::<f64>() }[0];
        match self.total {
            None => *clock = added(0.0, 0.0, now),
            Some(total) => {
                // SAFETY: only this kernel accesses the total now, which is not the clock.
                let total = &mut unsafe { total.slice_mut::<f64>() }[0];
                *total = added(*total, *clock, now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_added_also_where_the_clock_wraps() {
        assert_eq!(added(5.0, 10.0, 17), 12.0);
        assert_eq!(added(0.0, MASK as f64, 1), 2.0);
        assert_eq!(added(0.0, 0.0, MASK), MASK as f64);
        let first = nanoseconds();
        assert!(nanoseconds() >= first);
    }
}
