//! Normalization of rows, and its gradients.
//!
//! With `μ` the mean of a row, `σ² = Σ (x − μ)² / columns` and `r = 1 / √(σ² + ε)`:
//! - forward: `out = (x − μ) · r · weight + bias`, and `stats` = (μ, r) of each row;
//! - backward, with `x̂ = (x − μ) · r` and `h = grad_out · weight`:
//!   `grad_in = r · (h − mean(h) − x̂ · mean(h · x̂))`, and `grad_x̂ = grad_out · x̂`, whose sum over the rows is
//!   the gradient of the weight (that of the bias is the sum of `grad_out`).
//!
//! Any float types, computed in f32 (f64 if any operand is f64), with sums in f64 in column order; each result is
//! rounded once.

use rayon::prelude::*;

use super::Span;
use super::compute::{Compute, check_floats, check_streams, load, store, sum_dtype, with_compute};
use super::device::{entry_by_types, push_sizes, push_spans, push_types};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::error::{Error, Result};

/// Operands of [`layer_norm`]; a row has as many columns as `weight` has elements.
#[derive(Clone, Copy, Debug)]
pub struct LayerNorm<'a> {
    /// The rows.
    pub x: &'a Span,
    /// The factor of each column.
    pub weight: &'a Span,
    /// The addend of each column.
    pub bias: &'a Span,
    /// As long as `x`.
    pub out: &'a Span,
    /// Two numbers per row, of type [`sum_dtype`] of `x`.
    pub stats: &'a Span,
    /// Keeps the square root from being 0.
    pub epsilon: f64,
}

/// Enqueues the normalized rows and their statistics.
///
/// # Errors
/// [`Error::InvalidArgument`] for lengths or types that do not fit, operands of another stream, or that
/// overlap; [`Error::UnsupportedDtype`] for u32 and 8-bit types.
pub fn layer_norm(stream: &Stream, operands: &LayerNorm<'_>) -> Result<()> {
    const OP: &str = "layer_norm";
    let LayerNorm {
        x,
        weight,
        bias,
        out,
        stats,
        epsilon,
    } = *operands;
    check_streams(OP, stream, &[x, weight, bias, out, stats])?;
    check_floats(OP, &[x, weight, bias, out])?;
    let rows = check_rows(OP, x, weight)?;
    bias.check_len(OP, weight.len())?;
    out.check_len(OP, x.len())?;
    stats.check_len(OP, 2 * rows)?;
    stats.check_dtype(OP, sum_dtype(x.dtype()))?;
    out.check_in_place_or_disjoint(OP, x)?;
    for (written, read) in [
        (out, weight),
        (out, bias),
        (out, stats),
        (stats, x),
        (stats, weight),
        (stats, bias),
    ] {
        written.check_disjoint(OP, read)?;
    }
    if x.is_empty() {
        return Ok(());
    }
    let kernel = Forward {
        x: *x,
        weight: *weight,
        bias: *bias,
        out: *out,
        stats: *stats,
        epsilon,
    };
    super::enqueue(stream, kernel)
}

/// Operands of [`layer_norm_backward`], named as in the head of the module.
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBackward<'a> {
    /// The rows.
    pub x: &'a Span,
    /// The factor of each column.
    pub weight: &'a Span,
    /// The statistics that [`layer_norm`] wrote.
    pub stats: &'a Span,
    /// The gradient with respect to the output.
    pub grad_out: &'a Span,
    /// Receives the gradient with respect to `x`.
    pub grad_in: &'a Span,
    /// Receives the gradient with respect to the weight, row by row.
    pub grad_normalized: &'a Span,
}

/// Enqueues the gradient with respect to the rows, and the terms of the gradient with respect to the weight.
///
/// # Errors
/// As [`layer_norm`].
pub fn layer_norm_backward(stream: &Stream, operands: &LayerNormBackward<'_>) -> Result<()> {
    const OP: &str = "layer_norm_backward";
    let LayerNormBackward {
        x,
        weight,
        stats,
        grad_out,
        grad_in,
        grad_normalized,
    } = *operands;
    check_streams(
        OP,
        stream,
        &[x, weight, stats, grad_out, grad_in, grad_normalized],
    )?;
    check_floats(OP, &[x, weight, grad_out, grad_in, grad_normalized])?;
    let rows = check_rows(OP, x, weight)?;
    stats.check_len(OP, 2 * rows)?;
    stats.check_dtype(OP, sum_dtype(x.dtype()))?;
    for other in [grad_out, grad_in, grad_normalized] {
        other.check_len(OP, x.len())?;
    }
    for written in [grad_in, grad_normalized] {
        for read in [x, weight, stats, grad_out] {
            written.check_disjoint(OP, read)?;
        }
    }
    grad_in.check_disjoint(OP, grad_normalized)?;
    if x.is_empty() {
        return Ok(());
    }
    let kernel = Backward {
        x: *x,
        weight: *weight,
        stats: *stats,
        grad_out: *grad_out,
        grad_in: *grad_in,
        grad_normalized: *grad_normalized,
    };
    super::enqueue(stream, kernel)
}

