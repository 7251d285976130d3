//! Sums, means, and the accuracy of a classifier.
//!
//! Sums are computed in f64 and returned as f32 (f64 for f64) for inputs of any type, as an autocast scope requires.

use super::matrix_shape;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::storage::Tensor;

/// The sum of all elements, one number; 0 if there are none.
///
/// # Errors
/// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
pub fn sum(x: &Tensor) -> Result<Tensor> {
    let out = Tensor::uninit(x.context(), [], launch::sum_dtype(x.dtype()))?;
    launch::sum(x.context().stream(), &x.contiguous()?.span()?, &out.span()?)?;
    Ok(out)
}

/// The mean of all elements, one number; NaN if there are none.
///
/// # Errors
/// As [`sum`].
pub fn mean(x: &Tensor) -> Result<Tensor> {
    let out = Tensor::uninit(x.context(), [], launch::sum_dtype(x.dtype()))?;
    launch::mean(x.context().stream(), &x.contiguous()?.span()?, &out.span()?)?;
    Ok(out)
}

/// For each row of `x[n, c]` the column of its largest element, as u32. The first of equal elements wins, and NaN
/// counts as largest.
///
/// # Errors
/// [`Error::InvalidArgument`] if `x` is not a matrix or has no columns; [`Error::UnsupportedDtype`] for u32 and 8-bit
/// types; [`Error::OutOfMemory`].
pub fn argmax(x: &Tensor) -> Result<Tensor> {
    let [rows, _] = matrix_shape("argmax", "x", x)?;
    let out = Tensor::uninit(x.context(), [rows], DType::U32)?;
    launch::argmax_rows(x.context().stream(), &x.contiguous()?.span()?, &out.span()?)?;
    Ok(out)
}

/// The fraction of rows of `logits[n, c]` whose largest element is in the column given by `labels[n]`; NaN if there
/// are no rows. Waits for the device.
///
/// # Errors
/// As [`argmax`]; [`Error::InvalidArgument`] for labels that are not u32 or whose number differs from the rows;
/// [`Error::Driver`] if earlier work failed.
pub fn accuracy(logits: &Tensor, labels: &Tensor) -> Result<f64> {
    let [rows, _] = matrix_shape("accuracy", "logits", logits)?;
    if labels.shape()[..] != [rows] {
        return Err(Error::argument(
            "accuracy",
            format!(
                "logits {} and labels {} do not fit",
                logits.shape(),
                labels.shape()
            ),
        ));
    }
    let (guesses, labels) = (argmax(logits)?.to_vec::<u32>()?, labels.to_vec::<u32>()?);
    let right = guesses
        .iter()
        .zip(&labels)
        .filter(|(guess, label)| guess == label)
        .count();
    #[expect(clippy::cast_precision_loss, reason = "no batch has 2^53 rows")]
    Ok(right as f64 / rows as f64)
}
