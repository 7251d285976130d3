//! Causal multi-head attention, and its gradient.
//!
//! Matrix products run for one head of one sequence at a time; a single softmax covers all of them. Scores stay in
//! f32 (f64 for f64) until the softmax.

use super::autocast::operand;
use super::matmul::{multiply_into, view};
use super::matrix_shape;
use crate::error::{Error, Result};
use crate::launch::{self, Accumulate, Matrix};
use crate::storage::Tensor;

/// The op's name in autocast's lists.
const OP: &str = "scaled_dot_product_attention";

/// The result of [`causal_attention`], with the tensors that its gradient needs.
#[derive(Clone, Debug)]
pub struct Attention {
    output: Tensor,
    /// Queries, keys and values, `[3, sequences, heads, length, width]`, in the type of the products.
    packed: Tensor,
    /// `[sequences · heads · length, length]`, in that type.
    probabilities: Tensor,
    shape: Heads,
    dtype: crate::dtype::DType,
}

/// How rows and columns divide into sequences and heads.
#[derive(Clone, Copy, Debug)]
struct Heads {
    sequences: usize,
    length: usize,
    heads: usize,
    width: usize,
}

impl Heads {
    /// The number of heads of all sequences.
    fn blocks(self) -> usize {
        self.sequences * self.heads
    }

    /// The factor on the scores before the softmax.
    #[expect(clippy::cast_precision_loss, reason = "no head is 2^53 wide")]
    fn scale(self) -> f64 {
        1.0 / (self.width as f64).sqrt()
    }
}

/// Attention of every position to itself and those before it. `qkv[n, 3·heads·width]` consists of sequences of
/// `length` rows; its columns are queries, keys and values, each head after head. Returns `[n, heads·width]`. In an
/// autocast scope, computation and result have the type of the scope.
///
/// # Errors
/// [`Error::InvalidArgument`] for shapes that do not fit; [`Error::UnsupportedDtype`] for u32 and 8-bit types;
/// [`Error::OutOfMemory`].
pub fn causal_attention(qkv: &Tensor, heads: usize, length: usize) -> Result<Attention> {
    let [rows, columns] = matrix_shape(OP, "qkv", qkv)?;
    if !qkv.dtype().is_computed() {
        return Err(Error::UnsupportedDtype {
            op: OP,
            dtype: qkv.dtype(),
        });
    }
    let fits = heads > 0
        && length > 0
        && columns > 0
        && columns.is_multiple_of(3 * heads)
        && rows.is_multiple_of(length);
    if !fits {
        let reason = format!(
            "{} does not divide into {heads} heads and sequences of {length}",
            qkv.shape()
        );
        return Err(Error::argument(OP, reason));
    }
    let shape = Heads {
        sequences: rows / length,
        length,
        heads,
        width: columns / (3 * heads),
    };
    let (dtype, qkv) = (qkv.dtype(), operand(OP, qkv)?.contiguous()?);
    let apart = qkv.reshape([shape.sequences, length, 3, heads, shape.width])?;
    let packed = to_heads(&apart)?.contiguous()?;

    let context = qkv.context();
    let all = shape.blocks() * length;
    let wide = launch::sum_dtype(qkv.dtype());
    let scores = Tensor::uninit(context, [all, length], wide)?;
    let probabilities = Tensor::uninit(context, [all, length], qkv.dtype())?;
    let mixed = Tensor::uninit(context, [all, shape.width], qkv.dtype())?;
    for block in 0..shape.blocks() {
        let [queries, keys, _] = parts(&packed, shape, block)?;
        let scores = rows_of(&scores, shape, block)?;
        multiply_into(&queries, &keys.transposed(), &scores, Accumulate::Overwrite)?;
    }
    launch::causal_softmax(
        context.stream(),
        &scores.span()?,
        &probabilities.span()?,
        length,
        shape.scale(),
    )?;
    for block in 0..shape.blocks() {
        let [_, _, values] = parts(&packed, shape, block)?;
        let weights = view(&rows_of(&probabilities, shape, block)?)?;
        let mixed = rows_of(&mixed, shape, block)?;
        multiply_into(&weights, &values, &mixed, Accumulate::Overwrite)?;
    }
    let mixed = mixed.reshape([shape.sequences, heads, length, shape.width])?;
    let output = mixed.transpose(1, 2)?.contiguous()?;
    Ok(Attention {
        output: output.reshape([rows, heads * shape.width])?,
        packed,
        probabilities,
        shape,
        dtype,
    })
}

