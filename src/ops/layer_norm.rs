//! Normalization of the rows of a matrix.

use super::autocast::operand;
use super::{check_one_stream, matrix_shape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::{self, LayerNormBackward};
use crate::storage::Tensor;

const OP: &str = "layer_norm";

/// Keeps the square root above 0; PyTorch's value.
const EPSILON: f64 = 1e-5;

/// The result of [`layer_norm`], with the tensors that its gradients need. Operands that were not cast are shared, so
/// write to them (as an optimizer does) only after the backward pass.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    /// Mean and inverse standard deviation of each row.
    stats: Tensor,
    x_dtype: DType,
    weight_dtype: DType,
    bias_dtype: DType,
}

/// Gradients of a normalization, each in the shape and type of the operand.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LayerNormGradients {
    /// With respect to the input, `[n, d]`.
    pub input: Tensor,
    /// With respect to the weight, `[d]`.
    pub weight: Tensor,
    /// With respect to the bias, `[d]`.
    pub bias: Tensor,
}

/// Each row of `x[n, d]` minus its mean, divided by the square root of its variance plus 10⁻⁵, then times `weight[d]`
/// plus `bias[d]`. Computed in f32 (f64 as soon as an operand is f64) and returned in the type of `x`. In an autocast
/// scope all operands are cast to f32 first.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes or streams that do not fit; [`Error::UnsupportedDtype`] for u32 and
/// 8-bit types; [`Error::OutOfMemory`].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<LayerNorm> {
    let [rows, columns] = matrix_shape(OP, "x", x)?;
    if weight.shape()[..] != [columns] || bias.shape()[..] != [columns] {
        let reason = format!(
            "x {}, weight {} and bias {} do not fit",
            x.shape(),
            weight.shape(),
            bias.shape()
        );
        return Err(Error::argument(OP, reason));
    }
    check_one_stream(OP, &[("x", x), ("weight", weight), ("bias", bias)])?;
    let (x_dtype, weight_dtype, bias_dtype) = (x.dtype(), weight.dtype(), bias.dtype());
    let [x, weight, bias] = [x, weight, bias].map(|tensor| operand(OP, tensor)?.contiguous());
    let (x, weight, bias) = (x?, weight?, bias?);
    let output = Tensor::uninit(x.context(), x.shape(), x.dtype())?;
    let stats = Tensor::uninit(x.context(), [rows, 2], launch::sum_dtype(x.dtype()))?;
    let operands = launch::LayerNorm {
        x: &x.span()?,
        weight: &weight.span()?,
        bias: &bias.span()?,
        out: &output.span()?,
        stats: &stats.span()?,
        epsilon: EPSILON,
    };
    launch::layer_norm(x.context().stream(), &operands)?;
    Ok(LayerNorm {
        output,
        x,
        weight,
        stats,
        x_dtype,
        weight_dtype,
        bias_dtype,
    })
}

impl LayerNorm {
    /// The normalized rows.
    #[must_use]
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The gradients, given the one with respect to the output.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `grad_out` of another shape than the output or of another stream;
    /// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
    pub fn backward(&self, grad_out: &Tensor) -> Result<LayerNormGradients> {
        let op = "layer_norm_backward";
        super::check_same_shape(op, &self.output, grad_out)?;
        check_one_stream(op, &[("x", &self.x), ("grad_out", grad_out)])?;
        let (x, context) = (&self.x, self.x.context());
        let grad_out = grad_out.contiguous()?;
        let input = Tensor::uninit(context, x.shape(), self.x_dtype)?;
        let terms = Tensor::uninit(context, x.shape(), self.stats.dtype())?;
        let operands = LayerNormBackward {
            x: &x.span()?,
            weight: &self.weight.span()?,
            stats: &self.stats.span()?,
            grad_out: &grad_out.span()?,
            grad_in: &input.span()?,
            grad_normalized: &terms.span()?,
        };
        launch::layer_norm_backward(context.stream(), &operands)?;
        let over_rows = |terms: &Tensor, dtype| {
            let sum = Tensor::uninit(context, self.weight.shape(), dtype)?;
            launch::sum_rows(context.stream(), &terms.span()?, &sum.span()?)?;
            Ok::<_, Error>(sum)
        };
        Ok(LayerNormGradients {
            weight: over_rows(&terms, self.weight_dtype)?,
            bias: over_rows(&grad_out, self.bias_dtype)?,
            input,
        })
    }
}
