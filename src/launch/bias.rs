//! Adds a bias to each column of a matrix, and computes the gradient of the bias.
//!
//! - `add_bias`: `out[r, c] = x[r, c] + bias[c]`, rounded once; `out` may be `x`.
//! - `sum_rows`: `out[c] = Σ x[r, c]` over the rows, the gradient of the bias. Over zero rows it is 0.
//!
//! Any float types. `add_bias` computes in f32 (f64 if any operand is f64). `sum_rows` computes in f64, over blocks of
//! rows in a fixed order, so the result does not depend on the number of threads.

use rayon::prelude::*;

use super::compute::{
    CHUNK, Compute, check_floats, check_streams, entry_name, for_chunks, load, store, with_compute,
};
use super::device::{entry_by_types, push_sizes, push_spans, push_types};
use super::{PARALLEL_MIN, Span};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::error::{Error, Result};

/// Rows that one task of `sum_rows` adds up.
const BLOCK_ROWS: usize = 256;

/// Enqueues `out[r, c] = x[r, c] + bias[c]`. There are as many columns as `bias` has elements.
///
/// # Errors
/// [`Error::InvalidArgument`] for an `x` that is not whole rows, an `out` of another length, for operands
/// of another stream, or that overlap; [`Error::UnsupportedDtype`] for u32 and 8-bit types.
pub fn add_bias(stream: &Stream, x: &Span, bias: &Span, out: &Span) -> Result<()> {
    const OP: &str = "add_bias";
    check_streams(OP, stream, &[x, bias, out])?;
    check_floats(OP, &[x, bias, out])?;
    check_rows(OP, x, bias.len())?;
    out.check_len(OP, x.len())?;
    out.check_in_place_or_disjoint(OP, x)?;
    if x.is_empty() {
        return Ok(());
    }
    out.check_disjoint(OP, bias)?;
    super::enqueue(
        stream,
        AddBias {
            x: *x,
            bias: *bias,
            out: *out,
        },
    )
}

/// Enqueues `out[c] = Σ x[r, c]`. There are as many columns as `out` has elements.
///
/// # Errors
/// As [`add_bias`].
pub fn sum_rows(stream: &Stream, x: &Span, out: &Span) -> Result<()> {
    const OP: &str = "sum_rows";
    check_streams(OP, stream, &[x, out])?;
    check_floats(OP, &[x, out])?;
    check_rows(OP, x, out.len())?;
    out.check_disjoint(OP, x)?;
    if out.is_empty() {
        return Ok(());
    }
    super::enqueue(stream, SumRows { x: *x, out: *out })
}

fn check_rows(op: &'static str, x: &Span, columns: usize) -> Result<()> {
    if x.len().checked_rem(columns).unwrap_or(x.len()) == 0 {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!("{} elements are not whole rows of {columns}", x.len()),
    ))
}

#[derive(Debug)]
struct AddBias {
    x: Span,
    bias: Span,
    out: Span,
}

impl AddBias {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        let columns = self.bias.len();
        let mut bias = vec![C::default(); columns];
        // SAFETY: the caller promises that nothing writes the bias.
        unsafe { load(&self.bias, 0, &mut bias) };
        for_chunks(self.x.len(), |start, len| {
            let mut buffer = [C::default(); CHUNK];
            let values = &mut buffer[..len];
            // SAFETY: the caller keeps others away from `x`, and this thread has not written this part yet.
            unsafe { load(&self.x, start, values) };
            for_row_parts(start, values, columns, |column, part| {
                for (value, bias) in part.iter_mut().zip(&bias[column..]) {
                    *value = *value + *bias;
                }
            });
            // SAFETY: chunks are disjoint, so only this thread touches this part of `out`.
            unsafe { store(&self.out, start, values) };
        });
    }
}

/// Calls `body(column, part)` for each part of a row in `values`, which begins at element `start` of a matrix.
fn for_row_parts<C>(
    start: usize,
    mut values: &mut [C],
    columns: usize,
    mut body: impl FnMut(usize, &mut [C]),
) {
    let mut column = start % columns;
    while !values.is_empty() {
        let (part, rest) = values.split_at_mut(values.len().min(columns - column));
        body(column, part);
        (values, column) = (rest, 0);
    }
}

