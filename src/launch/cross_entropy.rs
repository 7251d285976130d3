//! Softmax and cross entropy combined: the loss of a classifier and its gradient.
//!
//! With `p[r, c] = e^(x[r, c] - m) / Σ e^(x[r, ·] - m)` and `m` the largest logit of the row:
//! - forward: `losses[r] = -ln p[r, label[r]]`, `loss[0]` their mean, and `p` itself;
//! - backward: `grad[r, c] = (p[r, c] - [c = label[r]]) · seed[0] / rows`.
//!
//! Logits have any float type. The computation, `loss` and `p` are in f32, or in f64 for f64 logits; `losses` are f64.
//! `seed` is the gradient of the loss, read on the device; a loss scale multiplies it. The gradient is rounded once
//! into its own type, where it may overflow. Overflows are what a loss scaler watches for, so nothing is clamped.
//!
//! Rows can be ignored by their label. Their loss, `p` and gradient are then 0, whatever their logits are. The mean is
//! taken over the other rows, and the backward pass divides by their number. If no rows remain, the mean is 0.
//!
//! A label out of range cannot be refused without waiting for the device. It makes the loss, and the gradient of its
//! row, NaN. So does a row that contains NaN or +∞, or only -∞. The loss of zero rows is NaN, unless an ignored label
//! is given.

use rayon::prelude::*;

use super::Span;
use super::compute::{
    check_floats, check_streams, entry_name, load, load_scalar, multiply_all, store, sum_dtype,
    with_compute,
};
use super::device::{entry_by_types, push_optional, push_sizes, push_spans, push_types};
use super::reduce::{Total, sum_in_lanes, total};
use super::special::Special;
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::units::to_usize;

/// Selects rows to ignore.
#[derive(Clone, Copy, Debug)]
pub struct Ignored {
    /// Rows with this label are ignored.
    pub label: u32,
    /// f64: how many rows count, written by the forward pass and read by the backward pass.
    pub counted: Span,
}

impl Ignored {
    fn check(&self, op: &'static str, stream: &Stream) -> Result<()> {
        self.counted.check_stream(op, stream)?;
        self.counted.check_dtype(op, DType::F64)?;
        self.counted.check_len(op, 1)
    }
}

/// Enqueues the loss of each row, their mean, and the probabilities of `logits`, which has one row for each of
/// `labels`.
///
/// # Errors
/// [`Error::InvalidArgument`] for lengths or types that do not fit (`labels` are u32, `losses` f64, `loss`
/// and `probabilities` of type [`sum_dtype`]), for operands of another stream, or that overlap
/// (`probabilities` may be `logits`); [`Error::UnsupportedDtype`] for logits of u32 or an 8-bit type.
pub fn cross_entropy(
    stream: &Stream,
    logits: &Span,
    labels: &Span,
    losses: &Span,
    loss: &Span,
    probabilities: &Span,
) -> Result<()> {
    let kernel = forward(stream, [logits, labels, losses, loss, probabilities], None)?;
    if !labels.is_empty() {
        super::enqueue(stream, kernel)?;
    }
    super::enqueue(stream, Total::mean_of(losses, loss))
}

/// Like [`cross_entropy`], but without the rows that are `ignored`.
///
/// # Errors
/// As [`cross_entropy`]; `ignored.counted` overlaps nothing.
pub fn cross_entropy_ignoring(
    stream: &Stream,
    logits: &Span,
    labels: &Span,
    losses: &Span,
    loss: &Span,
    probabilities: &Span,
    ignored: &Ignored,
) -> Result<()> {
    const OP: &str = "cross_entropy";
    ignored.check(OP, stream)?;
    let operands = [logits, labels, losses, loss, probabilities];
    for operand in operands {
        ignored.counted.check_disjoint(OP, operand)?;
    }
    let kernel = forward(stream, operands, Some(ignored.label))?;
    if !labels.is_empty() {
        super::enqueue(stream, kernel)?;
    }
    let mean = MeanOfRows {
        losses: *losses,
        labels: *labels,
        loss: *loss,
        ignored: *ignored,
    };
    super::enqueue(stream, mean)
}

