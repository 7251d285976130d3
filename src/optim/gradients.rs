//! Treats the gradients of a set of parameters as one operand: check, unscale, norm, clip.
//!
//! All device memory is allocated at the first use and kept, so later steps allocate nothing and addresses do not
//! change.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::ChunkTable;
use crate::launch::clip::{ClipOperands, clip_coefficient, multiply};
use crate::launch::gradient_check::{COUNT_WORDS, GradientStats, check, unscale};
use crate::launch::gradient_produce::gather;
use crate::launch::{NormKind, Span};
use crate::memory;
use crate::optim::Parameter;
use crate::optim::produced::CheckAtOnce;
use crate::optim::table::DeviceTable;
use crate::storage::{Context, Meter, Metered, Tensor};

/// A table of gradients, and the results of the last check of each.
#[derive(Debug)]
pub(crate) struct Gradients {
    table: DeviceTable,
    /// The table of results of gradients that were checked where they were made.
    produced: DeviceTable,
    memory: Option<Memory>,
    meter: Arc<Meter>,
    is_half_done: bool,
}

#[derive(Debug)]
struct Memory {
    norms: Metered,
    counts: Metered,
    total_norm: Tensor,
    /// f32, and f64 in case a gradient is f64.
    coefficients: [Tensor; 2],
    /// f32: the factor that is applied before the coefficient.
    first: Tensor,
    /// The memory that the last three are views of.
    _scalars: [Metered; 2],
}

/// The factors that clip gradients: first `first`, an f32, then `coefficient`, an f32 or, if a gradient is f64, an
/// f64.
#[derive(Clone, Debug)]
pub(crate) struct Clip {
    pub(crate) total_norm: Tensor,
    pub(crate) first: Tensor,
    pub(crate) coefficient: Tensor,
}

impl Memory {
    fn new(context: &Context, tensors: usize, meter: &Arc<Meter>) -> Result<Self> {
        let _tag = memory::tag("amp");
        let metered = |tensor| Metered::new(tensor, meter);
        let wide = metered(Tensor::zeros(context, [2], DType::F64)?);
        let narrow = metered(Tensor::zeros(context, [2], DType::F32)?);
        let one = |of: &Tensor, index| of.narrow(0, index, 1)?.reshape([]);
        Ok(Self {
            norms: metered(Tensor::zeros(context, [tensors], DType::F64)?),
            counts: metered(Tensor::zeros(context, [tensors * COUNT_WORDS], DType::U32)?),
            total_norm: one(&wide, 0)?,
            coefficients: [one(&narrow, 0)?, one(&wide, 1)?],
            first: one(&narrow, 1)?,
            _scalars: [wide, narrow],
        })
    }

    fn stats(&self) -> Result<GradientStats> {
        Ok(GradientStats {
            norms: self.norms.span()?,
            counts: self.counts.span()?,
        })
    }
}

