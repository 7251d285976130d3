//! Trainings in files: saved whole, and taken up again to the bit.
//!
//! A [`Checkpoint`] is the state of a training in host memory: *parts*, each with settings and named tensors
//! (a model, its optimizers, a scaler, averages, the count of applied steps), and whatever the caller adds, such as
//! the place in the data. It is one file: tensors as in safetensors, the rest as JSON in the same file's
//! header, checksums over both.
//!
//! *All or nothing*, on both sides. [`Checkpoint::write`] leaves the old file or the new one, and a file that is
//! there is whole on the disk. [`Restore`] checks every name, shape, type and number of all parts before it changes
//! the first byte; should the driver fail after that, it puts the old state back.
//!
//! A file says by which rule an optimizer was moved and with which flags; a restoration into another one is refused.
//! Files of version 1 do not say it. They are read all the same, and [`Restore::lacks`] lists what was not compared or
//! was taken from where the state went.
//!
//! A file is not trusted: whatever its bytes, [`Checkpoint::read`] answers with a checkpoint or with an error that
//! names the culprit, and takes no more memory than the file is long, beside 16 times its header.
//!
//! # Example
//! ```
//! use kitsune::amp::{AmpConfig, GradScaler};
//! use kitsune::checkpoint::Checkpoint;
//! use kitsune::optim::{AdamW, AdamWConfig, Parameter};
//! use kitsune::{Context, DType, Device, Tensor};
//!
//! # fn main() -> kitsune::Result<()> {
//! # let path = std::env::temp_dir().join(format!("kitsune-doc-{}.safetensors", std::process::id()));
//! # let context = Context::new(&Device::auto()?)?;
//! # let weight = Parameter::new("weight", Tensor::full(&context, [3], DType::F32, 0.5)?)?;
//! # let parameters = [weight.clone()];
//! # let mut optimizer = AdamW::new(parameters.to_vec(), AdamWConfig::default())?;
//! # let mut scaler = GradScaler::new(&context, AmpConfig::default())?;
//! let mut saved = Checkpoint::new();
//! saved.add_model(&parameters)?;
//! saved.add_optimizer("optimizer", &optimizer)?;
//! saved.add_scaler(&scaler)?;
//! saved.add_extra("epoch", &7)?;
//! saved.write(&path)?;
//! # weight.value().fill(0.0)?;
//!
//! let saved = Checkpoint::read(&path)?;
//! let epoch: u32 = saved.extra("epoch")?;
//! saved
//!     .restore()
//!     .model(&parameters)?
//!     .optimizer("optimizer", &mut optimizer)?
//!     .scaler(&mut scaler)?
//!     .finish()?;
//! # assert_eq!((epoch, weight.value().to_vec::<f32>()?), (7, vec![0.5; 3]));
//! # std::fs::remove_file(&path).expect("it was there");
//! # Ok(())
//! # }
//! ```
//!
//! Must not know: command line, how weights move.

mod file;
mod finite;
mod header;
mod json;
mod optimizer;
mod replace;
mod restore;

use std::collections::BTreeMap;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use optimizer::OptimizerPart;
pub use restore::Restore;

use crate::amp::fp8::Fp8Scaler;
use crate::amp::{AmpOptimizer, AppliedSteps, GradScaler};
use crate::error::{Error, Result};
use crate::optim::{Ema, NamedTensors, Optimizer, Parameter, save_named, values};
use crate::storage::HostTensor;

/// The part that holds a model.
const MODEL: &str = "model";
/// The part that holds a scaler.
const SCALER: &str = "scaler";
/// The part that holds averages.
const EMA: &str = "ema";
/// The part that holds a count of applied steps.
const APPLIED: &str = "applied_steps";
/// The part that holds the optimizer of an [`AmpOptimizer`].
const OPTIMIZER: &str = "optimizer";
/// The part that holds where the schedule of an [`AmpOptimizer`] is.
const SCHEDULE: &str = "schedule";
/// Where tensors of the caller's stand.
const EXTRA: &str = "extra";

/// The state of a training in host memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Checkpoint {
    parts: BTreeMap<String, Part>,
    extra: BTreeMap<String, Value>,
    extra_tensors: NamedTensors,
}

/// One part: what is not a tensor, and tensors.
#[derive(Clone, Debug, Default, PartialEq)]
struct Part {
    settings: Value,
    tensors: NamedTensors,
}

impl Checkpoint {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the values of `parameters`, whose names must differ. Waits for the device, as all of these do.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a part or name that stands twice; [`Error::Driver`] if work of the stream
    /// failed.
    pub fn add_model(&mut self, parameters: &[Parameter]) -> Result<()> {
        let tensors = within(MODEL, save_named(values(parameters)))?;
        self.add_part(MODEL, &(), tensors)
    }

    /// Adds the state of `optimizer` as the part `name`. Gradients are no part of it: save after a step, not between the
    /// batches whose gradients it adds up.
    ///
    /// # Errors
    /// As [`add_model`](Self::add_model), and [`Error::InvalidState`] with the parameters that have a gradient that no
    /// step has used: step first, or drop the gradients and make them again after the restoration.
    pub fn add_optimizer<O: Optimizer + ?Sized>(
        &mut self,
        name: &str,
        optimizer: &O,
    ) -> Result<()> {
        within(name, optimizer::expect_used(optimizer.parameters()))?;
        let state = within(name, optimizer.state_dict())?;
        let (part, tensors) = OptimizerPart::of(state, None);
        self.add_part(name, &part, tensors)
    }

