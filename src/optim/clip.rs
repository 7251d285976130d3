//! Clipping gradients without a scaler.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::NormKind;
use crate::optim::gradients::Pass;
use crate::optim::{Gradients, Parameter};
use crate::storage::{Context, Tensor};

/// Multiplies the gradients of `parameters` by min(1, `max_norm` / (norm + ε)) in place, and gives the
/// norm they had: an f64 on the device, 0 if there are no gradients. Nobody waits.
///
/// The norm is taken in f64 over all gradients at once, so f16 and large f32 gradients do not overflow it. The
/// L2 norm of f64 gradients must lie between 10⁻¹⁵⁴ and 10¹⁵⁴, where their squares are in the range of f64.
///
/// ε is 10⁻⁶ for limits of 0.1 and more: there the coefficient has PyTorch's bits, and clipped gradients are too
/// small by at most 10⁻⁶ / `max_norm`, so 10⁻⁵. For smaller limits, at which PyTorch's results are off by more (9 %
/// at 10⁻⁵), ε is 0. Beyond that, results are right to the rounding of the gradients' type: factors and norm are
/// f64 if a gradient is f64, and no factor leaves the normal numbers of its type. A limit of 0 gives gradients of 0.
///
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
    let clip = gradients.clip(parameters, None, (max_norm, kind), None)?;
    gradients.multiply(parameters, &clip)?;
    Ok(clip.total_norm)
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