/// The kernel for logits, labels, losses, their mean and probabilities that fit each other.
fn forward(
    stream: &Stream,
    [logits, labels, losses, loss, probabilities]: [&Span; 5],
    ignore: Option<u32>,
) -> Result<CrossEntropy> {
    const OP: &str = "cross_entropy";
    check_streams(OP, stream, &[logits, labels, losses, loss, probabilities])?;
    check_floats(OP, &[logits])?;
    let columns = check_rows(OP, logits, labels)?;
    loss.check_len(OP, 1)?;
    losses.check_len(OP, labels.len())?;
    losses.check_dtype(OP, DType::F64)?;
    probabilities.check_len(OP, logits.len())?;
    probabilities.check_in_place_or_disjoint(OP, logits)?;
    for out in [loss, probabilities] {
        out.check_dtype(OP, sum_dtype(logits.dtype()))?;
        out.check_disjoint(OP, labels)?;
    }
    for read in [logits, probabilities] {
        loss.check_disjoint(OP, read)?;
        losses.check_disjoint(OP, read)?;
    }
    losses.check_disjoint(OP, labels)?;
    loss.check_disjoint(OP, losses)?;
    Ok(CrossEntropy {
        logits: *logits,
        labels: *labels,
        losses: *losses,
        probabilities: *probabilities,
        columns,
        ignore,
    })
}

/// Enqueues the gradient of the loss with respect to the logits, from the probabilities that the forward pass computed
/// and the gradient of the loss (`seed`, one f32).
///
/// # Errors
/// As [`cross_entropy`]; `grad_logits` may be `probabilities` and is any float.
pub fn cross_entropy_backward(
    stream: &Stream,
    probabilities: &Span,
    labels: &Span,
    seed: &Span,
    grad_logits: &Span,
) -> Result<()> {
    backward(stream, [probabilities, labels, seed, grad_logits], None)
}

/// Like [`cross_entropy_backward`], for [`cross_entropy_ignoring`].
///
/// # Errors
/// As [`cross_entropy_backward`]; `grad_logits` does not overlap `ignored.counted`.
pub fn cross_entropy_ignoring_backward(
    stream: &Stream,
    probabilities: &Span,
    labels: &Span,
    seed: &Span,
    grad_logits: &Span,
    ignored: &Ignored,
) -> Result<()> {
    const OP: &str = "cross_entropy_backward";
    ignored.check(OP, stream)?;
    grad_logits.check_disjoint(OP, &ignored.counted)?;
    let operands = [probabilities, labels, seed, grad_logits];
    backward(stream, operands, Some(*ignored))
}

fn backward(
    stream: &Stream,
    [probabilities, labels, seed, grad_logits]: [&Span; 4],
    ignored: Option<Ignored>,
) -> Result<()> {
    const OP: &str = "cross_entropy_backward";
    check_streams(OP, stream, &[probabilities, labels, seed, grad_logits])?;
    check_floats(OP, &[probabilities, grad_logits])?;
    let columns = check_rows(OP, probabilities, labels)?;
    seed.check_len(OP, 1)?;
    seed.check_dtype(OP, DType::F32)?;
    grad_logits.check_len(OP, probabilities.len())?;
    grad_logits.check_in_place_or_disjoint(OP, probabilities)?;
    if grad_logits.is_empty() {
        return Ok(());
    }
    grad_logits.check_disjoint(OP, labels)?;
    grad_logits.check_disjoint(OP, seed)?;
    let kernel = Backward {
        probabilities: *probabilities,
        labels: *labels,
        seed: *seed,
        grad_logits: *grad_logits,
        columns,
        ignored,
    };
    super::enqueue(stream, kernel)
}

