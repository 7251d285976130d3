//! Checks all gradients in one pass: counts infinities and NaN, and computes norms.
//!
//! ```text
//! r      = g · inv_scale         in f32 (f64 for f64 gradients); inv_scale = 1 leaves g unchanged
//! flag   = flag OR any r (or g) is infinite or NaN
//! stats  = per tensor: Σ r² (or Σ |r|, or max |r|) in f64; how many r are infinite, how many NaN,
//!          and the position of the first that is either
//! ```
//!
//! [`check`] only reads. [`unscale`] also overwrites g with r, rounded once to nearest, and checks the rounded values:
//! a scale below 1 can overflow f16 there. Infinities, NaN and the sign of zero are preserved. The flag is never
//! cleared here.
//!
//! Numeric notes. Squares of f32 values and the sum of 2⁶⁴ of them fit in f64. So for 16-bit and f32 gradients the sum
//! is finite if and only if every element is: the sum *is* the test, and blocks that pass it are not examined further.
//! For f64 gradients a sum that overflows only triggers a closer examination. Sums are computed in a fixed order that
//! does not depend on the number of threads.
//!
//! Twin: [`GradientCheck`], for both.

use rayon::prelude::*;

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::{Chunk, ChunkTable, SCRATCH_WORDS};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, multiply_all, store, view};
use crate::launch::device::{push_optional, push_spans};
use crate::launch::vector::vectorized;
use crate::launch::{PARALLEL_MIN, Span, enqueue};

/// 32-bit words of one tensor's counts.
pub(crate) const COUNT_WORDS: usize = 4;

/// The value of the last two count words if there is no offending element.
pub(crate) const NO_INDEX: u64 = u64::MAX;

/// Which norm a check computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Sum of magnitudes.
    L1,
    /// Square root of the sum of squares.
    L2,
    /// Largest magnitude.
    Max,
}

impl NormKind {
    /// The device's code of this norm.
    pub(crate) fn code(self) -> u32 {
        match self {
            Self::L1 => 0,
            Self::L2 => 1,
            Self::Max => 2,
        }
    }
}

/// The memory that a check writes its findings about each tensor to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradientStats {
    /// f64, one per tensor: sum of squares, sum of magnitudes, or largest magnitude.
    pub(crate) norms: Span,
    /// u32, [`COUNT_WORDS`] per tensor: infinite elements, NaN elements, position of the first (low and high word;
    /// [`NO_INDEX`] if none). Counts saturate at the largest u32.
    pub(crate) counts: Span,
}

/// Reads every gradient of `table` (one column), multiplied by `inv_scale` if given. Sets `found_inf` (f32) to 1 if a
/// product or a gradient is not finite, and writes all of `stats`.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn check(
    stream: &Stream,
    table: &ChunkTable,
    inv_scale: Option<&Span>,
    found_inf: &Span,
    stats: &GradientStats,
    kind: NormKind,
) -> Result<()> {
    let inv_scale = inv_scale.copied();
    let kernel = GradientCheck {
        table: *table,
        inv_scale,
        found_inf: *found_inf,
        stats: *stats,
        kind,
        write: false,
    };
    kernel.check_operands("check", stream)?;
    enqueue(stream, kernel)
}

/// Like [`check`] with the L2 norm, and replaces every gradient with its product with `inv_scale`.
///
/// # Errors
/// As [`check`].
pub(crate) fn unscale(
    stream: &Stream,
    table: &ChunkTable,
    inv_scale: &Span,
    found_inf: &Span,
    stats: &GradientStats,
) -> Result<()> {
    let (inv_scale, kind) = (Some(*inv_scale), NormKind::L2);
    let kernel = GradientCheck {
        table: *table,
        inv_scale,
        found_inf: *found_inf,
        stats: *stats,
        kind,
        write: true,
    };
    kernel.check_operands("unscale", stream)?;
    enqueue(stream, kernel)
}

#[derive(Debug)]
struct GradientCheck {
    table: ChunkTable,
    inv_scale: Option<Span>,
    found_inf: Span,
    stats: GradientStats,
    kind: NormKind,
    write: bool,
}

/// The contribution of one chunk, or one tensor, to the statistics.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partial {
    norm: f64,
    inf: u64,
    nan: u64,
    first: u64,
}

