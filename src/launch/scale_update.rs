//! Computes the next loss scale.
//!
//! ```text
//! any flag ≠ 0     k = k + 1, t = 0, and if k ≥ hysteresis: S = max(f32(S · backoff), floor)
//! else             t = t + 1, and if t ≥ interval: S = min(f32(S · growth), cap) if finite, t = 0
//!                  k = 0, at once or when the scale grows
//! ```
//!
//! Products are computed in f64 and rounded to f32, as in PyTorch's `_amp_update_scale_`, whose results are reproduced
//! bit for bit with three deliberate differences. The scale has a floor and a cap. If the interval is lowered below the
//! tracker, the scale grows at the next clean update instead of never. And the flags are combined with OR, because
//! their sum could be 0 by accident. With a hysteresis of 1 every overflow backs off, as in PyTorch; other libraries
//! tolerate some overflows, and differ in when they forget them.
//!
//! An update can be told to ignore overflows that are only NaN: the state then stays unchanged.
//!
//! The kernel also refreshes 1/S, rounded once from f64 to f32, clears the flags for the next iteration, and records
//! the update in the journal.
//!
//! Twin: [`ScaleUpdate`]. [`next_scale`] is the rule by itself.

use crate::driver::{Arguments, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::device::{push_sizes, push_spans};
use crate::launch::journal::{
    BACKOFFS, CALIBRATED, CHANGES, FLOOR_HITS, GROWTHS, INF_STEPS_SINCE_UPDATE, JOURNAL_WORDS,
    NAN_STEPS_SINCE_UPDATE, RECENT_SKIPS, UPDATES, change_words, counter,
};
use crate::launch::{Span, enqueue};

/// When tolerated overflows are forgotten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refill {
    /// At every clean update.
    #[default]
    CleanUpdate,
    /// When the scale grows.
    Growth,
}

/// The parameters of the loss scale update.
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
    /// The overflow, counted from 1, from which on the scale backs off; at least 1.
    pub hysteresis: u32,
    /// When the count of overflows is reset.
    pub refill: Refill,
    /// The scale grows at the first clean update after a whole interval, not at the last one of the interval.
    pub late_growth: bool,
}

impl Default for ScalePolicy {
    /// PyTorch's defaults, without floor and cap.
    fn default() -> Self {
        Self {
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            min_scale: 0.0,
            max_scale: f32::MAX,
            hysteresis: 1,
            refill: Refill::CleanUpdate,
            late_growth: false,
        }
    }
}

/// A loss scale, and what it has seen since it last changed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleState {
    /// The scale.
    pub scale: f32,
    /// Clean updates since the last growth, overflow or start.
    pub growth_tracker: u32,
    /// Overflows that are not forgotten yet.
    pub overflows: u32,
}

/// The state after an update with the flag `found_inf`, which means an overflow unless it is 0.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the rule"
)]
pub fn next_scale(policy: &ScalePolicy, state: ScaleState, found_inf: f32) -> ScaleState {
    let times = |factor: f64| (f64::from(state.scale) * factor) as f32;
    // NaN counts as an overflow: it is not equal to 0.
    if found_inf != 0.0 {
        let overflows = state.overflows.saturating_add(1);
        let mut scale = state.scale;
        if overflows >= policy.hysteresis {
            // A scale already below the floor must not rise because of an overflow.
            scale = times(policy.backoff_factor)
                .max(policy.min_scale)
                .min(scale);
        }
        return ScaleState {
            scale,
            growth_tracker: 0,
            overflows,
        };
    }
    let growth_tracker = state.growth_tracker.saturating_add(1);
    let late = u32::from(policy.late_growth);
    if growth_tracker - late < policy.growth_interval {
        let overflows = match policy.refill {
            Refill::CleanUpdate => 0,
            Refill::Growth => state.overflows,
        };
        return ScaleState {
            growth_tracker,
            overflows,
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
        growth_tracker: late,
        overflows: 0,
    }
}

/// 1/S, the factor that kernels multiply by.
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
    /// u32, two: the growth tracker, and the overflows that are not forgotten yet.
    pub(crate) trackers: Span,
    /// f32, one per optimizer; cleared.
    pub(crate) flags: Span,
    /// f64, the journal.
    pub(crate) journal: Span,
}

/// What one update does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change {
    /// Updates the scale by the rule.
    Rule {
        /// Whether steps with NaN but no infinity are ignored.
        ignore_nan: bool,
    },
    /// Sets the scale and leaves the trackers unchanged.
    Set(f32),
}