/// What a pass over the gradients does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pass<'a> {
    /// Checks each gradient, multiplied by the inverse scale if there is one, without writing it.
    Check(Option<&'a Tensor>, NormKind),
    /// As [`Check`](Self::Check) for the L2 norm, but skips gradients that were already checked in this way where
    /// they were made.
    CheckUnlessProduced(CheckAtOnce<'a>),
    /// Checks each gradient and replaces it by its product with the inverse scale.
    Unscale(&'a Tensor),
}

impl Gradients {
    /// No gradients yet. `op` names the caller in errors; `meter` counts the device memory.
    pub(crate) fn new(op: &'static str, meter: Arc<Meter>) -> Self {
        Self {
            table: DeviceTable::metered(op, 1, meter.clone()),
            produced: DeviceTable::metered(op, 1, meter.clone()),
            memory: None,
            meter,
            is_half_done: false,
        }
    }

    /// Runs `pass` over the gradients of `parameters` and sets `found_inf` (f32) if one is not finite. Returns
    /// `false` if no parameter has a gradient; nothing was enqueued then. Nothing was enqueued after an error either,
    /// unless [`is_half_done`](Self::is_half_done).
    pub(crate) fn pass(
        &mut self,
        parameters: &[Parameter],
        pass: Pass<'_>,
        found_inf: &Span,
    ) -> Result<bool> {
        let mut gradients = present(parameters);
        let Some((first, _)) = gradients.first() else {
            return Ok(false);
        };
        let context = parameters[*first].value().context().clone();
        let stats = self.memory(&context, parameters.len())?.stats()?;
        let stream = context.stream();
        let tensors = parameters.len();
        self.is_half_done = false;
        match pass {
            Pass::Check(inv_scale, kind) => {
                let inv_scale = inv_scale.map(Tensor::span).transpose()?;
                let table = self.table(&context, tensors, &gradients)?;
                check(stream, &table, inv_scale.as_ref(), found_inf, &stats, kind)?;
            }
            Pass::CheckUnlessProduced(at_once) => {
                let partials = |(index, _): &(usize, Tensor)| {
                    Some((*index, parameters[*index].produced(at_once.by)?))
                };
                let partials: Vec<_> = gradients.iter().filter_map(partials).collect();
                let place = |index: usize| partials.binary_search_by_key(&index, |(at, _)| *at);
                gradients.retain(|(index, _)| place(*index).is_err());
                // Both tables are built before either launch, so that a failure to build one enqueues nothing.
                let rest = match gradients.is_empty() {
                    true => None,
                    false => Some(self.table(&context, tensors, &gradients)?),
                };
                let produced = match partials.is_empty() {
                    true => None,
                    false => Some(self.produced_table(&context, tensors, &partials)?),
                };
                if let Some(rest) = &rest {
                    let inv_scale = at_once.inv_scale.span()?;
                    check(
                        stream,
                        rest,
                        Some(&inv_scale),
                        found_inf,
                        &stats,
                        NormKind::L2,
                    )?;
                }
                if let Some(produced) = &produced {
                    self.is_half_done = rest.is_some();
                    gather(stream, produced, found_inf, &stats, rest.is_some())?;
                    self.is_half_done = false;
                }
            }
            Pass::Unscale(inv_scale) => {
                let table = self.table(&context, tensors, &gradients)?;
                gradients
                    .iter()
                    .for_each(|(_, gradient)| gradient.mark_written());
                unscale(stream, &table, &inv_scale.span()?, found_inf, &stats)?;
            }
        }
        Ok(true)
    }

    /// Computes the total norm from the last pass over the gradients of `parameters`, and the factors that clip it to
    /// `max_norm`. With `inv_scale`, the gradients are still multiplied by its inverse. Sets `found_inf` if the norm
    /// is not finite. The next call overwrites the result of this one.
    pub(crate) fn clip(
        &mut self,
        parameters: &[Parameter],
        inv_scale: Option<&Tensor>,
        (max_norm, kind): (f64, NormKind),
        found_inf: Option<&Span>,
    ) -> Result<Clip> {
        let memory = self.memory.as_ref().expect("a pass came before");
        let gradients = parameters.iter().filter_map(Parameter::grad);
        let is_wide = gradients
            .map(|one| one.dtype())
            .any(|dtype| dtype == DType::F64);
        let coefficient = &memory.coefficients[usize::from(is_wide)];
        let operands = ClipOperands {
            norms: memory.norms.span()?,
            total_norm: memory.total_norm.span()?,
            coefficient: coefficient.span()?,
            first: memory.first.span()?,
            inv_scale: inv_scale.map(Tensor::span).transpose()?,
            found_inf: found_inf.copied(),
        };
        let stream = memory.norms.context().stream();
        clip_coefficient(stream, &operands, kind, max_norm)?;
        Ok(Clip {
            total_norm: memory.total_norm.clone(),
            first: memory.first.clone(),
            coefficient: coefficient.clone(),
        })
    }

    /// Multiplies every gradient by the factors of `clip` in place.
    pub(crate) fn multiply(&mut self, parameters: &[Parameter], clip: &Clip) -> Result<()> {
        let gradients = present(parameters);
        let Some((first, _)) = gradients.first() else {
            return Ok(());
        };
        let context = parameters[*first].value().context();
        let table = self.table(context, parameters.len(), &gradients)?;
        gradients
            .iter()
            .for_each(|(_, gradient)| gradient.mark_written());
        let factors = [clip.first.span()?, clip.coefficient.span()?];
        multiply(context.stream(), &table, factors.each_ref())
    }

    /// Whether the last pass failed after checking some of the gradients, so that `found_inf` may be set.
    pub(crate) fn is_half_done(&self) -> bool {
        self.is_half_done
    }

    /// The counts of the last pass, tensor by tensor.
    pub(crate) fn counts(&self) -> Option<&Tensor> {
        self.memory.as_ref().map(|memory| &*memory.counts)
    }

    /// The last total norm.
    pub(crate) fn total_norm(&self) -> Option<&Tensor> {
        self.memory.as_ref().map(|memory| &memory.total_norm)
    }

    /// The table of `gradients`, whose indices are below `tensors`.
    fn table(
        &mut self,
        context: &Context,
        tensors: usize,
        gradients: &[(usize, Tensor)],
    ) -> Result<ChunkTable> {
        self.table
            .refresh(context, tensors, gradients, |list, index, gradient| {
                let span = gradient.storage_span();
                list.push_strided(index, &span, gradient.shape(), gradient.strides())
            })
    }

    /// The table of `partials`.
    fn produced_table(
        &mut self,
        context: &Context,
        tensors: usize,
        partials: &[(usize, Tensor)],
    ) -> Result<ChunkTable> {
        self.produced
            .refresh(context, tensors, partials, |list, index, partials| {
                list.push(index, &[Some(partials.span()?)])
            })
    }

    fn memory(&mut self, context: &Context, tensors: usize) -> Result<&Memory> {
        if self
            .memory
            .as_ref()
            .is_none_or(|memory| memory.norms.len() != tensors)
        {
            self.memory = Some(Memory::new(context, tensors, &self.meter)?);
        }
        Ok(self.memory.as_ref().expect("made above"))
    }
}

/// The gradients that exist, with the index of their parameter.
pub(super) fn present(parameters: &[Parameter]) -> Vec<(usize, Tensor)> {
    let grads = parameters.iter().map(Parameter::grad).enumerate();
    grads
        .filter_map(|(index, grad)| Some((index, grad?)))
        .collect()
}