impl Partial {
    pub(super) const NONE: Self = Self {
        norm: 0.0,
        inf: 0,
        nan: 0,
        first: NO_INDEX,
    };

    /// The words that represent it in memory.
    pub(super) fn to_words(self) -> [u64; SCRATCH_WORDS] {
        [self.norm.to_bits(), self.inf, self.nan, self.first]
    }

    pub(super) fn from_words(words: &[u64]) -> Self {
        Self {
            norm: f64::from_bits(words[0]),
            inf: words[1],
            nan: words[2],
            first: words[3],
        }
    }

    pub(super) fn add(&mut self, other: Self, kind: NormKind) {
        self.norm = match kind {
            NormKind::L1 | NormKind::L2 => self.norm + other.norm,
            // Unlike `f64::max`, this preserves NaN.
            NormKind::Max if other.norm > self.norm || other.norm.is_nan() => other.norm,
            NormKind::Max => self.norm,
        };
        self.inf += other.inf;
        self.nan += other.nan;
        self.first = self.first.min(other.first);
    }
}

impl GradientStats {
    /// Refuses statistics of another stream, or for a different number of tensors.
    pub(super) fn check(&self, op: &'static str, stream: &Stream, tensors: usize) -> Result<()> {
        check_operand(op, stream, &self.norms, DType::F64, tensors)?;
        check_operand(op, stream, &self.counts, DType::U32, tensors * COUNT_WORDS)
    }

    /// Writes the totals that are present, and sets `found_inf` if any of them has an element that is not finite.
    ///
    /// # Safety
    /// As [`Span::slice_mut`], for the statistics and for `found_inf`.
    pub(super) unsafe fn write(&self, totals: &[Option<Partial>], found_inf: &Span) {
        // SAFETY: the caller's promise.
        let norms = unsafe { self.norms.slice_mut::<f64>() };
        // SAFETY: as above.
        let counts = unsafe { self.counts.slice_mut::<u32>() };
        let places = norms.iter_mut().zip(counts.chunks_exact_mut(COUNT_WORDS));
        for (total, (norm, counts)) in totals.iter().zip(places) {
            let Some(total) = total else { continue };
            *norm = total.norm;
            counts.copy_from_slice(&[
                u32::try_from(total.inf).unwrap_or(u32::MAX),
                u32::try_from(total.nan).unwrap_or(u32::MAX),
                low_word(total.first),
                low_word(total.first >> 32),
            ]);
        }
        let is_bad = |total: &Partial| total.inf + total.nan > 0;
        if totals.iter().flatten().any(is_bad) {
            // SAFETY: the caller's promise.
            unsafe { found_inf.slice_mut() }.fill(1f32);
        }
    }
}

/// Refuses an operand of another stream, type or length.
pub(super) fn check_operand(
    op: &'static str,
    stream: &Stream,
    span: &Span,
    dtype: DType,
    len: usize,
) -> Result<()> {
    span.check_stream(op, stream)?;
    span.check_dtype(op, dtype)?;
    span.check_len(op, len)
}

impl GradientCheck {
    fn check_operands(&self, op: &'static str, stream: &Stream) -> Result<()> {
        self.table.check(op, stream, 1)?;
        check_operand(op, stream, &self.found_inf, DType::F32, 1)?;
        if let Some(inv_scale) = &self.inv_scale {
            check_operand(op, stream, inv_scale, DType::F32, 1)?;
        }
        self.stats.check(op, stream, self.table.tensors())
    }

    fn chunk(&self, chunk: &Chunk<'_>, inv: f32) -> Partial {
        // SAFETY: called from `run`.
        let span = unsafe { chunk.column(0) }.expect("a gradient table has its one column filled");
        if span.dtype() == DType::F64 {
            self.chunk_in::<f64>(chunk, span, f64::from(inv))
        } else {
            self.chunk_in::<f32>(chunk, span, inv)
        }
    }

