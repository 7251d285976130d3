//! Looks up rows of a table by index.

use super::{check_one_stream, matrix_shape};
use crate::error::{Error, Result};
use crate::launch;
use crate::storage::Tensor;

/// The rows of `table[v, d]` at the indices `ids[n]` (u32), `[n, d]`, in the type of the table. An index out of range
/// gives NaN: refusing it would make the host wait.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes, types or streams that do not fit;
/// [`Error::UnsupportedDtype`] for a table of u32 or an 8-bit type; [`Error::OutOfMemory`].
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding";
    let [_, columns] = matrix_shape(OP, "table", table)?;
    check_one_stream(OP, &[("table", table), ("ids", ids)])?;
    let out = Tensor::uninit(table.context(), [ids.len(), columns], table.dtype())?;
    launch::embedding(
        table.context().stream(),
        &table.contiguous()?.place(),
        &ids.contiguous()?.span()?,
        &out.span()?,
        columns,
    )?;
    Ok(out)
}

/// The gradient with respect to the table, in its shape and type, given the one with respect to the looked-up rows.
/// Each row is the sum over its uses, computed in f64 in their order.
///
/// # Errors
/// As [`embedding`].
pub fn embedding_backward(table: &Tensor, ids: &Tensor, grad_out: &Tensor) -> Result<Tensor> {
    const OP: &str = "embedding_backward";
    let [_, columns] = matrix_shape(OP, "table", table)?;
    if grad_out.shape()[..] != [ids.len(), columns] {
        let reason = format!(
            "a gradient of shape {} for {}",
            grad_out.shape(),
            ids.shape()
        );
        return Err(Error::argument(OP, reason));
    }
    check_one_stream(
        OP,
        &[("table", table), ("ids", ids), ("grad_out", grad_out)],
    )?;
    let grad = Tensor::uninit(table.context(), table.shape(), table.dtype())?;
    launch::embedding_backward(
        table.context().stream(),
        &grad_out.contiguous()?.span()?,
        &ids.contiguous()?.span()?,
        &grad.span()?,
        columns,
    )?;
    Ok(grad)
}
