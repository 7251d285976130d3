//! Matrix product.
//!
//! `out[m, n] = a[m, k] · b[k, n]`, optionally plus the previous value of `out`. `a` and `b` are [`Matrix`] views, so a
//! transpose costs nothing; `out` is dense and row-major. `a` and `b` have the same float type; `out` has that type or
//! is f32.
//!
//! Products are summed in f32, or in f64 for f64, and rounded once into `out`; the previous value of `out` is added
//! before that rounding. The order of summation depends only on the sizes and on the implementation: this crate's
//! kernel, or cuBLASLt. Infinity and NaN propagate through the sums: a row that contains a NaN becomes NaN. With k = 0
//! every sum is 0.
//!
//! The twin widens half-precision operands into dense scratch and distributes blocks of rows over the threads.

use rayon::prelude::*;

use super::compute::{CHUNK, Compute, check_floats, check_streams, entry_name, load, store};
use super::device::{push_sizes, push_spans};
use super::{PARALLEL_MIN, Span};
#[cfg(feature = "cuda")]
use crate::driver::DevicePtr;
use crate::driver::{Arguments, Grid, Kernel, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::units::to_usize;

const OP: &str = "matmul";

/// The fewest rows of `out` per task: the GEMM below packs `b` again for each task.
const BLOCK_ROWS: usize = 64;

/// Rows and columns of the tile of `out` that a thread block computes on a device.
const DEVICE_TILE: u64 = 64;

/// A matrix in memory: element (row, column) is at `row · row_stride + column · column_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    span: Span,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl Matrix {
    /// A view of `span` as `shape` = [rows, columns] with `strides` in elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if an element would lie outside `span`.
    pub fn new(span: &Span, shape: [usize; 2], strides: [usize; 2]) -> Result<Self> {
        let last = |idx: usize| shape[idx].saturating_sub(1).checked_mul(strides[idx]);
        let needed = last(0)
            .zip(last(1))
            .and_then(|(row, column)| row.checked_add(column)?.checked_add(1));
        let is_empty = shape.contains(&0);
        if !is_empty && needed.is_none_or(|needed| needed > span.len()) {
            return Err(Error::argument(
                "matmul",
                format!(
                    "shape {shape:?} with strides {strides:?} reaches outside {} elements",
                    span.len()
                ),
            ));
        }
        Ok(Self {
            // Only what is reached, so that the overlap checks are not stricter than necessary.
            span: span.sub(0, if is_empty { 0 } else { needed.unwrap_or(0) }),
            rows: shape[0],
            columns: shape[1],
            row_stride: strides[0],
            column_stride: strides[1],
        })
    }

    /// A view of `span` as `rows` dense rows of `columns`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn dense(span: &Span, rows: usize, columns: usize) -> Result<Self> {
        Self::new(span, [rows, columns], [columns, 1])
    }

    /// The same elements with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            span: self.span,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Steps from a row and from a column to the next, in elements.
    #[must_use]
    pub fn strides(&self) -> [usize; 2] {
        [self.row_stride, self.column_stride]
    }

    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.span.dtype()
    }

    /// Address of the first element.
    #[cfg(feature = "cuda")]
    pub(super) fn ptr(&self) -> DevicePtr {
        self.span.ptr()
    }

    /// Rows `start..start + rows`.
    fn band(self, start: usize, rows: usize) -> Self {
        if self.span.is_empty() {
            return Self { rows, ..self };
        }
        let first = start * self.row_stride;
        Self {
            span: self.span.sub(first, self.span.len() - first),
            rows,
            ..self
        }
    }
}

/// What happens to the previous values of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accumulate {
    /// They are overwritten without being read.
    Overwrite,
    /// The result is added to them.
    Add,
}

/// Enqueues `out = a · b`, or `out = out + a · b`.
///
/// # Errors
/// As [`matmul_with`].
pub fn matmul(
    stream: &Stream,
    a: &Matrix,
    b: &Matrix,
    out: &Span,
    accumulate: Accumulate,
) -> Result<()> {
    matmul_with(None, stream, a, b, out, accumulate)
}