    /// Adds the state of `scaler`.
    ///
    /// # Errors
    /// As [`add_model`](Self::add_model), and as [`GradScaler::state_dict`].
    pub fn add_scaler(&mut self, scaler: &GradScaler) -> Result<()> {
        self.add_part(SCALER, &scaler.state_dict()?, NamedTensors::new())
    }

    /// Adds the scales of 8-bit tensors as the part `name`.
    ///
    /// # Errors
    /// As [`add_model`](Self::add_model), and as [`Fp8Scaler::state_dict`].
    pub fn add_fp8_scaler(&mut self, name: &str, scaler: &Fp8Scaler) -> Result<()> {
        self.add_part(name, &scaler.state_dict()?, NamedTensors::new())
    }

    /// Adds averages.
    ///
    /// # Errors
    /// As [`add_model`](Self::add_model).
    pub fn add_ema(&mut self, ema: &Ema) -> Result<()> {
        let state = within(EMA, ema.state_dict())?;
        self.add_part(EMA, &state.decay, state.averages)
    }

    /// Adds a count of applied steps.
    ///
    /// # Errors
    /// As [`add_model`](Self::add_model), and as [`AppliedSteps::state_dict`].
    pub fn add_applied_steps(&mut self, applied: &AppliedSteps) -> Result<()> {
        self.add_part(APPLIED, &applied.state_dict()?, NamedTensors::new())
    }

    /// Adds all that `optimizer` holds: the optimizer's state and the limit of the norm, the scaler, where its schedule
    /// is, and the averages.
    ///
    /// # Errors
    /// As the others.
    pub fn add_amp_optimizer<O: Optimizer>(&mut self, optimizer: &AmpOptimizer<O>) -> Result<()> {
        let parameters = optimizer.optimizer().parameters();
        within(OPTIMIZER, optimizer::expect_used(parameters))?;
        let state = optimizer.state_dict()?;
        let (part, tensors) = OptimizerPart::of(state.optimizer, state.clip);
        self.add_part(OPTIMIZER, &part, tensors)?;
        self.add_part(SCALER, &state.scaler, NamedTensors::new())?;
        if let Some(schedule) = &state.schedule {
            self.add_part(SCHEDULE, schedule, NamedTensors::new())?;
        }
        match state.ema {
            Some(ema) => self.add_part(EMA, &ema.decay, ema.averages),
            None => Ok(()),
        }
    }

    /// Adds a value of the caller's, such as the place in the data.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a name that stands twice, or a value that JSON cannot hold: keys that are no text,
    /// infinities and NaN.
    pub fn add_extra<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) -> Result<()> {
        let value = to_json(name, value)?;
        match self.extra.insert(name.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(Error::state(name, "the name stands twice")),
        }
    }

    /// Adds a tensor of the caller's.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a name that stands twice.
    pub fn add_extra_tensor(&mut self, name: &str, tensor: HostTensor) -> Result<()> {
        match self.extra_tensors.insert(name.to_owned(), tensor) {
            None => Ok(()),
            Some(_) => Err(Error::state(name, "the name stands twice")),
        }
    }

    /// The value that was added as `name`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if there is none, or it is no `T`.
    pub fn extra<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let Some(value) = self.extra.get(name) else {
            return Err(Error::state(name, "the saved state has no such value"));
        };
        T::deserialize(value).map_err(|error| Error::state(name, error.to_string()))
    }

    /// The tensor that was added as `name`.
    #[must_use]
    pub fn extra_tensor(&self, name: &str) -> Option<&HostTensor> {
        self.extra_tensors.get(name)
    }

    /// The names of the parts.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    /// A tensor of a part: of the part `model`, the value of the parameter `name`.
    #[must_use]
    pub fn tensor(&self, part: &str, name: &str) -> Option<&HostTensor> {
        self.parts.get(part)?.tensors.get(name)
    }

    /// Begins to put the state back where it came from. Nothing changes before [`Restore::finish`].
    pub fn restore(&self) -> Restore<'_> {
        Restore::new(self)
    }

    fn add_part<T: Serialize + ?Sized>(
        &mut self,
        name: &str,
        settings: &T,
        tensors: NamedTensors,
    ) -> Result<()> {
        check_part_name(name)?;
        if self.parts.contains_key(name) {
            return Err(Error::state(name, "the part stands twice"));
        }
        let settings = to_json(name, settings)?;
        self.parts
            .insert(name.to_owned(), Part { settings, tensors });
        Ok(())
    }
}

/// Refuses names that would not be found again: a tensor is `part/name` in the file.
fn check_part_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains('/') || name == EXTRA {
        let reason = format!("{name:?} cannot name a part: it is empty, `{EXTRA}`, or has a `/`");
        return Err(Error::state("part", reason));
    }
    Ok(())
}

fn to_json<T: Serialize + ?Sized>(name: &str, value: &T) -> Result<Value> {
    finite::check(value).map_err(|refusal| Error::state(name, refusal.to_string()))?;
    serde_json::to_value(value).map_err(|error| Error::state(name, error.to_string()))
}

/// `outcome` with the part in the key of its error.
fn within<T>(part: &str, outcome: Result<T>) -> Result<T> {
    outcome.map_err(|error| error.within(part))
}
