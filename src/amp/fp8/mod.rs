//! Scales for tensors that are kept in 8 bits.
//!
//! ```text
//! y = round(x · S)      quantize    S so that the largest |x| lands near the largest number of the type
//! x ≈ y / S             dequantize
//! a = max(a, |x|)       beside it, for S in the next iteration
//! S = largest / a'      update      a' from the history of a
//! ```
//!
//! An [`Fp8Scaler`] keeps a scale for each of the tensors it was told, by name. With
//! [`Fp8Scaling::Delayed`] the scale is known before the tensor is: from the largest magnitudes of earlier
//! iterations, one for each [`update`](Fp8Scaler::update). With [`Fp8Scaling::Current`] it comes from the tensor
//! itself, at the price of reading it twice. The numbers are those of NVIDIA's Transformer Engine.
//!
//! Scales, histories and counters lie in pool memory at addresses that never change. Nothing waits for the device
//! but what says so, and a captured step finds everything where it was.
//!
//! # An infinity must not blind the scale
//! In Transformer Engine an infinity goes into the history, and a scale taken from the largest of a history with an
//! infinity in it stands still until that has rolled out: after 1,024 updates by default, during which everything
//! that has grown since saturates. Here an iteration whose largest magnitude is infinite or NaN leaves scale and
//! history as they were; it is counted ([`Fp8TensorStats::not_finite`]), and the next one is free to move the scale.
//!
//! # Overflows
//! Saturation hides infinities: `e4m3` has none. Each conversion therefore counts, on the device and in the same pass,
//! the elements that were too large, those that became 0 and those that are NaN, see [`Fp8Scaler::stats`].
//!
//! Must not know: what is computed from the tensors.

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
