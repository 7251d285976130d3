//! Sums, means and largest elements.
//!
//! - `sum`: `out[0] = Σ x[i]`, and `mean`: `out[0] = Σ x[i] / len`; `out` is f64 for f64, else f32. The sum
//!   of nothing is 0, its mean NaN.
//! - `argmax_rows`: `out[r]` = the first column of the largest element in row `r` of `x[rows, columns]`.
//!   NaN counts as largest, as in PyTorch.
//!
//! Sums are computed in f64: per chunk, then over the chunks in order. So the result does not depend on the number of
//! threads, and the only significant rounding is the last.

use rayon::prelude::*;

use super::compute::{
    CHUNK, Compute, check_floats, check_streams, entry_name, load, store, sum_dtype, with_compute,
};
use super::device::{push_sizes, push_spans, push_types};
use super::{PARALLEL_MIN, Span};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};

/// Enqueues `out[0] = Σ x[i]`.
///
/// # Errors
/// [`Error::InvalidArgument`] if `out` does not have exactly one element of type [`sum_dtype`], for operands of another
/// stream, or that overlap; [`Error::UnsupportedDtype`] for u32 and 8-bit types.
pub fn sum(stream: &Stream, x: &Span, out: &Span) -> Result<()> {
    enqueue_total(
        "sum",
        stream,
        Total {
            x: *x,
            out: *out,
            divisor: 1,
        },
    )
}

/// Enqueues `out[0] = Σ x[i] / len`.
///
/// # Errors
/// As [`sum`].
pub fn mean(stream: &Stream, x: &Span, out: &Span) -> Result<()> {
    enqueue_total("mean", stream, Total::mean_of(x, out))
}

fn enqueue_total(op: &'static str, stream: &Stream, total: Total) -> Result<()> {
    check_streams(op, stream, &[&total.x, &total.out])?;
    check_floats(op, &[&total.x])?;
    total.out.check_len(op, 1)?;
    total.out.check_dtype(op, sum_dtype(total.x.dtype()))?;
    total.out.check_disjoint(op, &total.x)?;
    super::enqueue(stream, total)
}

/// Enqueues `out[r]` = the column of the largest element in row `r` of `x`, for `out.len()` rows.
///
/// # Errors
/// [`Error::InvalidArgument`] if `x` is not `out.len()` rows of equal length, at least one element each,
/// for an `out` that is not u32, for operands of another stream, or that overlap;
/// [`Error::UnsupportedDtype`] if `x` is u32 or of an 8-bit type.
pub fn argmax_rows(stream: &Stream, x: &Span, out: &Span) -> Result<()> {
    const OP: &str = "argmax_rows";
    check_streams(OP, stream, &[x, out])?;
    check_floats(OP, &[x])?;
    out.check_dtype(OP, DType::U32)?;
    out.check_disjoint(OP, x)?;
    let columns = x.len().checked_div(out.len()).unwrap_or(0);
    if columns * out.len() != x.len() || columns == 0 && !out.is_empty() {
        return Err(Error::argument(
            OP,
            format!(
                "{} elements do not make {} equal rows of at least one element",
                x.len(),
                out.len()
            ),
        ));
    }
    if u32::try_from(columns).is_err() {
        return Err(Error::argument(
            OP,
            format!("{columns} columns are more than a u32 can index"),
        ));
    }
    if out.is_empty() {
        return Ok(());
    }
    super::enqueue(
        stream,
        ArgmaxRows {
            x: *x,
            out: *out,
            columns,
        },
    )
}

#[derive(Debug)]
pub(super) struct Total {
    x: Span,
    out: Span,
    divisor: u64,
}

impl Total {
    /// The mean of `x`, into one element of any float type.
    pub(super) fn mean_of(x: &Span, out: &Span) -> Self {
        Self {
            x: *x,
            out: *out,
            divisor: x.len() as u64,
        }
    }
}

impl Kernel for Total {
    fn entry(&self) -> &'static str {
        entry_name!("sum", self.x.dtype())
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.out]);
        into.u64(self.elements());
        into.u64(self.divisor);
        push_types(into, &[&self.out]);
    }

    fn grid(&self) -> Grid {
        // One block, since several would need memory to combine their results.
        Grid {
            threads: 1024,
            ..Grid::of_blocks(1)
        }
    }

    unsafe fn run(&self) {
        // SAFETY: the caller's promise.
        let total = unsafe { total(&self.x) };
        #[expect(clippy::cast_precision_loss, reason = "no array has 2^53 elements")]
        let quotient = total / self.divisor as f64;
        // SAFETY: the caller promises exclusive access to `out`.
        unsafe { store(&self.out, 0, &[quotient]) };
    }
}

/// The sum of all elements of `x`: per chunk, then over the chunks in order.
///
/// # Safety
/// As [`Span::slice`].
pub(super) unsafe fn total(x: &Span) -> f64 {
    let part = |idx: usize| {
        let start = idx * CHUNK;
        let mut buffer = [0.0f64; CHUNK];
        let values = &mut buffer[..CHUNK.min(x.len() - start)];
        // SAFETY: the caller promises that nothing writes `x`.
        unsafe { load(x, start, values) };
        sum_in_lanes(values)
    };
    let chunks = 0..x.len().div_ceil(CHUNK);
    let parts: Vec<f64> = if x.len() < PARALLEL_MIN {
        chunks.map(part).collect()
    } else {
        chunks
            .into_par_iter()
            .with_min_len(PARALLEL_MIN / CHUNK)
            .map(part)
            .collect()
    };
    sum_in_lanes(&parts)
}

