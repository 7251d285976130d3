//! Stochastic gradient descent.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::launch::sgd::{COLUMNS, SgdNumbers, sgd};
use crate::launch::update_pass::SETTING_WORDS;
use crate::optim::groups::{Groups, take_apart};
use crate::optim::rows::{Needs, Rows};
use crate::optim::rule::master_flag;
use crate::optim::settings::{Precision, Settings, named, not_negative, unchanged};
use crate::optim::{
    MasterWeights, Moments, Optimizer, OptimizerId, ParamGroup, Parameter, StepInputs,
};
use crate::storage::Tensor;

/// Settings of [`Sgd`]. Defaults match PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Step size; finite, not negative. Default 0.001.
    pub learning_rate: f64,
    /// Share of the last direction that each step keeps; finite, not negative. Default 0: no momentum buffer.
    pub momentum: f64,
    /// Share of the weight that is added to its gradient; finite, not negative. Default 0.
    pub weight_decay: f64,
    /// Whether momentum is Nesterov's, which looks one step ahead; needs momentum. Default off.
    pub nesterov: bool,
    /// Where the f32 values of 16-bit parameters are kept. Default beside them, in f32.
    pub master_weights: MasterWeights,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            momentum: 0.0,
            weight_decay: 0.0,
            nesterov: false,
            master_weights: MasterWeights::F32,
        }
    }
}

impl SgdConfig {
    /// Refuses invalid values.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of the field.
    pub fn validate(&self) -> Result<()> {
        not_negative("learning_rate", self.learning_rate)?;
        not_negative("momentum", self.momentum)?;
        not_negative("weight_decay", self.weight_decay)?;
        if self.nesterov && self.momentum == 0.0 {
            return Err(Error::config("nesterov", "needs a momentum above 0"));
        }
        Ok(())
    }
}

impl Settings for SgdConfig {
    fn numbers(&mut self) -> Vec<(&'static str, &mut f64)> {
        vec![
            ("learning_rate", &mut self.learning_rate),
            ("momentum", &mut self.momentum),
            ("weight_decay", &mut self.weight_decay),
        ]
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn validate_in(&self, precision: Precision) -> Result<()> {
        precision.check("learning_rate", self.learning_rate)?;
        precision.check_below_one("momentum", self.momentum)?;
        precision.check("weight_decay", self.weight_decay)
    }

    fn flags(&self, parameters: &[Parameter]) -> Vec<(&'static str, String)> {
        let mut flags = vec![("nesterov", self.nesterov.to_string())];
        flags.extend(master_flag(self.master_weights, parameters));
        flags
    }

    fn allows(&self, changed: &Self) -> Result<()> {
        if self.momentum == 0.0 && changed.momentum != 0.0 {
            let reason = "the optimizer was made without momentum and has no buffers for it";
            return Err(Error::config("momentum", reason));
        }
        unchanged(
            "master_weights",
            &self.master_weights,
            &changed.master_weights,
        )
    }

    fn needs(&self) -> Needs {
        Needs {
            states: usize::from(self.momentum != 0.0),
            moments: Moments::Full,
            masters: self.master_weights,
        }
    }

    fn words(&self) -> [u64; SETTING_WORDS] {
        let Self {
            learning_rate,
            momentum,
            weight_decay,
            nesterov,
            ..
        } = *self;
        let numbers = SgdNumbers {
            learning_rate,
            momentum,
            weight_decay,
            nesterov,
        };
        numbers.words()
    }
}

/// Stochastic gradient descent with momentum, Nesterov momentum and weight decay, without dampening.
#[derive(Debug)]
pub struct Sgd {
    rows: Rows,
    groups: Groups<SgdConfig>,
}

impl Sgd {
    /// An optimizer for `parameters`, all on one stream, with its momentum zeroed.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], also for a setting that becomes 0 or infinite in the compute type, which is f64 for
    /// f64 parameters and f32 for others; [`Error::InvalidArgument`] for no parameters, one given twice, two of one
    /// name, or several streams; [`Error::OutOfMemory`].
    pub fn new(parameters: Vec<Parameter>, config: SgdConfig) -> Result<Self> {
        Self::with_groups(vec![ParamGroup::new(parameters, config)])
    }

