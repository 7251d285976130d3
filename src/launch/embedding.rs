//! Embedding lookup, and the gradient of the table.
//!
//! - `embedding`: `out[r, c] = table[ids[r], c]`, in the type of the table;
//! - `embedding_backward`: `grad_table[i, c] = Σ grad_out[r, c]` over the rows with `ids[r] = i`, in order, in f64,
//!   rounded once. A table row that no id selects gets 0.
//!
//! An id out of range cannot be refused without waiting for the device. It selects a row of NaN, and its gradient is
//! added to no row.

use rayon::prelude::*;

use super::Span;
use super::compute::{check_floats, check_streams, entry_name, load, store, with_element};
use super::device::{push_sizes, push_spans, push_types};
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::units::to_usize;

/// Enqueues `out[r, ·] = table[ids[r], ·]`, for a table of `columns` columns.
///
/// # Errors
/// [`Error::InvalidArgument`] if the table is not whole rows, if `out` does not have one row for each of `ids` (u32),
/// for different types, operands of another stream, or that overlap; [`Error::UnsupportedDtype`] for a table of u32 or
/// an 8-bit type.
pub fn embedding(
    stream: &Stream,
    table: &Span,
    ids: &Span,
    out: &Span,
    columns: usize,
) -> Result<()> {
    const OP: &str = "embedding";
    check(OP, stream, ids, out, table, columns)?;
    out.check_dtype(OP, table.dtype())?;
    out.check_disjoint(OP, table)?;
    out.check_disjoint(OP, ids)?;
    if out.is_empty() {
        return Ok(());
    }
    let (table, ids, out) = (*table, *ids, *out);
    let kernel = Embedding {
        table,
        ids,
        out,
        columns,
    };
    super::enqueue(stream, kernel)
}

/// Enqueues the gradient of a table of `columns` columns, given the gradient of the rows that `ids` selected.
///
/// # Errors
/// As [`embedding`]; types may differ.
pub fn embedding_backward(
    stream: &Stream,
    grad_out: &Span,
    ids: &Span,
    grad_table: &Span,
    columns: usize,
) -> Result<()> {
    const OP: &str = "embedding_backward";
    check(OP, stream, ids, grad_out, grad_table, columns)?;
    grad_table.check_disjoint(OP, grad_out)?;
    grad_table.check_disjoint(OP, ids)?;
    if grad_table.is_empty() {
        return Ok(());
    }
    let kernel = Backward {
        grad_out: *grad_out,
        ids: *ids,
        grad_table: *grad_table,
        columns,
    };
    super::enqueue(stream, kernel)
}

fn check(
    op: &'static str,
    stream: &Stream,
    ids: &Span,
    rows: &Span,
    table: &Span,
    columns: usize,
) -> Result<()> {
    check_streams(op, stream, &[ids, rows, table])?;
    check_floats(op, &[rows, table])?;
    ids.check_dtype(op, DType::U32)?;
    let picked = ids.len().checked_mul(columns);
    if picked == Some(rows.len()) && columns > 0 && table.len().is_multiple_of(columns) {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{} output elements do not fit {} ids into a table of {} elements in {columns} columns",
            rows.len(),
            ids.len(),
            table.len()
        ),
    ))
}

#[derive(Debug)]
struct Embedding {
    table: Span,
    ids: Span,
    out: Span,
    columns: usize,
}

impl Embedding {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_as<T: Element>(&self) {
        // SAFETY: the caller promises that nothing writes the ids.
        let ids = unsafe { self.ids.slice::<u32>() };
        // SAFETY: the caller promises that nothing writes the table.
        let table = unsafe { self.table.slice::<T>() };
        // SAFETY: the caller promises exclusive access to the output.
        let out = unsafe { self.out.slice_mut::<T>() };
        let rows = out.chunks_exact_mut(self.columns).zip(ids);
        for (row, id) in rows {
            let start = to_usize(u64::from(*id)) * self.columns;
            match table.get(start..start + self.columns) {
                Some(from) => row.copy_from_slice(from),
                None => row.fill(T::from_f32(f32::NAN)),
            }
        }
    }
}