/// Enqueues `out = a · b`, or `out = out + a · b`. On a CUDA device, cuBLASLt computes the product if it is installed,
/// supports this product, and `workspace` is at least as large as [`matmul_workspace`] says. Otherwise this crate's
/// kernel does. The contents of `workspace` are overwritten.
///
/// # Errors
/// [`Error::InvalidArgument`] for sizes or types that do not fit, for operands of another stream, or if `out` or
/// `workspace` overlaps another operand; [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::Driver`] if the
/// product cannot be enqueued.
pub fn matmul_with(
    workspace: Option<&Span>,
    stream: &Stream,
    a: &Matrix,
    b: &Matrix,
    out: &Span,
    accumulate: Accumulate,
) -> Result<()> {
    check(stream, a, b, out)?;
    if let Some(workspace) = workspace {
        check_streams(OP, stream, &[workspace])?;
        for span in [&a.span, &b.span, out] {
            workspace.check_disjoint(OP, span)?;
        }
    }
    if out.is_empty() || a.columns == 0 && accumulate == Accumulate::Add {
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if product(a, b, out, accumulate).enqueue(stream, workspace)? {
        return Ok(());
    }
    super::enqueue(
        stream,
        Matmul {
            a: *a,
            b: *b,
            out: *out,
            accumulate,
        },
    )
}

/// Bytes of workspace that [`matmul_with`] can use for this product; 0 for a product that it refuses, or that this
/// crate's kernel computes.
#[must_use]
pub fn matmul_workspace(
    stream: &Stream,
    a: &Matrix,
    b: &Matrix,
    out: &Span,
    accumulate: Accumulate,
) -> u64 {
    #[cfg(feature = "cuda")]
    if check(stream, a, b, out).is_ok() {
        return product(a, b, out, accumulate).workspace(stream);
    }
    let _ = (stream, a, b, out, accumulate);
    0
}

#[cfg(feature = "cuda")]
fn product<'a>(
    a: &'a Matrix,
    b: &'a Matrix,
    out: &'a Span,
    accumulate: Accumulate,
) -> super::cublaslt::Product<'a> {
    super::cublaslt::Product {
        a,
        b,
        out,
        accumulate,
    }
}

fn check(stream: &Stream, a: &Matrix, b: &Matrix, out: &Span) -> Result<()> {
    check_streams(OP, stream, &[&a.span, &b.span, out])?;
    check_floats(OP, &[&a.span, &b.span, out])?;
    b.span.check_dtype(OP, a.span.dtype())?;
    if out.dtype() != DType::F32 || a.span.dtype() == DType::F64 {
        out.check_dtype(OP, a.span.dtype())?;
    }
    if a.columns != b.rows || a.rows.checked_mul(b.columns) != Some(out.len()) {
        return Err(Error::argument(
            OP,
            format!(
                "[{}, {}] · [{}, {}] does not fit, or does not make {} elements",
                a.rows,
                a.columns,
                b.rows,
                b.columns,
                out.len()
            ),
        ));
    }
    out.check_disjoint(OP, &a.span)?;
    out.check_disjoint(OP, &b.span)
}

#[derive(Debug)]
struct Matmul {
    a: Matrix,
    b: Matrix,
    out: Span,
    accumulate: Accumulate,
}

