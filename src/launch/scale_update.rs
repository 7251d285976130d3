//! The loss scale's next value.
//!
//! ```text
//! any flag ≠ 0     S = max(f32(S · backoff), floor), t = 0
//! else             t = t + 1, and if t ≥ interval: S = min(f32(S · growth), cap) if finite, t = 0
//! ```
//!
//! The products are taken in f64 and rounded to f32, as PyTorch's `_amp_update_scale_` does; every other
//! number it gives is reproduced to the bit. We differ on purpose in three ways: the scale has a floor and a
//! cap; an interval that was lowered below the tracker grows at the next clean update, not never; and the
//! flags are combined with OR, so that no sum of them can be 0 by accident.
//!
//! The kernel also refreshes 1/S, rounded once to f32 from f64, clears the flags for the next iteration, and
//! notes what it did in the journal.
//!
//! Twin: [`ScaleUpdate`]. [`next_scale`] is the rule by itself.

use crate::driver::{Arguments, Kernel, Stream};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::device::{push_sizes, push_spans};
use crate::launch::journal::{
    BACKOFFS, CHANGES, GROWTHS, JOURNAL_WORDS, UPDATES, change_words, counter,
};
use crate::launch::{Span, enqueue};

/// The numbers that govern a loss scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScalePolicy {
    /// Factor after a run of clean updates; above 1.
    pub growth_factor: f64,
    /// Factor after an overflow; between 0 and 1.
    pub backoff_factor: f64,
    /// Clean updates before the scale grows; at least 1.
    pub growth_interval: u32,
    /// The scale does not back off below this.
    pub min_scale: f32,
    /// The scale does not grow above this.
    pub max_scale: f32,
}

/// A loss scale, and how many clean updates it has seen since it last changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleState {
    /// The scale.
    pub scale: f32,
    /// Clean updates since the last growth, overflow or start.
    pub growth_tracker: u32,
}

/// The state after an update that saw `found_inf`: an overflow unless it is 0.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the rule"
)]
pub fn next_scale(policy: &ScalePolicy, state: ScaleState, found_inf: f32) -> ScaleState {
    let times = |factor: f64| (f64::from(state.scale) * factor) as f32;
    // NaN is not equal to 0 either.
    if found_inf != 0.0 {
        let scale = times(policy.backoff_factor).max(policy.min_scale);
        // A scale that was below the floor already must not rise because of an overflow.
        return ScaleState {
            scale: scale.min(state.scale),
            growth_tracker: 0,
        };
    }
    let growth_tracker = state.growth_tracker.saturating_add(1);
    if growth_tracker < policy.growth_interval {
        return ScaleState {
            growth_tracker,
            ..state
        };
    }
    let grown = times(policy.growth_factor);
    let scale = if grown.is_finite() {
        grown.min(policy.max_scale.max(state.scale))
    } else {
        state.scale
    };
    ScaleState {
        scale,
        growth_tracker: 0,
    }
}

/// 1/S as the kernels multiply with it.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "one rounding, from f64 to f32"
)]
pub fn inverse_scale(scale: f32) -> f32 {
    (1.0 / f64::from(scale)) as f32
}

/// The device memory of a scaler that an update reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ScaleOperands {
    /// f32: the scale.
    pub(crate) scale: Span,
    /// f32: its inverse.
    pub(crate) inv_scale: Span,
    /// u32: the growth tracker.
    pub(crate) growth_tracker: Span,
    /// f32, one an optimizer; cleared.
    pub(crate) flags: Span,
    /// f64, the journal.
    pub(crate) journal: Span,
}

/// Moves the scale by the rule; or, with `forced`, sets it and leaves the tracker alone. Clears the flags.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn scale_update(
    stream: &Stream,
    operands: &ScaleOperands,
    policy: &ScalePolicy,
    forced: Option<f32>,
) -> Result<()> {
    let op = "update";
    let ScaleOperands {
        scale,
        inv_scale,
        growth_tracker,
        flags,
        journal,
    } = *operands;
    for (span, dtype, len) in [
        (scale, DType::F32, 1),
        (inv_scale, DType::F32, 1),
        (growth_tracker, DType::U32, 1),
        (flags, DType::F32, flags.len()),
        (journal, DType::F64, JOURNAL_WORDS),
    ] {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    enqueue(
        stream,
        ScaleUpdate {
            operands: *operands,
            policy: *policy,
            forced,
        },
    )
}

#[derive(Debug)]
struct ScaleUpdate {
    operands: ScaleOperands,
    policy: ScalePolicy,
    forced: Option<f32>,
}

impl Kernel for ScaleUpdate {
    fn entry(&self) -> &'static str {
        "scale_update"
    }

    fn elements(&self) -> u64 {
        1
    }

    fn arguments(&self, into: &mut Arguments) {
        let ScaleOperands {
            scale,
            inv_scale,
            growth_tracker,
            flags,
            journal,
        } = &self.operands;
        push_spans(into, &[scale, inv_scale, growth_tracker, flags]);
        push_sizes(into, &[flags.len()]);
        push_spans(into, &[journal]);
        into.f64(self.policy.growth_factor);
        into.f64(self.policy.backoff_factor);
        into.u32(self.policy.growth_interval);
        into.f32(self.policy.min_scale);
        into.f32(self.policy.max_scale);
        into.u32(u32::from(self.forced.is_some()));
        into.f32(self.forced.unwrap_or(0.0));
    }

    unsafe fn run(&self) {
        // SAFETY: only this kernel accesses the scaler's memory now; the five operands are distinct
        // buffers of one scaler.
        let scale = &mut unsafe { self.operands.scale.slice_mut::<f32>() }[0];
        // SAFETY: as above.
        let inv_scale = &mut unsafe { self.operands.inv_scale.slice_mut::<f32>() }[0];
        // SAFETY: as above.
        let tracker = &mut unsafe { self.operands.growth_tracker.slice_mut::<u32>() }[0];
        // SAFETY: as above.
        let flags = unsafe { self.operands.flags.slice_mut::<f32>() };
        // SAFETY: as above.
        let journal = unsafe { self.operands.journal.slice_mut::<f64>() };

        let before = ScaleState {
            scale: *scale,
            growth_tracker: *tracker,
        };
        let overflow = flags.iter().any(|flag| *flag != 0.0);
        let after = match self.forced {
            Some(scale) => ScaleState { scale, ..before },
            None => next_scale(&self.policy, before, if overflow { 1.0 } else { 0.0 }),
        };
        *scale = after.scale;
        *inv_scale = inverse_scale(after.scale);
        *tracker = after.growth_tracker;
        flags.fill(0.0);

        journal[UPDATES] += 1.0;
        if self.forced.is_none() {
            let grown = after.scale > before.scale;
            journal[BACKOFFS] += f64::from(u8::from(overflow));
            journal[GROWTHS] += f64::from(u8::from(grown));
        }
        if after.scale.to_bits() != before.scale.to_bits() {
            let change = change_words(counter(journal, CHANGES));
            let words = [journal[UPDATES], f64::from(after.scale)];
            journal[change].copy_from_slice(&words);
            journal[CHANGES] += 1.0;
        }
    }
}