impl Kernel for Embedding {
    fn entry(&self) -> &'static str {
        entry_name!("embedding", self.table.dtype())
    }

    fn elements(&self) -> u64 {
        self.out.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.table, &self.ids, &self.out]);
        let rows = self.table.len() / self.columns;
        push_sizes(into, &[self.out.len(), rows, self.columns]);
    }

    unsafe fn run(&self) {
        with_element!(self.table.dtype(), T => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_as::<T>() }
        });
    }
}

#[derive(Debug)]
struct Backward {
    grad_out: Span,
    ids: Span,
    grad_table: Span,
    columns: usize,
}

impl Kernel for Backward {
    fn entry(&self) -> &'static str {
        entry_name!("embedding_backward", self.grad_out.dtype())
    }

    fn elements(&self) -> u64 {
        self.grad_table.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.grad_out, &self.ids, &self.grad_table]);
        let rows = self.grad_table.len() / self.columns;
        push_sizes(into, &[self.ids.len(), rows, self.columns]);
        push_types(into, &[&self.grad_table]);
    }

    fn grid(&self) -> Grid {
        Grid::of_warps((self.grad_table.len() / self.columns) as u64)
    }

    unsafe fn run(&self) {
        let columns = self.columns;
        // SAFETY: the caller promises that nothing writes the ids.
        let ids = unsafe { self.ids.slice::<u32>() };
        // The rows that selected each table row, in order.
        let mut picked = vec![Vec::new(); self.grad_table.len() / columns];
        for (row, id) in ids.iter().enumerate() {
            if let Some(rows) = picked.get_mut(to_usize(u64::from(*id))) {
                rows.push(row);
            }
        }
        picked.par_iter().enumerate().for_each_init(
            || (vec![0.0f64; columns], vec![0.0f64; columns]),
            |(sum, term), (index, rows)| {
                sum.fill(0.0);
                for row in rows {
                    // SAFETY: the caller promises that nothing writes the gradient.
                    unsafe { load(&self.grad_out, row * columns, term) };
                    for (sum, term) in sum.iter_mut().zip(&*term) {
                        *sum += *term;
                    }
                }
                // SAFETY: the caller promises exclusive access, and table rows are disjoint.
                unsafe { store(&self.grad_table, index * columns, sum) };
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::{Array, numbers, rounded, run};
    use crate::launch::tolerance::assert_same;

    #[test]
    fn rows_are_picked_and_sums_go_back() {
        let columns = 3;
        let ids = [2.0, 0.0, 2.0, 9.0, 2.0];
        for dtype in DType::FLOATS {
            let values = rounded(dtype, &numbers(1, 4 * columns, 2.0));
            let (table, ids) = (Array::new(dtype, &values), Array::new(DType::U32, &ids));
            let out = Array::filled(dtype, 5 * columns);
            run(&Embedding {
                table: table.span(),
                ids: ids.span(),
                out: out.span(),
                columns,
            });
            let row = |id: usize| &values[id * columns..][..columns];
            let nan = [f64::NAN; 3];
            let expected = [row(2), row(0), row(2), &nan, row(2)].concat();
            assert_same("embedding", &out.values(), &expected);

            let grad = rounded(dtype, &numbers(2, 5 * columns, 2.0));
            let (grad_out, grad_table) =
                (Array::new(dtype, &grad), Array::filled(dtype, 4 * columns));
            run(&Backward {
                grad_out: grad_out.span(),
                ids: ids.span(),
                grad_table: grad_table.span(),
                columns,
            });
            let sums =
                (0..columns).map(|c| grad[c] + grad[2 * columns + c] + grad[4 * columns + c]);
            let mut expected = vec![0.0; 4 * columns];
            expected[..columns].copy_from_slice(&grad[columns..2 * columns]);
            expected[2 * columns..3 * columns]
                .copy_from_slice(&rounded(dtype, &sums.collect::<Vec<_>>()));
            assert_same("embedding_backward", &grad_table.values(), &expected);
        }
    }
}
