//! Adam, with decoupled weight decay (AdamW) or without, with or without amsgrad, over any number of tensors.
//!
//! ```text
//! k = k + 1                                     per tensor, on the device
//! w = w · (1 − rate · decay)                    if decay is decoupled
//! g = g + decay · w                             else, unless decay = 0
//! m = m + (g − m) · (1 − β₁)
//! v = β₂ · v + (1 − β₂) · g · g
//! x = max(x, v)                                 amsgrad: if a third state is present; else x = v
//! w = w − rate / (1 − β₁ᵏ) · m / (√x / √(1 − β₂ᵏ) + ε)
//! ```
//!
//! Products and quotients are evaluated from left to right, as in PyTorch: (1 − β₂) · g · g then stays finite for
//! larger g.
//!
//! A skipped step leaves w, m, v, x and k unchanged. A step takes two launches for all groups together: [`Prepare`]
//! only writes a row of f64 coefficients for each tensor, from its group's settings and k + 1; [`Adam`] updates the
//! weights and counts the step. So if only the first can be enqueued, nothing but scratch has changed. Both read the
//! same flag. State in bf16 is rounded with random numbers that depend on the seed, the tensor's index, k and the
//! element's index, so a skipped step does not advance them either.
//!
//! Bytes moved per parameter, read or written, for a gradient element of `g` bytes:
//!
//! ```text
//! check g + gradient g + weights + moments      (amsgrad: half as much again for moments)
//! weights: f32 in place 8 | f32 master and 16-bit copy 10 | split master 8
//! moments: f32 16 | bf16 8
//! ```
//!
//! | path | bytes |
//! |---|---|
//! | f32 | 4 + 4 + 8 + 16 = 32 |
//! | 16-bit gradient, f32 master | 2 + 2 + 10 + 16 = 30 |
//! | 16-bit gradient, split master | 2 + 2 + 8 + 16 = 28 |
//! | 16-bit gradient, f32 master, bf16 moments | 2 + 2 + 10 + 8 = 22 |
//! | 16-bit gradient, split master, bf16 moments | 2 + 2 + 8 + 8 = 20 |
//!
//! Twins: [`Prepare`], [`Adam`].

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::ChunkTable;
use crate::launch::compute::Compute;
use crate::launch::device::push_spans;
use crate::launch::stochastic::random_key;
use crate::launch::update_pass::{
    GroupSettings, MAX_STATES, Rule, SETTING_WORDS, STATE, StepScalars, check_found, for_each_row,
    traffic,
};
use crate::launch::vector::vectorized;
use crate::launch::{Span, enqueue};

/// Columns of the table.
pub(crate) const COLUMNS: usize = STATE + 3;

/// Words of a tensor's row of coefficients.
pub(crate) const ROW_WORDS: usize = 8;

/// The settings of a group.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamNumbers {
    pub(crate) learning_rate: f64,
    pub(crate) betas: (f64, f64),
    pub(crate) epsilon: f64,
    pub(crate) weight_decay: f64,
    pub(crate) is_decoupled: bool,
    /// Seed of the random numbers that round bf16 moments.
    pub(crate) seed: u64,
}

impl AdamNumbers {
    /// The row of a group with these settings.
    pub(crate) fn words(&self) -> [u64; SETTING_WORDS] {
        let mut words = [0.0; SETTING_WORDS];
        words[0] = self.learning_rate;
        words[1] = self.betas.0;
        words[2] = self.betas.1;
        words[3] = self.epsilon;
        words[4] = self.weight_decay;
        words[5] = f64::from(u8::from(self.is_decoupled));
        let mut words = words.map(f64::to_bits);
        words[6] = self.seed;
        words
    }
}

/// Device memory outside the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamSteps {
    /// u32, one per tensor: steps applied so far.
    pub(crate) steps: Span,
    /// f64, [`ROW_WORDS`] per tensor. Scratch.
    pub(crate) rows: Span,
    /// 64-bit words: counts of the weights that become infinite or NaN.
    pub(crate) found: Span,
}