impl Kernel for AddBias {
    fn entry(&self) -> &'static str {
        entry_by_types!("add_bias", [self.x, self.bias, self.out])
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.x, &self.bias, &self.out];
        push_spans(into, &spans);
        push_sizes(into, &[self.x.len(), self.bias.len()]);
        push_types(into, &spans);
    }

    unsafe fn run(&self) {
        with_compute!([self.x, self.bias, self.out], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[derive(Debug)]
struct SumRows {
    x: Span,
    out: Span,
}

impl Kernel for SumRows {
    fn entry(&self) -> &'static str {
        entry_name!("sum_rows", self.x.dtype())
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let columns = self.out.len();
        push_spans(into, &[&self.x, &self.out]);
        push_sizes(into, &[self.x.len() / columns, columns]);
        push_types(into, &[&self.out]);
    }

    fn grid(&self) -> Grid {
        // A block processes as many columns as a warp has lanes.
        Grid::of_blocks((self.out.len() as u64).div_ceil(32))
    }

    unsafe fn run(&self) {
        let columns = self.out.len();
        let rows = self.x.len() / columns;
        let part = |idx: usize| {
            let first = idx * BLOCK_ROWS;
            // SAFETY: the caller promises that nothing writes `x`.
            unsafe { self.sum_block(first, BLOCK_ROWS.min(rows - first)) }
        };
        let blocks = 0..rows.div_ceil(BLOCK_ROWS);
        let parts: Vec<Vec<f64>> = if self.x.len() < PARALLEL_MIN {
            blocks.map(part).collect()
        } else {
            blocks.into_par_iter().map(part).collect()
        };
        let mut totals = vec![0.0; columns];
        for part in &parts {
            for (total, value) in totals.iter_mut().zip(part) {
                *total += value;
            }
        }
        // SAFETY: the caller promises exclusive access to `out`.
        unsafe { store(&self.out, 0, &totals) };
    }
}

impl SumRows {
    /// The sums over rows `first..first + rows`.
    ///
    /// # Safety
    /// Nothing writes `x` meanwhile.
    unsafe fn sum_block(&self, first: usize, rows: usize) -> Vec<f64> {
        let columns = self.out.len();
        let mut sums = vec![0.0; columns];
        let mut buffer = [0.0f64; CHUNK];
        let end = (first + rows) * columns;
        for start in (first * columns..end).step_by(CHUNK) {
            let values = &mut buffer[..CHUNK.min(end - start)];
            // SAFETY: the caller promises that nothing writes `x`.
            unsafe { load(&self.x, start, values) };
            for_row_parts(start, values, columns, |column, part| {
                for (sum, value) in sums[column..].iter_mut().zip(part) {
                    *sum += *value;
                }
            });
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::launch::testing::{Array, numbers, rounded, run};
    use crate::launch::tolerance::assert_close;

    const SHAPES: [(usize, usize); 6] =
        [(0, 3), (1, 1), (7, 5), (3, 2049), (40_001, 3), (300, 700)];

    #[test]
    fn bias_is_added_to_every_row() {
        for dtype in DType::FLOATS {
            for (rows, columns) in SHAPES {
                let x = rounded(dtype, &numbers(1, rows * columns, 4.0));
                let bias = rounded(dtype, &numbers(2, columns, 4.0));
                let expected: Vec<_> = x
                    .iter()
                    .enumerate()
                    .map(|(idx, x)| x + bias[idx % columns])
                    .collect();
                let (array, bias) = (Array::new(dtype, &x), Array::new(dtype, &bias));
                let (x, out) = (array.span(), array.span());
                run(&AddBias {
                    x,
                    bias: bias.span(),
                    out,
                });
                assert_close(dtype, 0.0, &array.values(), &expected);
            }
        }
    }

    #[test]
    fn rows_are_summed() {
        for dtype in DType::FLOATS {
            for (rows, columns) in SHAPES {
                let x = rounded(dtype, &numbers(3, rows * columns, 0.1));
                let mut expected = vec![0.0; columns];
                for (idx, x) in x.iter().enumerate() {
                    expected[idx % columns] += x;
                }
                let (x, out) = (Array::new(dtype, &x), Array::filled(dtype, columns));
                run(&SumRows {
                    x: x.span(),
                    out: out.span(),
                });
                assert_close(dtype, 1e-10, &out.values(), &expected);
            }
        }
    }

    #[test]
    fn non_finite_columns_stay_apart() {
        let x = Array::new(DType::F16, &[1.0, f64::INFINITY, f64::NAN, 2.0, 1.0, 1.0]);
        let out = Array::filled(DType::F32, 3);
        run(&SumRows {
            x: x.span(),
            out: out.span(),
        });
        assert_close(
            DType::F32,
            0.0,
            &out.values(),
            &[3.0, f64::INFINITY, f64::NAN],
        );
    }

    #[test]
    fn sums_do_not_depend_on_the_number_of_threads() {
        let x = Array::new(DType::F64, &numbers(4, 100_002, 1.0));
        let in_pool = |threads| {
            let out = Array::filled(DType::F64, 6);
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .unwrap();
            pool.install(|| {
                run(&SumRows {
                    x: x.span(),
                    out: out.span(),
                })
            });
            out.values()
        };
        assert_eq!(in_pool(1), in_pool(3));
    }
}
