//! Averages of weights over a training, which often predict better than the last weights.
//!
//! ```text
//! average = average + (1 − decay) · (weight − average)        after each applied step
//! ```
//!
//! Whether a step was applied is decided on the device, by the flag that decided the step itself: an average is
//! left alone, to the bit, exactly when its weight was. The formula is a step of plain gradient descent
//! towards the weight, so it runs in that kernel: the weight stands where the gradient would, multiplied by −1,
//! and a weight decay of 1 adds the average to it.
//!
//! Averages are f32 (f64 of f64 weights): with a decay near 1 the summands are too small for 16 bits. For the same reason
//! a 16-bit weight is best averaged by its f32 master, which [`Ema::of`] does: steps too small to show in 16 bits would
//! show in no average of them either.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::chunk_table::MAX_COLUMNS;
use crate::launch::sgd::{COLUMNS, SgdNumbers, sgd};
use crate::launch::update_pass::{GRADIENT, GroupSettings, PARAMETER, SETTING_WORDS, StepScalars};
use crate::memory;
use crate::optim::rows::MASTER_WEIGHT;
use crate::optim::state::{Live, NamedTensors, match_named, save_named};
use crate::optim::table::DeviceTable;
use crate::optim::{Optimizer, Parameter};
use crate::storage::{HostTensor, Load, Tensor};

/// Exponential moving averages of parameters, which begin as their values.
///
/// ```
/// use kitsune::optim::{Ema, Parameter};
/// use kitsune::{Context, Device, Tensor};
///
/// # fn main() -> kitsune::Result<()> {
/// let context = Context::new(&Device::auto()?)?;
/// let weight = Parameter::new("weight", Tensor::from_slice(&context, [1], &[0f32])?)?;
/// let mut ema = Ema::new(std::slice::from_ref(&weight), 0.75)?;
/// weight.value().fill(4.0)?;
/// ema.update(None)?;
/// assert_eq!(ema.average(0).expect("a parameter").item::<f32>()?, 1.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    parameters: Vec<Parameter>,
    /// What is averaged: the values, or masters of them.
    weights: Vec<Tensor>,
    averages: Vec<Tensor>,
    minus_one: Tensor,
    /// What the kernel reads of the decay: a row of settings, and its number for each average.
    settings: Tensor,
    groups: Tensor,
    table: DeviceTable,
}

impl Ema {
    /// Averages of the values of `parameters`, all of one stream, of which each step keeps the share `decay`. For 16-bit
    /// parameters of an optimizer use [`of`](Self::of).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a decay that is not from 0 to below 1; [`Error::InvalidArgument`] for no
    /// parameters or several streams; [`Error::OutOfMemory`].
    pub fn new(parameters: &[Parameter], decay: f64) -> Result<Self> {
        let values = parameters.iter().map(|one| one.value().clone());
        Self::averaging(parameters, values.collect(), decay)
    }

