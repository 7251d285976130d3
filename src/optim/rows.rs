//! What every optimizer keeps for each parameter, and the table of it.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::chunk_table::{ChunkTable, MAX_COLUMNS};
use crate::launch::update_pass::{GRADIENT, MASTER, PARAMETER, STATE};
use crate::memory;
use crate::optim::gradients::present;
use crate::optim::table::DeviceTable;
use crate::optim::{OptimizerId, Parameter};
use crate::storage::{Context, Tensor};

/// The parameters of one optimizer with their master weights and state.
#[derive(Debug)]
pub(super) struct Rows {
    pub(super) id: OptimizerId,
    pub(super) parameters: Vec<Parameter>,
    columns: usize,
    masters: Vec<Option<Tensor>>,
    /// Zeroed when made, in the type of the computation: f64 for f64 parameters, else f32.
    states: Vec<Vec<Tensor>>,
    /// Copies, in the parameter's order, of gradients that have another.
    ordered: Vec<Option<Tensor>>,
    table: DeviceTable,
}

/// How many state tensors a parameter has, and whether 16-bit ones have master weights.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    pub(super) op: &'static str,
    pub(super) columns: usize,
    pub(super) states: usize,
    pub(super) master_weights: bool,
}

impl Rows {
    /// Makes and zeroes all state, so that no later step allocates any.
    pub(super) fn new(parameters: Vec<Parameter>, needs: Needs) -> Result<Self> {
        let op = needs.op;
        let Some(first) = parameters.first() else {
            return Err(Error::argument(op, "no parameters"));
        };
        let stream = first.value().context().stream().id();
        for (index, parameter) in parameters.iter().enumerate() {
            let name = parameter.name();
            if parameters[..index]
                .iter()
                .any(|other| other.is_same(parameter))
            {
                return Err(Error::argument(
                    op,
                    format!("parameter `{name}` is given twice"),
                ));
            }
            if parameter.value().context().stream().id() != stream {
                return Err(Error::argument(
                    op,
                    format!("parameter `{name}` is on another stream"),
                ));
            }
        }
        let _tag = memory::tag("optimizer");
        let master = |parameter: &Parameter| {
            let wanted = needs.master_weights && parameter.value().dtype().is_half();
            wanted
                .then(|| parameter.value().cast(DType::F32))
                .transpose()
        };
        let state = |parameter: &Parameter| {
            let value = parameter.value();
            let dtype = if value.dtype() == DType::F64 {
                DType::F64
            } else {
                DType::F32
            };
            let zeros = |_| Tensor::zeros(value.context(), value.shape(), dtype);
            (0..needs.states).map(zeros).collect()
        };
        Ok(Self {
            id: OptimizerId::new(),
            columns: needs.columns,
            masters: parameters.iter().map(master).collect::<Result<_>>()?,
            states: parameters.iter().map(state).collect::<Result<_>>()?,
            ordered: vec![None; parameters.len()],
            table: DeviceTable::new(op, needs.columns),
            parameters,
        })
    }

    pub(super) fn context(&self) -> &Context {
        self.parameters[0].value().context()
    }

    /// State tensor `which` of parameter `index`.
    pub(super) fn state(&self, index: usize, which: usize) -> Option<&Tensor> {
        self.states.get(index)?.get(which)
    }

    pub(super) fn master(&self, index: usize) -> Option<&Tensor> {
        self.masters.get(index)?.as_ref()
    }

    /// Master weight and state of parameter `index`; `names` are those of the state tensors.
    pub(super) fn named(
        &self,
        index: usize,
        names: &[&'static str],
    ) -> Vec<(&'static str, Tensor)> {
        let master = self.master(index).map(|master| ("master_weight", master));
        let states = self.states.get(index).into_iter().flatten();
        let states = names.iter().copied().zip(states);
        let tensors = master.into_iter().chain(states);
        tensors
            .map(|(name, tensor)| (name, tensor.clone()))
            .collect()
    }

    /// Makes the master weights equal to the parameters again, after those were written by someone else.
    pub(super) fn reload_masters(&self) -> Result<()> {
        let pairs = self.masters.iter().zip(&self.parameters);
        pairs
            .filter_map(|(master, parameter)| Some((master.as_ref()?, parameter)))
            .try_for_each(|(master, parameter)| master.copy_from(parameter.value()))
    }

    /// The table of all parameters that have a gradient now, for a kernel that writes those parameters.
    pub(super) fn table(&mut self) -> Result<ChunkTable> {
        let mut gradients = present(&self.parameters);
        for (index, _) in &gradients {
            self.parameters[*index].value().mark_written();
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
        table.refresh(
            context,
            parameters.len(),
            &gradients,
            |list, index, gradient| {
                let mut row = [None; MAX_COLUMNS];
                row[PARAMETER] = Some(parameters[index].value().span()?);
                row[GRADIENT] = Some(gradient.span()?);
                row[MASTER] = masters[index].as_ref().map(Tensor::span).transpose()?;
                for (place, state) in row[STATE..].iter_mut().zip(&states[index]) {
                    *place = Some(state.span()?);
                }
                list.push(index, &row[..*columns])
            },
        )
    }
}

/// `gradient` copied to `place` in index order; the memory is kept from step to step.
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
