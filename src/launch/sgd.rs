//! Stochastic gradient descent with momentum, over any number of tensors.
//!
//! ```text
//! g = g + decay · w
//! b = momentum · b + g
//! w = w − rate · (g + momentum · b  if nesterov, else b)
//! ```
//!
//! The momentum buffer starts as zeros. So the first applied step sets b = g as in PyTorch, however many steps were
//! skipped before it, and no first-step flag is needed. Without momentum there is no buffer.
//!
//! Bytes per parameter, including the gradient check: f32 24 with momentum, 16 without; 16-bit gradient with an f32
//! master 22 and 14, with a split master 20 and 12.
//!
//! Twin: [`Sgd`].

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::error::Result;
use crate::launch::chunk_table::ChunkTable;
use crate::launch::compute::Compute;
use crate::launch::device::push_spans;
use crate::launch::update_pass::{
    GroupSettings, MAX_STATES, Rule, SETTING_WORDS, STATE, StepScalars, check_found, for_each_row,
    traffic,
};
use crate::launch::vector::vectorized;
use crate::launch::{Span, enqueue};

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

impl SgdNumbers {
    /// The row of a group with these settings.
    pub(crate) fn words(&self) -> [u64; SETTING_WORDS] {
        let mut words = [0.0; SETTING_WORDS];
        words[0] = self.learning_rate;
        words[1] = self.momentum;
        words[2] = self.weight_decay;
        words[3] = f64::from(u8::from(self.nesterov));
        words.map(f64::to_bits)
    }

    fn of_row(row: [f64; SETTING_WORDS]) -> Self {
        Self {
            learning_rate: row[0],
            momentum: row[1],
            weight_decay: row[2],
            nesterov: row[3] != 0.0,
        }
    }
}

/// One step for all rows of `table`: parameter, gradient, master, momentum. `found` counts the weights that become
/// infinite or NaN.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn sgd(
    stream: &Stream,
    table: &ChunkTable,
    scalars: &StepScalars,
    settings: &GroupSettings,
    found: &Span,
) -> Result<()> {
    table.check("sgd", stream, COLUMNS)?;
    scalars.check("sgd", stream)?;
    settings.check("sgd", stream, table.tensors())?;
    check_found("sgd", stream, found, table.tensors())?;
    if table.elements() == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Sgd {
            table: *table,
            scalars: *scalars,
            settings: *settings,
            found: *found,
        },
    )
}

#[derive(Debug)]
struct Sgd {
    table: ChunkTable,
    scalars: StepScalars,
    settings: GroupSettings,
    found: Span,
}

/// The numbers of the formula in the type of the computation.
struct Coefficients<C> {
    rate: C,
    momentum: C,
    decay: C,
    nesterov: bool,
}

impl Rule for Sgd {
    fn apply<C: Compute>(
        &self,
        tensor: usize,
        weights: &mut [C],
        gradients: &mut [C],
        [buffer, ..]: [&mut [C]; MAX_STATES],
    ) {
        // SAFETY: called from `run`; settings are written in stream order only.
        let numbers = SgdNumbers::of_row(unsafe { self.settings.of(tensor) });
        let by = Coefficients {
            rate: C::from_f64(numbers.learning_rate),
            momentum: C::from_f64(numbers.momentum),
            decay: C::from_f64(numbers.weight_decay),
            nesterov: numbers.nesterov,
        };
        if buffer.is_empty() {
            descend(weights, gradients, &by);
        } else {
            descend_with_momentum(weights, gradients, buffer, &by);
        }
    }

    fn random_key(&self, _tensor: usize) -> u64 {
        unreachable!("momentum is kept in the type of the computation")
    }
}

vectorized! {
    fn descend<C: Compute>(weights: &mut [C], gradients: &[C], by: &Coefficients<C>) {
        for (weight, gradient) in weights.iter_mut().zip(gradients) {
            *weight = *weight - by.rate * (*gradient + by.decay * *weight);
        }
    }
}

vectorized! {
    fn descend_with_momentum<C: Compute>(
        weights: &mut [C],
        gradients: &[C],
        buffer: &mut [C],
        by: &Coefficients<C>,
    ) {
        for ((weight, gradient), buffer) in weights.iter_mut().zip(gradients).zip(buffer) {
            let gradient = *gradient + by.decay * *weight;
            *buffer = by.momentum * *buffer + gradient;
            let direction = if by.nesterov {
                gradient + by.momentum * *buffer
            } else {
                *buffer
            };
            *weight = *weight - by.rate * direction;
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
        self.settings.push_to(into);
        push_spans(into, &[&self.found]);
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
            // SAFETY: the caller's promise; the rows of a table share no bytes.
            unsafe { for_each_row(&self.table, factors, &self.found, self) };
        }
    }
}