/// The number of columns, if `x` has as many rows as there are labels, each with at least one column.
fn check_rows(op: &'static str, x: &Span, labels: &Span) -> Result<usize> {
    labels.check_dtype(op, DType::U32)?;
    let columns = x.len().checked_div(labels.len()).unwrap_or(0);
    if columns * labels.len() == x.len() && (columns > 0 || labels.is_empty()) {
        return Ok(columns);
    }
    Err(Error::argument(
        op,
        format!(
            "{} elements do not make a row for each of {} labels",
            x.len(),
            labels.len()
        ),
    ))
}

#[derive(Debug)]
struct CrossEntropy {
    logits: Span,
    labels: Span,
    losses: Span,
    probabilities: Span,
    columns: usize,
    /// The label of ignored rows.
    ignore: Option<u32>,
}

/// The value that device code compares labels with. Without an ignored label it is larger than any label.
fn label_code(ignore: Option<u32>) -> u64 {
    ignore.map_or(u64::MAX, u64::from)
}

impl CrossEntropy {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Special>(&self) {
        // SAFETY: the caller promises that nothing writes the labels.
        let labels = unsafe { self.labels.slice::<u32>() };
        // SAFETY: the caller promises exclusive access to the losses.
        let losses = unsafe { self.losses.slice_mut::<f64>() };
        labels
            .par_iter()
            .zip(losses)
            .with_min_len(rows_at_once(self.columns))
            .enumerate()
            .for_each_init(
                || vec![C::default(); self.columns],
                |row_values, (row, (label, loss))| {
                    let start = row * self.columns;
                    if self.ignore == Some(*label) {
                        row_values.fill(C::default());
                        *loss = 0.0;
                    } else {
                        // SAFETY: the caller keeps others away, and rows are disjoint.
                        unsafe { load(&self.logits, start, row_values) };
                        *loss = softmax(row_values, to_usize(u64::from(*label)));
                    }
                    // SAFETY: as above.
                    unsafe { store(&self.probabilities, start, row_values) };
                },
            );
    }
}

/// The fewest rows per task.
fn rows_at_once(columns: usize) -> usize {
    // An exponential costs about as much as eight additions.
    (super::PARALLEL_MIN / 8).div_ceil(columns.max(1))
}

/// Replaces logits with probabilities and returns the loss for `label`; NaN if there is no such column.
fn softmax<C: Special>(row: &mut [C], label: usize) -> f64 {
    let chosen = row.get(label).map_or(f64::NAN, |logit| logit.to_f64());
    // Comparisons may skip a NaN here, but its exponential makes the row NaN below.
    let largest = row
        .iter()
        .copied()
        .fold(row[0], |a, b| if b > a { b } else { a });
    for value in row.iter_mut() {
        *value = (*value - largest).exp();
    }
    let sum = sum_in_lanes(row);
    let divisor = C::from_f64(sum);
    for value in row.iter_mut() {
        *value = *value / divisor;
    }
    sum.ln() - (chosen - largest.to_f64())
}

