//! Sums and products of two tensors, element by element.
//!
//! Shapes must be equal; nothing is broadcast. Different float types give the wider of the two, and f16 with bf16
//! gives f32, also inside autocast scopes.

use super::{check_same_shape, promoted};
use crate::error::Result;
use crate::launch;
use crate::storage::Tensor;

/// `a + b`, rounded once.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for different shapes or streams;
/// [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for u32 and 8-bit types;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_same_shape("add", a, b)?;
    let out = Tensor::uninit(a.context(), a.shape(), promoted(a.dtype(), b.dtype()))?;
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    launch::add(a.context().stream(), &a.span()?, &b.span()?, &out.span()?)?;
    Ok(out)
}

/// `a · b`, element by element, rounded once.
///
/// # Errors
/// As [`add`].
pub fn mul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    check_same_shape("mul", a, b)?;
    let out = Tensor::uninit(a.context(), a.shape(), promoted(a.dtype(), b.dtype()))?;
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    launch::mul(a.context().stream(), &a.span()?, &b.span()?, &out.span()?)?;
    Ok(out)
}