impl Kernel for Matmul {
    fn entry(&self) -> &'static str {
        match self.a.span.dtype() {
            DType::F16 => entry_name!("matmul_f16", self.out.dtype()),
            DType::Bf16 => entry_name!("matmul_bf16", self.out.dtype()),
            dtype => entry_name!("matmul", dtype),
        }
    }

    fn elements(&self) -> u64 {
        self.out.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let Self {
            a,
            b,
            out,
            accumulate,
        } = self;
        push_spans(into, &[&a.span, &b.span, out]);
        push_sizes(into, &[a.rows, a.columns, b.columns]);
        push_sizes(into, &[a.row_stride, a.column_stride]);
        push_sizes(into, &[b.row_stride, b.column_stride]);
        into.u32(u32::from(*accumulate == Accumulate::Add));
    }

    fn grid(&self) -> Grid {
        let tiles = |extent: usize| (extent as u64).div_ceil(DEVICE_TILE);
        Grid::of_blocks(tiles(self.a.rows).saturating_mul(tiles(self.b.columns)))
    }

    unsafe fn run(&self) {
        match self.a.span.dtype() {
            // SAFETY: the caller promises access to the three spans.
            DType::F64 => unsafe { self.run_in::<f64>() },
            // SAFETY: as above.
            _ => unsafe { self.run_in::<f32>() },
        }
    }
}

impl Matmul {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Gemm>(&self) {
        // SAFETY: the caller promises that nothing writes `b`.
        let b = unsafe { Operand::<C>::new(&self.b) };
        let threads = rayon::current_num_threads();
        let rows = self.a.rows.div_ceil(threads).max(BLOCK_ROWS);
        let block = |idx: usize| {
            let start = idx * rows;
            // SAFETY: the caller promises access, and blocks are disjoint in `out`.
            unsafe { self.run_rows(start, rows.min(self.a.rows - start), &b) };
        };
        let blocks = 0..self.a.rows.div_ceil(rows);
        if self.out.len().saturating_mul(self.a.columns) < PARALLEL_MIN {
            blocks.for_each(block);
        } else {
            blocks.into_par_iter().for_each(block);
        }
    }

    /// Computes rows `start..start + rows` of `out`.
    ///
    /// # Safety
    /// As [`Kernel::run`], for these rows of `out`.
    unsafe fn run_rows<C: Gemm>(&self, start: usize, rows: usize, b: &Operand<C>) {
        let columns = self.b.columns;
        let out = self.out.sub(start * columns, rows * columns);
        // SAFETY: the caller promises that nothing writes `a`.
        let a = unsafe { Operand::<C>::new(&self.a.band(start, rows)) };
        let shape = [rows, self.a.columns, columns];
        let add = self.accumulate == Accumulate::Add;
        if out.dtype() == C::DTYPE {
            // SAFETY: the caller promises these rows of `out` to this call alone.
            let sums = unsafe { out.slice_mut::<C>() };
            return multiply(shape, &a, b, sums, add);
        }
        let mut sums = vec![C::default(); out.len()];
        if add {
            // SAFETY: as above; the slice inside `load` is gone before the next one is made.
            unsafe { load(&out, 0, &mut sums) };
        }
        multiply(shape, &a, b, &mut sums, add);
        // SAFETY: as above.
        unsafe { store(&out, 0, &sums) };
    }
}

/// A matrix in the compute type: in place, or a dense copy.
struct Operand<C> {
    /// Address of the first element, in the matrix itself or in `_scratch`.
    address: usize,
    strides: [usize; 2],
    _scratch: Vec<C>,
}

impl<C: Gemm> Operand<C> {
    /// # Safety
    /// Nothing writes the elements of `matrix` while the operand lives.
    unsafe fn new(matrix: &Matrix) -> Self {
        let strides = [matrix.row_stride, matrix.column_stride];
        if matrix.span.dtype() == C::DTYPE {
            let address = to_usize(matrix.span.ptr().0);
            return Self {
                address,
                strides,
                _scratch: Vec::new(),
            };
        }
        // Lines run along the smaller stride, which is 1 in all but odd views.
        let by_columns = matrix.row_stride < matrix.column_stride;
        let lines = if by_columns {
            matrix.transposed()
        } else {
            *matrix
        };
        let (count, len) = (lines.rows, lines.columns);
        let mut scratch = vec![C::default(); count * len];
        let line = |(idx, line): (usize, &mut [C])| {
            // SAFETY: the caller promises that nothing writes these elements.
            unsafe { load_line(&lines, idx, line) };
        };
        if len > 0 && scratch.len() < PARALLEL_MIN {
            scratch.chunks_mut(len).enumerate().for_each(line);
        } else if len > 0 {
            let few = CHUNK.div_ceil(len);
            scratch
                .par_chunks_mut(len)
                .with_min_len(few)
                .enumerate()
                .for_each(line);
        }
        let strides = if by_columns { [1, len] } else { [len, 1] };
        Self {
            address: scratch.as_ptr() as usize,
            strides,
            _scratch: scratch,
        }
    }
}