    fn chunk_in<C: Compute>(&self, chunk: &Chunk<'_>, span: Span, inv: C) -> Partial {
        let one = C::from_f32(1.0);
        let write = self.write && inv != one;
        let factor = if write { one } else { inv };
        let mut total = Partial::NONE;
        let mut scratch = [C::default(); BLOCK];
        for start in (0..span.len()).step_by(BLOCK) {
            let buffer = &mut scratch[..BLOCK.min(span.len() - start)];
            if write {
                // SAFETY: called from `run`, whose caller promises that the gradients may be read.
                unsafe { load(&span, start, buffer) };
                multiply_all(buffer, inv);
                // SAFETY: as above, and they may be written: chunks share no bytes, and no slice is alive. The check
                // below must see the rounded values.
                unsafe { store(&span, start, buffer) };
            }
            // SAFETY: as above; nothing writes the gradient while the values are read.
            let values = unsafe { view(&span, start, buffer) };
            let offset = chunk.offset() + start as u64;
            total.add(summarize(values, factor, offset, self.kind), self.kind);
        }
        total
    }
}

/// The statistics of one block, multiplied by `factor`. The block begins at element `offset` of its tensor.
pub(super) fn summarize<C: Compute>(
    values: &[C],
    factor: C,
    offset: u64,
    kind: NormKind,
) -> Partial {
    let squares = sum(values, factor, &|value| value * value);
    let norm = match kind {
        NormKind::L2 => squares,
        NormKind::L1 => sum(values, factor, &f64::abs),
        NormKind::Max if squares.is_nan() => f64::NAN,
        NormKind::Max => values.iter().fold(0.0, |max, value| {
            f64::max(max, (*value * factor).to_f64().abs())
        }),
    };
    let mut partial = Partial {
        norm,
        ..Partial::NONE
    };
    if squares.is_finite() {
        return partial;
    }
    for (value, index) in values.iter().zip(offset..) {
        let value = (*value * factor).to_f64();
        if value.is_finite() {
            continue;
        }
        partial.first = partial.first.min(index);
        if value.is_nan() {
            partial.nan += 1;
        } else {
            partial.inf += 1;
        }
    }
    partial
}

vectorized! {
    /// The sum of `term` of each value times `factor`, in lanes, so that it vectorizes with a fixed order.
    fn sum<C: Compute, F: Fn(f64) -> f64>(values: &[C], factor: C, term: &F) -> f64 {
        const LANES: usize = 16;
        let mut lanes = [0.0; LANES];
        let (rows, rest) = values.as_chunks::<LANES>();
        for row in rows {
            for (lane, value) in lanes.iter_mut().zip(row) {
                *lane += term((*value * factor).to_f64());
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += term((*value * factor).to_f64());
        }
        lanes.iter().sum()
    }
}

impl Kernel for GradientCheck {
    fn entry(&self) -> &'static str {
        if self.write {
            "gradient_unscale"
        } else {
            "gradient_check"
        }
    }

    fn elements(&self) -> u64 {
        // The kernel must run even without elements, to write the statistics of empty tensors.
        self.table.elements().max(self.table.tensors() as u64)
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        push_optional(into, self.inv_scale.as_ref());
        push_spans(
            into,
            &[&self.found_inf, &self.stats.norms, &self.stats.counts],
        );
        into.u32(self.kind.code());
    }

    fn traffic(&self) -> Option<Traffic> {
        let read = self.table.bytes(0);
        let written = if self.write { read } else { 0 };
        Some(Traffic { read, written })
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise; nothing writes the inverse scale meanwhile.
        let inv = self
            .inv_scale
            .map_or(1.0, |span| unsafe { span.slice::<f32>() }[0]);
        // SAFETY: the table was uploaded in stream order before this kernel.
        let chunks: Vec<_> = unsafe { self.table.chunks() }.collect();
        let partials: Vec<Partial> = if self.table.elements() < PARALLEL_MIN as u64 {
            chunks.iter().map(|chunk| self.chunk(chunk, inv)).collect()
        } else {
            chunks
                .par_iter()
                .map(|chunk| self.chunk(chunk, inv))
                .collect()
        };

        let mut totals = vec![Some(Partial::NONE); self.table.tensors()];
        for (chunk, partial) in chunks.iter().zip(partials) {
            if let Some(total) = &mut totals[chunk.tensor()] {
                total.add(partial, self.kind);
            }
        }
        // SAFETY: only this kernel accesses the statistics and the flag now.
        unsafe { self.stats.write(&totals, &self.found_inf) };
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the lower 32 bits are what is wanted"
)]
const fn low_word(value: u64) -> u32 {
    value as u32
}

#[cfg(test)]
#[path = "gradient_check_tests.rs"]
mod tests;
