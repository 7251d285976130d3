//! Produces gradients, by a sum or a conversion, and checks them in the same pass.
//!
//! ```text
//! sum[i]   = term[i], or sum[i] + term[i], rounded once into its type
//! partials = the findings of [`gradient_check`](super::gradient_check) for sum · inv_scale, chunk by chunk
//! ```
//!
//! [`produce`] is the pass that has to write the gradient anyway. [`gather`] adds up the partials of all tensors; it
//! reads a few words per chunk, where a check reads every element. Both process elements and chunks in the order of a
//! check, so norms, counts and flags are bit-identical to those of a check that reads the gradients again.
//!
//! Partials are sums of squares: a check for another norm must read the gradients.
//!
//! Twins: [`Produce`], [`Gather`].

use rayon::prelude::*;

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::chunk_table::{CHUNK_ELEMENTS, ChunkTable, SCRATCH_WORDS};
use crate::launch::compute::{CHUNK as BLOCK, Compute, add_all, load, store, view};
use crate::launch::device::{push_optional, push_sizes, push_spans, push_types};
use crate::launch::gradient_check::{GradientStats, Partial, check_operand, summarize};
use crate::launch::{NormKind, PARALLEL_MIN, Span, enqueue};

/// Whether [`produce`] accepts a term of type `term` for a gradient of type `sum`: the same type, or 16 bits for f32.
pub(crate) fn can_produce(term: DType, sum: DType) -> bool {
    term == sum && term.is_float() || term.is_half() && sum == DType::F32
}

/// 64-bit words that the partials of a gradient of `len` elements take.
pub(crate) fn partial_words(len: usize) -> usize {
    len.div_ceil(CHUNK_ELEMENTS) * SCRATCH_WORDS
}

/// Operands of [`produce`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProduceOperands {
    /// The addend, or the value to convert, of a type that [`can_produce`] accepts.
    pub(crate) term: Span,
    /// The gradient.
    pub(crate) sum: Span,
    /// f32: the factor that the check multiplies by; 1 if absent.
    pub(crate) inv_scale: Option<Span>,
    /// f64, [`partial_words`] of them; only the bits matter.
    pub(crate) partials: Span,
}

/// Enqueues `sum = sum + term`, or `sum = term` unless `add`, and the check of the result.
///
/// # Errors
/// [`Error::InvalidArgument`] if the operands do not fit each other, or overlap.
pub(crate) fn produce(
    op: &'static str,
    stream: &Stream,
    operands: &ProduceOperands,
    add: bool,
) -> Result<()> {
    let ProduceOperands {
        term,
        sum,
        inv_scale,
        partials,
    } = operands;
    if !can_produce(term.dtype(), sum.dtype()) {
        let reason = format!(
            "a term of {} for a gradient of {}",
            term.dtype(),
            sum.dtype()
        );
        return Err(Error::argument(op, reason));
    }
    check_operand(op, stream, term, term.dtype(), sum.len())?;
    sum.check_stream(op, stream)?;
    sum.check_disjoint(op, term)?;
    check_operand(op, stream, partials, DType::F64, partial_words(sum.len()))?;
    if let Some(inv_scale) = inv_scale {
        check_operand(op, stream, inv_scale, DType::F32, 1)?;
    }
    if sum.is_empty() {
        return Ok(());
    }
    enqueue(
        stream,
        Produce {
            operands: *operands,
            add,
        },
    )
}

/// Adds up the partials of each tensor, which are the only column of `table`. Writes `stats` of these tensors and sets
/// `found_inf` if one is not finite. Unless `keep`, writes the stats of all other tensors as if they had no elements.
///
/// # Errors
/// [`Error::InvalidArgument`] if the operands do not fit each other.
pub(crate) fn gather(
    stream: &Stream,
    table: &ChunkTable,
    found_inf: &Span,
    stats: &GradientStats,
    keep: bool,
) -> Result<()> {
    let op = "check";
    table.check(op, stream, 1)?;
    check_operand(op, stream, found_inf, DType::F32, 1)?;
    stats.check(op, stream, table.tensors())?;
    let (table, found_inf, stats) = (*table, *found_inf, *stats);
    enqueue(
        stream,
        Gather {
            table,
            found_inf,
            stats,
            keep,
        },
    )
}

#[derive(Debug)]
struct Produce {
    operands: ProduceOperands,
    add: bool,
}