/// One step for all rows of `table`: parameter, gradient, master, first and second moment, and, for
/// amsgrad, the largest second moment. All states of a row have the same type.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other;
/// [`Error::Driver`](crate::Error::Driver) if the driver refuses. After an error, only scratch may be written.
pub(crate) fn adam(
    stream: &Stream,
    table: &ChunkTable,
    scalars: &StepScalars,
    settings: &GroupSettings,
    steps: &AdamSteps,
) -> Result<()> {
    let op = "adam";
    table.check(op, stream, COLUMNS)?;
    scalars.check(op, stream)?;
    let tensors = table.tensors();
    settings.check(op, stream, tensors)?;
    check_found(op, stream, &steps.found, tensors)?;
    for (span, dtype, len) in [
        (steps.steps, DType::U32, tensors),
        (steps.rows, DType::F64, ROW_WORDS * tensors),
    ] {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    if table.elements() == 0 {
        return Ok(());
    }
    let (table, scalars, settings, steps) = (*table, *scalars, *settings, *steps);
    enqueue(
        stream,
        Prepare {
            table,
            scalars,
            settings,
            steps,
        },
    )?;
    enqueue(
        stream,
        Adam {
            table,
            scalars,
            steps,
        },
    )
}

#[derive(Debug)]
struct Prepare {
    table: ChunkTable,
    scalars: StepScalars,
    settings: GroupSettings,
    steps: AdamSteps,
}

impl Kernel for Prepare {
    fn entry(&self) -> &'static str {
        "adam_prepare"
    }

    fn elements(&self) -> u64 {
        self.table.tensors() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        self.scalars.push_to(into);
        self.settings.push_to(into);
        push_spans(into, &[&self.steps.steps, &self.steps.rows]);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    fn grid(&self) -> Grid {
        // One thread per chunk.
        Grid::over(4 * self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        if unsafe { self.scalars.factors() }.is_none() {
            return;
        }
        // SAFETY: nothing writes the counters now.
        let steps = unsafe { self.steps.steps.slice::<u32>() };
        // SAFETY: only this kernel accesses the rows now.
        let rows = unsafe { self.steps.rows.slice_mut::<f64>() };
        // SAFETY: the table was uploaded in stream order before this kernel.
        for tensor in unsafe { stepped(&self.table) } {
            // SAFETY: settings are written in stream order only.
            let of = unsafe { self.settings.of(tensor) };
            let row = numbers_of_step(of, tensor, steps[tensor].saturating_add(1));
            rows[tensor * ROW_WORDS..][..ROW_WORDS].copy_from_slice(bytemuck::cast_slice(&row));
        }
    }
}

/// The tensors that take part in the step, each once, found by their first chunks. A tensor without a gradient has no
/// chunks.
///
/// # Safety
/// As [`ChunkTable::chunks`].
unsafe fn stepped(table: &ChunkTable) -> impl Iterator<Item = usize> {
    // SAFETY: the caller's promise.
    let chunks = unsafe { table.chunks() };
    chunks
        .filter(|chunk| chunk.offset() == 0)
        .map(|chunk| chunk.tensor())
}

/// A tensor's row of coefficients in step `step`, from its group's settings.
fn numbers_of_step(of: [f64; SETTING_WORDS], tensor: usize, step: u32) -> [u64; ROW_WORDS] {
    let [rate, beta1, beta2, epsilon, decay, is_decoupled, seed, _] = of;
    let is_decoupled = is_decoupled != 0.0;
    let power = f64::from(step);
    let row = [
        rate / (1.0 - beta1.powf(power)),
        beta1,
        beta2,
        epsilon,
        if is_decoupled { 0.0 } else { decay },
        (1.0 - beta2.powf(power)).sqrt(),
        if is_decoupled {
            1.0 - rate * decay
        } else {
            1.0
        },
        0.0,
    ];
    let mut row = row.map(f64::to_bits);
    row[7] = random_key(seed.to_bits(), tensor as u64, step);
    row
}

#[derive(Debug)]
struct Adam {
    table: ChunkTable,
    scalars: StepScalars,
    steps: AdamSteps,
}

/// The formula, with the rows of coefficients.
struct Formula<'a> {
    rows: &'a [f64],
}

impl Rule for Formula<'_> {
    fn apply<C: Compute>(
        &self,
        tensor: usize,
        weights: &mut [C],
        gradients: &mut [C],
        [first, second, largest]: [&mut [C]; MAX_STATES],
    ) {
        let row = &self.rows[tensor * ROW_WORDS..][..ROW_WORDS];
        let by = Coefficients {
            rate: C::from_f64(row[0]),
            first_share: C::from_f64(1.0 - row[1]),
            second_keep: C::from_f64(row[2]),
            second_share: C::from_f64(1.0 - row[2]),
            epsilon: C::from_f64(row[3]),
            decay: C::from_f64(row[4]),
            correction: C::from_f64(row[5]),
            keep: C::from_f64(row[6]),
        };
        if by.decay != C::default() {
            decay(gradients, weights, by.decay);
        }
        if largest.is_empty() {
            update(weights, gradients, first, second, &by);
        } else {
            update_amsgrad(weights, gradients, first, second, largest, &by);
        }
    }

    fn random_key(&self, tensor: usize) -> u64 {
        self.rows[tensor * ROW_WORDS + 7].to_bits()
    }
}

