//! The loss of a classifier.

use super::{check_one_stream, matrix_shape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::storage::Tensor;

/// A loss, and what its gradient needs.
///
/// Its *seed* is the gradient that the backward pass starts from: 1, times every scale the loss was
/// multiplied by. Scaling a loss and its seed together is all that loss scaling is.
#[derive(Clone, Debug)]
pub struct Loss {
    value: Tensor,
    seed: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    logits_dtype: DType,
}

/// The mean cross entropy between the softmax of `logits[n, c]` and `labels[n]`, the u32 numbers of the
/// right classes.
///
/// Computed in f32 whatever the type of the logits (f64 for f64), which is what an autocast scope asks for.
/// A label that is no class makes the loss NaN: to refuse it, the host would have to wait.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes, types or streams that do not fit;
/// [`Error::UnsupportedDtype`] for logits of u32 or an 8-bit type; [`Error::OutOfMemory`].
pub fn softmax_cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Loss> {
    const OP: &str = "softmax_cross_entropy";
    let [rows, columns] = matrix_shape(OP, "logits", logits)?;
    if labels.shape()[..] != [rows] || columns == 0 {
        return Err(Error::argument(
            OP,
            format!(
                "logits {} and labels {} do not fit",
                logits.shape(),
                labels.shape()
            ),
        ));
    }
    if !logits.dtype().is_computed() {
        return Err(Error::UnsupportedDtype {
            op: OP,
            dtype: logits.dtype(),
        });
    }
    check_one_stream(OP, &[("logits", logits), ("labels", labels)])?;
    let context = logits.context();
    let dtype = launch::sum_dtype(logits.dtype());
    let value = Tensor::uninit(context, [], dtype)?;
    let probabilities = Tensor::uninit(context, [rows, columns], dtype)?;
    let labels = labels.contiguous()?;
    let losses = Tensor::uninit(context, [rows], DType::F64)?;
    launch::cross_entropy(
        context.stream(),
        &logits.contiguous()?.span()?,
        &labels.span()?,
        &losses.span()?,
        &value.span()?,
        &probabilities.span()?,
    )?;
    let seed = Tensor::full(context, [], DType::F32, 1.0)?;
    Ok(Loss {
        value,
        seed,
        probabilities,
        labels,
        logits_dtype: logits.dtype(),
    })
}

impl Loss {
    /// The loss, one number: f32, or f64 for logits of f64.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The gradient that the backward pass starts from, one f32.
    #[must_use]
    pub fn seed(&self) -> &Tensor {
        &self.seed
    }

    /// This loss times `scale`, one f32 or f64 that the device reads. This one stays as it is; both share
    /// what the gradient needs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `scale` is not one such number, or of another stream;
    /// [`Error::OutOfMemory`].
    pub fn scaled_by(&self, scale: &Tensor) -> Result<Self> {
        Ok(Self {
            value: scaled(&self.value, scale)?,
            seed: scaled(&self.seed, scale)?,
            ..self.clone()
        })
    }

    /// The gradient by the logits, times the seed, in their shape and type. In f16 a large seed may
    /// overflow it: that is what a scaler looks for.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if it cannot be enqueued.
    pub fn backward(&self) -> Result<Tensor> {
        let context = self.probabilities.context();
        let grad = Tensor::uninit(context, self.probabilities.shape(), self.logits_dtype)?;
        launch::cross_entropy_backward(
            context.stream(),
            &self.probabilities.span()?,
            &self.labels.span()?,
            &self.seed.span()?,
            &grad.span()?,
        )?;
        Ok(grad)
    }
}

/// `x · scale`, both one number, in the type of `x`.
fn scaled(x: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let out = Tensor::uninit(x.context(), x.shape(), x.dtype())?;
    launch::scale(
        x.context().stream(),
        &x.span()?,
        &scale.span()?,
        &out.span()?,
    )?;
    Ok(out)
}
