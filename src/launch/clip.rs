//! Clipping by total norm: the coefficient, and the pass that applies it.
//!
//! ```text
//! n     = total norm of all tensors, from the statistics of a check, in f64
//! coef  = min(1, max_norm / (n + 10⁻⁶)), NaN if n is NaN
//! g     = g · coef
//! ```
//!
//! [`clip_coefficient`] works on a few numbers; a norm that is not finite is an overflow and sets the flag,
//! so that the step is skipped instead of taken with every gradient set to zero. [`multiply`] is the pass
//! over the gradients, for those who look at clipped gradients; optimizers take the coefficient instead
//! and multiply as they read.
//!
//! Numeric notes. The coefficient is computed in f32 as in PyTorch (a reciprocal, then a product), from the
//! norm rounded to f32, unless that rounding overflows. Infinity times 0 is NaN: clipping does not repair gradients.
//!
//! Twins: [`ClipCoefficient`], [`Multiply`].

use rayon::prelude::*;

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::chunk_table::{Chunk, ChunkTable};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, multiply_all, store};
use crate::launch::device::{push_optional, push_sizes, push_spans};
use crate::launch::gradient_check::NormKind;
use crate::launch::{PARALLEL_MIN, Span, enqueue};

/// Keeps the quotient finite for a norm of 0; PyTorch's value.
const EPSILON: f32 = 1e-6;

/// Operands of [`clip_coefficient`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClipOperands {
    /// f64, one a tensor: what a check of kind `kind` wrote.
    pub(crate) norms: Span,
    /// f64: receives the total norm.
    pub(crate) total_norm: Span,
    /// f32: receives the coefficient.
    pub(crate) coefficient: Span,
    /// f32: set to 1 if the total norm is not finite.
    pub(crate) found_inf: Option<Span>,
}

/// Sets the total norm and the coefficient that bring it to `max_norm` at most.
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
        found_inf,
    } = *operands;
    for (span, dtype, len) in [
        Some((norms, DType::F64, norms.len())),
        Some(one(total_norm, DType::F64)),
        Some(one(coefficient, DType::F32)),
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

/// Multiplies every element of `table` (one column) by `factor`, an f32 on the device.
///
/// # Errors
/// [`Error::InvalidArgument`] if the operands do not fit each other.
pub(crate) fn multiply(stream: &Stream, table: &ChunkTable, factor: &Span) -> Result<()> {
    let op = "multiply";
    table.check(op, stream, 1)?;
    factor.check_stream(op, stream)?;
    factor.check_dtype(op, DType::F32)?;
    factor.check_len(op, 1)?;
    if table.elements() == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Multiply {
            table: *table,
            factor: *factor,
        },
    )
}

#[derive(Debug)]
struct ClipCoefficient {
    operands: ClipOperands,
    kind: NormKind,
    max_norm: f64,
}

/// The coefficient for one total norm.
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is PyTorch's arithmetic"
)]
fn coefficient(total_norm: f64, max_norm: f64) -> f32 {
    let narrow = total_norm as f32;
    let quotient = if narrow.is_infinite() && total_norm.is_finite() {
        (max_norm / total_norm) as f32
    } else {
        (narrow + EPSILON).recip() * max_norm as f32
    };
    // Unlike `f32::min`, NaN passes.
    if quotient > 1.0 { 1.0 } else { quotient }
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
            found_inf,
        } = &self.operands;
        push_spans(into, &[norms]);
        push_sizes(into, &[norms.len()]);
        push_spans(into, &[total_norm, coefficient]);
        push_optional(into, found_inf.as_ref());
        into.f64(self.max_norm);
        into.u32(self.kind.code());
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(1)
    }

    unsafe fn run(&self) {
        // SAFETY: the check that wrote the norms ran before, in stream order.
        let norms = unsafe { self.operands.norms.slice::<f64>() };
        let total_norm = match self.kind {
            NormKind::L1 => norms.iter().sum(),
            NormKind::L2 => norms.iter().sum::<f64>().sqrt(),
            NormKind::Max if norms.iter().any(|norm| norm.is_nan()) => f64::NAN,
            NormKind::Max => norms.iter().copied().fold(0.0, f64::max),
        };
        // SAFETY: only this kernel accesses the outputs now.
        unsafe { self.operands.total_norm.slice_mut() }.fill(total_norm);
        // SAFETY: as above.
        unsafe { self.operands.coefficient.slice_mut() }
            .fill(coefficient(total_norm, self.max_norm));
        if let Some(found_inf) = self.operands.found_inf.filter(|_| !total_norm.is_finite()) {
            // SAFETY: as above.
            unsafe { found_inf.slice_mut() }.fill(1f32);
        }
    }
}

#[derive(Debug)]
struct Multiply {
    table: ChunkTable,
    factor: Span,
}

impl Multiply {
    fn chunk(&self, chunk: &Chunk<'_>, factor: f32) {
        // SAFETY: called from `run`.
        let span = unsafe { chunk.column(0) }.expect("a gradient table has its one column filled");
        if span.dtype() == DType::F64 {
            multiply_span(&span, f64::from(factor));
        } else {
            multiply_span(&span, factor);
        }
    }
}

fn multiply_span<C: Compute>(span: &Span, factor: C) {
    let mut scratch = [C::default(); BLOCK];
    for start in (0..span.len()).step_by(BLOCK) {
        let values = &mut scratch[..BLOCK.min(span.len() - start)];
        // SAFETY: called from `run`; chunks share no bytes, so this task alone accesses them.
        unsafe { load(span, start, values) };
        multiply_all(values, factor);
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
        push_spans(into, &[&self.factor]);
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
        // SAFETY: the factor was written before, in stream order.
        let factor = unsafe { self.factor.slice::<f32>() }[0];
        // SAFETY: the table was uploaded in stream order before this kernel.
        let chunks: Vec<_> = unsafe { self.table.chunks() }.collect();
        if self.table.elements() < PARALLEL_MIN as u64 {
            chunks.iter().for_each(|chunk| self.chunk(chunk, factor));
        } else {
            chunks
                .par_iter()
                .for_each(|chunk| self.chunk(chunk, factor));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coefficients_at_the_edges() {
        assert_eq!(coefficient(5.0, 10.0), 1.0);
        assert_eq!(coefficient(0.0, 1.0), 1.0);
        assert_eq!(coefficient(5.0, 0.0), 0.0);
        assert_eq!(coefficient(f64::INFINITY, 1.0), 0.0);
        assert!(coefficient(f64::NAN, 1.0).is_nan());
        // Past the range of f32 the quotient is still right.
        assert_eq!(coefficient(1e40, 1e30), 1e-10);
        // The epsilon bites when the norm is at the limit.
        assert!(coefficient(5.0, 5.0) < 1.0);
    }
}
