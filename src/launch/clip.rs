//! Clipping by total norm: the coefficient, and the pass that applies it.
//!
//! ```text
//! n     = total norm of all tensors, from the statistics of a check, in f64
//! coef  = min(1, max_norm / (n + ε)), NaN if n is NaN; ε = 10⁻⁶ for limits of 0.1 and more, else 0
//! g     = g · first · coef
//! ```
//!
//! `first` is the inverse scale, or 1 for gradients that are not scaled.
//!
//! [`clip_coefficient`] works on a few numbers. A norm that is not finite is an overflow and sets the flag, so that the
//! step is skipped; otherwise it would be taken with all gradients multiplied by zero. [`multiply`] is the pass over
//! the gradients, for callers that read clipped gradients. Optimizers take the coefficient instead and multiply as they
//! read.
//!
//! Numeric notes. ε is PyTorch's. It makes clipped gradients too small by a relative error of up to 10⁻⁶ / `max_norm`,
//! at most 10⁻⁵ for the limits that use it; smaller limits do not. With ε the coefficient is computed as in PyTorch (a
//! reciprocal, then a product): in f64 if any gradient is f64, else in f32 from the norm rounded to f32, unless the
//! reciprocal is not a normal number of that type. Everything else is computed in f64 and rounded once.
//!
//! A coefficient below the normal range of f32 would lose bits. In that case `first` is made smaller by a power of two,
//! which is exact, and the coefficient larger. So clipped gradients are accurate to 10⁻⁵ plus the rounding of their
//! type whenever the norm can be computed: for L2, squares of f64 gradients must be in the range of f64, so norms must
//! be from 10⁻¹⁵⁴ to 10¹⁵⁴. Infinity times 0 is NaN: clipping does not repair gradients.
//!
//! Twins: [`ClipCoefficient`], [`Multiply`].

use rayon::prelude::*;

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::chunk_table::{Chunk, ChunkTable};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, load_scalar, store};
use crate::launch::device::{push_optional, push_sizes, push_spans, push_types};
use crate::launch::gradient_check::NormKind;
use crate::launch::update_pass::scale;
use crate::launch::{PARALLEL_MIN, Span, enqueue};

/// PyTorch's ε.
const EPSILON: f32 = 1e-6;

/// The smallest limit that uses [`EPSILON`].
const EPSILON_FROM: f64 = 0.1;

/// Operands of [`clip_coefficient`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClipOperands {
    /// f64, one per tensor: the norms that a check of kind `kind` wrote.
    pub(crate) norms: Span,
    /// f64: receives the total norm.
    pub(crate) total_norm: Span,
    /// f32, or f64 if a gradient is f64: receives the coefficient.
    pub(crate) coefficient: Span,
    /// f32: receives the factor that gradients are multiplied by first.
    pub(crate) first: Span,
    /// f32: the inverse of the scale that gradients still have.
    pub(crate) inv_scale: Option<Span>,
    /// f32: set to 1 if the total norm is not finite.
    pub(crate) found_inf: Option<Span>,
}

/// Computes the total norm, and the coefficient that brings it to at most `max_norm`.
///
/// # Errors
/// [`Error::InvalidArgument`] for a negative or NaN `max_norm`, or operands that do not fit.
pub(crate) fn clip_coefficient(
    stream: &Stream,
    operands: &ClipOperands,
    kind: NormKind,
    max_norm: f64,
) -> Result<()> {
    let op = "clip_grad_norm";
    if max_norm.is_nan() || max_norm < 0.0 {
        return Err(Error::argument(
            op,
            format!("max_norm is {max_norm}, not zero or more"),
        ));
    }
    let one = |span, dtype| (span, dtype, 1);
    let ClipOperands {
        norms,
        total_norm,
        coefficient,
        first,
        inv_scale,
        found_inf,
    } = *operands;
    for (span, dtype, len) in [
        Some((norms, DType::F64, norms.len())),
        Some(one(total_norm, DType::F64)),
        Some(one(coefficient, factor_dtype(&coefficient))),
        Some(one(first, DType::F32)),
        inv_scale.map(|span| one(span, DType::F32)),
        found_inf.map(|span| one(span, DType::F32)),
    ]
    .into_iter()
    .flatten()
    {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    enqueue(
        stream,
        ClipCoefficient {
            operands: *operands,
            kind,
            max_norm,
        },
    )
}

/// The required type of a factor: f64 if it is f64, f32 otherwise.
fn factor_dtype(factor: &Span) -> DType {
    match factor.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

/// Multiplies every element of `table` (one column) by the first of `factors`, an f32 on the device, then by the
/// second, an f32 or f64.
///
/// # Errors
/// [`Error::InvalidArgument`] if the operands do not fit each other.
pub(crate) fn multiply(stream: &Stream, table: &ChunkTable, factors: [&Span; 2]) -> Result<()> {
    let op = "multiply";
    table.check(op, stream, 1)?;
    for (factor, dtype) in factors
        .into_iter()
        .zip([DType::F32, factor_dtype(factors[1])])
    {
        factor.check_stream(op, stream)?;
        factor.check_dtype(op, dtype)?;
        factor.check_len(op, 1)?;
    }
    if table.elements() == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Multiply {
            table: *table,
            factors: factors.map(|factor| *factor),
        },
    )
}

#[derive(Debug)]
struct ClipCoefficient {
    operands: ClipOperands,
    kind: NormKind,
    max_norm: f64,
}

/// `max_norm / (total_norm + ε)` as the module documentation describes; `wide` if any gradient is f64.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is PyTorch's arithmetic"
)]
fn quotient(total_norm: f64, max_norm: f64, wide: bool) -> f64 {
    if max_norm >= EPSILON_FROM && wide {
        // In f64, 10⁻⁶ differs from the f32 constant.
        let reciprocal = (total_norm + 1e-6).recip();
        if reciprocal.is_nan() || reciprocal >= f64::MIN_POSITIVE {
            return reciprocal * max_norm;
        }
    } else if max_norm >= EPSILON_FROM {
        let reciprocal = (total_norm as f32 + EPSILON).recip();
        if reciprocal.is_nan() || reciprocal >= f32::MIN_POSITIVE {
            return f64::from(reciprocal * max_norm as f32);
        }
    }
    if total_norm == 0.0 {
        return if max_norm == 0.0 { 0.0 } else { 1.0 };
    }
    max_norm / total_norm
}