/// The sum in eight interleaved lanes, which the compiler keeps in vector registers.
pub(super) fn sum_in_lanes<C: Compute>(values: &[C]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (whole, rest) = values.as_chunks::<8>();
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += value.to_f64();
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value.to_f64();
    }
    lanes.iter().sum()
}

#[derive(Debug)]
struct ArgmaxRows {
    x: Span,
    out: Span,
    columns: usize,
}

impl ArgmaxRows {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        // SAFETY: the caller promises exclusive access to `out`.
        let out = unsafe { self.out.slice_mut::<u32>() };
        let rows_at_once = PARALLEL_MIN.div_ceil(self.columns);
        out.par_iter_mut()
            .with_min_len(rows_at_once)
            .enumerate()
            .for_each(|(row, out)| {
                // SAFETY: the caller promises that nothing writes `x`.
                *out = unsafe { self.argmax::<C>(row) };
            });
    }

    /// # Safety
    /// Nothing writes `x` meanwhile.
    unsafe fn argmax<C: Compute>(&self, row: usize) -> u32 {
        let mut buffer = [C::default(); CHUNK];
        let (mut best, mut best_at) = (None, 0);
        for start in (0..self.columns).step_by(CHUNK) {
            let values = &mut buffer[..CHUNK.min(self.columns - start)];
            // SAFETY: the caller promises that nothing writes `x`.
            unsafe { load(&self.x, row * self.columns + start, values) };
            for (idx, value) in values.iter().enumerate() {
                if best.is_none_or(|best| exceeds(*value, best)) {
                    (best, best_at) = (Some(*value), start + idx);
                }
            }
        }
        u32::try_from(best_at).expect("the launcher admits only columns that fit")
    }
}

/// Whether `value` is larger than `best`. NaN is larger than every number, but not larger than NaN.
#[expect(clippy::eq_op, reason = "only NaN differs from itself")]
fn exceeds<C: Compute>(value: C, best: C) -> bool {
    value > best || value != value && best == best
}

impl Kernel for ArgmaxRows {
    fn entry(&self) -> &'static str {
        entry_name!("argmax_rows", self.x.dtype())
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.out]);
        push_sizes(into, &[self.out.len(), self.columns]);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps(self.out.len() as u64)
    }

    unsafe fn run(&self) {
        with_compute!([self.x], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
    use crate::launch::tolerance::assert_close;

    fn total(dtype: DType, values: &[f64], divisor: u64) -> f64 {
        let (x, out) = (
            Array::new(dtype, values),
            Array::filled(sum_dtype(dtype), 1),
        );
        run(&Total {
            x: x.span(),
            out: out.span(),
            divisor,
        });
        out.values()[0]
    }

    #[test]
    fn sums_against_exact_ones() {
        for dtype in DType::FLOATS {
            for len in LENGTHS {
                let values = rounded(dtype, &numbers(1, len, 10.0));
                let exact: f64 = values.iter().sum();
                assert_close(
                    sum_dtype(dtype),
                    1e-9,
                    &[total(dtype, &values, 1)],
                    &[exact],
                );
            }
        }
    }

    #[test]
    fn a_sum_that_f32_could_not_take() {
        // Each 1 is lost in an f32 accumulator, and the large ones must cancel exactly.
        let mut values = vec![1.0; 50_000];
        values[0] = 2f64.powi(40);
        values[49_999] = -(2f64.powi(40));
        assert_eq!(total(DType::F32, &values, 1), 49_998.0);
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let values = numbers(2, 100_003, 1.0);
        let in_pool = |threads| {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| total(DType::F64, &values, 1).to_bits())
        };
        assert_eq!(in_pool(1), in_pool(3));
    }

    #[test]
    fn means_and_ends() {
        assert_eq!(total(DType::F16, &[1.0, 2.0, 6.0], 3), 3.0);
        assert_eq!(total(DType::F32, &[], 1), 0.0);
        assert!(total(DType::F32, &[], 0).is_nan());
        assert_eq!(total(DType::F32, &[f64::INFINITY, 1.0], 2), f64::INFINITY);
        assert!(total(DType::F32, &[f64::INFINITY, f64::NEG_INFINITY], 1).is_nan());
        // More than f16 holds: the output is f32.
        assert_eq!(total(DType::F16, &[65504.0; 4], 1), 262_016.0);
    }

    fn argmax(dtype: DType, values: &[f64], rows: usize) -> Vec<f64> {
        let (x, out) = (Array::new(dtype, values), Array::filled(DType::U32, rows));
        run(&ArgmaxRows {
            x: x.span(),
            out: out.span(),
            columns: values.len() / rows,
        });
        out.values()
    }

    #[test]
    fn argmax_takes_the_first_of_equals_and_nan_before_all() {
        let nan = f64::NAN;
        for dtype in DType::FLOATS {
            let x = [1.0, 3.0, 3.0, 5.0, nan, nan, -1.0, -2.0, -3.0];
            assert_eq!(argmax(dtype, &x, 3), [1.0, 1.0, 0.0], "{dtype}");
            assert_eq!(argmax(dtype, &[f64::NEG_INFINITY; 4], 2), [0.0, 0.0]);
        }
    }

    #[test]
    fn argmax_of_long_and_of_many_rows() {
        for (rows, columns) in [(3, 5000), (5000, 3)] {
            let values = numbers(3, rows * columns, 1.0);
            let expected: Vec<f64> = values
                .chunks(columns)
                .map(|row| {
                    let best = (0..columns)
                        .max_by(|a, b| row[*a].total_cmp(&row[*b]))
                        .unwrap();
                    f64::from(u32::try_from(best).unwrap())
                })
                .collect();
            assert_eq!(argmax(DType::F64, &values, rows), expected);
        }
    }
}
