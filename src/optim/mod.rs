//! Parameters and optimizers.
//!
//! A [`Parameter`] is a named weight with a place for its gradient. An [`Optimizer`] moves parameters by
//! their gradients, all of them in the same launches, whatever their types and settings. Parameters with the same
//! settings are a [`ParamGroup`]; settings lie in device memory at addresses that stay, so that what was captured
//! before a change follows it. What decides and scales a step ([`StepInputs`]: skip it?
//! unscale by what? clip by what?) are numbers in device memory, so a step under a
//! gradient scaler never makes the host wait. A skipped step leaves weights, optimizer state and step
//! counts as they were, to the bit.
//!
//! *Master weights*: beside a 16-bit parameter an optimizer keeps the weight in f32, moves that, and writes
//! the 16-bit copy in the same pass; or it keeps beside a bf16 parameter the 16 bits that make it the same f32. Optimizer state is zeroed when it is made, never later: with a pool
//! below, fresh memory holds old bytes.
//!
//! Must not know: who computed the inputs of a step, and when a loss scale changes.

mod adam;
mod clip;
mod distinct;
mod ema;
mod gradients;
mod groups;
mod masters;
mod matching;
mod optimizer;
mod parameter;
mod produced;
mod rows;
mod rule;
mod schedule;
mod settings;
mod sgd;
mod state;
mod table;
mod weights;

pub use crate::launch::NormKind;
pub(crate) use crate::storage::moment;
pub use adam::{Adam, AdamConfig, AdamFamily, AdamFamilyConfig, AdamW, AdamWConfig};
pub use clip::{clip_grad_norm, clip_grad_norm_};
pub(crate) use distinct::first_repeated;
pub use ema::{Ema, EmaState};
pub(crate) use gradients::{Clip, Gradients, Pass};
pub use groups::ParamGroup;
pub(crate) use optimizer::OptimizerLife;
pub use optimizer::{Optimizer, OptimizerId, StepInputs};
pub(crate) use parameter::UnscaleMark;
pub use parameter::{Parameter, ScaleTag};
pub(crate) use produced::CheckAtOnce;
pub use rows::{MasterWeights, Moments};
pub use rule::Flags;
pub use schedule::{Decay, Schedule};
pub use sgd::{Sgd, SgdConfig};
pub use state::{GroupState, NamedTensors, OptimizerState};
pub(crate) use state::{
    load as load_optimizer, match_named, save_named, saved_groups, setting_names, values,
};
pub use weights::WeightOverflow;
