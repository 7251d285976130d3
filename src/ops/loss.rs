//! The loss of a classifier.

use super::{check_one_stream, matrix_shape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::storage::Tensor;

/// A loss, with the tensors that its gradient needs.
///
/// Its *seed* is the gradient that the backward pass starts from: 1, times every scale the loss was multiplied by.
/// Loss scaling consists of scaling a loss together with its seed.
#[derive(Clone, Debug)]
pub struct Loss {
    value: Tensor,
    seed: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    /// The label of ignored rows, and the number of rows that count.
    ignored: Option<(u32, Tensor)>,
    logits_dtype: DType,
}

/// The mean cross entropy between the softmax of `logits[n, c]` and `labels[n]`, the u32 indices of the correct
/// classes.
///
/// Computed in f32 for logits of any type (f64 for f64), as an autocast scope requires. An invalid label makes the
/// loss NaN: refusing it would make the host wait.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes, types or streams that do not fit;
/// [`Error::UnsupportedDtype`] for logits of u32 or an 8-bit type; [`Error::OutOfMemory`].
pub fn softmax_cross_entropy(logits: &Tensor, labels: &Tensor) -> Result<Loss> {
    cross_entropy("softmax_cross_entropy", logits, labels, None)
}

/// As [`softmax_cross_entropy`], but ignores rows whose label is `ignore`, whatever their logits: the loss is the
/// mean over the other rows, and gradients of ignored rows are 0. If all rows are ignored, or there are none, the
/// loss is 0. The device counts the rows; the host does not wait.
///
/// `ignore` may be a class index or not. In data made for PyTorch, the default of −100 is `-100i32 as u32`. Any other
/// invalid label makes the loss NaN.
///
/// # Examples
/// ```
/// use kitsune::{Context, DType, Device, Tensor, ops};
///
/// # fn main() -> kitsune::Result<()> {
/// # let context = Context::new(&Device::auto()?)?;
/// const PADDING: u32 = u32::MAX;
/// let logits = Tensor::zeros(&context, [3, 4], DType::F32)?;
/// let labels = Tensor::from_slice(&context, [3], &[1, PADDING, 2])?;
/// let loss = ops::softmax_cross_entropy_ignoring(&logits, &labels, PADDING)?;
/// assert!((loss.value().item::<f32>()? - 4f32.ln()).abs() < 1e-6);
/// assert_eq!(loss.backward()?.to_vec::<f32>()?[4..8], [0.0; 4]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`softmax_cross_entropy`].
pub fn softmax_cross_entropy_ignoring(
    logits: &Tensor,
    labels: &Tensor,
    ignore: u32,
) -> Result<Loss> {
    cross_entropy(
        "softmax_cross_entropy_ignoring",
        logits,
        labels,
        Some(ignore),
    )
}

fn cross_entropy(
    op: &'static str,
    logits: &Tensor,
    labels: &Tensor,
    ignore: Option<u32>,
) -> Result<Loss> {
    let [rows, columns] = matrix_shape(op, "logits", logits)?;
    if labels.shape()[..] != [rows] || columns == 0 {
        return Err(Error::argument(
            op,
            format!(
                "logits {} and labels {} do not fit",
                logits.shape(),
                labels.shape()
            ),
        ));
    }
    if !logits.dtype().is_computed() {
        return Err(Error::UnsupportedDtype {
            op,
            dtype: logits.dtype(),
        });
    }
    check_one_stream(op, &[("logits", logits), ("labels", labels)])?;
    let context = logits.context();
    let dtype = launch::sum_dtype(logits.dtype());
    let value = Tensor::uninit(context, [], dtype)?;
    let probabilities = Tensor::uninit(context, [rows, columns], dtype)?;
    let labels = labels.contiguous()?;
    let losses = Tensor::uninit(context, [rows], DType::F64)?;
    let logits_dtype = logits.dtype();
    let operands = [
        &logits.contiguous()?,
        &labels,
        &losses,
        &value,
        &probabilities,
    ];
    let ignored = match ignore {
        None => None,
        Some(label) => Some((label, Tensor::uninit(context, [], DType::F64)?)),
    };
    enqueue(operands, ignored.as_ref())?;
    let seed = Tensor::full(context, [], DType::F32, 1.0)?;
    Ok(Loss {
        value,
        seed,
        probabilities,
        labels,
        ignored,
        logits_dtype,
    })
}

/// Enqueues the losses of the rows, their mean, and the probabilities.
fn enqueue(operands: [&Tensor; 5], ignored: Option<&(u32, Tensor)>) -> Result<()> {
    let stream = operands[0].context().stream();
    let [logits, labels, losses, value, probabilities] = operands;
    let (logits, labels) = (logits.span()?, labels.span()?);
    let (losses, value, probabilities) = (losses.span()?, value.span()?, probabilities.span()?);
    match ignored {
        None => launch::cross_entropy(stream, &logits, &labels, &losses, &value, &probabilities),
        Some(ignored) => launch::cross_entropy_ignoring(
            stream,
            &logits,
            &labels,
            &losses,
            &value,
            &probabilities,
            &spans(ignored)?,
        ),
    }
}

/// The ignored rows as operands of a kernel.
fn spans((label, counted): &(u32, Tensor)) -> Result<launch::Ignored> {
    Ok(launch::Ignored {
        label: *label,
        counted: counted.span()?,
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

    /// This loss times `scale`, one f32 or f64 that the device reads. The original is unchanged; both share the
    /// tensors that the gradient needs.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `scale` is not one such number, or is on another stream; [`Error::OutOfMemory`].
    pub fn scaled_by(&self, scale: &Tensor) -> Result<Self> {
        Ok(Self {
            value: scaled(&self.value, scale)?,
            seed: scaled(&self.seed, scale)?,
            ..self.clone()
        })
    }

    /// The gradient with respect to the logits, times the seed, in their shape and type. In f16 a large seed may make
    /// it overflow, which the scaler detects.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if the kernel cannot be enqueued.
    pub fn backward(&self) -> Result<Tensor> {
        let context = self.probabilities.context();
        let grad = Tensor::uninit(context, self.probabilities.shape(), self.logits_dtype)?;
        let stream = context.stream();
        let (probabilities, labels) = (self.probabilities.span()?, self.labels.span()?);
        let (seed, into) = (self.seed.span()?, grad.span()?);
        match &self.ignored {
            None => launch::cross_entropy_backward(stream, &probabilities, &labels, &seed, &into)?,
            Some(ignored) => launch::cross_entropy_ignoring_backward(
                stream,
                &probabilities,
                &labels,
                &seed,
                &into,
                &spans(ignored)?,
            )?,
        }
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
