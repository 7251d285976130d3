//! The linear layer, `x·wᵀ + bias`, and its gradients.

use super::autocast::operand;
use super::matmul::{multiply_into, view};
use super::{check_one_stream, check_same_dtype, matrix_shape};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::{self, Accumulate, StridedCopy};
use crate::storage::Tensor;

const OP: &str = "linear";

/// The result of [`linear`], with the operands that its gradients need, in the type of the product, which autocast
/// may have chosen. Operands that were not cast are shared, so write to them (as an optimizer does) only after the
/// backward pass.
#[derive(Clone, Debug)]
pub struct Linear {
    output: Tensor,
    x: Tensor,
    weight: Tensor,
    /// Types of the operands as given. Their gradients have the same types.
    x_dtype: DType,
    weight_dtype: DType,
    bias_dtype: Option<DType>,
}

/// Gradients of a linear layer, each in the shape and type of the operand.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LinearGradients {
    /// With respect to the input, `[n, i]`.
    pub input: Tensor,
    /// With respect to the weight, `[o, i]`.
    pub weight: Tensor,
    /// With respect to the bias, `[o]`; `None` without a bias.
    pub bias: Option<Tensor>,
}

/// `x[n, i] · weight[o, i]ᵀ + bias[o]`, of shape `[n, o]`: summed in f32 (f64 for f64), bias included, and rounded
/// once. In an autocast scope the operands are first cast to its type, which the output then has.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes, types or streams that do not fit;
/// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Linear> {
    let ([rows, inner], [outer, inner_too]) = (
        matrix_shape(OP, "x", x)?,
        matrix_shape(OP, "weight", weight)?,
    );
    if inner != inner_too || bias.is_some_and(|bias| bias.shape()[..] != [outer]) {
        let bias = bias.map_or_else(|| "none".to_owned(), |bias| bias.shape().to_string());
        return Err(Error::argument(
            OP,
            format!(
                "x {}, weight {} and bias {bias} do not fit",
                x.shape(),
                weight.shape()
            ),
        ));
    }
    check_one_stream(OP, &[("x", x), ("weight", weight)])?;
    if let Some(bias) = bias {
        check_one_stream(OP, &[("x", x), ("bias", bias)])?;
    }
    let (x_dtype, weight_dtype) = (x.dtype(), weight.dtype());
    let bias_dtype = bias.map(Tensor::dtype);
    let (x, weight) = (operand(OP, x)?, operand(OP, weight)?);
    check_same_dtype(OP, &x, &weight)?;
    let output = Tensor::uninit(x.context(), [rows, outer], x.dtype())?;
    let accumulate = match bias {
        Some(bias) => {
            let bias = operand(OP, bias)?;
            check_same_dtype(OP, &x, &bias)?;
            repeat_rows(&bias, &output)?;
            Accumulate::Add
        }
        None => Accumulate::Overwrite,
    };
    multiply_into(
        &view(&x)?,
        &view(&weight)?.transposed(),
        &output,
        accumulate,
    )?;
    Ok(Linear {
        output,
        x,
        weight,
        x_dtype,
        weight_dtype,
        bias_dtype,
    })
}

/// Enqueues a copy of `row` to every row of `out`. The product is then added to it in the wide type, so the bias adds
/// no extra rounding.
fn repeat_rows(row: &Tensor, out: &Tensor) -> Result<()> {
    let copy = StridedCopy {
        shape: out.shape(),
        src: &row.storage_span(),
        src_strides: &[0, row.strides()[0]],
        dst: &out.span()?,
        dst_strides: out.strides(),
    };
    launch::copy_strided(out.context().stream(), &copy)
}

impl Linear {
    /// `x·weightᵀ + bias`.
    #[must_use]
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The output alone, if no gradient is needed.
    #[must_use]
    pub fn into_output(self) -> Tensor {
        self.output
    }

    /// The gradients, given the one with respect to the output.
    ///
    /// They are computed in the type of the forward product, rounded to it (so that an overflow in that type shows),
    /// and then cast to the types of the operands: the gradient of a cast is a cast.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `grad_out` of another shape than the output or of another stream;
    /// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
    pub fn backward(&self, grad_out: &Tensor) -> Result<LinearGradients> {
        let op = "linear_backward";
        super::check_same_shape(op, &self.output, grad_out)?;
        check_one_stream(op, &[("x", &self.x), ("grad_out", grad_out)])?;
        let dtype = self.x.dtype();
        let grad_out = grad_out.cast(dtype)?;
        let context = self.x.context();

        let input = Tensor::uninit(context, self.x.shape(), dtype)?;
        let grad = view(&grad_out)?;
        multiply_into(&grad, &view(&self.weight)?, &input, Accumulate::Overwrite)?;

        let weight = Tensor::uninit(context, self.weight.shape(), dtype)?;
        multiply_into(
            &grad.transposed(),
            &view(&self.x)?,
            &weight,
            Accumulate::Overwrite,
        )?;

        let bias = match self.bias_dtype {
            Some(bias_dtype) => {
                let bias = Tensor::uninit(context, [self.output.shape()[1]], dtype)?;
                let grad_out = grad_out.contiguous()?;
                launch::sum_rows(context.stream(), &grad_out.span()?, &bias.span()?)?;
                Some(bias.cast(bias_dtype)?)
            }
            None => None,
        };
        Ok(LinearGradients {
            input: input.cast(self.x_dtype)?,
            weight: weight.cast(self.weight_dtype)?,
            bias,
        })
    }
}