/// The two factors that gradients are multiplied by, one after the other, to have a norm of at most `max_norm`.
fn factors(total_norm: f64, max_norm: f64, inv_scale: f32, wide: bool) -> (f32, f64) {
    let quotient = quotient(total_norm, max_norm, wide);
    // Unlike `f64::min`, this preserves NaN.
    let quotient = if quotient > 1.0 { 1.0 } else { quotient };
    let is_normal = quotient.is_nan() || quotient >= f64::from(f32::MIN_POSITIVE);
    if is_normal || max_norm == 0.0 || !total_norm.is_finite() {
        return (inv_scale, quotient);
    }
    // The largest shift that leaves the first factor a normal number.
    let exponent = (inv_scale.to_bits() >> 23) & 0xff;
    let shift = exponent.saturating_sub(1).min(126);
    let power = f64::from_bits(u64::from(1023 + shift) << 52);
    (
        inv_scale * f32::from_bits((127 - shift) << 23),
        max_norm * power / total_norm,
    )
}

impl Kernel for ClipCoefficient {
    fn entry(&self) -> &'static str {
        "clip_coefficient"
    }

    fn elements(&self) -> u64 {
        self.operands.norms.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let ClipOperands {
            norms,
            total_norm,
            coefficient,
            first,
            inv_scale,
            found_inf,
        } = &self.operands;
        push_spans(into, &[norms]);
        push_sizes(into, &[norms.len()]);
        push_spans(into, &[total_norm, coefficient, first]);
        push_optional(into, inv_scale.as_ref());
        push_optional(into, found_inf.as_ref());
        into.f64(self.max_norm);
        into.u32(self.kind.code());
        push_types(into, &[coefficient]);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(1)
    }

    unsafe fn run(&self) {
        // SAFETY: the check that wrote the norms ran earlier, in stream order.
        let norms = unsafe { self.operands.norms.slice::<f64>() };
        let total_norm = match self.kind {
            NormKind::L1 => norms.iter().sum(),
            NormKind::L2 => norms.iter().sum::<f64>().sqrt(),
            NormKind::Max if norms.iter().any(|norm| norm.is_nan()) => f64::NAN,
            NormKind::Max => norms.iter().copied().fold(0.0, f64::max),
        };
        // SAFETY: only this kernel accesses the outputs now.
        unsafe { self.operands.total_norm.slice_mut() }.fill(total_norm);
        // SAFETY: the scale was written earlier, in stream order.
        let read = |span: Span| unsafe { load_scalar::<f32>(&span) };
        let inv_scale = self.operands.inv_scale.map_or(1.0, read);
        let wide = self.operands.coefficient.dtype() == DType::F64;
        let (first, coefficient) = factors(total_norm, self.max_norm, inv_scale, wide);
        // SAFETY: as above.
        unsafe { store(&self.operands.first, 0, &[first]) };
        // SAFETY: as above.
        unsafe { store(&self.operands.coefficient, 0, &[coefficient]) };
        if let Some(found_inf) = self.operands.found_inf.filter(|_| !total_norm.is_finite()) {
            // SAFETY: as above.
            unsafe { found_inf.slice_mut() }.fill(1f32);
        }
    }
}

#[derive(Debug)]
struct Multiply {
    table: ChunkTable,
    factors: [Span; 2],
}