/// The number of rows of `x`, which has a column for each element of `weight`.
fn check_rows(op: &'static str, x: &Span, weight: &Span) -> Result<usize> {
    let columns = weight.len();
    if columns > 0 && x.len().is_multiple_of(columns) {
        return Ok(x.len() / columns);
    }
    let reason = format!("{} elements are not whole rows of {columns}", x.len());
    Err(Error::argument(op, reason))
}

#[derive(Debug)]
struct Forward {
    x: Span,
    weight: Span,
    bias: Span,
    out: Span,
    stats: Span,
    epsilon: f64,
}

/// The mean over a row of `term` of each element, in f64.
fn mean<C: Compute>(row: &[C], term: impl Fn(usize, f64) -> f64) -> f64 {
    let terms = row.iter().enumerate();
    #[expect(clippy::cast_precision_loss, reason = "no row has 2^53 columns")]
    let columns = row.len() as f64;
    let sum: f64 = terms
        .map(|(index, value)| term(index, value.to_f64()))
        .sum();
    sum / columns
}

/// All elements of `span`, in the compute type.
///
/// # Safety
/// As [`Span::slice`], while the call lasts.
unsafe fn whole<C: Compute>(span: &Span) -> Vec<C> {
    let mut values = vec![C::default(); span.len()];
    // SAFETY: the caller's promise.
    unsafe { load(span, 0, &mut values) };
    values
}

impl Forward {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        let columns = self.weight.len();
        // SAFETY: the caller promises that nothing writes the weight.
        let weight = unsafe { whole::<C>(&self.weight) };
        // SAFETY: as for the weight.
        let bias = unsafe { whole::<C>(&self.bias) };
        let row = |row: &mut Vec<C>, index: usize| {
            // SAFETY: the caller keeps others away, and rows are disjoint.
            unsafe { load(&self.x, index * columns, row) };
            let center = mean(row, |_, value| value);
            let variance = mean(row, |_, value| (value - center) * (value - center));
            let stats = [center, 1.0 / (variance + self.epsilon).sqrt()].map(C::from_f64);
            for ((value, weight), bias) in row.iter_mut().zip(&weight).zip(&bias) {
                *value = (*value - stats[0]) * stats[1] * *weight + *bias;
            }
            // SAFETY: as above.
            unsafe { store(&self.out, index * columns, row) };
            // SAFETY: as above.
            unsafe { store(&self.stats, 2 * index, &stats) };
        };
        (0..self.x.len() / columns)
            .into_par_iter()
            .with_min_len(super::PARALLEL_MIN.div_ceil(columns))
            .for_each_init(|| vec![C::default(); columns], row);
    }
}

