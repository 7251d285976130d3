//! Stochastic gradient descent with momentum, over any number of tensors.
//!
//! ```text
//! g = g + decay · w
//! b = momentum · b + g
//! w = w − rate · (g + momentum · b  if nesterov, else b)
//! ```
//!
//! The momentum buffer begins as zeros, so the first step that is applied sets b = g as in PyTorch, however
//! many were skipped before it; no first-step mark is needed. Without momentum there is no buffer.
//!
//! Twin: [`Sgd`].

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::error::Result;
use crate::launch::chunk_table::{ChunkTable, MAX_COLUMNS};
use crate::launch::compute::Compute;
use crate::launch::enqueue;
use crate::launch::update_pass::{Rule, STATE, StepScalars, for_each_row, traffic};

/// Columns of the table.
pub(crate) const COLUMNS: usize = STATE + 1;

/// The numbers of the formula.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SgdNumbers {
    pub(crate) learning_rate: f64,
    pub(crate) momentum: f64,
    pub(crate) weight_decay: f64,
    pub(crate) nesterov: bool,
}

/// One step for all rows of `table`: parameter, gradient, master weight, momentum.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn sgd(
    stream: &Stream,
    table: &ChunkTable,
    scalars: &StepScalars,
    numbers: &SgdNumbers,
) -> Result<()> {
    table.check("sgd", stream, COLUMNS)?;
    scalars.check("sgd", stream)?;
    if table.elements() == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Sgd {
            table: *table,
            scalars: *scalars,
            numbers: *numbers,
        },
    )
}

#[derive(Debug)]
struct Sgd {
    table: ChunkTable,
    scalars: StepScalars,
    numbers: SgdNumbers,
}

impl Rule for SgdNumbers {
    fn apply<C: Compute>(
        &self,
        _tensor: usize,
        weights: &mut [C],
        gradients: &[C],
        [buffer, _]: [&mut [C]; MAX_COLUMNS - STATE],
    ) {
        let momentum = C::from_f64(self.momentum);
        let decay = C::from_f64(self.weight_decay);
        let rate = C::from_f64(self.learning_rate);
        if buffer.is_empty() {
            for (weight, gradient) in weights.iter_mut().zip(gradients) {
                *weight = *weight - rate * (*gradient + decay * *weight);
            }
            return;
        }
        for ((weight, gradient), buffer) in weights.iter_mut().zip(gradients).zip(buffer) {
            let gradient = *gradient + decay * *weight;
            *buffer = momentum * *buffer + gradient;
            let direction = if self.nesterov {
                gradient + momentum * *buffer
            } else {
                *buffer
            };
            *weight = *weight - rate * direction;
        }
    }
}

impl Kernel for Sgd {
    fn entry(&self) -> &'static str {
        "sgd"
    }

    fn elements(&self) -> u64 {
        self.table.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        self.scalars.push_to(into);
        into.f64(self.numbers.learning_rate);
        into.f64(self.numbers.momentum);
        into.f64(self.numbers.weight_decay);
        into.u32(u32::from(self.numbers.nesterov));
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(traffic(&self.table))
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        if let Some(factors) = unsafe { self.scalars.factors() } {
            // SAFETY: the caller's promise; launchers of tables know that rows share no bytes.
            unsafe { for_each_row(&self.table, factors, &self.numbers) };
        }
    }
}
