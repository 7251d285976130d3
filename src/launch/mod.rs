//! Kernels: each file has a typed launcher and its host twin.
//!
//! A launcher is a safe function `op(stream, arguments…)`. It checks that the arguments fit each other, packs them into
//! a struct that implements [`Kernel`], and enqueues the struct. On the host device the struct's `run`, the *twin*,
//! does the work; other devices look up their own kernels by name. The twin is more than a reference implementation:
//! without a GPU it is what programs run on, so it is vectorized and parallel.
//!
//! Array arguments are [`Span`]s. Constructing a span is unsafe and promises a live address; the launchers do all other
//! checks.

#![allow(unsafe_code, reason = "twins turn device addresses into slices")]

mod activation;
pub(crate) mod adam;
mod attention;
mod bias;
mod cast;
pub(crate) mod chunk_table;
pub(crate) mod clip;
mod compute;
mod cross_entropy;
#[cfg(feature = "cuda")]
mod cublaslt;
mod device;
mod elementwise;
pub(crate) mod ema;
mod embedding;
mod fill;
pub(crate) mod fp8_update;
pub(crate) mod gradient_check;
pub(crate) mod gradient_produce;
pub(crate) mod journal;
mod layer_norm;
mod matmul;
pub(crate) mod quantize;
mod reduce;
mod scale_update;
pub(crate) mod sgd;
mod span;
mod special;
mod split_master;
mod stochastic;
pub(crate) mod stopwatch;
mod strided;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tolerance;
pub(crate) mod update_pass;
mod vector;

pub use activation::{Activation, activation, activation_backward};
pub use attention::{causal_softmax, causal_softmax_backward};
pub use bias::{add_bias, sum_rows};
pub use cast::{cast, cast_with};
pub use compute::sum_dtype;
pub use cross_entropy::{
    Ignored, cross_entropy, cross_entropy_backward, cross_entropy_ignoring,
    cross_entropy_ignoring_backward,
};
#[cfg(feature = "cuda")]
pub use cublaslt::why_not_cublaslt;
pub use elementwise::{add, add_scaled, mul, scale};
pub use embedding::{embedding, embedding_backward};
pub use fill::fill;
pub use fp8_update::{AmaxAlgorithm, AmaxSource, Fp8Policy, next_fp8_scale};
pub use gradient_check::NormKind;
pub use layer_norm::{LayerNorm, LayerNormBackward, layer_norm, layer_norm_backward};
pub use matmul::{Accumulate, Matrix, matmul, matmul_with, matmul_workspace};
pub use quantize::{QuantizeTo, amax, dequantize, quantize};
pub use reduce::{argmax_rows, mean, sum};
pub(crate) use scale_update::{Change, ScaleOperands, scale_update};
pub use scale_update::{Refill, ScalePolicy, ScaleState, inverse_scale, next_scale};
pub use span::Span;
pub use strided::{RANK_MAX, StridedCopy, copy_strided};

use crate::driver::{Kernel, Stream};
use crate::error::Result;

/// Below this many elements a twin stays on one thread: about what one thread processes while another wakes up.
pub(crate) const PARALLEL_MIN: usize = 16 * 1024;

/// Enqueues `kernel` on `stream`. Every span in `kernel` must belong to that stream, which the launchers check.
fn enqueue(stream: &Stream, kernel: impl Kernel + 'static) -> Result<()> {
    // SAFETY: spans are live on the stream they name (`Span::new`). Launchers check that it is this stream, and that
    // written spans are disjoint from the others or identical to them.
    unsafe { stream.driver().launch(Box::new(kernel), stream.raw()) }
}