    /// Averages of the parameters of `optimizer`: of their f32 master weights where it has them, else of their values.
    /// Masters that are [split](crate::optim::MasterWeights::Split) are no tensors of their own; of those the 16-bit
    /// values are averaged.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of<O: Optimizer + ?Sized>(optimizer: &O, decay: f64) -> Result<Self> {
        let parameters = optimizer.parameters();
        let weight = |(index, parameter): (usize, &Parameter)| {
            let mut state = optimizer.state(index).into_iter();
            let master = state.find(|(name, _)| *name == MASTER_WEIGHT);
            master.map_or_else(|| parameter.value().clone(), |(_, master)| master)
        };
        let weights = parameters.iter().enumerate().map(weight).collect();
        Self::averaging(parameters, weights, decay)
    }

    /// Averages of `weights`, which are the values of `parameters` or of the same shapes.
    fn averaging(parameters: &[Parameter], weights: Vec<Tensor>, decay: f64) -> Result<Self> {
        check_decay(decay)?;
        let Some(first) = parameters.first() else {
            return Err(Error::argument("Ema", "no parameters"));
        };
        let context = first.value().context();
        let _tag = memory::tag("ema");
        let average = |(parameter, weight): (&Parameter, &Tensor)| {
            let value = parameter.value();
            if value.context().stream().id() != context.stream().id() {
                let reason = format!("parameter `{}` is on another stream", parameter.name());
                return Err(Error::argument("Ema", reason));
            }
            let dtype = match value.dtype() {
                DType::F64 => DType::F64,
                _ => DType::F32,
            };
            let average = Tensor::uninit(context, value.shape(), dtype)?;
            average.copy_from(weight)?;
            Ok(average)
        };
        let averages = parameters.iter().zip(&weights).map(average);
        Ok(Self {
            decay,
            averages: averages.collect::<Result<_>>()?,
            parameters: parameters.to_vec(),
            weights,
            minus_one: Tensor::full(context, [], DType::F32, -1.0)?,
            settings: Tensor::from_slice(context, [SETTING_WORDS], &settings(decay))?,
            groups: Tensor::zeros(context, [parameters.len()], DType::U32)?,
            table: DeviceTable::new("Ema", COLUMNS),
        })
    }

    /// Enqueues one update, which leaves the averages as they are unless `found_inf`, an f32 on the device, is
    /// 0; without it they always move. The host does not wait.
    ///
    /// The flag is that of the step before: enqueue this between
    /// [`step`](../amp/struct.GradScaler.html#method.step) and
    /// [`update`](../amp/struct.GradScaler.html#method.update) of the scaler, with its
    /// [`found_inf`](../amp/struct.GradScaler.html#method.found_inf). The scaler's update clears the flag.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a flag that is not one f32 of this stream; [`Error::OutOfMemory`] in a
    /// first update.
    pub fn update(&mut self, found_inf: Option<&Tensor>) -> Result<()> {
        if let Some(flag) = found_inf {
            self.check_flag(flag)?;
        }
        let weights: Vec<_> = self.weights.iter().cloned().enumerate().collect();
        let (averages, context) = (&self.averages, self.minus_one.context());
        let table =
            self.table
                .refresh(context, averages.len(), &weights, |list, index, weight| {
                    let mut row = [None; MAX_COLUMNS];
                    row[PARAMETER] = Some(averages[index].span()?);
                    row[GRADIENT] = Some(weight.span()?);
                    list.push(index, &row[..COLUMNS])
                })?;
        let scalars = StepScalars {
            found_inf: found_inf.map(Tensor::span).transpose()?,
            inv_scale: Some(self.minus_one.span()?),
            clip: None,
        };
        let settings = GroupSettings {
            rows: self.settings.span()?,
            groups: self.groups.span()?,
        };
        sgd(context.stream(), &table, &scalars, &settings)
    }

    fn check_flag(&self, flag: &Tensor) -> Result<()> {
        let what = if flag.dtype() != DType::F32 || flag.len() != 1 {
            "is not one f32"
        } else if flag.context().stream().id() != self.minus_one.context().stream().id() {
            "is on another stream than the averages"
        } else {
            return Ok(());
        };
        Err(Error::argument(
            "Ema::update",
            format!("the flag, {flag:?}, {what}"),
        ))
    }

    /// Runs `f` while the parameters have the values of their averages, rounded to their types; then they are
    /// as before, to the bit, whatever `f` returns. Takes device memory for a copy of the parameters.
    ///
    /// Master weights of optimizers stay: do not step in `f`.
    ///
    /// # Errors
    /// Those of `f`; [`Error::OutOfMemory`]; [`Error::Driver`] if a copy cannot be enqueued.
    pub fn with_averages<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let copies = self
            .parameters
            .iter()
            .map(|parameter| parameter.value().duplicate());
        let before = Before {
            parameters: &self.parameters,
            values: copies.collect::<Result<_>>()?,
        };
        for (parameter, average) in self.parameters.iter().zip(&self.averages) {
            parameter.value().copy_from(average)?;
        }
        let result = f();
        before.put_back()?;
        result
    }

    /// Average of parameter `index`, in the order given.
    #[must_use]
    pub fn average(&self, index: usize) -> Option<&Tensor> {
        self.averages.get(index)
    }

    /// The parameters, in the order given.
    #[must_use]
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The share that a step keeps.
    #[must_use]
    pub fn decay(&self) -> f64 {
        self.decay
    }

    /// Updates enqueued from now on keep this share, and so do launches of graphs that captured one.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless it is from 0 to below 1; [`Error::Capturing`] while an update is being
    /// captured; [`Error::Driver`] if the copy cannot be enqueued. The old one stays.
    pub fn set_decay(&mut self, decay: f64) -> Result<()> {
        check_decay(decay)?;
        if decay == self.decay {
            return Ok(());
        }
        let stream = self.settings.context().stream();
        // A copy in a graph would bring this share back at every launch.
        if stream.driver().is_capturing(stream.raw())? {
            return Err(Error::Capturing { call: "set_decay" });
        }
        self.settings.copy_from_slice(&settings(decay))?;
        self.decay = decay;
        Ok(())
    }

    /// The averages as a value. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if two parameters have one name; [`Error::Driver`] if work of the stream failed.
    pub fn state_dict(&self) -> Result<EmaState> {
        Ok(EmaState {
            decay: self.decay,
            averages: save_named(self.live())?,
        })
    }

    /// Goes on from `state`. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the name of what does not fit; [`Error::Driver`] if the driver refuses.
    /// Nothing was changed.
    pub fn load_state_dict(&mut self, state: &EmaState) -> Result<()> {
        self.load(state)?.carry_out()
    }

    /// [`load_state_dict`](Self::load_state_dict), checked and ready.
    pub(crate) fn load(&mut self, state: &EmaState) -> Result<Load<'_>> {
        let decay = state.decay;
        if check_decay(decay).is_err() {
            return Err(Error::state(
                "decay",
                format!("{decay} is not from 0 to below 1"),
            ));
        }
        let mut writes = match_named(self.live(), &state.averages)?;
        let row = HostTensor::from_slice([SETTING_WORDS], &settings(decay))?;
        writes.push((self.settings.clone(), row));
        Ok(Load::writing(writes).then(move || self.decay = decay))
    }

    fn live(&self) -> Vec<Live> {
        let names = self
            .parameters
            .iter()
            .map(|parameter| parameter.name().to_owned());
        names.zip(self.averages.iter().cloned()).collect()
    }
}

