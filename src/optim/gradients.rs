//! The gradients of a set of parameters as one operand: check, unscale, norm, clip.
//!
//! All device memory is made at the first use and kept, so later steps allocate nothing and the addresses
//! stay.

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::chunk_table::ChunkTable;
use crate::launch::clip::{ClipOperands, clip_coefficient, multiply};
use crate::launch::gradient_check::{COUNT_WORDS, GradientStats, check, unscale};
use crate::launch::{NormKind, Span};
use crate::memory;
use crate::optim::Parameter;
use crate::optim::table::DeviceTable;
use crate::storage::{Context, Tensor};

/// One table over gradients, and what the last check found about each of them.
#[derive(Debug)]
pub(crate) struct Gradients {
    table: DeviceTable,
    memory: Option<Memory>,
}

#[derive(Debug)]
struct Memory {
    norms: Tensor,
    counts: Tensor,
    total_norm: Tensor,
    coefficient: Tensor,
}

impl Memory {
    fn new(context: &Context, tensors: usize) -> Result<Self> {
        let _tag = memory::tag("amp");
        Ok(Self {
            norms: Tensor::zeros(context, [tensors], DType::F64)?,
            counts: Tensor::zeros(context, [tensors * COUNT_WORDS], DType::U32)?,
            total_norm: Tensor::zeros(context, [], DType::F64)?,
            coefficient: Tensor::zeros(context, [], DType::F32)?,
        })
    }

    fn stats(&self) -> Result<GradientStats> {
        Ok(GradientStats {
            norms: self.norms.span()?,
            counts: self.counts.span()?,
        })
    }
}

/// What to do with a gradient while it is checked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pass<'a> {
    /// Only read it, multiplied by the inverse scale if there is one.
    Check(Option<&'a Tensor>, NormKind),
    /// Replace it by its product with the inverse scale.
    Unscale(&'a Tensor),
}

impl Gradients {
    pub(crate) fn new(op: &'static str) -> Self {
        Self {
            table: DeviceTable::new(op, 1),
            memory: None,
        }
    }

    /// Runs `pass` over the gradients of `parameters` and sets `found_inf` (f32) if one is not finite.
    /// `false` if no parameter has a gradient; then nothing was enqueued.
    pub(crate) fn pass(
        &mut self,
        parameters: &[Parameter],
        pass: Pass<'_>,
        found_inf: &Span,
    ) -> Result<bool> {
        let Some((context, table)) = self.table(parameters)? else {
            return Ok(false);
        };
        let stats = self.memory(&context, parameters.len())?.stats()?;
        let stream = context.stream();
        match pass {
            Pass::Check(inv_scale, kind) => {
                let inv_scale = inv_scale.map(Tensor::span).transpose()?;
                check(stream, &table, inv_scale.as_ref(), found_inf, &stats, kind)?;
            }
            Pass::Unscale(inv_scale) => {
                unscale(stream, &table, &inv_scale.span()?, found_inf, &stats)?;
            }
        }
        Ok(true)
    }

    /// Computes the total norm of the last pass and the coefficient that brings it to `max_norm`; sets
    /// `found_inf` if the norm is not finite. Gives (norm, coefficient), which the next call overwrites.
    pub(crate) fn coefficient(
        &mut self,
        context: &Context,
        kind: NormKind,
        max_norm: f64,
        found_inf: Option<&Span>,
    ) -> Result<(Tensor, Tensor)> {
        let memory = self.memory.as_ref().expect("a pass came before");
        let operands = ClipOperands {
            norms: memory.norms.span()?,
            total_norm: memory.total_norm.span()?,
            coefficient: memory.coefficient.span()?,
            found_inf: found_inf.copied(),
        };
        clip_coefficient(context.stream(), &operands, kind, max_norm)?;
        Ok((memory.total_norm.clone(), memory.coefficient.clone()))
    }

    /// Multiplies every gradient by `factor` in place.
    pub(crate) fn multiply(&mut self, parameters: &[Parameter], factor: &Tensor) -> Result<()> {
        match self.table(parameters)? {
            Some((context, table)) => multiply(context.stream(), &table, &factor.span()?),
            None => Ok(()),
        }
    }

    /// What the last pass counted, a tensor after the other.
    pub(crate) fn counts(&self) -> Option<&Tensor> {
        self.memory.as_ref().map(|memory| &memory.counts)
    }

    /// The last total norm.
    pub(crate) fn total_norm(&self) -> Option<&Tensor> {
        self.memory.as_ref().map(|memory| &memory.total_norm)
    }

    fn table(&mut self, parameters: &[Parameter]) -> Result<Option<(Context, ChunkTable)>> {
        let gradients = present(parameters);
        let Some((first, _)) = gradients.first() else {
            return Ok(None);
        };
        let context = parameters[*first].value().context().clone();
        let table = self.table.refresh(
            &context,
            parameters.len(),
            &gradients,
            |list, index, gradient| {
                let span = gradient.storage_span();
                list.push_strided(index, &span, gradient.shape(), gradient.strides())
            },
        )?;
        Ok(Some((context, table)))
    }

    fn memory(&mut self, context: &Context, tensors: usize) -> Result<&Memory> {
        if self
            .memory
            .as_ref()
            .is_none_or(|memory| memory.norms.len() != tensors)
        {
            self.memory = Some(Memory::new(context, tensors)?);
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