impl Kernel for Forward {
    fn entry(&self) -> &'static str {
        entry_by_types!("layer_norm", [self.x, self.weight, self.bias, self.out])
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.x, &self.weight, &self.bias, &self.out];
        push_spans(into, &spans);
        push_spans(into, &[&self.stats]);
        push_sizes(into, &[self.x.len() / self.weight.len(), self.weight.len()]);
        into.f64(self.epsilon);
        push_types(into, &spans);
        push_types(into, &[&self.stats]);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps((self.x.len() / self.weight.len()) as u64)
    }

    unsafe fn run(&self) {
        with_compute!([self.x, self.weight, self.bias, self.out], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[derive(Debug)]
struct Backward {
    x: Span,
    weight: Span,
    stats: Span,
    grad_out: Span,
    grad_in: Span,
    grad_normalized: Span,
}

impl Backward {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        let columns = self.weight.len();
        // SAFETY: the caller promises that nothing writes the weight.
        let weight = unsafe { whole::<C>(&self.weight) };
        let row = |[x, grad]: &mut [Vec<C>; 2], index: usize| {
            let mut stats = [C::default(); 2];
            // SAFETY: the caller promises that nothing writes what is read here.
            unsafe { load(&self.stats, 2 * index, &mut stats) };
            // SAFETY: as above.
            unsafe { load(&self.x, index * columns, x) };
            // SAFETY: as above.
            unsafe { load(&self.grad_out, index * columns, grad) };
            for value in x.iter_mut() {
                *value = (*value - stats[0]) * stats[1];
            }
            let h = |index: usize, grad: f64| grad * weight[index].to_f64();
            let first = C::from_f64(mean(grad, h));
            let second = C::from_f64(mean(grad, |index, grad| h(index, grad) * x[index].to_f64()));
            for ((x, grad), weight) in x.iter_mut().zip(grad.iter_mut()).zip(&weight) {
                let normalized = *x;
                *x = *grad * normalized;
                *grad = stats[1] * (*grad * *weight - first - normalized * second);
            }
            // SAFETY: the caller keeps others away, and rows are disjoint.
            unsafe { store(&self.grad_in, index * columns, grad) };
            // SAFETY: as above.
            unsafe { store(&self.grad_normalized, index * columns, x) };
        };
        (0..self.x.len() / columns)
            .into_par_iter()
            .with_min_len(super::PARALLEL_MIN.div_ceil(columns))
            .for_each_init(
                || [vec![C::default(); columns], vec![C::default(); columns]],
                row,
            );
    }
}

impl Kernel for Backward {
    fn entry(&self) -> &'static str {
        entry_by_types!(
            "layer_norm_backward",
            [
                self.x,
                self.weight,
                self.grad_out,
                self.grad_in,
                self.grad_normalized
            ]
        )
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [
            &self.x,
            &self.weight,
            &self.grad_out,
            &self.grad_in,
            &self.grad_normalized,
        ];
        push_spans(into, &spans);
        push_spans(into, &[&self.stats]);
        push_sizes(into, &[self.x.len() / self.weight.len(), self.weight.len()]);
        push_types(into, &spans);
        push_types(into, &[&self.stats]);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps((self.x.len() / self.weight.len()) as u64)
    }

    unsafe fn run(&self) {
        with_compute!([self.x, self.weight, self.grad_out, self.grad_in, self.grad_normalized], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::launch::testing::{Array, numbers, run};
    use crate::launch::tolerance::assert_close;

    const EPSILON: f64 = 1e-5;

    fn reference(x: &[f64], weight: &[f64], bias: &[f64]) -> Vec<f64> {
        let columns = weight.len();
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        let count = columns as f64;
        let rows = x.chunks(columns).flat_map(|row| {
            let center = row.iter().sum::<f64>() / count;
            let variance = row.iter().map(|x| (x - center).powi(2)).sum::<f64>() / count;
            let root = (variance + EPSILON).sqrt();
            (0..columns).map(move |c| (row[c] - center) / root * weight[c] + bias[c])
        });
        rows.collect()
    }

    fn forward(
        dtype: DType,
        x: &Array,
        weight: &[f64],
        bias: &[f64],
        len: usize,
    ) -> (Array, Array) {
        let (weight, bias) = (Array::new(dtype, weight), Array::new(dtype, bias));
        let out = Array::filled(dtype, len);
        let stats = Array::filled(sum_dtype(dtype), 2 * len / weight.span().len());
        run(&Forward {
            x: x.span(),
            weight: weight.span(),
            bias: bias.span(),
            out: out.span(),
            stats: stats.span(),
            epsilon: EPSILON,
        });
        (out, stats)
    }

    #[test]
    fn rows_are_normalized() {
        for (dtype, columns) in [(DType::F64, 7), (DType::F32, 1), (DType::F32, 130)] {
            let x = numbers(1, 9 * columns, 3.0);
            let (weight, bias) = (numbers(2, columns, 1.0), numbers(3, columns, 1.0));
            let (out, _) = forward(dtype, &Array::new(dtype, &x), &weight, &bias, x.len());
            assert_close(
                dtype,
                4.0 * dtype.epsilon(),
                &out.values(),
                &reference(&x, &weight, &bias),
            );
        }
    }

    #[test]
    fn gradients_are_those_of_differences() {
        let (columns, step) = (5, 1e-6);
        let x = numbers(1, 3 * columns, 2.0);
        let (weight, bias) = (numbers(2, columns, 1.0), numbers(3, columns, 1.0));
        let grad = numbers(4, x.len(), 1.0);
        let total = |x: &[f64], weight: &[f64]| -> f64 {
            let out = reference(x, weight, &bias);
            out.iter().zip(&grad).map(|(out, grad)| out * grad).sum()
        };
        let array = Array::new(DType::F64, &x);
        let (_, stats) = forward(DType::F64, &array, &weight, &bias, x.len());
        let (grad_in, normalized) = (
            Array::filled(DType::F64, x.len()),
            Array::filled(DType::F64, x.len()),
        );
        let (weights, grad_out) = (
            Array::new(DType::F64, &weight),
            Array::new(DType::F64, &grad),
        );
        run(&Backward {
            x: array.span(),
            weight: weights.span(),
            stats: stats.span(),
            grad_out: grad_out.span(),
            grad_in: grad_in.span(),
            grad_normalized: normalized.span(),
        });
        let moved = |values: &[f64], place: usize| {
            let mut moved = values.to_vec();
            moved[place] += step;
            moved
        };
        let here = total(&x, &weight);
        let by_x: Vec<_> = (0..x.len())
            .map(|i| (total(&moved(&x, i), &weight) - here) / step)
            .collect();
        assert_close(DType::F64, 1e-4, &grad_in.values(), &by_x);
        let terms = normalized.values();
        let by_weight: Vec<_> = (0..columns)
            .map(|i| (total(&x, &moved(&weight, i)) - here) / step)
            .collect();
        let sums: Vec<f64> = (0..columns)
            .map(|c| terms.iter().skip(c).step_by(columns).sum())
            .collect();
        assert_close(DType::F64, 1e-4, &sums, &by_weight);
    }
}
