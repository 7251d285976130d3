//! The softmax of causal attention, and its gradient.
//!
//! Rows are queries and columns are keys, as many as queries; row `r` sees the columns up to `r mod columns`.
//! - forward: `p[r, c] = e^(s·x[r, c] − m) / Σ e^(s·x[r, ·] − m)` over the visible columns, with `m` the
//!   largest of `s·x` there; 0 in the other columns;
//! - backward: `grad_x[r, c] = s · p[r, c] · (grad_p[r, c] − Σ p[r, ·]·grad_p[r, ·])`.
//!
//! Any float types, computed in f32 (f64 if any operand is f64), sums in f64; each result is rounded once. Hidden
//! columns are not read. A NaN or +∞ in a visible column makes the row NaN.

use rayon::prelude::*;

use super::Span;
use super::compute::{Compute, check_floats, check_streams, load, store, with_compute};
use super::device::{entry_by_types, push_sizes, push_spans, push_types};
use super::reduce::sum_in_lanes;
use super::special::Special;
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::error::{Error, Result};

/// Enqueues the causal softmax of `scores` times `scale`, in squares of `columns` rows and columns.
///
/// # Errors
/// [`Error::InvalidArgument`] for operands that are not whole squares, of different lengths, of another
/// stream, or that overlap without being identical; [`Error::UnsupportedDtype`] for u32 and 8-bit types.
pub fn causal_softmax(
    stream: &Stream,
    scores: &Span,
    probabilities: &Span,
    columns: usize,
    scale: f64,
) -> Result<()> {
    const OP: &str = "causal_softmax";
    check_streams(OP, stream, &[scores, probabilities])?;
    check_floats(OP, &[scores, probabilities])?;
    check_squares(OP, scores, columns)?;
    probabilities.check_len(OP, scores.len())?;
    probabilities.check_in_place_or_disjoint(OP, scores)?;
    if scores.is_empty() {
        return Ok(());
    }
    let (scores, probabilities) = (*scores, *probabilities);
    let kernel = CausalSoftmax {
        scores,
        probabilities,
        columns,
        scale,
    };
    super::enqueue(stream, kernel)
}

/// Enqueues the gradient with respect to the scores, from the probabilities and their gradient. `grad_scores` may be
/// `grad_probabilities`.
///
/// # Errors
/// As [`causal_softmax`].
pub fn causal_softmax_backward(
    stream: &Stream,
    probabilities: &Span,
    grad_probabilities: &Span,
    grad_scores: &Span,
    columns: usize,
    scale: f64,
) -> Result<()> {
    const OP: &str = "causal_softmax_backward";
    let spans = [probabilities, grad_probabilities, grad_scores];
    check_streams(OP, stream, &spans)?;
    check_floats(OP, &spans)?;
    check_squares(OP, probabilities, columns)?;
    for other in [grad_probabilities, grad_scores] {
        other.check_len(OP, probabilities.len())?;
    }
    grad_scores.check_in_place_or_disjoint(OP, grad_probabilities)?;
    grad_scores.check_disjoint(OP, probabilities)?;
    if probabilities.is_empty() {
        return Ok(());
    }
    let kernel = Backward {
        probabilities: *probabilities,
        grad_probabilities: *grad_probabilities,
        grad_scores: *grad_scores,
        columns,
        scale,
    };
    super::enqueue(stream, kernel)
}

fn check_squares(op: &'static str, x: &Span, columns: usize) -> Result<()> {
    let square = columns.checked_mul(columns).filter(|square| *square > 0);
    if x.is_empty() || square.is_some_and(|square| x.len().is_multiple_of(square)) {
        return Ok(());
    }
    let reason = format!("{} elements are not squares of {columns}", x.len());
    Err(Error::argument(op, reason))
}

/// Calls `body(row, values)` for all rows, with a buffer of one row.
fn for_rows<C: Compute>(rows: usize, columns: usize, body: impl Fn(usize, &mut [C]) + Sync) {
    // An exponential costs about as much as eight additions.
    let at_once = (super::PARALLEL_MIN / 8).div_ceil(columns);
    (0..rows)
        .into_par_iter()
        .with_min_len(at_once)
        .for_each_init(
            || vec![C::default(); columns],
            |values, row| body(row, values),
        );
}

#[derive(Debug)]
struct CausalSoftmax {
    scores: Span,
    probabilities: Span,
    columns: usize,
    scale: f64,
}

impl CausalSoftmax {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Special>(&self) {
        let (columns, scale) = (self.columns, C::from_f64(self.scale));
        for_rows::<C>(self.scores.len() / columns, columns, |row, values| {
            let start = row * columns;
            let (seen, hidden) = values.split_at_mut(row % columns + 1);
            // SAFETY: the caller keeps others away, and rows are disjoint.
            unsafe { load(&self.scores, start, seen) };
            for value in seen.iter_mut() {
                *value = *value * scale;
            }
            // Comparisons may skip a NaN here, but its exponential makes the row NaN below.
            let larger = |a, b| if b > a { b } else { a };
            let largest = seen.iter().copied().fold(seen[0], larger);
            for value in seen.iter_mut() {
                *value = (*value - largest).exp();
            }
            let divisor = C::from_f64(sum_in_lanes(seen));
            for value in seen.iter_mut() {
                *value = *value / divisor;
            }
            hidden.fill(C::default());
            // SAFETY: as above.
            unsafe { store(&self.probabilities, start, values) };
        });
    }
}