/// Changes the scale. Clears the flags.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn scale_update(
    stream: &Stream,
    operands: &ScaleOperands,
    policy: &ScalePolicy,
    change: Change,
) -> Result<()> {
    let op = "update";
    let ScaleOperands {
        scale,
        inv_scale,
        trackers,
        flags,
        journal,
    } = *operands;
    for (span, dtype, len) in [
        (scale, DType::F32, 1),
        (inv_scale, DType::F32, 1),
        (trackers, DType::U32, 2),
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
            change,
        },
    )
}

#[derive(Debug)]
struct ScaleUpdate {
    operands: ScaleOperands,
    policy: ScalePolicy,
    change: Change,
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
            trackers,
            flags,
            journal,
        } = &self.operands;
        push_spans(into, &[scale, inv_scale, trackers, flags]);
        push_sizes(into, &[flags.len()]);
        push_spans(into, &[journal]);
        into.f64(self.policy.growth_factor);
        into.f64(self.policy.backoff_factor);
        into.u32(self.policy.growth_interval);
        into.f32(self.policy.min_scale);
        into.f32(self.policy.max_scale);
        into.u32(self.policy.hysteresis);
        into.u32(u32::from(self.policy.refill == Refill::Growth));
        into.u32(u32::from(self.policy.late_growth));
        let (ignore_nan, forced) = match self.change {
            Change::Rule { ignore_nan } => (ignore_nan, None),
            Change::Set(scale) => (false, Some(scale)),
        };
        into.u32(u32::from(ignore_nan));
        into.u32(u32::from(forced.is_some()));
        into.f32(forced.unwrap_or(0.0));
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    unsafe fn run(&self) {
        // SAFETY: only this kernel accesses the scaler's memory now; the five operands are distinct
        // buffers of one scaler.
        let scale = &mut unsafe { self.operands.scale.slice_mut::<f32>() }[0];
        // SAFETY: as above.
        let inv_scale = &mut unsafe { self.operands.inv_scale.slice_mut::<f32>() }[0];
        // SAFETY: as above.
        let trackers = unsafe { self.operands.trackers.slice_mut::<u32>() };
        // SAFETY: as above.
        let flags = unsafe { self.operands.flags.slice_mut::<f32>() };
        // SAFETY: as above.
        let journal = unsafe { self.operands.journal.slice_mut::<f64>() };

        let before = ScaleState {
            scale: *scale,
            growth_tracker: trackers[0],
            overflows: trackers[1],
        };
        let found = flags.iter().any(|flag| *flag != 0.0);
        let only_nan =
            journal[NAN_STEPS_SINCE_UPDATE] > 0.0 && journal[INF_STEPS_SINCE_UPDATE] == 0.0;
        let (overflow, after) = match self.change {
            Change::Set(scale) => (false, ScaleState { scale, ..before }),
            Change::Rule { ignore_nan: true } if found && only_nan => (false, before),
            Change::Rule { .. } => {
                let flag = if found { 1.0 } else { 0.0 };
                (found, next_scale(&self.policy, before, flag))
            }
        };
        *scale = after.scale;
        *inv_scale = inverse_scale(after.scale);
        trackers.copy_from_slice(&[after.growth_tracker, after.overflows]);
        flags.fill(0.0);
        self.note(journal, overflow, before, after);
    }
}

impl ScaleUpdate {
    fn note(&self, journal: &mut [f64], overflow: bool, before: ScaleState, after: ScaleState) {
        journal[UPDATES] += 1.0;
        journal[NAN_STEPS_SINCE_UPDATE] = 0.0;
        journal[INF_STEPS_SINCE_UPDATE] = 0.0;
        if let Change::Set(_) = self.change {
            // After the scale is set, calibration starts again.
            for word in [CALIBRATED, RECENT_SKIPS, FLOOR_HITS] {
                journal[word] = 0.0;
            }
        } else {
            journal[BACKOFFS] += f64::from(u8::from(overflow));
            journal[GROWTHS] += f64::from(u8::from(after.scale > before.scale));
            let at_floor = overflow
                && before.scale <= self.policy.min_scale
                && after.overflows >= self.policy.hysteresis;
            journal[FLOOR_HITS] = if at_floor {
                journal[FLOOR_HITS] + 1.0
            } else {
                0.0
            };
        }
        if after.scale.to_bits() != before.scale.to_bits() {
            let change = change_words(counter(journal, CHANGES));
            let words = [journal[UPDATES], f64::from(after.scale)];
            journal[change].copy_from_slice(&words);
            journal[CHANGES] += 1.0;
        }
    }
}
