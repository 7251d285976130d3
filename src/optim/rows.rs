//! The state that every optimizer keeps for each parameter, and the table that kernels read.
//!
//! A master is either an f32 tensor, or a tensor of u32 words that hold two lower halves each; the parameter then
//! holds the upper halves (`launch/split_master.rs`).

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::Span;
use crate::launch::chunk_table::{ChunkTable, MAX_COLUMNS};
use crate::launch::update_pass::{GRADIENT, MASTER, PARAMETER, STATE};
use crate::memory;
use crate::optim::distinct::check_names;
use crate::optim::gradients::present;
use crate::optim::masters::Master;
use crate::optim::table::DeviceTable;
use crate::optim::{OptimizerId, Parameter, weights};
use crate::storage::{Context, Tensor};

/// Where an optimizer keeps the f32 values of 16-bit parameters, so that small steps add up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MasterWeights {
    /// Nowhere: a step starts from the 16-bit values and rounds its result to 16 bits.
    Off,
    /// In an f32 tensor beside the parameter, which is its nearest 16-bit value, ties to even.
    #[default]
    F32,
    /// For bf16: in the parameter plus 16 bits beside it. Together they give the same f32 values as
    /// [`F32`](Self::F32), bit for bit, in 2 bytes less per element. The parameter is the nearest bf16 here too, but
    /// ties round away from zero. For f16 as [`F32`](Self::F32).
    Split,
}

/// The type of an optimizer's moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// The compute type: f64 for f64 parameters, otherwise f32.
    #[default]
    Full,
    /// bf16 with stochastic rounding at each step, so that small terms count on average. For f64 parameters as
    /// [`Full`](Self::Full).
    Bf16,
}

/// The name of a parameter's f32 master in its state.
pub(super) const MASTER_WEIGHT: &str = "master_weight";

/// The name of the lower halves of a parameter's master in its state.
pub(super) const MASTER_REMAINDER: &str = "master_remainder";

/// The parameters of one optimizer with their masters and state.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) id: OptimizerId,
    pub(super) parameters: Vec<Parameter>,
    columns: usize,
    masters: Vec<Option<Master>>,
    /// Zeroed when made.
    states: Vec<Vec<Tensor>>,
    /// Copies in index order of gradients that are not contiguous.
    ordered: Vec<Option<Tensor>>,
    table: DeviceTable,
}

/// The state that a parameter needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Number of state tensors.
    pub(super) states: usize,
    pub(super) moments: Moments,
    pub(super) masters: MasterWeights,
}

impl Needs {
    fn master(&self, value: &Tensor) -> Result<Option<Master>> {
        if !value.dtype().is_half() {
            return Ok(None);
        }
        let master = match self.masters {
            MasterWeights::Off => return Ok(None),
            MasterWeights::Split if value.dtype() == DType::Bf16 => {
                Tensor::zeros(value.context(), [value.len().div_ceil(2)], DType::U32)
            }
            MasterWeights::F32 | MasterWeights::Split => value.cast(DType::F32),
        };
        Ok(Some(Master::new(master?, value)))
    }

    fn states(&self, value: &Tensor) -> Result<Vec<Tensor>> {
        let dtype = match self.moments {
            _ if value.dtype() == DType::F64 => DType::F64,
            Moments::Full => DType::F32,
            Moments::Bf16 => DType::Bf16,
        };
        let zeros = |_| Tensor::zeros(value.context(), value.shape(), dtype);
        (0..self.states).map(zeros).collect()
    }
}

/// Refuses parameters that share elements, which would be moved twice. Values are contiguous, so comparing neighbors
/// by address suffices.
fn check_apart(op: &'static str, parameters: &[Parameter]) -> Result<()> {
    let place = |parameter: &Parameter| parameter.value().place();
    let mut placed: Vec<_> = parameters
        .iter()
        .map(|parameter| (place(parameter), parameter.name()))
        .filter(|(span, _)| !span.is_empty())
        .collect();
    placed.sort_unstable_by_key(|(span, _)| span.ptr());
    for pair in placed.windows(2) {
        let [(before, first), (span, second)] = pair else {
            continue;
        };
        if before.overlaps(span) {
            let reason = format!("parameters `{first}` and `{second}` share memory");
            return Err(Error::argument(op, reason));
        }
    }
    Ok(())
}

impl Rows {
    /// Allocates and zeroes all state, so that no later step allocates any. Tables have `columns` columns; `op` names
    /// the optimizer in errors.
    pub(super) fn new(
        op: &'static str,
        columns: usize,
        parameters: Vec<(Parameter, Needs)>,
    ) -> Result<Self> {
        let (parameters, needs): (Vec<Parameter>, Vec<Needs>) = parameters.into_iter().unzip();
        let Some(first) = parameters.first() else {
            return Err(Error::argument(op, "no parameters"));
        };
        check_names(op, &parameters)?;
        let stream = first.value().context().stream().id();
        let is_elsewhere =
            |parameter: &&Parameter| parameter.value().context().stream().id() != stream;
        if let Some(parameter) = parameters.iter().find(is_elsewhere) {
            let reason = format!("parameter `{}` is on another stream", parameter.name());
            return Err(Error::argument(op, reason));
        }
        check_apart(op, &parameters)?;
        let _tag = memory::tag("optimizer");
        let pairs = || parameters.iter().map(Parameter::value).zip(&needs);
        let masters = pairs().map(|(value, needs)| needs.master(value));
        let states = pairs().map(|(value, needs)| needs.states(value));
        Ok(Self {
            id: OptimizerId::counting(weights::counts(first.value().context(), parameters.len())?),
            columns,
            masters: masters.collect::<Result<_>>()?,
            states: states.collect::<Result<_>>()?,
            ordered: vec![None; parameters.len()],
            table: DeviceTable::new(op, columns),
            parameters,
        })
    }

