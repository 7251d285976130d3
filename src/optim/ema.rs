//! Averages of weights over a run, which often predict better than the final weights.
//!
//! ```text
//! average = average + (1 − decay) · (weight − average)        after each applied step
//! ```
//!
//! The flag that decides the step also decides, on the device, whether averages move: an average keeps its bits
//! exactly when its weight did.
//!
//! Averages are f32 (f64 for f64 weights), because with a decay near 1 the increments are too small for 16 bits. For
//! the same reason the average of a 16-bit weight should follow its f32 master, as [`Ema::of`] does, split or not:
//! steps too small to change the 16-bit weight would not change its average either.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::ema::{AVERAGE, COLUMNS, REMAINDER, WEIGHT, ema};
use crate::memory;
use crate::optim::distinct::check_names;
use crate::optim::rows::{MASTER_REMAINDER, MASTER_WEIGHT};
use crate::optim::state::{Live, NamedTensors, match_named, save_named};
use crate::optim::table::DeviceTable;
use crate::optim::{Optimizer, Parameter};
use crate::storage::{HostTensor, Load, Tensor};

/// Exponential moving averages of parameters, starting from their current values.
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
    weights: Vec<Weight>,
    averages: Vec<Tensor>,
    /// 1 − decay, an f64.
    share: Tensor,
    table: DeviceTable,
}

/// The averaged tensor: a parameter's value or its master.
#[derive(Debug)]
struct Weight {
    /// The value or master; for split masters the upper halves.
    tensor: Tensor,
    /// The lower halves of split masters.
    remainder: Option<Tensor>,
}

impl Weight {
    fn value_of(parameter: &Parameter) -> Self {
        Self {
            tensor: parameter.value().clone(),
            remainder: None,
        }
    }

    /// The master of `parameter` in `state`, if it has one, else its value.
    fn master_of(parameter: &Parameter, state: Vec<(&'static str, Tensor)>) -> Result<Self> {
        let mut weight = Self::value_of(parameter);
        for (name, tensor) in state {
            match name {
                MASTER_WEIGHT => weight.tensor = tensor,
                MASTER_REMAINDER => weight.remainder = Some(tensor),
                _ => {}
            }
        }
        let Self { tensor, remainder } = &weight;
        let value = parameter.value();
        let fits = tensor.shape() == value.shape()
            && tensor.dtype().is_computed()
            && remainder.as_ref().is_none_or(|low| {
                let words = value.len().div_ceil(2);
                tensor.dtype() == DType::Bf16 && low.dtype() == DType::U32 && low.len() == words
            });
        if fits {
            return Ok(weight);
        }
        let reason = format!(
            "the master of parameter `{}` does not fit it",
            parameter.name()
        );
        Err(Error::argument("Ema", reason))
    }
}

impl Ema {
    /// Averages of the values of `parameters`, all on one stream. Each step keeps the share `decay`. For 16-bit
    /// parameters of an optimizer use [`of`](Self::of).
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a decay that is not from 0 to below 1; [`Error::InvalidArgument`] for no
    /// parameters, two of one name, several streams, or parameters that share memory; [`Error::OutOfMemory`].
    pub fn new(parameters: &[Parameter], decay: f64) -> Result<Self> {
        let values = parameters.iter().map(Weight::value_of);
        Self::averaging(parameters, values.collect(), decay)
    }

    /// Averages of the parameters of `optimizer`: of their f32 master weights where it has them,
    /// [split](crate::optim::MasterWeights::Split) or not, otherwise of their values.
    ///
    /// # Errors
    /// As [`new`](Self::new); [`Error::InvalidArgument`] for a custom optimizer whose masters do not fit its
    /// parameters.
    pub fn of<O: Optimizer + ?Sized>(optimizer: &O, decay: f64) -> Result<Self> {
        let parameters = optimizer.parameters();
        let weights = parameters
            .iter()
            .enumerate()
            .map(|(index, parameter)| Weight::master_of(parameter, optimizer.state(index)));
        Self::averaging(parameters, weights.collect::<Result<_>>()?, decay)
    }

