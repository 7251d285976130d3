//! The tensor operations that mixed-precision training needs.
//!
//! Each op checks that shapes and types fit, allocates its result on the stream of its first operand and enqueues the
//! kernels. It waits for the device only if it returns a number. There is no tape: an op whose gradient needs more
//! than its inputs returns a value ([`Linear`], [`Loss`]) that holds what the gradient needs and has a `backward`.
//!
//! Terms. *Autocast* is a scope in which ops choose their compute type ([`autocast`]). The *seed* of a loss is the
//! gradient that its backward pass starts from; scaling a loss also scales its seed.
//!
//! Invariants: a result has its own memory; operands are never written. A gradient has the type of its operand.
//!
//! Must not know: scalers, optimizers.

pub mod autocast;

mod activation;
mod attention;
mod elementwise;
mod embedding;
mod layer_norm;
mod linear;
mod loss;
mod matmul;
mod reduce;

pub use activation::{gelu, gelu_backward, relu, relu_backward};
pub use attention::{Attention, causal_attention};
pub use elementwise::{add, mul};
pub use embedding::{embedding, embedding_backward};
pub use layer_norm::{LayerNorm, LayerNormGradients, layer_norm};
pub use linear::{Linear, LinearGradients, linear};
pub use loss::{Loss, softmax_cross_entropy, softmax_cross_entropy_ignoring};
pub use matmul::matmul;
pub use reduce::{accuracy, argmax, mean, sum};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::storage::Tensor;

/// The narrowest float type that holds all values of both types.
fn promoted(a: DType, b: DType) -> DType {
    if a == b {
        a
    } else if a == DType::F64 || b == DType::F64 {
        DType::F64
    } else {
        DType::F32
    }
}

/// Refuses operands of different types, and of 8-bit types, which autocast does not cast.
fn check_same_dtype(op: &'static str, first: &Tensor, second: &Tensor) -> Result<()> {
    if let Some(narrow) = [first, second]
        .into_iter()
        .find(|tensor| tensor.dtype().is_f8())
    {
        return Err(Error::UnsupportedDtype {
            op,
            dtype: narrow.dtype(),
        });
    }
    if first.dtype() == second.dtype() {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!(
            "{} and {} do not mix; cast one, or use autocast",
            first.dtype(),
            second.dtype()
        ),
    ))
}

/// Refuses operands of different shapes.
fn check_same_shape(op: &'static str, first: &Tensor, second: &Tensor) -> Result<()> {
    if first.shape() == second.shape() {
        return Ok(());
    }
    Err(Error::argument(
        op,
        format!("shapes {} and {} differ", first.shape(), second.shape()),
    ))
}

/// Refuses operands on other streams than the first: a result is ordered on one stream only.
fn check_one_stream(op: &'static str, operands: &[(&str, &Tensor)]) -> Result<()> {
    let [(first, home), others @ ..] = operands else {
        return Ok(());
    };
    let home = home.context().stream().id();
    match others
        .iter()
        .find(|(_, other)| other.context().stream().id() != home)
    {
        None => Ok(()),
        Some((name, _)) => Err(Error::argument(
            op,
            format!("{name} is on another stream than {first}; copy_to its context first"),
        )),
    }
}

/// The two dimensions of a matrix.
fn matrix_shape(op: &'static str, name: &str, tensor: &Tensor) -> Result<[usize; 2]> {
    <[usize; 2]>::try_from(&tensor.shape()[..]).map_err(|_| {
        Error::argument(
            op,
            format!("{name} has shape {}, which is not a matrix", tensor.shape()),
        )
    })
}