/// Row `row` of `matrix`, widened.
///
/// # Safety
/// Nothing writes its elements meanwhile.
unsafe fn load_line<C: Compute>(matrix: &Matrix, row: usize, into: &mut [C]) {
    let start = row * matrix.row_stride;
    if matrix.column_stride == 1 {
        // SAFETY: the caller promises the same.
        return unsafe { load(&matrix.span, start, into) };
    }
    for (column, element) in into.iter_mut().enumerate() {
        let at = start + column * matrix.column_stride;
        // SAFETY: the caller promises the same.
        unsafe { load(&matrix.span, at, std::slice::from_mut(element)) };
    }
}

/// `out = a · b`, or `out + a · b`, for `shape` = [m, k, n] and dense rows in `out`.
fn multiply<C: Gemm>(
    [m, k, n]: [usize; 3],
    a: &Operand<C>,
    b: &Operand<C>,
    out: &mut [C],
    add: bool,
) {
    assert_eq!(
        out.len(),
        m * n,
        "the output has one element for each row and column"
    );
    let beta = if add { C::from_f32(1.0) } else { C::default() };
    let at = |operand: &Operand<C>| (operand.address as *const C, operand.strides.map(signed));
    // SAFETY: an operand covers all elements of its matrix, whose bounds `Matrix::new` has checked, and `out` has room
    // for m rows of n.
    unsafe {
        C::gemm(
            [m, k, n],
            at(a),
            at(b),
            beta,
            (out.as_mut_ptr(), [signed(n), 1]),
        )
    }
}

/// Converts a stride for the GEMM. A stride that does not fit is never used: its dimension has at most one element,
/// since the matrix would not fit in memory otherwise.
fn signed(stride: usize) -> isize {
    isize::try_from(stride).unwrap_or(0)
}

/// A compute type with a GEMM.
trait Gemm: Compute {
    /// `c = a·b + beta·c` for `shape` = [m, k, n], each operand an address with row and column stride.
    /// With a `beta` of 0, `c` is not read.
    ///
    /// # Safety
    /// `a` is readable for (m, k), `b` for (k, n), and `c` exclusively writable for (m, n), at these
    /// strides.
    unsafe fn gemm(
        shape: [usize; 3],
        a: (*const Self, [isize; 2]),
        b: (*const Self, [isize; 2]),
        beta: Self,
        c: (*mut Self, [isize; 2]),
    );
}

macro_rules! gemm {
    ($type:ty, $function:path) => {
        impl Gemm for $type {
            unsafe fn gemm(
                [m, k, n]: [usize; 3],
                (a, [a_row, a_column]): (*const Self, [isize; 2]),
                (b, [b_row, b_column]): (*const Self, [isize; 2]),
                beta: Self,
                (c, [c_row, c_column]): (*mut Self, [isize; 2]),
            ) {
                // SAFETY: the caller promises these addresses and strides for these sizes.
                unsafe {
                    $function(
                        m, k, n, 1.0, a, a_row, a_column, b, b_row, b_column, beta, c, c_row,
                        c_column,
                    );
                }
            }
        }
    };
}

gemm!(f32, matrixmultiply::sgemm);
gemm!(f64, matrixmultiply::dgemm);

#[cfg(test)]
mod tests;
