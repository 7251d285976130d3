//! What every optimizer kernel does around its formula: skip, unscale, clip, master weights.
//!
//! ```text
//! if found_inf ≠ 0: nothing is written
//! for each element:  w = master, or the parameter;  g = gradient · inv_scale · clip
//!                    (w, state) = rule(w, g, state)
//!                    master = w;  parameter = w rounded once
//! ```
//!
//! Computed in f32, for f64 parameters in f64. The three scalars lie in device memory, so a step is decided
//! and scaled there without the host waiting for it.
//!
//! Rows of the table: parameter, gradient, master weight (f32, only beside a 16-bit parameter), then the
//! optimizer's state in the type of the computation. The gradient is only read.

use rayon::prelude::*;

use crate::driver::{Arguments, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::{Chunk, ChunkTable, MAX_COLUMNS};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, multiply_all, store};
use crate::launch::device::push_optional;
use crate::launch::{PARALLEL_MIN, Span};

/// Column of the parameters.
pub(crate) const PARAMETER: usize = 0;
/// Column of the gradients.
pub(crate) const GRADIENT: usize = 1;
/// Column of the master weights.
pub(crate) const MASTER: usize = 2;
/// First column of optimizer state.
pub(crate) const STATE: usize = 3;

/// Most state tensors of one optimizer.
const MAX_STATES: usize = MAX_COLUMNS - STATE;

/// The scalars that decide and scale a step, each an f32 on the device or absent.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepScalars {
    /// The step is skipped unless this is 0.
    pub(crate) found_inf: Option<Span>,
    /// Gradients are multiplied by this first.
    pub(crate) inv_scale: Option<Span>,
    /// Then by this.
    pub(crate) clip: Option<Span>,
}

impl StepScalars {
    /// Refuses scalars of another stream, type or length.
    pub(crate) fn check(&self, op: &'static str, stream: &Stream) -> Result<()> {
        for span in [self.found_inf, self.inv_scale, self.clip].iter().flatten() {
            span.check_stream(op, stream)?;
            span.check_dtype(op, DType::F32)?;
            span.check_len(op, 1)?;
        }
        Ok(())
    }

    /// Adds the addresses for device code.
    pub(super) fn push_to(&self, into: &mut Arguments) {
        for span in [self.found_inf, self.inv_scale, self.clip] {
            push_optional(into, span.as_ref());
        }
    }

    /// The factors of the gradients, or `None` if the step is to be skipped.
    ///
    /// # Safety
    /// As [`Span::slice`].
    pub(super) unsafe fn factors(&self) -> Option<[f32; 2]> {
        // SAFETY: the caller's promise; the scalars were written before, in stream order.
        let read = |span: Span| unsafe { span.slice::<f32>() }[0];
        let found_inf = self.found_inf.map_or(0.0, read);
        // NaN is not equal to 0 either.
        (found_inf == 0.0).then(|| [self.inv_scale, self.clip].map(|span| span.map_or(1.0, read)))
    }
}

/// One optimizer's formula for a block of weights.
pub(super) trait Rule: Sync {
    /// Moves `weights` by `gradients`. `states` are as long; `tensor` is the parameter's index.
    fn apply<C: Compute>(
        &self,
        tensor: usize,
        weights: &mut [C],
        gradients: &[C],
        states: [&mut [C]; MAX_STATES],
    );
}

/// What a pass over `table` moves: weights, gradients and state are read; weights and state are written, and so are
/// parameters beside master weights.
pub(super) fn traffic(table: &ChunkTable) -> Traffic {
    let states: u64 = (STATE..table.columns())
        .map(|column| table.bytes(column))
        .sum();
    let parameters = table.bytes(PARAMETER);
    let masters = table.bytes(MASTER);
    Traffic {
        // A parameter that has a master weight is not read.
        read: parameters - table.bytes_beside(MASTER) + table.bytes(GRADIENT) + masters + states,
        written: parameters + masters + states,
    }
}

/// Applies `rule` to every row of `table`, gradients multiplied by `factors`.
///
/// # Safety
/// As [`Kernel::run`](crate::driver::Kernel::run), for all rows of the table.
pub(super) unsafe fn for_each_row(table: &ChunkTable, factors: [f32; 2], rule: &impl Rule) {
    // SAFETY: the caller's promise.
    let chunks: Vec<_> = unsafe { table.chunks() }.collect();
    let row = |chunk: &Chunk<'_>| {
        // SAFETY: the caller's promise.
        let columns: [_; MAX_COLUMNS] = std::array::from_fn(|column| {
            // SAFETY: as above; columns past the table's last are absent.
            (column < table.columns())
                .then(|| unsafe { chunk.column(column) })
                .flatten()
        });
        let parameter = columns[PARAMETER].expect("every row has a parameter");
        if parameter.dtype() == DType::F64 {
            chunk_in::<f64>(chunk.tensor(), columns, factors, rule);
        } else {
            chunk_in::<f32>(chunk.tensor(), columns, factors, rule);
        }
    };
    if table.elements() < PARALLEL_MIN as u64 {
        chunks.iter().for_each(row);
    } else {
        chunks.par_iter().for_each(row);
    }
}

fn chunk_in<C: Compute>(
    tensor: usize,
    columns: [Option<Span>; MAX_COLUMNS],
    factors: [f32; 2],
    rule: &impl Rule,
) {
    let parameter = columns[PARAMETER].expect("every row has a parameter");
    let gradient = columns[GRADIENT].expect("every row has a gradient");
    let weight = columns[MASTER].unwrap_or(parameter);
    let factors = factors
        .map(C::from_f32)
        .map(|factor| (factor != C::from_f32(1.0)).then_some(factor));
    let (mut weights, mut gradients) = ([C::default(); BLOCK], [C::default(); BLOCK]);
    for start in (0..parameter.len()).step_by(BLOCK) {
        let len = BLOCK.min(parameter.len() - start);
        let block = |span: Span| span.sub(start, len);
        let (weights, gradients) = (&mut weights[..len], &mut gradients[..len]);
        // SAFETY: called from a `run`, whose caller promises that rows are live and not accessed by others.
        unsafe { load(&gradient, start, gradients) };
        for factor in factors.iter().flatten() {
            multiply_all(gradients, *factor);
        }
        let states = std::array::from_fn(|state| match columns[STATE + state] {
            // SAFETY: as above; the columns of a row share no bytes.
            Some(span) => unsafe { block(span).slice_mut::<C>() },
            None => &mut [],
        });
        let in_place = weight.dtype() == C::DTYPE;
        let weights = if in_place {
            // SAFETY: as above.
            unsafe { block(weight).slice_mut::<C>() }
        } else {
            // SAFETY: as above.
            unsafe { load(&weight, start, weights) };
            weights
        };
        rule.apply(tensor, weights, gradients, states);
        if !in_place {
            // SAFETY: as above.
            unsafe { store(&weight, start, weights) };
        }
        if columns[MASTER].is_some() {
            // SAFETY: as above; the parameter shares no bytes with its master weight.
            unsafe { store(&parameter, start, weights) };
        }
    }
}
