//! Adam and AdamW.

use std::ops::Range;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::adam::{AdamNumbers, AdamSteps, COLUMNS, ROW_WORDS, adam};
use crate::launch::update_pass::SETTING_WORDS;
use crate::memory;
use crate::optim::groups::{Groups, take_apart};
use crate::optim::rows::{Needs, Rows};
use crate::optim::rule::{master_flag, moments_flag};
use crate::optim::settings::{Precision, Settings, named, not_negative, unchanged};
use crate::optim::{
    MasterWeights, Moments, Optimizer, OptimizerId, ParamGroup, Parameter, StepInputs,
};
use crate::storage::Tensor;

/// Settings of [`Adam`], whose weight decay is added to gradients. Defaults match PyTorch.
pub type AdamConfig = AdamFamilyConfig<false>;

/// Settings of [`AdamW`], whose weight decay is decoupled from gradients. Defaults match PyTorch.
pub type AdamWConfig = AdamFamilyConfig<true>;

/// Adam, with weight decay added to gradients.
pub type Adam = AdamFamily<false>;

/// Adam with decoupled weight decay.
pub type AdamW = AdamFamily<true>;

/// Settings of [`Adam`] or, with `DECOUPLED` weight decay, of [`AdamW`]. Defaults match PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default = "AdamFamilyConfig::default", deny_unknown_fields)]
pub struct AdamFamilyConfig<const DECOUPLED: bool> {
    /// Step size; finite, not negative. Default 0.001.
    pub learning_rate: f64,
    /// Share of the first and of the second moment that each step keeps; from 0 to below 1. Default (0.9, 0.999).
    pub betas: (f64, f64),
    /// Added to the square root of the second moment; finite, not negative, and not so small that it becomes 0 in the
    /// compute type. Default 10⁻⁸.
    pub epsilon: f64,
    /// Decoupled: share of the weight that a step of size 1 subtracts; default 0.01. Otherwise: share of the weight
    /// that is added to its gradient; default 0. Finite, not negative.
    pub weight_decay: f64,
    /// Divides by the largest second moment so far, not by the current one. Default off.
    pub amsgrad: bool,
    /// Where the f32 values of 16-bit parameters are kept. Default beside them, in f32.
    pub master_weights: MasterWeights,
    /// The type of the moments. Default the compute type.
    pub moments: Moments,
    /// Seed of the random numbers that round [`Moments::Bf16`]. The same seed gives the same run, on every device.
    /// Default 0.
    pub seed: u64,
}

impl<const DECOUPLED: bool> Default for AdamFamilyConfig<DECOUPLED> {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: if DECOUPLED { 1e-2 } else { 0.0 },
            amsgrad: false,
            master_weights: MasterWeights::F32,
            moments: Moments::Full,
            seed: 0,
        }
    }
}

impl<const DECOUPLED: bool> AdamFamilyConfig<DECOUPLED> {
    /// Refuses invalid values.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of the field.
    pub fn validate(&self) -> Result<()> {
        not_negative("learning_rate", self.learning_rate)?;
        not_negative("epsilon", self.epsilon)?;
        not_negative("weight_decay", self.weight_decay)?;
        for beta in [self.betas.0, self.betas.1] {
            if !(0.0..1.0).contains(&beta) {
                return Err(Error::config(
                    "betas",
                    format!("{beta} is not from 0 to below 1"),
                ));
            }
        }
        Ok(())
    }
}

impl<const DECOUPLED: bool> Settings for AdamFamilyConfig<DECOUPLED> {
    fn numbers(&mut self) -> Vec<(&'static str, &mut f64)> {
        vec![
            ("learning_rate", &mut self.learning_rate),
            ("beta1", &mut self.betas.0),
            ("beta2", &mut self.betas.1),
            ("epsilon", &mut self.epsilon),
            ("weight_decay", &mut self.weight_decay),
        ]
    }

    fn validate(&self) -> Result<()> {
        self.validate()
    }

    fn validate_in(&self, precision: Precision) -> Result<()> {
        let Self {
            learning_rate,
            betas: (beta1, beta2),
            epsilon,
            weight_decay,
            ..
        } = *self;
        precision.check("learning_rate", learning_rate)?;
        precision.check("epsilon", epsilon)?;
        precision.check("weight_decay", weight_decay)?;
        precision.check_below_one("betas", beta1)?;
        precision.check_below_one("betas", beta2)?;
        let first = learning_rate / (1.0 - beta1);
        precision.check_product("learning_rate", "the width of the first step", first)?;
        let taken = if DECOUPLED {
            learning_rate * weight_decay
        } else {
            0.0
        };
        precision.check_product("weight_decay", "the share that a step takes off", taken)
    }

    fn flags(&self, parameters: &[Parameter]) -> Vec<(&'static str, String)> {
        let mut flags = vec![
            ("amsgrad", self.amsgrad.to_string()),
            ("seed", self.seed.to_string()),
        ];
        flags.extend(master_flag(self.master_weights, parameters));
        flags.extend(moments_flag(self.moments, parameters));
        flags
    }

    fn allows(&self, changed: &Self) -> Result<()> {
        unchanged("amsgrad", &self.amsgrad, &changed.amsgrad)?;
        unchanged(
            "master_weights",
            &self.master_weights,
            &changed.master_weights,
        )?;
        unchanged("moments", &self.moments, &changed.moments)?;
        unchanged("seed", &self.seed, &changed.seed)
    }