    /// Averages of `weights`, which belong to `parameters`.
    fn averaging(parameters: &[Parameter], weights: Vec<Weight>, decay: f64) -> Result<Self> {
        check_decay(decay)?;
        let Some(first) = parameters.first() else {
            return Err(Error::argument("Ema", "no parameters"));
        };
        check_names("Ema", parameters)?;
        let context = first.value().context();
        let _tag = memory::tag("ema");
        let average = |(parameter, weight): (&Parameter, &Weight)| {
            let value = parameter.value();
            if value.context().stream().id() != context.stream().id() {
                let reason = format!("parameter `{}` is on another stream", parameter.name());
                return Err(Error::argument("Ema", reason));
            }
            // The kernel expects f64 averages exactly for f64 weights.
            let dtype = match weight.tensor.dtype() {
                DType::F64 => DType::F64,
                _ => DType::F32,
            };
            // From −0, an update with share 1 gives exactly the weight: −0 − (−0 − w) is w, for both zeros too.
            Tensor::full(context, value.shape(), dtype, -0.0)
        };
        let averages = parameters.iter().zip(&weights).map(average);
        let mut ema = Self {
            decay,
            averages: averages.collect::<Result<_>>()?,
            parameters: parameters.to_vec(),
            weights,
            share: Tensor::full(context, [1], DType::F64, 1.0)?,
            table: DeviceTable::new("Ema", COLUMNS),
        };
        ema.update(None)?;
        ema.share.fill(1.0 - decay)?;
        Ok(ema)
    }

    /// Enqueues one update. It changes the averages only if `found_inf`, an f32 on the device, is 0; without a flag
    /// they always move. The host does not wait.
    ///
    /// The flag is that of the preceding step: call this between [`step`](../amp/struct.GradScaler.html#method.step)
    /// and [`update`](../amp/struct.GradScaler.html#method.update) of the scaler, with its
    /// [`found_inf`](../amp/struct.GradScaler.html#method.found_inf). The scaler's update clears the flag.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a flag that is not one f32 on this stream; [`Error::Driver`] if the update
    /// cannot be enqueued.
    pub fn update(&mut self, found_inf: Option<&Tensor>) -> Result<()> {
        if let Some(flag) = found_inf {
            self.check_flag(flag)?;
        }
        let tensors = self.weights.iter().map(|weight| weight.tensor.clone());
        let tensors: Vec<_> = tensors.enumerate().collect();
        let (averages, weights) = (&self.averages, &self.weights);
        let context = self.share.context();
        let table =
            self.table
                .refresh(context, averages.len(), &tensors, |list, index, tensor| {
                    let mut row = [None; COLUMNS];
                    row[AVERAGE] = Some(averages[index].span()?);
                    row[WEIGHT] = Some(tensor.span()?);
                    if let Some(remainder) = &weights[index].remainder {
                        row[REMAINDER] = Some(remainder.span()?.halves(tensor.len()));
                    }
                    list.push(index, &row)
                })?;
        let found_inf = found_inf.map(Tensor::span).transpose()?;
        ema(
            context.stream(),
            &table,
            &self.share.span()?,
            found_inf.as_ref(),
        )
    }

    fn check_flag(&self, flag: &Tensor) -> Result<()> {
        let what = if flag.dtype() != DType::F32 || flag.len() != 1 {
            "is not one f32"
        } else if flag.context().stream().id() != self.share.context().stream().id() {
            "is on another stream than the averages"
        } else {
            return Ok(());
        };
        Err(Error::argument(
            "Ema::update",
            format!("the flag, {flag:?}, {what}"),
        ))
    }

    /// Runs `f` with the parameters set to their averages, rounded to their types. Afterwards the parameters have
    /// their old bits again, whatever `f` returns. Takes device memory for a copy of the parameters.
    ///
    /// Master weights of optimizers are not replaced, so do not step in `f`.
    ///
    /// # Errors
    /// Those of `f`; [`Error::OutOfMemory`]; [`Error::Driver`] if a copy cannot be enqueued.
    pub fn with_averages<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<R> {
        let copies = self
            .parameters
            .iter()
            .map(|parameter| parameter.value().duplicate());
        let mut before = Before {
            parameters: &self.parameters,
            values: copies.collect::<Result<_>>()?,
            versions: versions(&self.parameters),
            averaged: Vec::new(),
        };
        for (parameter, average) in self.parameters.iter().zip(&self.averages) {
            parameter.value().copy_from(average)?;
        }
        before.averaged = versions(&self.parameters);
        let result = f();
        before.put_back()?;
        result
    }

