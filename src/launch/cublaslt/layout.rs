//! Describes this crate's row-major matrices to cuBLASLt, which is column-major.
//!
//! A row-major matrix read in column-major order is its transpose. So the library is asked for the transposed product,
//! `outᵀ = bᵀ · aᵀ`: its first operand is `b`, its second is `a`, and what it writes column by column is `out` row by
//! row.

use crate::launch::Matrix;

/// A column-major matrix: element (row, column) is at `row + column · leading`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Stored {
    pub(super) rows: u64,
    pub(super) columns: u64,
    pub(super) leading: i64,
    /// Whether the operand is the transpose of this matrix.
    pub(super) is_transposed: bool,
}

impl Stored {
    /// The transpose of `matrix` in a form that the library can read; `None` if neither its rows nor its columns are
    /// contiguous, or if they overlap.
    pub(super) fn transpose_of(matrix: &Matrix) -> Option<Self> {
        let (shape, strides) = ([matrix.rows(), matrix.columns()], matrix.strides());
        let by_columns = |[count, extent]: [usize; 2], [step, inner]: [usize; 2], is_transposed| {
            // A stride that is never used may have any value.
            let is_dense = extent <= 1 || inner == 1;
            let leading = if count <= 1 { extent.max(1) } else { step };
            let fits = is_dense && leading >= extent.max(1);
            let leading = i64::try_from(leading).ok().filter(|_| fits)?;
            Some(Self {
                rows: extent as u64,
                columns: count as u64,
                leading,
                is_transposed,
            })
        };
        let exchanged = |[a, b]: [usize; 2]| [b, a];
        by_columns(shape, strides, false)
            .or_else(|| by_columns(exchanged(shape), exchanged(strides), true))
    }

    /// The transpose of `rows` dense rows of `columns`: the form in which the library writes the result.
    pub(super) fn dense(rows: usize, columns: usize) -> Option<Self> {
        Some(Self {
            rows: columns as u64,
            columns: rows as u64,
            leading: i64::try_from(columns).ok()?,
            is_transposed: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::DevicePtr;
    use crate::dtype::DType;
    use crate::launch::Span;
    use crate::units::StreamId;

    fn matrix(shape: [usize; 2], strides: [usize; 2]) -> Matrix {
        // SAFETY: never launched.
        let span = unsafe { Span::new(DevicePtr(512), 10_000, DType::F16, StreamId(0)) };
        Matrix::new(&span, shape, strides).expect("it lies in the span")
    }

    /// Where the library finds element (row, column) of the operand, according to its documentation.
    fn found_at(stored: &Stored, row: usize, column: usize) -> usize {
        let [row, column] = if stored.is_transposed {
            [column, row]
        } else {
            [row, column]
        };
        assert!((row as u64) < stored.rows && (column as u64) < stored.columns);
        row + column * usize::try_from(stored.leading).expect("positive")
    }

    #[test]
    fn the_library_finds_every_element_where_it_lies() {
        for (shape, strides) in [
            ([3, 5], [5, 1]),
            ([3, 5], [8, 1]),
            ([3, 5], [1, 3]),
            ([3, 5], [1, 7]),
            ([1, 5], [5, 1]),
            ([1, 5], [0, 1]),
            ([1, 5], [1, 9]),
            ([3, 1], [1, 1]),
            ([3, 1], [4, 9]),
            ([1, 1], [0, 0]),
        ] {
            let stored = Stored::transpose_of(&matrix(shape, strides));
            let stored = stored.unwrap_or_else(|| panic!("{shape:?} by {strides:?}"));
            assert!(
                stored.leading.unsigned_abs() >= stored.rows,
                "as the library demands"
            );
            for row in 0..shape[0] {
                for column in 0..shape[1] {
                    let lies_at = row * strides[0] + column * strides[1];
                    assert_eq!(
                        found_at(&stored, column, row),
                        lies_at,
                        "{shape:?} by {strides:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_the_library_cannot_read_is_left_to_the_kernel() {
        for (shape, strides) in [
            ([3, 5], [20, 2]),
            ([3, 5], [0, 1]),
            ([3, 5], [2, 1]),
            ([3, 5], [1, 0]),
        ] {
            assert_eq!(
                Stored::transpose_of(&matrix(shape, strides)),
                None,
                "{strides:?}"
            );
        }
    }

    #[test]
    fn what_it_writes_by_columns_is_dense_by_rows() {
        let stored = Stored::dense(3, 5).expect("small");
        assert_eq!(found_at(&stored, 4, 2), 2 * 5 + 4);
    }
}
