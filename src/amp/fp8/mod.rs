//! Scales for tensors stored in 8 bits.
//!
//! ```text
//! y = round(x · S)      quantize    S so that the largest |x| lands near the largest number of the type
//! x ≈ y / S             dequantize
//! a = max(a, |x|)       in the same pass, for S in the next iteration
//! S = largest / a'      update      a' from the history of a
//! ```
//!
//! An [`Fp8Scaler`] keeps a scale for each of its tensors, by name. With [`Fp8Scaling::Delayed`] the scale is known
//! before the tensor is: it derives from the largest magnitudes of earlier iterations, one for each
//! [`update`](Fp8Scaler::update). With [`Fp8Scaling::Current`] it derives from the tensor itself, which must then be
//! read twice. The numbers are those of NVIDIA's Transformer Engine.
//!
//! Scales, histories and counters lie in pool memory at addresses that never change, so captured steps stay valid.
//! Only calls that say so wait for the device.
//!
//! # An infinity must not blind the scale
//! Transformer Engine records an infinity in the history. Until it has rolled out, a scale derived from the history's
//! maximum does not move: for 1,024 updates by default, during which everything that has grown since saturates. Here
//! an iteration whose largest magnitude is infinite or NaN leaves scale and history unchanged. It is counted
//! ([`Fp8TensorStats::not_finite`]), and the next iteration can move the scale again.
//!
//! # Overflows
//! Saturation hides infinities: `e4m3` has none. Each conversion therefore counts, on the device and in the same
//! pass, the elements that were too large, became 0, or are NaN; see [`Fp8Scaler::stats`].
//!
//! Must not know: how the tensors are used.

mod config;
mod quantized;
mod scaler;
mod state;
mod stats;

pub use config::{Fp8Config, Fp8Scaling};
pub use quantized::Quantized;
pub use scaler::Fp8Scaler;
pub use state::{Fp8Recipe, Fp8State, Fp8TensorState};
pub use stats::{Fp8Stats, Fp8TensorStats};

pub use crate::launch::{AmaxAlgorithm, AmaxSource, Fp8Policy, next_fp8_scale};