/// The coefficients of the formula for one block, in the compute type.
struct Coefficients<C> {
    rate: C,
    first_share: C,
    second_keep: C,
    second_share: C,
    epsilon: C,
    decay: C,
    correction: C,
    keep: C,
}

vectorized! {
    fn decay<C: Compute>(gradients: &mut [C], weights: &[C], decay: C) {
        for (gradient, weight) in gradients.iter_mut().zip(weights) {
            *gradient = *gradient + decay * *weight;
        }
    }
}

vectorized! {
    /// The formula for slices of equal length, after any coupled decay.
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

vectorized! {
    /// [`update`] with amsgrad.
    fn update_amsgrad<C: Compute>(
        weights: &mut [C],
        gradients: &[C],
        first: &mut [C],
        second: &mut [C],
        largest: &mut [C],
        by: &Coefficients<C>,
    ) {
        let moments = first.iter_mut().zip(second).zip(largest);
        for ((weight, gradient), ((first, second), largest)) in
            weights.iter_mut().zip(gradients).zip(moments)
        {
            *first = *first + (*gradient - *first) * by.first_share;
            *second = by.second_keep * *second + by.second_share * *gradient * *gradient;
            // If either is NaN, the comparison fails and selects the second moment. A NaN moment stays NaN, so the
            // result does, too.
            *largest = if *largest >= *second { *largest } else { *second };
            let denominator = largest.root() / by.correction + by.epsilon;
            *weight = *weight * by.keep - by.rate * *first / denominator;
        }
    }
}

impl Kernel for Adam {
    fn entry(&self) -> &'static str {
        "adam"
    }

    fn elements(&self) -> u64 {
        self.table.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        self.scalars.push_to(into);
        let AdamSteps { steps, rows, found } = &self.steps;
        push_spans(into, &[steps, rows, found]);
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
        // SAFETY: `Prepare` wrote the rows earlier, in stream order.
        let rows = unsafe { self.steps.rows.slice::<f64>() };
        // SAFETY: the caller's promise; the rows of a table share no bytes.
        unsafe { for_each_row(&self.table, factors, &self.steps.found, &Formula { rows }) };
        // SAFETY: only this kernel accesses the counters now.
        let steps = unsafe { self.steps.steps.slice_mut::<u32>() };
        // SAFETY: the table was uploaded in stream order before this kernel.
        for tensor in unsafe { stepped(&self.table) } {
            steps[tensor] = steps[tensor].saturating_add(1);
        }
    }
}
