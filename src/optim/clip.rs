//! Clipping gradients without a scaler.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::NormKind;
use crate::optim::gradients::Pass;
use crate::optim::{Gradients, Parameter};
use crate::storage::{Context, Tensor};

/// Multiplies the gradients of `parameters` by min(1, `max_norm` / (norm + 10⁻⁶)) in place, and gives the
/// norm they had: an f64 on the device, 0 if there are no gradients. Nobody waits.
///
/// The norm is taken in f64 over all gradients at once, so f16 and large f32 gradients do not overflow it.
/// If it is infinite or NaN nevertheless, gradients become 0 or NaN as in PyTorch; under a scaler use
/// [`GradScaler::clip_grad_norm`](../amp/struct.GradScaler.html#method.clip_grad_norm), which skips such a
/// step. Scratch memory is taken from the pool at each call.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a negative or NaN `max_norm`, gradients on
/// several streams, that share memory, or that say they are still multiplied by a loss scale; [`Error::OutOfMemory`](crate::Error::OutOfMemory).
pub fn clip_grad_norm(
    context: &Context,
    parameters: &[Parameter],
    max_norm: f64,
    kind: NormKind,
) -> Result<Tensor> {
    Parameter::expect_unscaled("clip_grad_norm", parameters)?;
    let mut gradients = Gradients::new("clip_grad_norm", Arc::default());
    let found_inf = Tensor::zeros(context, [], DType::F32)?;
    if !gradients.pass(parameters, Pass::Check(None, kind), &found_inf.span()?)? {
        return Tensor::zeros(context, [], DType::F64);
    }
    let (norm, coefficient) = gradients.coefficient(context, kind, max_norm, None)?;
    gradients.multiply(parameters, &coefficient)?;
    Ok(norm)
}

/// [`clip_grad_norm`] under PyTorch's name.
///
/// # Errors
/// As [`clip_grad_norm`].
pub fn clip_grad_norm_(
    context: &Context,
    parameters: &[Parameter],
    max_norm: f64,
    kind: NormKind,
) -> Result<Tensor> {
    clip_grad_norm(context, parameters, max_norm, kind)
}
