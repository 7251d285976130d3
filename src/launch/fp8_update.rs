//! Updates the scales of tensors stored in 8 bits.
//!
//! Each tensor has a history of amax values (largest magnitudes). Its first entry is the current amax, which is still
//! being accumulated.
//!
//! ```text
//! a        largest amax of the history, or its first entry, the current amax
//! scale    largest value of the type / a / 2^margin, clamped to 2⁻¹²⁶ … the largest f32; optionally rounded
//!          down to a power of two
//! history  rotated: the current amax moves to the end, the oldest entry is dropped, a new one starts at 0
//! ```
//!
//! The quotient is computed in f64 and rounded once to f32, which matches Transformer Engine's f32 quotient bit for
//! bit. We differ on purpose in the handling of infinity. There, an infinity enters the history, and if the largest of
//! the history is used, the scale does not change until the infinity has left it, after 1,024 updates by default. Here,
//! a current amax of infinity, NaN or 0 leaves scale and history unchanged.
//!
//! Without a history, only the current amax is used, or `epsilon` if that is larger; if it is infinite, NaN or 0, the
//! scale is 1.
//!
//! Twin: [`Fp8Update`]. [`next_fp8_scale`] is the formula by itself.

use super::device::{push_sizes, push_spans};
use super::quantize::{FP8_COUNTS, LAST_AMAX, NOT_FINITE, UPDATES};
use super::{Span, enqueue};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Which amax of a history decides the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AmaxAlgorithm {
    /// The largest of all.
    #[default]
    Max,
    /// The one of the last iteration.
    MostRecent,
}

/// The parameters of the scale update for 8-bit tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Policy {
    /// Where the largest magnitude comes from.
    pub source: AmaxSource,
    /// Headroom above the largest magnitude, in powers of two; at most 64.
    pub margin: u32,
    /// Whether the scale is rounded down to a power of two.
    pub power_of_two: bool,
}

/// Where the largest magnitude that decides a scale comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AmaxSource {
    /// A history of earlier iterations.
    History(AmaxAlgorithm),
    /// The tensor about to be converted.
    Current {
        /// A lower bound on the largest magnitude; finite and not negative.
        epsilon: f32,
    },
}

/// The scale for a type whose largest value is `largest`, and for magnitudes up to `amax`, which is positive and
/// finite.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the rule"
)]
pub fn next_fp8_scale(policy: &Fp8Policy, largest: f32, amax: f32) -> f32 {
    let scale = (f64::from(largest) / f64::from(amax) / policy.divisor()) as f32;
    let scale = scale.clamp(f32::MIN_POSITIVE, f32::MAX);
    if policy.power_of_two {
        return f32::from_bits(scale.to_bits() & f32::INFINITY.to_bits());
    }
    scale
}

impl Fp8Policy {
    fn divisor(&self) -> f64 {
        2f64.powi(i32::try_from(self.margin).unwrap_or(i32::MAX))
    }
}

/// The device memory of the scales of 8-bit tensors, one row per tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fp8Operands {
    /// f32, one per tensor.
    pub(crate) scales: Span,
    /// f32, one per tensor: the largest value of its type.
    pub(crate) largest: Span,
    /// f32, `length` per tensor.
    pub(crate) history: Span,
    /// f64, [`FP8_COUNTS`] per tensor.
    pub(crate) counts: Span,
    /// Length of a tensor's history; at least 1.
    pub(crate) length: usize,
}

/// Enqueues an update of all scales.
///
/// # Errors
/// [`Error::InvalidArgument`] if the operands do not fit each other.
pub(crate) fn fp8_update(
    stream: &Stream,
    operands: &Fp8Operands,
    policy: &Fp8Policy,
) -> Result<()> {
    let op = "fp8_update";
    let Fp8Operands {
        scales,
        largest,
        history,
        counts,
        length,
    } = *operands;
    let tensors = scales.len();
    if length == 0 {
        return Err(Error::argument(op, "the history length is 0"));
    }
    for (span, dtype, len) in [
        (scales, DType::F32, tensors),
        (largest, DType::F32, tensors),
        (history, DType::F32, tensors * length),
        (counts, DType::F64, tensors * FP8_COUNTS),
    ] {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    if tensors == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Fp8Update {
            operands: *operands,
            policy: *policy,
        },
    )
}

#[derive(Debug)]
struct Fp8Update {
    operands: Fp8Operands,
    policy: Fp8Policy,
}

impl Kernel for Fp8Update {
    fn entry(&self) -> &'static str {
        "fp8_update"
    }

    fn elements(&self) -> u64 {
        self.operands.scales.len() as u64
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.elements())
    }

    fn arguments(&self, into: &mut Arguments) {
        let Fp8Operands {
            scales,
            largest,
            history,
            counts,
            length,
        } = &self.operands;
        push_spans(into, &[scales, largest, history, counts]);
        push_sizes(into, &[scales.len(), *length]);
        into.f64(self.policy.divisor());
        let (epsilon, is_current, most_recent) = match self.policy.source {
            AmaxSource::Current { epsilon } => (epsilon, true, false),
            AmaxSource::History(which) => (0.0, false, which == AmaxAlgorithm::MostRecent),
        };
        into.f32(epsilon);
        into.u32(u32::from(is_current));
        into.u32(u32::from(most_recent));
        into.u32(u32::from(self.policy.power_of_two));
    }

    unsafe fn run(&self) {
        let Fp8Operands {
            scales,
            largest,
            history,
            counts,
            length,
        } = &self.operands;
        // SAFETY: only this kernel accesses this memory now; the operands are distinct buffers.
        let scales = unsafe { scales.slice_mut::<f32>() };
        // SAFETY: as above.
        let largest = unsafe { largest.slice::<f32>() };
        // SAFETY: as above.
        let history = unsafe { history.slice_mut::<f32>() };
        // SAFETY: as above.
        let counts = unsafe { counts.slice_mut::<f64>() };
        let rows = history
            .chunks_exact_mut(*length)
            .zip(counts.chunks_exact_mut(FP8_COUNTS));
        for ((scale, largest), (row, counts)) in scales.iter_mut().zip(largest).zip(rows) {
            self.update(scale, *largest, row, counts);
        }
    }
}

impl Fp8Update {
    fn update(&self, scale: &mut f32, largest: f32, row: &mut [f32], counts: &mut [f64]) {
        let recent = row[0];
        match self.policy.source {
            AmaxSource::Current { epsilon } => {
                let amax = recent.max(epsilon);
                *scale = if recent.is_finite() && amax > 0.0 {
                    next_fp8_scale(&self.policy, largest, amax)
                } else {
                    1.0
                };
            }
            AmaxSource::History(which) if recent.is_finite() && recent > 0.0 => {
                let amax = match which {
                    AmaxAlgorithm::Max => row.iter().copied().fold(recent, f32::max),
                    AmaxAlgorithm::MostRecent => recent,
                };
                *scale = next_fp8_scale(&self.policy, largest, amax);
                row.rotate_left(1);
            }
            AmaxSource::History(_) => {}
        }
        row[0] = 0.0;
        counts[UPDATES] += 1.0;
        if !recent.is_finite() {
            counts[NOT_FINITE] += 1.0;
        }
        if recent != 0.0 {
            counts[LAST_AMAX] = f64::from(recent);
        }
    }
}

#[cfg(test)]
mod tests;
