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
//! The calls, their order and their numbers are those of PyTorch's `GradScaler`, to the bit. Where that one
//! corrupts a training silently, this one does not; each such difference is told at the function it
//! concerns.
//!
//! # Nothing waits
//! Scale, inverse, growth tracker, overflow flags, counters and norms lie in pool memory, at addresses that
//! never change. [`GradScaler::step`] enqueues a check of all gradients, the step, which skips itself if
//! the flag is set, and a note in a journal, and returns. Whether the step was skipped is known when the
//! device gets there; [`StepOutcome`] can be asked then, later, or never. After the first step nothing is
//! allocated.
//!
//! # The state of an optimizer
//!
//! | state \ call | `unscale` | `clip_grad_norm` | `step` | `update` |
//! |---|---|---|---|---|
//! | ready | → unscaled | → checked | check, step → stepped | counts if another was checked |
//! | checked | error | again | step, clipping → stepped | → ready |
//! | unscaled | error | multiplies in place | step → stepped | → ready |
//! | stepped | error | error | error | → ready |
//!
//! Must not know: how an optimizer moves a weight.

mod config;
mod journal;
mod outcome;
mod scalable;
mod scaler;
mod slot;
mod state;
mod stats;

pub use config::AmpConfig;
pub use outcome::{Outcome, OverflowKind, OverflowReport, StepOutcome, TensorOverflow};
pub use scalable::Scalable;
pub use scaler::GradScaler;
pub use state::ScalerState;
pub use stats::{ScaleChange, ScalerStats};

pub use crate::launch::{NormKind, ScalePolicy, ScaleState, inverse_scale, next_scale};
