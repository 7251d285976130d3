//! Clips gradients without a scaler.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::NormKind;
use crate::optim::gradients::Pass;
use crate::optim::{Gradients, Parameter};
use crate::storage::{Context, Tensor};

/// Multiplies the gradients of `parameters` by min(1, `max_norm` / (norm + ε)) in place, and returns the norm they
/// had: an f64 on the device, 0 if there are no gradients. The host does not wait.
///
/// The norm is computed in f64 over all gradients at once, so f16 and large f32 gradients do not overflow it. The L2
/// norm of f64 gradients must lie between 10⁻¹⁵⁴ and 10¹⁵⁴, where their squares are within the range of f64.
///
/// For limits of 0.1 and more ε is 10⁻⁶: the coefficient then matches PyTorch's bit for bit, and clipped gradients
/// are too small by at most 10⁻⁶ / `max_norm`, so by 10⁻⁵ or less. For smaller limits ε is 0, because PyTorch's
/// results are off by more there (9 % at 10⁻⁵). Apart from ε, results are exact up to the rounding of the gradients'
/// type: factors and norm are f64 if a gradient is f64, and no factor leaves the normal numbers of its type. A limit
/// of 0 gives gradients of 0.
///
/// If the norm is infinite or NaN, gradients become 0 or NaN as in PyTorch. With a scaler, use
/// [`GradScaler::clip_grad_norm`](../amp/struct.GradScaler.html#method.clip_grad_norm), which skips such a step. Each
/// call takes scratch memory from the pool.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a negative or NaN `max_norm`, and for gradients that
/// are on several streams, share memory, or are marked as still multiplied by a loss scale;
/// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
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