impl Multiply {
    fn chunk(&self, chunk: &Chunk<'_>, factors: [f64; 2]) {
        // SAFETY: called from `run`.
        let span = unsafe { chunk.column(0) }.expect("a gradient table has its one column filled");
        if span.dtype() == DType::F64 {
            multiply_span::<f64>(&span, factors);
        } else {
            multiply_span::<f32>(&span, factors);
        }
    }
}

fn multiply_span<C: Compute>(span: &Span, factors: [f64; 2]) {
    let factors = factors.map(C::from_f64);
    let mut scratch = [C::default(); BLOCK];
    for start in (0..span.len()).step_by(BLOCK) {
        let values = &mut scratch[..BLOCK.min(span.len() - start)];
        // SAFETY: called from `run`; chunks share no bytes, so only this task accesses them.
        unsafe { load(span, start, values) };
        scale(values, factors);
        // SAFETY: as above.
        unsafe { store(span, start, values) };
    }
}

impl Kernel for Multiply {
    fn entry(&self) -> &'static str {
        "multiply"
    }

    fn elements(&self) -> u64 {
        self.table.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        push_spans(into, &[&self.factors[0], &self.factors[1]]);
        push_types(into, &[&self.factors[1]]);
    }

    fn traffic(&self) -> Option<Traffic> {
        let bytes = self.table.bytes(0);
        Some(Traffic {
            read: bytes,
            written: bytes,
        })
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the factors were written earlier, in stream order.
        let read = |span: Span| unsafe { load_scalar::<f64>(&span) };
        let factors = self.factors.map(read);
        // SAFETY: the table was uploaded in stream order before this kernel.
        let chunks: Vec<_> = unsafe { self.table.chunks() }.collect();
        if self.table.elements() < PARALLEL_MIN as u64 {
            chunks.iter().for_each(|chunk| self.chunk(chunk, factors));
        } else {
            chunks
                .par_iter()
                .for_each(|chunk| self.chunk(chunk, factors));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficients_at_the_edges() {
        for wide in [false, true] {
            let coefficient = |norm, limit| factors(norm, limit, 0.25, wide).1;
            assert_eq!(coefficient(5.0, 10.0), 1.0);
            assert_eq!(coefficient(0.0, 1.0), 1.0);
            assert_eq!(coefficient(5.0, 0.0), 0.0);
            assert_eq!(coefficient(0.0, 0.0), 0.0);
            assert_eq!(coefficient(0.0, 1e-30), 1.0);
            assert_eq!(coefficient(0.0, f64::INFINITY), 1.0);
            assert_eq!(coefficient(1e300, f64::INFINITY), 1.0);
            for limit in [1.0, 1e-3] {
                assert_eq!(coefficient(f64::INFINITY, limit), 0.0);
                assert!(coefficient(f64::NAN, limit).is_nan());
            }
            assert!(coefficient(f64::NAN, 0.0).is_nan());
            // The epsilon takes effect when the norm equals the limit, and is not used for small limits.
            assert!(coefficient(5.0, 5.0) < 1.0);
            assert_eq!(coefficient(1e-5, 1e-5), 1.0);
            // Beyond the range of f32 the quotient is still correct.
            assert!((coefficient(1e40, 1e30) / 1e-10 - 1.0).abs() < 1e-7);
        }
    }

    /// For norms and limits of all magnitudes, the product of the factors is the quotient, and neither loses bits.
    #[test]
    fn factors_of_every_magnitude() {
        let powers = || (-300..=300).step_by(5);
        for (norm, limit) in powers().flat_map(|norm| powers().map(move |limit| (norm, limit))) {
            let (norm, limit) = (3.0 * 10f64.powi(norm), 7.0 * 10f64.powi(limit));
            for inv_scale in [1.0, 1.0 / 65536.0, 1e-4, 3.0, 1e-37] {
                for wide in [false, true] {
                    let (first, coefficient) = factors(norm, limit, inv_scale, wide);
                    let what = format!("{norm:e} to {limit:e}, {inv_scale:e}, {wide}");
                    // The power of two that was moved from the coefficient to the first factor.
                    let taken = f64::from(first) / f64::from(inv_scale);
                    assert_eq!(taken.to_bits() << 12, 0, "{what}: not a power of two");
                    assert!(
                        (0.0..=1.0).contains(&coefficient),
                        "{what}: {coefficient:e}"
                    );
                    if limit >= norm {
                        assert!(1.0 - coefficient <= 1.1e-5, "{what}: {coefficient:e}");
                        continue;
                    }
                    assert!(first >= f32::MIN_POSITIVE, "{what}: {first:e}");
                    if norm / taken.recip() > limit * 1e75 {
                        // Far below the range of any gradient type.
                        continue;
                    }
                    let right = limit / taken / norm;
                    let bound = if limit >= EPSILON_FROM { 1.1e-5 } else { 1e-15 };
                    assert!(
                        (coefficient / right - 1.0).abs() <= bound,
                        "{what}: {coefficient:e}"
                    );
                }
            }
        }
    }
}
