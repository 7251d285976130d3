//! Mixed precision: loss scaling, and scopes in which operations run in 16 bits.
//!
//! ```text
//! loss = loss · S        scale      small gradients survive f16
//! g    = ∂loss/∂w                   (computed by the trainer)
//! g    = g / S           unscale    optional: to look at gradients, or clip them
//! w    = w − …           step       skipped if any g is infinite or NaN
//! S    = S · 2 or S / 2  update     after 2,000 clean steps; after an overflow
//! ```
//!
//! Calls, their order and their numbers match PyTorch's `GradScaler` bit for bit. Where PyTorch silently corrupts a
//! run, this scaler does not; each difference is documented at the function it concerns.
//!
//! # Example
//! ```
//! use kitsune::amp::{AmpConfig, GradScaler};
//! use kitsune::optim::{Parameter, Sgd, SgdConfig};
//! use kitsune::{Context, DType, Device, Tensor, ops};
//!
//! # fn main() -> kitsune::Result<()> {
//! let context = Context::new(&Device::auto()?)?;
//! let weight = Parameter::new("weight", Tensor::full(&context, [3, 4], DType::F32, 0.1)?)?;
//! let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default())?;
//! let config = AmpConfig::default();
//! let mut scaler = GradScaler::new(&context, config.clone())?;
//!
//! let data = Tensor::full(&context, [2, 4], DType::F32, 1.0)?;
//! let labels = Tensor::from_slice(&context, [2], &[0u32, 2])?;
//! for _ in 0..3 {
//!     let (layer, loss) = config.in_autocast(|| -> kitsune::Result<_> {
//!         let layer = ops::linear(&data, weight.value(), None)?;
//!         let loss = ops::softmax_cross_entropy(layer.output(), &labels)?;
//!         Ok((layer, loss))
//!     })?;
//!     let grad = scaler.scale(&loss)?.backward()?;
//!     weight.set_grad(layer.backward(&grad)?.weight)?;
//!
//!     scaler.unscale(&optimizer)?;
//!     scaler.clip_grad_norm(&optimizer, 1.0)?;
//!     let outcome = scaler.step(&mut optimizer)?;
//!     scaler.update()?;
//!     // Waits for the device. A real loop asks a few steps later, or never.
//!     assert!(outcome.is_applied()?);
//! }
//! assert_eq!(scaler.scale_factor()?, 65536.0);
//! # Ok(())
//! # }
//! ```
//!
//! # Nothing waits
//! Scale, inverse, growth tracker, overflow flags, counters and norms lie in pool memory, at addresses that never
//! change. [`GradScaler::step`] enqueues three things and returns: a check of all gradients, the step, which skips
//! itself if the flag is set, and a journal entry. Whether the step was skipped is known once the device gets there;
//! [`StepOutcome`] can be asked then, later, or never. After the first step nothing is allocated.
//!
//! # Where the scale changes
//! [`GradScaler::update`] enqueues one kernel, `kernels/scale_update.cu`, which halves or doubles the scale.
//! `src/launch/scale_update.rs` launches it, contains its twin for the host device, and states the rule;
//! [`next_scale`] is the rule as a plain function.
//!
//! # The state of an optimizer
//!
//! | state \ call | `unscale` | `check` | `clip_grad_norm` | `step` | `update` |
//! |---|---|---|---|---|---|
//! | ready | → unscaled | → checked | → checked | check, step → stepped | error, unless another was checked |
//! | checked | error | error | clips again | step, clipping → stepped | → ready |
//! | unscaled | error | error | multiplies in place | step → stepped | → ready |
//! | stepped | error | error | error | error | → ready |
//!
//! Loading a state makes every optimizer ready. Gradients from before the load are refused.
//!
//! An optimizer has one scaler: a second one is refused while the first exists. A gradient is unscaled once, and all
//! its terms must have the scale of one iteration. Other gradients are refused as far as the calls that made them
//! reveal it.
//!
//! Must not know: how an optimizer moves a weight.

mod alarm;
mod applied;
mod config;
pub mod fp8;
mod journal;
mod magnitudes;
mod memory;
mod optimizer;
mod outcome;
mod policy;
mod readback;
mod resume;
mod scalable;
mod scaler;
mod slot;
mod state;
mod stats;
mod step_all;
mod versioned;

pub use applied::{AppliedSteps, AppliedStepsState};
pub use config::AmpConfig;
pub use magnitudes::Magnitudes;
pub use optimizer::{AmpOptimizer, AmpOptimizerState, ClipState, ScheduleState};
pub use outcome::{
    Outcome, OverflowKind, OverflowReport, StepOutcome, TensorOverflow, WeightReport,
};
pub use policy::{NanPolicy, ScaleProfile, ScalingMode, SkipPolicy};
pub use scalable::Scalable;
pub use scaler::GradScaler;
pub use state::{KeptScale, ScalerState};
pub use stats::{ScaleChange, ScalerStats, StepTimes};
pub use step_all::StepAllError;

pub use crate::ops::autocast::{AutocastGuard, autocast};

pub use crate::error::{AlarmKind, ScalerAlarm};
pub use crate::launch::{NormKind, Refill, ScalePolicy, ScaleState, inverse_scale, next_scale};
pub use crate::optim::ScaleTag;
