//! The next scale of each tensor that is kept in 8 bits.
//!
//! ```text
//! a        largest of the history, or its first, the running one
//! scale    largest number of the type / a / 2^margin, from 2⁻¹²⁶ to the largest f32; if told to, less its
//!          fraction, which leaves a power of two
//! history  rolled: the running one goes to the end, the oldest, next to it, is dropped, and 0 begins anew
//! ```
//!
//! The quotient is taken in f64 and rounded once to f32, which gives the bits of Transformer Engine's quotient of
//! f32. We differ on purpose in what an infinity does: there it goes into the history, and with the largest of the
//! history chosen the scale then stands still until it has rolled out, 1,024 updates by default. Here a running
//! largest of infinity or NaN leaves scale and history as they are, as one of 0 does.
//!
//! Without history there is only the running one, taken to be at least `epsilon`; where it tells nothing the scale
//! is 1.
//!
//! Twin: [`Fp8Update`]. [`next_fp8_scale`] is the formula by itself.

use super::device::{push_sizes, push_spans};
use super::quantize::{FP8_COUNTS, LAST_AMAX, NOT_FINITE, UPDATES};
use super::{Span, enqueue};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Which largest magnitude of a history counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AmaxAlgorithm {
    /// The largest of all.
    #[default]
    Max,
    /// That of the last iteration.
    MostRecent,
}

/// The numbers that govern the scales of 8-bit tensors.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fp8Policy {
    /// Where the largest magnitude comes from.
    pub source: AmaxSource,
    /// Binary orders of magnitude kept free above the largest; at most 64.
    pub margin: u32,
    /// Whether the scale is brought down to a power of two.
    pub power_of_two: bool,
}

/// Where the largest magnitude that decides a scale comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AmaxSource {
    /// A history of earlier iterations.
    History(AmaxAlgorithm),
    /// The tensor that is about to be converted, or this number if that is larger.
    Current {
        /// See above; finite and not negative.
        epsilon: f32,
    },
}

/// The scale for a type whose largest number is `largest`, and numbers up to `amax`, which is positive and finite.
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

/// The device memory of 8-bit tensors' scales, a row each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fp8Operands {
    /// f32, one a tensor.
    pub(crate) scales: Span,
    /// f32, one a tensor: the largest number of its type.
    pub(crate) largest: Span,
    /// f32, `length` a tensor.
    pub(crate) history: Span,
    /// f64, [`FP8_COUNTS`] a tensor.
    pub(crate) counts: Span,
    /// Largest magnitudes a tensor, from 1.
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
        return Err(Error::argument(op, "a history without a place"));
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
