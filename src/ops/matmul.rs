//! The product of two matrices.

use super::autocast::operand;
use super::{check_one_stream, check_same_dtype, matrix_shape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::{self, Accumulate, Matrix};
use crate::storage::Tensor;
use crate::units::to_usize;

/// `a[m, k] · b[k, n]`, summed in f32 (f64 for f64) and rounded once. Transposed views cost nothing. In an autocast
/// scope, computation and result have the type of the scope.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes, types or streams that do not fit;
/// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    const OP: &str = "matmul";
    let ([m, k], [k_too, n]) = (matrix_shape(OP, "a", a)?, matrix_shape(OP, "b", b)?);
    if k != k_too {
        return Err(Error::argument(
            OP,
            format!("{} · {} does not fit", a.shape(), b.shape()),
        ));
    }
    check_one_stream(OP, &[("a", a), ("b", b)])?;
    let (a, b) = (operand(OP, a)?, operand(OP, b)?);
    check_same_dtype(OP, &a, &b)?;
    let out = Tensor::uninit(a.context(), [m, n], a.dtype())?;
    multiply_into(&view(&a)?, &view(&b)?, &out, Accumulate::Overwrite)?;
    Ok(out)
}

/// A matrix of any memory layout, as an operand of the kernel.
pub(super) fn view(tensor: &Tensor) -> Result<Matrix> {
    let shape = matrix_shape("matmul", "an operand", tensor)?;
    let strides = [tensor.strides()[0], tensor.strides()[1]];
    Matrix::new(&tensor.storage_span(), shape, strides)
}

/// Enqueues `out = a · b`, or adds it to `out`, which must be contiguous.
pub(super) fn multiply_into(
    a: &Matrix,
    b: &Matrix,
    out: &Tensor,
    accumulate: Accumulate,
) -> Result<()> {
    let (context, span) = (out.context(), out.span()?);
    let stream = context.stream();
    let workspace = match launch::matmul_workspace(stream, a, b, &span, accumulate) {
        0 => None,
        bytes => {
            // Without memory for it, a kernel that needs no workspace computes the product.
            let words = to_usize(bytes.div_ceil(4));
            Tensor::uninit(context, [words], DType::F32).ok()
        }
    };
    let workspace = workspace.as_ref().map(Tensor::span).transpose()?;
    launch::matmul_with(workspace.as_ref(), stream, a, b, &span, accumulate)
}
