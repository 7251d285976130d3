//! Adam with decoupled weight decay.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::adamw::{AdamWNumbers, AdamWSteps, COLUMNS, adamw};
use crate::memory;
use crate::optim::rows::{Needs, Rows};
use crate::optim::settings::{Settings, changed, named, of_group};
use crate::optim::sgd::not_negative;
use crate::optim::{Optimizer, OptimizerId, Parameter, StepInputs};
use crate::storage::Tensor;

/// Settings of [`AdamW`]. Defaults as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Step width; finite, not negative. Default 0.001.
    pub learning_rate: f64,
    /// Shares of the first and second moment that are kept; from 0 to below 1. Default (0.9, 0.999).
    pub betas: (f64, f64),
    /// Added to the root of the second moment; finite, not negative. Default 10⁻⁸.
    pub epsilon: f64,
    /// Share of the weight that a step of width 1 takes off; finite, not negative. Default 0.01.
    pub weight_decay: f64,
    /// Keeps f32 master weights beside 16-bit parameters. Default on.
    pub master_weights: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 1e-2,
            master_weights: true,
        }
    }
}

impl AdamWConfig {
    /// Refuses values that cannot work.
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

impl Settings for AdamWConfig {
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

    fn allows(&self, _changed: &Self) -> Result<()> {
        Ok(())
    }
}

/// Adam with decoupled weight decay. Each parameter counts its own steps, on the device.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    rows: Rows,
    steps: Tensor,
    corrections: Tensor,
}

impl AdamW {
    /// An optimizer for `parameters`, all of one stream, with moments and step counts zeroed.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for no parameters, one given twice, or several
    /// streams; [`Error::OutOfMemory`].
    pub fn new(parameters: Vec<Parameter>, config: AdamWConfig) -> Result<Self> {
        config.validate()?;
        let master_weights = config.master_weights;
        let needs = Needs {
            op: "AdamW",
            columns: COLUMNS,
            states: 2,
            master_weights,
        };
        let rows = Rows::new(parameters, needs)?;
        let _tag = memory::tag("optimizer");
        let (context, tensors) = (rows.context(), rows.parameters.len());
        let steps = Tensor::zeros(context, [tensors], DType::U32)?;
        let corrections = Tensor::zeros(context, [tensors, 2], DType::F64)?;
        Ok(Self {
            config,
            steps,
            corrections,
            rows,
        })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Steps enqueued from now on are this wide.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative or non-finite number; the old one stays.
    pub fn set_learning_rate(&mut self, learning_rate: f64) -> Result<()> {
        not_negative("learning_rate", learning_rate)?;
        self.config.learning_rate = learning_rate;
        Ok(())
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

    /// Master weight of parameter `index`, or `None` if it has none.
    #[must_use]
    pub fn master_weight(&self, index: usize) -> Option<&Tensor> {
        self.rows.master(index)
    }

    /// Copies the parameters into the master weights. Needed after parameters were overwritten, say from a
    /// checkpoint: the next step would otherwise start from the old master weights.
    ///
    /// # Errors
    /// [`Error::Driver`] if a copy cannot be enqueued.
    pub fn reload_master_weights(&self) -> Result<()> {
        self.rows.reload_masters()
    }
}

impl Optimizer for AdamW {
    fn id(&self) -> &OptimizerId {
        &self.rows.id
    }

    fn parameters(&self) -> &[Parameter] {
        &self.rows.parameters
    }

    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        let mut state = self.rows.named(index, &["first_moment", "second_moment"]);
        if let Ok(steps) = self.steps.narrow(0, index, 1) {
            state.push(("steps", steps));
        }
        state
    }

    fn settings(&self, group: usize) -> Vec<(&'static str, f64)> {
        if group > 0 {
            return Vec::new();
        }
        named(&self.config)
    }

    fn set_settings(&mut self, group: usize, changes: &[(&str, f64)]) -> Result<()> {
        self.expect_group(group)?;
        self.config = of_group(group, changed(&self.config, changes))?;
        Ok(())
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        let AdamWConfig {
            learning_rate,
            betas,
            epsilon,
            weight_decay,
            ..
        } = self.config;
        let numbers = AdamWNumbers {
            learning_rate,
            betas,
            epsilon,
            weight_decay,
        };
        let steps = AdamWSteps {
            steps: self.steps.span()?,
            corrections: self.corrections.span()?,
        };
        let table = self.rows.table()?;
        adamw(
            self.rows.context().stream(),
            &table,
            &inputs.scalars()?,
            &steps,
            &numbers,
        )
    }
}