/// Averages as a value, by the names of their parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmaState {
    /// The share that a step keeps.
    pub decay: f64,
    /// The averages.
    pub averages: NamedTensors,
}

/// The settings of the kernel by which an average moves.
fn settings(decay: f64) -> [f64; SETTING_WORDS] {
    let numbers = SgdNumbers {
        learning_rate: 1.0 - decay,
        momentum: 0.0,
        weight_decay: 1.0,
        nesterov: false,
    };
    bytemuck::cast(numbers.words())
}

/// Refuses a decay that no average can have.
fn check_decay(decay: f64) -> Result<()> {
    if (0.0..1.0).contains(&decay) {
        return Ok(());
    }
    let reason = format!("{decay} is not from 0 to below 1");
    Err(Error::config("decay", reason))
}

/// Values that parameters get back, at the latest when this is dropped: `f` may panic.
struct Before<'a> {
    parameters: &'a [Parameter],
    values: Vec<Tensor>,
}

impl Before<'_> {
    fn put_back(mut self) -> Result<()> {
        self.copy_back()
    }

    fn copy_back(&mut self) -> Result<()> {
        let values = std::mem::take(&mut self.values);
        let pairs = self.parameters.iter().zip(&values);
        // Each is tried: one that fails must not keep the others from their values.
        let outcomes: Vec<_> = pairs
            .map(|(parameter, value)| parameter.value().copy_from(value))
            .collect();
        outcomes.into_iter().collect()
    }
}

impl Drop for Before<'_> {
    fn drop(&mut self) {
        // A second failure beside the panic or error that is under way has nobody to tell.
        let _ = self.copy_back();
    }
}