impl Kernel for CrossEntropy {
    fn entry(&self) -> &'static str {
        entry_name!("cross_entropy", self.logits.dtype())
    }

    fn elements(&self) -> u64 {
        self.logits.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(
            into,
            &[
                &self.logits,
                &self.labels,
                &self.losses,
                &self.probabilities,
            ],
        );
        push_sizes(into, &[self.labels.len(), self.columns]);
        into.u64(label_code(self.ignore));
    }

    fn grid(&self) -> Grid {
        Grid::of_warps(self.labels.len() as u64)
    }

    unsafe fn run(&self) {
        with_compute!([self.logits], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

/// Computes the mean over the rows that are not ignored, and their number.
#[derive(Debug)]
struct MeanOfRows {
    losses: Span,
    labels: Span,
    loss: Span,
    ignored: Ignored,
}

impl Kernel for MeanOfRows {
    fn entry(&self) -> &'static str {
        "mean_of_rows"
    }

    fn elements(&self) -> u64 {
        self.losses.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let Ignored { label, counted } = &self.ignored;
        push_spans(into, &[&self.losses, &self.labels, &self.loss, counted]);
        push_sizes(into, &[self.losses.len()]);
        into.u64(u64::from(*label));
        push_types(into, &[&self.loss]);
    }

    fn grid(&self) -> Grid {
        // The same as for `Total`, so that the order of summation is the same.
        Grid {
            threads: 1024,
            ..Grid::of_blocks(1)
        }
    }

    unsafe fn run(&self) {
        // SAFETY: the caller promises that nothing writes the labels.
        let labels = unsafe { self.labels.slice::<u32>() };
        let counts = |label: &&u32| **label != self.ignored.label;
        #[expect(clippy::cast_precision_loss, reason = "no batch has 2^53 rows")]
        let counted = labels.iter().filter(counts).count() as f64;
        // SAFETY: the caller promises exclusive access to the results.
        unsafe { store(&self.ignored.counted, 0, &[counted]) };
        // SAFETY: the caller promises that nothing writes the losses.
        let total = unsafe { total(&self.losses) };
        let mean = if counted > 0.0 { total / counted } else { 0.0 };
        // SAFETY: as above.
        unsafe { store(&self.loss, 0, &[mean]) };
    }
}

#[derive(Debug)]
struct Backward {
    probabilities: Span,
    labels: Span,
    seed: Span,
    grad_logits: Span,
    columns: usize,
    ignored: Option<Ignored>,
}

impl Backward {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Special>(&self) {
        // SAFETY: the caller promises that nothing writes the labels.
        let labels = unsafe { self.labels.slice::<u32>() };
        // SAFETY: the caller promises that nothing writes the seed.
        let seed = unsafe { load_scalar::<f64>(&self.seed) };
        // SAFETY: the forward pass wrote the number earlier.
        let read = |ignored: Ignored| unsafe { load_scalar::<f64>(&ignored.counted) };
        #[expect(clippy::cast_precision_loss, reason = "no batch has 2^53 rows")]
        let rows = self.ignored.map_or(labels.len() as f64, read);
        let factor = C::from_f64(seed / rows);
        let row = |values: &mut Vec<C>, (row, label): (usize, &u32)| {
            let start = row * self.columns;
            // SAFETY: the caller keeps others away, and rows are disjoint.
            unsafe { load(&self.probabilities, start, values) };
            let is_ignored = self.ignored.is_some_and(|ignored| ignored.label == *label);
            match values.get_mut(to_usize(u64::from(*label))) {
                _ if is_ignored => values.fill(C::default()),
                Some(chosen) => *chosen = *chosen - C::from_f64(1.0),
                None => values.fill(C::from_f64(f64::NAN)),
            }
            if !is_ignored {
                multiply_all(values, factor);
            }
            // SAFETY: as above.
            unsafe { store(&self.grad_logits, start, values) };
        };
        labels
            .par_iter()
            .with_min_len(rows_at_once(self.columns))
            .enumerate()
            .for_each_init(|| vec![C::default(); self.columns], row);
    }
}

impl Kernel for Backward {
    fn entry(&self) -> &'static str {
        entry_by_types!(
            "cross_entropy_backward",
            [self.probabilities, self.grad_logits]
        )
    }

    fn elements(&self) -> u64 {
        self.grad_logits.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let (probabilities, grad_logits) = (&self.probabilities, &self.grad_logits);
        push_spans(
            into,
            &[probabilities, &self.labels, &self.seed, grad_logits],
        );
        push_sizes(into, &[self.labels.len(), self.columns]);
        into.u64(label_code(self.ignored.map(|ignored| ignored.label)));
        push_optional(into, self.ignored.as_ref().map(|ignored| &ignored.counted));
        push_types(into, &[probabilities, grad_logits]);
    }

    unsafe fn run(&self) {
        with_compute!([self.probabilities, self.grad_logits], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[cfg(test)]
mod tests;