    pub(super) fn context(&self) -> &Context {
        self.parameters[0].value().context()
    }

    /// The memory in which a step counts the weights that it makes infinite or NaN.
    pub(super) fn lost_weights(&self) -> Result<Span> {
        self.id.lost_weights().expect("made with the rows").span()
    }

    /// State tensor `which` of parameter `index`.
    pub(super) fn state(&self, index: usize, which: usize) -> Option<&Tensor> {
        self.states.get(index)?.get(which)
    }

    /// The f32 master of parameter `index`.
    pub(super) fn master(&self, index: usize) -> Option<&Tensor> {
        self.any_master(index)
            .filter(|master| master.dtype() == DType::F32)
    }

    /// The lower halves of the masters of parameter `index`.
    pub(super) fn remainder(&self, index: usize) -> Option<&Tensor> {
        self.any_master(index)
            .filter(|master| master.dtype() == DType::U32)
    }

    fn any_master(&self, index: usize) -> Option<&Tensor> {
        self.masters.get(index)?.as_ref().map(Master::tensor)
    }

    /// Master weight and state of parameter `index`; `names` are those of the state tensors. A stale master is
    /// rebuilt first, so that it is never saved.
    pub(super) fn named(
        &self,
        index: usize,
        names: &[&'static str],
    ) -> Vec<(&'static str, Tensor)> {
        if let Some((Some(master), parameter)) =
            self.masters.get(index).zip(self.parameters.get(index))
        {
            // If this fails, reading the tensors fails as well; the next step retries it.
            let _ = master.reload_if_stale(parameter.value());
        }
        let master = self.master(index).map(|master| (MASTER_WEIGHT, master));
        let remainder = self.remainder(index);
        let remainder = remainder.map(|master| (MASTER_REMAINDER, master));
        let states = self.states.get(index).into_iter().flatten();
        let states = names.iter().copied().zip(states);
        let tensors = master.into_iter().chain(remainder).chain(states);
        tensors
            .map(|(name, tensor)| (name, tensor.clone()))
            .collect()
    }

    /// Copies the parameters into the master weights after other code wrote the parameters.
    pub(super) fn reload_masters(&self) -> Result<()> {
        let pairs = self.masters.iter().zip(&self.parameters);
        pairs
            .filter_map(|(master, parameter)| Some((master.as_ref()?, parameter)))
            .try_for_each(|(master, parameter)| master.reload(parameter.value()))
    }

    /// The table of all parameters that have a gradient now, for a kernel that writes those parameters. Rebuilds the
    /// masters of parameters that other code wrote.
    pub(super) fn table(&mut self) -> Result<ChunkTable> {
        let mut gradients = present(&self.parameters);
        for (index, _) in &gradients {
            if let Some(master) = &self.masters[*index] {
                master.refresh(self.parameters[*index].value())?;
            }
        }
        for (index, gradient) in &mut gradients {
            if !gradient.is_contiguous() {
                *gradient = in_order(&mut self.ordered[*index], gradient)?;
            }
        }
        let Self {
            parameters,
            masters,
            states,
            columns,
            table,
            ..
        } = self;
        let context = parameters[0].value().context();
        let table = table.refresh(
            context,
            parameters.len(),
            &gradients,
            |list, index, gradient| {
                let mut row = [None; MAX_COLUMNS];
                row[PARAMETER] = Some(parameters[index].value().span()?);
                row[GRADIENT] = Some(gradient.span()?);
                let master = masters[index].as_ref().map(Master::tensor);
                let master = master.map(Tensor::span).transpose()?;
                row[MASTER] = master.map(|master| match master.dtype() {
                    DType::U32 => master.halves(gradient.len()),
                    _ => master,
                });
                for (place, state) in row[STATE..].iter_mut().zip(&states[index]) {
                    *place = Some(state.span()?);
                }
                list.push(index, &row[..*columns])
            },
        )?;
        for (index, _) in &gradients {
            let value = parameters[*index].value();
            value.mark_written();
            if let Some(master) = &masters[*index] {
                master.agrees_with(value);
            }
        }
        Ok(table)
    }
}

/// Copies `gradient` to `place` in index order. The memory is kept from step to step.
fn in_order(place: &mut Option<Tensor>, gradient: &Tensor) -> Result<Tensor> {
    if let Some(copy) = place
        .as_ref()
        .filter(|copy| copy.dtype() == gradient.dtype())
    {
        copy.copy_from(gradient)?;
        return Ok(copy.clone());
    }
    let copy = gradient.contiguous()?;
    *place = Some(copy.clone());
    Ok(copy)
}
