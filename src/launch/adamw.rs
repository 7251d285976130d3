//! AdamW: Adam with decoupled weight decay, over any number of tensors.
//!
//! ```text
//! k = k + 1                                     per tensor, on the device
//! w = w · (1 − rate · decay)
//! m = m + (g − m) · (1 − β₁)
//! v = β₂ · v + (1 − β₂) · g · g
//! w = w − rate / (1 − β₁ᵏ) · m / (√v / √(1 − β₂ᵏ) + ε)
//! ```
//!
//! Products and quotients are taken from the left, as in PyTorch: (1 − β₂) · g · g is finite for larger g.
//!
//! A skipped step leaves w, m, v and k as they are. Two launches: [`Advance`] counts the step and derives
//! the bias corrections in f64, [`AdamW`] moves the weights; both decide by the same flag.
//!
//! Twins: [`Advance`], [`AdamW`].

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::{ChunkTable, MAX_COLUMNS};
use crate::launch::compute::Compute;
use crate::launch::device::push_spans;
use crate::launch::update_pass::{Rule, STATE, StepScalars, for_each_row, traffic};
use crate::launch::vector::vectorized;
use crate::launch::{Span, enqueue};

/// Columns of the table.
pub(crate) const COLUMNS: usize = STATE + 2;

/// The numbers of the formula.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWNumbers {
    pub(crate) learning_rate: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) epsilon: f64,
    pub(crate) weight_decay: f64,
}

/// Device memory that is not a row of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWSteps {
    /// u32, one a tensor: steps applied so far.
    pub(crate) steps: Span,
    /// f64, two a tensor: 1 − β₁ᵏ and √(1 − β₂ᵏ). Scratch.
    pub(crate) corrections: Span,
}

/// One step for all rows of `table`: parameter, gradient, master weight, first and second moment.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn adamw(
    stream: &Stream,
    table: &ChunkTable,
    scalars: &StepScalars,
    steps: &AdamWSteps,
    numbers: &AdamWNumbers,
) -> Result<()> {
    let op = "adamw";
    table.check(op, stream, COLUMNS)?;
    scalars.check(op, stream)?;
    let tensors = table.tensors();
    for (span, dtype, len) in [
        (steps.steps, DType::U32, tensors),
        (steps.corrections, DType::F64, 2 * tensors),
    ] {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    if table.elements() == 0 {
        return Ok(());
    }
    let (table, scalars, steps, numbers) = (*table, *scalars, *steps, *numbers);
    enqueue(
        stream,
        Advance {
            table,
            scalars,
            steps,
            betas: numbers.betas,
        },
    )?;
    enqueue(
        stream,
        AdamW {
            table,
            scalars,
            corrections: steps.corrections,
            numbers,
        },
    )
}

#[derive(Debug)]
struct Advance {
    table: ChunkTable,
    scalars: StepScalars,
    steps: AdamWSteps,
    betas: (f64, f64),
}

impl Kernel for Advance {
    fn entry(&self) -> &'static str {
        "adamw_advance"
    }

    fn elements(&self) -> u64 {
        self.table.tensors() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        self.scalars.push_to(into);
        push_spans(into, &[&self.steps.steps, &self.steps.corrections]);
        into.f64(self.betas.0);
        into.f64(self.betas.1);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    fn grid(&self) -> Grid {
        // A thread takes a chunk.
        Grid::over(4 * self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        if unsafe { self.scalars.factors() }.is_none() {
            return;
        }
        // SAFETY: only this kernel accesses the counters now.
        let steps = unsafe { self.steps.steps.slice_mut::<u32>() };
        // SAFETY: as above.
        let corrections = unsafe { self.steps.corrections.slice_mut::<f64>() };
        // SAFETY: the table was uploaded in stream order before this kernel.
        let chunks = unsafe { self.table.chunks() };
        // A tensor steps once, by its first chunk; tensors without a gradient have none.
        for tensor in chunks
            .filter(|chunk| chunk.offset() == 0)
            .map(|chunk| chunk.tensor())
        {
            steps[tensor] = steps[tensor].saturating_add(1);
            let power = f64::from(steps[tensor]);
            corrections[2 * tensor] = 1.0 - self.betas.0.powf(power);
            corrections[2 * tensor + 1] = (1.0 - self.betas.1.powf(power)).sqrt();
        }
    }
}

#[derive(Debug)]
struct AdamW {
    table: ChunkTable,
    scalars: StepScalars,
    corrections: Span,
    numbers: AdamWNumbers,
}

/// The formula with the corrections at hand.
struct Formula<'a> {
    numbers: &'a AdamWNumbers,
    corrections: &'a [f64],
}

impl Rule for Formula<'_> {
    fn apply<C: Compute>(
        &self,
        tensor: usize,
        weights: &mut [C],
        gradients: &[C],
        [first, second]: [&mut [C]; MAX_COLUMNS - STATE],
    ) {
        let AdamWNumbers {
            learning_rate,
            betas,
            epsilon,
            weight_decay,
        } = *self.numbers;
        let keep = C::from_f64(1.0 - learning_rate * weight_decay);
        let (first_share, second_share) = (C::from_f64(1.0 - betas.0), C::from_f64(1.0 - betas.1));
        let second_keep = C::from_f64(betas.1);
        let rate = C::from_f64(learning_rate / self.corrections[2 * tensor]);
        let correction = C::from_f64(self.corrections[2 * tensor + 1]);
        let epsilon = C::from_f64(epsilon);
        let coefficients = Coefficients {
            keep,
            first_share,
            second_share,
            second_keep,
            rate,
            correction,
            epsilon,
        };
        update(weights, gradients, first, second, &coefficients);
    }
}

/// The numbers of the formula as one block uses them, in the type of the computation.
struct Coefficients<C> {
    keep: C,
    first_share: C,
    second_share: C,
    second_keep: C,
    rate: C,
    correction: C,
    epsilon: C,
}

vectorized! {
    /// The formula for slices of one length.
    fn update<C: Compute>(
        weights: &mut [C],
        gradients: &[C],
        first: &mut [C],
        second: &mut [C],
        by: &Coefficients<C>,
    ) {
        let moments = first.iter_mut().zip(second);
        for ((weight, gradient), (first, second)) in weights.iter_mut().zip(gradients).zip(moments)
        {
            *first = *first + (*gradient - *first) * by.first_share;
            *second = by.second_keep * *second + by.second_share * *gradient * *gradient;
            let denominator = second.root() / by.correction + by.epsilon;
            *weight = *weight * by.keep - by.rate * *first / denominator;
        }
    }
}

impl Kernel for AdamW {
    fn entry(&self) -> &'static str {
        "adamw"
    }

    fn elements(&self) -> u64 {
        self.table.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        self.scalars.push_to(into);
        push_spans(into, &[&self.corrections]);
        into.f64(self.numbers.learning_rate);
        into.f64(self.numbers.betas.0);
        into.f64(self.numbers.betas.1);
        into.f64(self.numbers.epsilon);
        into.f64(self.numbers.weight_decay);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(traffic(&self.table))
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        let Some(factors) = (unsafe { self.scalars.factors() }) else {
            return;
        };
        // SAFETY: `Advance` wrote the corrections before, in stream order.
        let corrections = unsafe { self.corrections.slice::<f64>() };
        let formula = Formula {
            numbers: &self.numbers,
            corrections,
        };
        // SAFETY: the caller's promise; launchers of tables know that rows share no bytes.
        unsafe { for_each_row(&self.table, factors, &formula) };
    }
}