impl Produce {
    /// Computes chunk `index` of the sum, and returns what the check found.
    fn chunk<C: Compute>(&self, index: usize, inv: C) -> Partial {
        let ProduceOperands { term, sum, .. } = &self.operands;
        let start = index * CHUNK_ELEMENTS;
        let end = sum.len().min(start + CHUNK_ELEMENTS);
        let (mut terms, mut sums) = ([C::default(); BLOCK], [C::default(); BLOCK]);
        let mut total = Partial::NONE;
        for start in (start..end).step_by(BLOCK) {
            let len = BLOCK.min(end - start);
            let (terms, sums) = (&mut terms[..len], &mut sums[..len]);
            // SAFETY: called from `run`, whose caller promises that nothing writes the term.
            unsafe { load(term, start, terms) };
            if self.add {
                // SAFETY: as above; only this task accesses these elements of the sum.
                unsafe { load(sum, start, sums) };
                add_all(terms, sums);
            }
            // SAFETY: as above.
            unsafe { store(sum, start, terms) };
            // SAFETY: as above, and no slice is alive. The check must see the rounded values.
            let values = unsafe { view(sum, start, sums) };
            total.add(
                summarize(values, inv, start as u64, NormKind::L2),
                NormKind::L2,
            );
        }
        total
    }

    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        let ProduceOperands {
            sum,
            inv_scale,
            partials,
            ..
        } = &self.operands;
        // SAFETY: the caller's promise; nothing writes the inverse scale meanwhile.
        let inv = inv_scale.map_or(1.0, |span| unsafe { span.slice::<f32>() }[0]);
        // SAFETY: only this kernel accesses the partials now.
        let words: &mut [u64] = bytemuck::cast_slice_mut(unsafe { partials.slice_mut::<f64>() });
        let chunk = |(index, words): (usize, &mut [u64])| {
            words.copy_from_slice(&self.chunk(index, C::from_f32(inv)).to_words());
        };
        if sum.len() < PARALLEL_MIN {
            words
                .chunks_exact_mut(SCRATCH_WORDS)
                .enumerate()
                .for_each(chunk);
        } else {
            words
                .par_chunks_exact_mut(SCRATCH_WORDS)
                .enumerate()
                .for_each(chunk);
        }
    }
}

impl Kernel for Produce {
    fn entry(&self) -> &'static str {
        "gradient_produce"
    }

    fn elements(&self) -> u64 {
        self.operands.sum.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let ProduceOperands {
            term,
            sum,
            inv_scale,
            partials,
        } = &self.operands;
        push_spans(into, &[term, sum]);
        push_sizes(into, &[sum.len(), CHUNK_ELEMENTS]);
        push_optional(into, inv_scale.as_ref());
        push_spans(into, &[partials]);
        push_types(into, &[term, sum]);
        into.u32(u32::from(self.add));
    }

    fn traffic(&self) -> Option<Traffic> {
        let sum = self.operands.sum.bytes();
        let added = if self.add { sum } else { 0 };
        Some(Traffic {
            read: self.operands.term.bytes() + added,
            written: sum,
        })
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.elements().div_ceil(CHUNK_ELEMENTS as u64))
    }

    unsafe fn run(&self) {
        if self.operands.sum.dtype() == DType::F64 {
            // SAFETY: the caller's promise.
            unsafe { self.run_in::<f64>() };
        } else {
            // SAFETY: the caller's promise.
            unsafe { self.run_in::<f32>() };
        }
    }
}

#[derive(Debug)]
struct Gather {
    table: ChunkTable,
    found_inf: Span,
    stats: GradientStats,
    keep: bool,
}

impl Kernel for Gather {
    fn entry(&self) -> &'static str {
        "gradient_gather"
    }

    fn elements(&self) -> u64 {
        self.table.tensors() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        push_spans(
            into,
            &[&self.found_inf, &self.stats.norms, &self.stats.counts],
        );
        into.u32(u32::from(self.keep));
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    fn grid(&self) -> Grid {
        Grid::of_warps(self.elements())
    }

    unsafe fn run(&self) {
        let nothing = (!self.keep).then_some(Partial::NONE);
        let mut totals = vec![nothing; self.table.tensors()];
        // SAFETY: the table was uploaded in stream order before this kernel.
        for chunk in unsafe { self.table.chunks() } {
            // SAFETY: the partials were written before, in stream order.
            let span = unsafe { chunk.column(0) }.expect("a row has its partials");
            // SAFETY: as above.
            let words: &[u64] = bytemuck::cast_slice(unsafe { span.slice::<f64>() });
            let total = totals[chunk.tensor()].get_or_insert(Partial::NONE);
            for partial in words.chunks_exact(SCRATCH_WORDS) {
                total.add(Partial::from_words(partial), NormKind::L2);
            }
        }
        // SAFETY: only this kernel accesses the statistics and the flag now.
        unsafe { self.stats.write(&totals, &self.found_inf) };
    }
}