impl Kernel for CausalSoftmax {
    fn entry(&self) -> &'static str {
        entry_by_types!("causal_softmax", [self.scores, self.probabilities])
    }

    fn elements(&self) -> u64 {
        self.scores.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.scores, &self.probabilities]);
        push_sizes(into, &[self.scores.len() / self.columns, self.columns]);
        into.f64(self.scale);
        push_types(into, &[&self.scores, &self.probabilities]);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps((self.scores.len() / self.columns) as u64)
    }

    unsafe fn run(&self) {
        with_compute!([self.scores, self.probabilities], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[derive(Debug)]
struct Backward {
    probabilities: Span,
    grad_probabilities: Span,
    grad_scores: Span,
    columns: usize,
    scale: f64,
}

impl Backward {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        let (columns, scale) = (self.columns, C::from_f64(self.scale));
        let rows = self.probabilities.len() / columns;
        for_rows::<C>(rows, 2 * columns, |row, buffer| {
            let start = row * columns;
            let (p, grad) = buffer.split_at_mut(columns);
            let seen = row % columns + 1;
            // SAFETY: the caller keeps others away, and rows are disjoint.
            unsafe { load(&self.probabilities, start, &mut p[..seen]) };
            // SAFETY: as above.
            unsafe { load(&self.grad_probabilities, start, &mut grad[..seen]) };
            let pairs = p[..seen].iter().zip(&grad[..seen]);
            let dot: f64 = pairs.map(|(p, grad)| p.to_f64() * grad.to_f64()).sum();
            let dot = C::from_f64(dot);
            for (grad, p) in grad[..seen].iter_mut().zip(&p[..seen]) {
                *grad = *p * (*grad - dot) * scale;
            }
            grad[seen..].fill(C::default());
            // SAFETY: as above.
            unsafe { store(&self.grad_scores, start, grad) };
        });
    }
}

impl Kernel for Backward {
    fn entry(&self) -> &'static str {
        entry_by_types!(
            "causal_softmax_backward",
            [
                self.probabilities,
                self.grad_probabilities,
                self.grad_scores
            ]
        )
    }

    fn elements(&self) -> u64 {
        self.probabilities.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [
            &self.probabilities,
            &self.grad_probabilities,
            &self.grad_scores,
        ];
        push_spans(into, &spans);
        let rows = self.probabilities.len() / self.columns;
        push_sizes(into, &[rows, self.columns]);
        into.f64(self.scale);
        push_types(into, &spans);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps((self.probabilities.len() / self.columns) as u64)
    }

    unsafe fn run(&self) {
        with_compute!(
            [self.probabilities, self.grad_probabilities, self.grad_scores],
            C => {
                // SAFETY: the caller promises the same.
                unsafe { self.run_in::<C>() }
            }
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::launch::testing::{Array, numbers, run};
    use crate::launch::tolerance::assert_close;

    /// Probabilities by the formula, in f64.
    fn reference(x: &[f64], columns: usize, scale: f64) -> Vec<f64> {
        let rows = x.chunks(columns).enumerate();
        rows.flat_map(|(row, x)| {
            let seen = row % columns;
            let power = |column: usize| (scale * x[column]).exp();
            let sum: f64 = (0..=seen).map(power).sum();
            (0..columns).map(move |c| {
                if c <= seen {
                    (scale * x[c]).exp() / sum
                } else {
                    0.0
                }
            })
        })
        .collect()
    }

    #[test]
    fn rows_see_what_came_before_them() {
        for columns in [1, 5, 33] {
            let x = numbers(3, 2 * columns * columns, 2.0);
            let expected = reference(&x, columns, 0.7);
            for (dtype, out) in [
                (DType::F64, DType::F64),
                (DType::F32, DType::F32),
                (DType::F32, DType::F16),
            ] {
                let (scores, probabilities) = (Array::new(dtype, &x), Array::filled(out, x.len()));
                run(&CausalSoftmax {
                    scores: scores.span(),
                    probabilities: probabilities.span(),
                    columns,
                    scale: 0.7,
                });
                assert_close(out, 1e-6, &probabilities.values(), &expected);
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_differences() {
        let (columns, scale, step) = (4, 0.5, 1e-6);
        let x = numbers(4, columns * columns, 1.0);
        let grad = numbers(5, x.len(), 1.0);
        let total = |x: &[f64]| -> f64 {
            let p = reference(x, columns, scale);
            p.iter().zip(&grad).map(|(p, grad)| p * grad).sum()
        };
        let differences: Vec<f64> = (0..x.len())
            .map(|place| {
                let mut moved = x.clone();
                moved[place] += step;
                (total(&moved) - total(&x)) / step
            })
            .collect();
        let p = Array::new(DType::F64, &reference(&x, columns, scale));
        let (grad, out) = (
            Array::new(DType::F64, &grad),
            Array::filled(DType::F64, x.len()),
        );
        run(&Backward {
            probabilities: p.span(),
            grad_probabilities: grad.span(),
            grad_scores: out.span(),
            columns,
            scale,
        });
        assert_close(DType::F64, 1e-5, &out.values(), &differences);
    }
}
