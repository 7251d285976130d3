//! Activation functions on tensors.
//!
//! They run in the type of their input, also inside autocast scopes. Their gradients need only that input, so forward
//! and backward are plain functions.

use super::check_same_shape;
use crate::error::Result;
use crate::launch::{self, Activation};
use crate::storage::Tensor;

/// `max(x, 0)`, in the shape and type of `x`. NaN stays NaN.
///
/// # Errors
/// [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for u32 and 8-bit types;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn relu(x: &Tensor) -> Result<Tensor> {
    forward(Activation::Relu, x)
}

/// The gradient with respect to `x`, given the one with respect to `relu(x)`. It has the type of `x`.
///
/// # Errors
/// As [`relu`], and [`Error::InvalidArgument`](crate::Error::InvalidArgument) for different shapes.
pub fn relu_backward(x: &Tensor, grad_out: &Tensor) -> Result<Tensor> {
    backward("relu_backward", Activation::Relu, x, grad_out)
}

/// `x·Φ(x)`, where `Φ` is the exact normal distribution, in the shape and type of `x`.
///
/// # Errors
/// As [`relu`].
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    forward(Activation::Gelu, x)
}

/// The gradient with respect to `x`, given the one with respect to `gelu(x)`. It has the type of `x`.
///
/// # Errors
/// As [`relu_backward`].
pub fn gelu_backward(x: &Tensor, grad_out: &Tensor) -> Result<Tensor> {
    backward("gelu_backward", Activation::Gelu, x, grad_out)
}

fn forward(f: Activation, x: &Tensor) -> Result<Tensor> {
    let out = Tensor::uninit(x.context(), x.shape(), x.dtype())?;
    launch::activation(
        x.context().stream(),
        f,
        &x.contiguous()?.span()?,
        &out.span()?,
    )?;
    Ok(out)
}

fn backward(op: &'static str, f: Activation, x: &Tensor, grad_out: &Tensor) -> Result<Tensor> {
    check_same_shape(op, x, grad_out)?;
    let grad_in = Tensor::uninit(x.context(), x.shape(), x.dtype())?;
    let (x, grad_out) = (x.contiguous()?, grad_out.contiguous()?);
    let stream = x.context().stream();
    launch::activation_backward(stream, f, &x.span()?, &grad_out.span()?, &grad_in.span()?)?;
    Ok(grad_in)
}
