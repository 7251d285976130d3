//! Stochastic gradient descent.

use crate::error::{Error, Result};
use crate::launch::sgd::{COLUMNS, SgdNumbers, sgd};
use crate::optim::rows::{Needs, Rows};
use crate::optim::settings::{Settings, changed, named, of_group};
use crate::optim::{Optimizer, OptimizerId, Parameter, StepInputs};
use crate::storage::Tensor;

/// Settings of [`Sgd`]. Defaults as in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SgdConfig {
    /// Step width; finite, not negative. Default 0.001.
    pub learning_rate: f64,
    /// Share of the last direction that is kept; finite, not negative. Default 0: no momentum buffer.
    pub momentum: f64,
    /// Share of the weight that is added to its gradient; finite, not negative. Default 0.
    pub weight_decay: f64,
    /// Looks one step ahead; needs momentum. Default off.
    pub nesterov: bool,
    /// Keeps f32 master weights beside 16-bit parameters. Default on.
    pub master_weights: bool,
}

impl Default for SgdConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            momentum: 0.0,
            weight_decay: 0.0,
            nesterov: false,
            master_weights: true,
        }
    }
}

impl SgdConfig {
    /// Refuses values that cannot work.
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

    fn allows(&self, changed: &Self) -> Result<()> {
        if self.momentum == 0.0 && changed.momentum != 0.0 {
            let reason = "the optimizer was made without momentum and has no buffers for it";
            return Err(Error::config("momentum", reason));
        }
        Ok(())
    }
}

/// Refuses a setting that is negative, infinite or NaN.
pub(super) fn not_negative(key: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        key,
        format!("{value} is not a finite number of 0 or more"),
    ))
}

/// Stochastic gradient descent with momentum, Nesterov momentum and weight decay, without dampening.
#[derive(Debug)]
pub struct Sgd {
    config: SgdConfig,
    rows: Rows,
}

impl Sgd {
    /// An optimizer for `parameters`, all of one stream, with its momentum zeroed.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::InvalidArgument`] for no parameters, one given twice, or several
    /// streams; [`Error::OutOfMemory`].
    pub fn new(parameters: Vec<Parameter>, config: SgdConfig) -> Result<Self> {
        config.validate()?;
        let states = usize::from(config.momentum != 0.0);
        let master_weights = config.master_weights;
        let needs = Needs {
            op: "Sgd",
            columns: COLUMNS,
            states,
            master_weights,
        };
        Ok(Self {
            config,
            rows: Rows::new(parameters, needs)?,
        })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &SgdConfig {
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

    /// Momentum of parameter `index`, or `None` without momentum.
    #[must_use]
    pub fn momentum_buffer(&self, index: usize) -> Option<&Tensor> {
        self.rows.state(index, 0)
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
        let SgdConfig {
            learning_rate,
            momentum,
            weight_decay,
            nesterov,
            ..
        } = self.config;
        let numbers = SgdNumbers {
            learning_rate,
            momentum,
            weight_decay,
            nesterov,
        };
        let table = self.rows.table()?;
        sgd(
            self.rows.context().stream(),
            &table,
            &inputs.scalars()?,
            &numbers,
        )
    }
}