    /// An optimizer for several groups of parameters, each with its own settings. All groups move in one launch.
    ///
    /// # Errors
    /// As [`new`](Self::new); an invalid setting is named with its group.
    pub fn with_groups(groups: Vec<ParamGroup<SgdConfig>>) -> Result<Self> {
        let (parameters, ranges, settings) = take_apart(groups)?;
        let rows = Rows::new("Sgd", COLUMNS, parameters)?;
        Ok(Self {
            groups: Groups::new(&rows, ranges, settings)?,
            rows,
        })
    }

    /// The settings of the first group.
    #[must_use]
    pub fn config(&self) -> &SgdConfig {
        self.groups.first()
    }

    /// The settings of a group.
    #[must_use]
    pub fn group_config(&self, group: usize) -> Option<&SgdConfig> {
        self.groups.get(group)
    }

    /// Replaces all settings of a group; see [`set_settings`](Optimizer::set_settings).
    ///
    /// # Errors
    /// As [`set_settings`](Optimizer::set_settings); also for other master weights, or for momentum in a group that
    /// was made without it.
    pub fn set_group_config(&mut self, group: usize, config: SgdConfig) -> Result<()> {
        self.groups.set(group, config)
    }

    /// Sets the learning rate of all groups for steps enqueued from now on.
    ///
    /// # Errors
    /// As [`set_settings`](Optimizer::set_settings); the old rates stay.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        self.groups.set_everywhere("learning_rate", learning_rate)
    }

    /// Momentum of parameter `index`, or `None` without momentum.
    #[must_use]
    pub fn momentum_buffer(&self, index: usize) -> Option<&Tensor> {
        self.rows.state(index, 0)
    }

    /// Master weight of parameter `index`, or `None` if it has none in f32.
    #[must_use]
    pub fn master_weight(&self, index: usize) -> Option<&Tensor> {
        self.rows.master(index)
    }

    /// Lower halves of the master weights of parameter `index`, two per u32, or `None` if they are not
    /// [split](MasterWeights::Split).
    #[must_use]
    pub fn master_remainder(&self, index: usize) -> Option<&Tensor> {
        self.rows.remainder(index)
    }

    /// Copies the parameters into the master weights. A step does this itself for parameters written through their
    /// tensors since the last one. If something else wrote the parameters, call it before capturing a step, and
    /// between launches of a graph that captured one.
    ///
    /// # Errors
    /// [`Error::Driver`] if a copy cannot be enqueued.
    pub fn reload_master_weights(&self) -> Result<()> {
        self.rows.reload_masters()
    }
}

impl Optimizer for Sgd {
    fn id(&self) -> &OptimizerId {
        &self.rows.id
    }

    fn parameters(&self) -> &[Parameter] {
        &self.rows.parameters
    }

    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        self.rows.named(index, &["momentum"])
    }

    fn groups(&self) -> Vec<Range<usize>> {
        self.groups.ranges().to_vec()
    }

    fn rule(&self) -> Option<&'static str> {
        Some("Sgd")
    }

    fn flags(&self, group: usize) -> Vec<(&'static str, String)> {
        self.groups.flags(group, &self.rows.parameters)
    }

    fn settings(&self, group: usize) -> Vec<(&'static str, f64)> {
        self.groups.get(group).map(named).unwrap_or_default()
    }

    fn set_settings(&mut self, group: usize, changes: &[(&str, f64)]) -> Result<()> {
        self.groups.set_numbers(group, changes)
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        let table = self.rows.table()?;
        sgd(
            self.rows.context().stream(),
            &table,
            &inputs.scalars()?,
            &self.groups.on_device()?,
            &self.rows.lost_weights()?,
        )
    }
}