/// `[sequences, length, 3, heads, width]` as `[3, sequences, heads, length, width]`, and back.
fn to_heads(apart: &Tensor) -> Result<Tensor> {
    apart.transpose(0, 2)?.transpose(1, 2)?.transpose(2, 3)
}

/// Queries, keys and values of one head of one sequence.
fn parts(packed: &Tensor, shape: Heads, block: usize) -> Result<[Matrix; 3]> {
    let rows = 3 * shape.blocks() * shape.length;
    let flat = packed.reshape([rows, shape.width])?;
    let part = |which: usize| view(&rows_of(&flat, shape, which * shape.blocks() + block)?);
    Ok([part(0)?, part(1)?, part(2)?])
}

/// The rows of one head of one sequence.
fn rows_of(matrix: &Tensor, shape: Heads, block: usize) -> Result<Tensor> {
    matrix.narrow(0, block * shape.length, shape.length)
}

impl Attention {
    /// The result for each position, `[n, heads·width]`.
    #[must_use]
    pub fn output(&self) -> &Tensor {
        &self.output
    }

    /// The gradient with respect to `qkv`, in its shape and type, given the one with respect to the output. Computed
    /// in the type of the forward products and rounded to it, so that an overflow in that type shows.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a `grad_out` of another shape than the output or of another stream;
    /// [`Error::UnsupportedDtype`] for u32 and 8-bit types; [`Error::OutOfMemory`].
    pub fn backward(&self, grad_out: &Tensor) -> Result<Tensor> {
        let op = "causal_attention_backward";
        super::check_same_shape(op, &self.output, grad_out)?;
        super::check_one_stream(op, &[("qkv", &self.packed), ("grad_out", grad_out)])?;
        let (shape, context) = (self.shape, self.packed.context());
        let Heads {
            sequences,
            length,
            heads,
            width,
        } = shape;
        let dtype = self.packed.dtype();
        let apart = grad_out.cast(dtype)?.contiguous()?;
        let apart = apart.reshape([sequences, length, heads, width])?;
        let all = shape.blocks() * length;
        let grad_mixed = apart.transpose(1, 2)?.contiguous()?.reshape([all, width])?;

        let wide = launch::sum_dtype(dtype);
        let grad_weights = Tensor::uninit(context, [all, length], wide)?;
        let grad_scores = Tensor::uninit(context, [all, length], dtype)?;
        let grads = Tensor::uninit(context, [3 * all, width], dtype)?;
        let grad_part =
            |which: usize, block| rows_of(&grads, shape, which * shape.blocks() + block);
        for block in 0..shape.blocks() {
            let [_, _, values] = parts(&self.packed, shape, block)?;
            let grad = view(&rows_of(&grad_mixed, shape, block)?)?;
            let weights = view(&rows_of(&self.probabilities, shape, block)?)?;
            let by_weights = rows_of(&grad_weights, shape, block)?;
            let by_values = grad_part(2, block)?;
            multiply_into(
                &grad,
                &values.transposed(),
                &by_weights,
                Accumulate::Overwrite,
            )?;
            multiply_into(
                &weights.transposed(),
                &grad,
                &by_values,
                Accumulate::Overwrite,
            )?;
        }
        launch::causal_softmax_backward(
            context.stream(),
            &self.probabilities.span()?,
            &grad_weights.span()?,
            &grad_scores.span()?,
            length,
            shape.scale(),
        )?;
        for block in 0..shape.blocks() {
            let [queries, keys, _] = parts(&self.packed, shape, block)?;
            let grad = view(&rows_of(&grad_scores, shape, block)?)?;
            multiply_into(&grad, &keys, &grad_part(0, block)?, Accumulate::Overwrite)?;
            let by_keys = grad_part(1, block)?;
            multiply_into(
                &grad.transposed(),
                &queries,
                &by_keys,
                Accumulate::Overwrite,
            )?;
        }
        let packed = grads.reshape([3, sequences, heads, length, width])?;
        let apart = packed.transpose(2, 3)?.transpose(1, 2)?.transpose(0, 2)?;
        let grad = apart.contiguous()?;
        grad.reshape([sequences * length, 3 * heads * width])?
            .cast(self.dtype)
    }
}
