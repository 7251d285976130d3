//! Parameters and optimizers.
//!
//! A [`Parameter`] is a named weight with a place for its gradient. An [`Optimizer`] moves parameters by their
//! gradients, all of them in the same launches, whatever their types and settings. Parameters with the same settings
//! form a [`ParamGroup`]. Settings lie in device memory at fixed addresses, so captured steps see later changes. The
//! inputs that decide and scale a step ([`StepInputs`]: the skip flag, the inverse scale, the clip coefficient) lie
//! in device memory too, so a step under a gradient scaler never makes the host wait. A skipped step leaves weights,
//! optimizer state and step counts bit for bit as they were.
//!
//! *Master weights*: an optimizer keeps a 16-bit parameter's weight in f32, moves that, and writes the 16-bit copy in
//! the same pass. For a bf16 parameter it can instead keep only the lower 16 bits, which complete the parameter to
//! the same f32. Optimizer state is zeroed when it is allocated, because memory from a pool holds old bytes.
//!
//! Must not know: where the inputs of a step come from, and when a loss scale changes.

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