    fn needs(&self) -> Needs {
        Needs {
            states: if self.amsgrad { 3 } else { 2 },
            moments: self.moments,
            masters: self.master_weights,
        }
    }

    fn words(&self) -> [u64; SETTING_WORDS] {
        let numbers = AdamNumbers {
            learning_rate: self.learning_rate,
            betas: self.betas,
            epsilon: self.epsilon,
            weight_decay: self.weight_decay,
            is_decoupled: DECOUPLED,
            seed: self.seed,
        };
        numbers.words()
    }
}

/// [`Adam`] or, with `DECOUPLED` weight decay, [`AdamW`]. Each parameter counts its own steps, on the device. A step
/// takes two launches for any number of groups and parameters.
#[derive(Debug)]
pub struct AdamFamily<const DECOUPLED: bool> {
    rows: Rows,
    groups: Groups<AdamFamilyConfig<DECOUPLED>>,
    /// u32, one per parameter.
    steps: Tensor,
    /// f64, scratch memory of a step.
    numbers: Tensor,
}

impl<const DECOUPLED: bool> AdamFamily<DECOUPLED> {
    const NAME: &str = if DECOUPLED { "AdamW" } else { "Adam" };

    /// An optimizer for `parameters`, all on one stream, with moments and step counts zeroed.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], also for a setting that becomes 0 or infinite in the compute type, which is f64 for
    /// f64 parameters and f32 for others; [`Error::InvalidArgument`] for no parameters, one given twice, two of one
    /// name, or several streams; [`Error::OutOfMemory`].
    pub fn new(parameters: Vec<Parameter>, config: AdamFamilyConfig<DECOUPLED>) -> Result<Self> {
        Self::with_groups(vec![ParamGroup::new(parameters, config)])
    }

    /// An optimizer for several groups of parameters, each with its own settings. All groups move in the same
    /// launches.
    ///
    /// # Errors
    /// As [`new`](Self::new); an invalid setting is named with its group.
    pub fn with_groups(groups: Vec<ParamGroup<AdamFamilyConfig<DECOUPLED>>>) -> Result<Self> {
        let op = Self::NAME;
        let (parameters, ranges, settings) = take_apart(groups)?;
        let rows = Rows::new(op, COLUMNS, parameters)?;
        let groups = Groups::new(&rows, ranges, settings)?;
        let _tag = memory::tag("optimizer");
        let (context, tensors) = (rows.context(), rows.parameters.len());
        let steps = Tensor::zeros(context, [tensors], DType::U32)?;
        let numbers = Tensor::zeros(context, [tensors, ROW_WORDS], DType::F64)?;
        Ok(Self {
            steps,
            numbers,
            groups,
            rows,
        })
    }

    /// The settings of the first group.
    #[must_use]
    pub fn config(&self) -> &AdamFamilyConfig<DECOUPLED> {
        self.groups.first()
    }

    /// The settings of a group.
    #[must_use]
    pub fn group_config(&self, group: usize) -> Option<&AdamFamilyConfig<DECOUPLED>> {
        self.groups.get(group)
    }

    /// Replaces all settings of a group; see [`set_settings`](Optimizer::set_settings).
    ///
    /// # Errors
    /// As [`set_settings`](Optimizer::set_settings); also if `amsgrad`, `master_weights`, `moments` or `seed` differ,
    /// which are fixed when the optimizer is made.
    pub fn set_group_config(
        &mut self,
        group: usize,
        config: AdamFamilyConfig<DECOUPLED>,
    ) -> Result<()> {
        self.groups.set(group, config)
    }

    /// Sets the learning rate of all groups for steps enqueued from now on.
    ///
    /// # Errors
    /// As [`set_settings`](Optimizer::set_settings); the old rates stay.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        self.groups.set_everywhere("learning_rate", learning_rate)
    }

    /// Steps applied so far, a u32 for each parameter.
    #[must_use]
    pub fn step_counts(&self) -> &Tensor {
        &self.steps
    }

    /// First moment of parameter `index`.
    #[must_use]
    pub fn first_moment(&self, index: usize) -> Option<&Tensor> {
        self.rows.state(index, 0)
    }

    /// Second moment of parameter `index`.
    #[must_use]
    pub fn second_moment(&self, index: usize) -> Option<&Tensor> {
        self.rows.state(index, 1)
    }

    /// Largest second moment of parameter `index`, or `None` without amsgrad.
    #[must_use]
    pub fn largest_second_moment(&self, index: usize) -> Option<&Tensor> {
        self.rows.state(index, 2)
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

impl<const DECOUPLED: bool> Optimizer for AdamFamily<DECOUPLED> {
    fn id(&self) -> &OptimizerId {
        &self.rows.id
    }

    fn parameters(&self) -> &[Parameter] {
        &self.rows.parameters
    }

    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        let names = ["first_moment", "second_moment", "largest_second_moment"];
        let mut state = self.rows.named(index, &names);
        if let Ok(steps) = self.steps.narrow(0, index, 1) {
            state.push(("steps", steps));
        }
        state
    }

    fn groups(&self) -> Vec<Range<usize>> {
        self.groups.ranges().to_vec()
    }

    fn rule(&self) -> Option<&'static str> {
        Some(Self::NAME)
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
        let steps = AdamSteps {
            steps: self.steps.span()?,
            rows: self.numbers.span()?,
            found: self.rows.lost_weights()?,
        };
        let table = self.rows.table()?;
        adam(
            self.rows.context().stream(),
            &table,
            &inputs.scalars()?,
            &self.groups.on_device()?,
            &steps,
        )
    }
}