    /// The average of parameter `index`.
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

    /// Sets the share that updates enqueued from now on keep. Launches of graphs that captured an update use it too.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless it is from 0 to below 1; [`Error::Capturing`] during a capture;
    /// [`Error::Driver`] if the write cannot be enqueued. The old share stays.
    pub fn set_decay(&mut self, decay: f64) -> Result<()> {
        check_decay(decay)?;
        if decay == self.decay {
            return Ok(());
        }
        let stream = self.share.context().stream();
        // A captured write would restore this share at every launch of the graph.
        if stream.driver().is_capturing(stream.raw())? {
            return Err(Error::Capturing { call: "set_decay" });
        }
        self.share.fill(1.0 - decay)?;
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

    /// Resumes from `state`. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the name of the part that does not fit; [`Error::Driver`] if the driver refuses.
    /// Nothing was changed.
    pub fn load_state_dict(&mut self, state: &EmaState) -> Result<()> {
        self.load(state, false)?.carry_out()
    }

    /// [`load_state_dict`](Self::load_state_dict), checked but not carried out yet; `keeps_decay` leaves the decay
    /// unchanged.
    pub(crate) fn load(&mut self, state: &EmaState, keeps_decay: bool) -> Result<Load<'_>> {
        let decay = if keeps_decay { self.decay } else { state.decay };
        if check_decay(decay).is_err() {
            return Err(Error::state(
                "decay",
                format!("{decay} is not from 0 to below 1"),
            ));
        }
        let mut writes = match_named(self.live(), &state.averages)?;
        let share = HostTensor::from_slice([1], &[1.0 - decay])?;
        writes.push((self.share.clone(), share));
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

/// Refuses a decay that is not from 0 to below 1.
fn check_decay(decay: f64) -> Result<()> {
    if (0.0..1.0).contains(&decay) {
        return Ok(());
    }
    let reason = format!("{decay} is not from 0 to below 1");
    Err(Error::config("decay", reason))
}

/// The parameters' own values, restored at the latest on drop, because `f` may panic.
struct Before<'a> {
    parameters: &'a [Parameter],
    values: Vec<Tensor>,
    /// The versions of the parameters before, and after the averages were written.
    versions: Vec<Option<u64>>,
    averaged: Vec<Option<u64>>,
}

fn versions(parameters: &[Parameter]) -> Vec<Option<u64>> {
    let versions = parameters
        .iter()
        .map(|parameter| parameter.value().version());
    versions.collect()
}

impl Before<'_> {
    fn put_back(mut self) -> Result<()> {
        self.copy_back()
    }

    fn copy_back(&mut self) -> Result<()> {
        let values = std::mem::take(&mut self.values);
        let inside = versions(self.parameters);
        let pairs = self.parameters.iter().zip(&values);
        // Every copy is tried, so that one failure does not leave the other parameters unrestored.
        let outcomes: Vec<_> = pairs
            .map(|(parameter, value)| parameter.value().copy_from(value))
            .collect();
        // If nothing else wrote a parameter, its value is what it was, so its old version and everything derived from
        // it are valid again.
        let places = outcomes.iter().enumerate().filter(|(_, one)| one.is_ok());
        for (place, _) in places {
            let is_alone = self.averaged.get(place) == Some(&inside[place]);
            if let (Some(version), true) = (self.versions.get(place).copied().flatten(), is_alone) {
                self.parameters[place].value().set_version(version);
            }
        }
        outcomes.into_iter().collect()
    }
}

impl Drop for Before<'_> {
    fn drop(&mut self) {
        // There is no way to report a failure during a panic or another error.
        let _ = self.copy_back();
    }
}
