//! The state that a scaler keeps for one optimizer.

use std::sync::Arc;

use crate::amp::memory::ScaleMemory;
use crate::error::{Error, Result, ScalerMisuse};
use crate::launch::NormKind;
use crate::launch::journal::{CHECK_TIME, CLIP_TIME, RecordOperands, STEP_TIME, record_step};
use crate::optim::{
    CheckAtOnce, Clip, Gradients, Optimizer, OptimizerId, OptimizerLife, Parameter, Pass,
    StepInputs, UnscaleMark,
};
use crate::storage::Tensor;

/// The stage of an optimizer between two updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Its gradients were not touched yet.
    Ready,
    /// Gradients were checked, and are still scaled; the step unscales and clips as it reads them.
    Checked,
    /// Gradients were divided by the scale in place.
    Unscaled,
    /// The step was enqueued.
    Stepped,
}

/// An optimizer's flag, gradient table and stage.
#[derive(Debug)]
pub(super) struct Slot {
    optimizer: OptimizerLife,
    number: u64,
    /// The moment the scaler's state was last loaded, 0 if never. Gradients with a term from before it belong to an
    /// abandoned iteration.
    restored: u64,
    /// The number under which the journal knows the optimizer; a new one whenever its parameters change.
    recorded_as: Option<u64>,
    /// The names the journal holds under that number.
    names: Arc<[String]>,
    stage: Stage,
    found_inf: Tensor,
    gradients: Gradients,
    /// The gradients of the last pass: for each parameter the moment of its gradient's last term, `None` without a
    /// gradient.
    seen: Vec<Option<u64>>,
    /// Whether the norm was computed since the last update.
    norm_taken: bool,
    clip: Option<Clip>,
}

impl Slot {
    pub(super) fn new(
        id: &OptimizerId,
        memory: &ScaleMemory,
        found_inf: Tensor,
        restored: u64,
    ) -> Self {
        Self {
            optimizer: id.life(),
            number: id.number(),
            restored,
            recorded_as: None,
            names: Arc::default(),
            stage: Stage::Ready,
            found_inf,
            gradients: Gradients::new("gradients", memory.meter.clone()),
            seen: Vec::new(),
            norm_taken: false,
            clip: None,
        }
    }

    pub(super) fn is_for(&self, id: &OptimizerId) -> bool {
        self.number == id.number()
    }

    /// Whether another optimizer may reuse the slot: its own was dropped, and its flag is not waiting for an update.
    pub(super) fn is_free(&self) -> bool {
        self.optimizer.is_over() && self.stage == Stage::Ready
    }

    /// The number under which the journal knows the optimizer.
    pub(super) fn recorded_as(&self) -> Option<u64> {
        self.recorded_as
    }

    pub(super) fn stage(&self) -> Stage {
        self.stage
    }

    pub(super) fn found_inf(&self) -> &Tensor {
        &self.found_inf
    }

    /// Begins the next iteration.
    pub(super) fn reset(&mut self) {
        self.stage = Stage::Ready;
        self.norm_taken = false;
        self.clip = None;
    }

    /// Abandons the iteration in progress, because the scaler's state was loaded at the moment `restored`.
    pub(super) fn abandon(&mut self, restored: u64) {
        self.reset();
        self.restored = restored;
    }

    /// Divides the gradients by the scale in place, and checks them.
    pub(super) fn unscale(
        &mut self,
        memory: &ScaleMemory,
        parameters: &[Parameter],
        mark: UnscaleMark,
    ) -> Result<()> {
        match self.stage {
            Stage::Ready => {}
            Stage::Checked | Stage::Unscaled => return Err(ScalerMisuse::AlreadyUnscaled.into()),
            Stage::Stepped => return Err(ScalerMisuse::UnscaleAfterStep.into()),
        }
        self.pass(
            "unscale",
            memory,
            parameters,
            mark,
            Pass::Unscale(&memory.inv_scale),
        )?;
        let with_grad = parameters
            .iter()
            .filter(|parameter| parameter.grad().is_some());
        with_grad.for_each(|parameter| parameter.mark_unscaled(mark));
        self.stage = Stage::Unscaled;
        Ok(())
    }

    /// Checks the gradients, which stay scaled.
    pub(super) fn check(
        &mut self,
        op: &'static str,
        memory: &ScaleMemory,
        parameters: &[Parameter],
        mark: UnscaleMark,
    ) -> Result<()> {
        match self.stage {
            Stage::Ready => {}
            Stage::Checked | Stage::Unscaled => return Err(ScalerMisuse::AlreadyUnscaled.into()),
            Stage::Stepped => return Err(ScalerMisuse::UnscaleAfterStep.into()),
        }
        let pass = still_scaled(memory, mark, NormKind::L2);
        self.pass(op, memory, parameters, mark, pass)?;
        // If the step fails, the flag still counts in the next update, which clears it.
        self.stage = Stage::Checked;
        Ok(())
    }

    /// Computes the norm and clips: in place if gradients are unscaled, otherwise within the step.
    pub(super) fn clip(
        &mut self,
        memory: &ScaleMemory,
        parameters: &[Parameter],
        mark: UnscaleMark,
        (max_norm, kind): (f64, NormKind),
    ) -> Result<Tensor> {
        let op = "clip_grad_norm";
        let in_place = match self.stage {
            Stage::Ready | Stage::Checked => false,
            Stage::Unscaled => true,
            Stage::Stepped => return Err(ScalerMisuse::UnscaleAfterStep.into()),
        };
        if max_norm.is_nan() || max_norm < 0.0 {
            return Err(Error::argument(
                op,
                format!("max_norm is {max_norm}, not zero or more"),
            ));
        }
        let pass = if in_place {
            self.check_unchanged(op, parameters)?;
            Pass::Check(None, kind)
        } else {
            still_scaled(memory, mark, kind)
        };
        self.pass(op, memory, parameters, mark, pass)?;
        if !in_place {
            // If the rest fails, the flag still counts in the next update, which clears it.
            self.stage = Stage::Checked;
        }
        let flag = self.found_inf.span()?;
        let gradients = &mut self.gradients;
        let inv_scale = (!in_place).then_some(&*memory.inv_scale);
        let (norm, clip) = memory.timed(CLIP_TIME, || {
            let clip = gradients.clip(parameters, inv_scale, (max_norm, kind), Some(&flag))?;
            // The slot's own norm is overwritten in the next iteration, so the caller gets a copy. Copied before
            // clipping, because an error must leave the gradients unclipped.
            let norm = clip.total_norm.duplicate()?;
            if in_place {
                gradients.multiply(parameters, &clip)?;
            }
            Ok((norm, clip))
        })?;
        self.norm_taken = true;
        if !in_place {
            self.clip = Some(clip);
        }
        Ok(norm)
    }

    /// Checks the gradients if that was not done yet, and steps. After an error nothing was stepped.
    pub(super) fn step<O: Optimizer + ?Sized>(
        &mut self,
        memory: &ScaleMemory,
        optimizer: &mut O,
        mark: UnscaleMark,
    ) -> Result<()> {
        let inv_scale = match self.stage {
            Stage::Ready => {
                self.check("step", memory, optimizer.parameters(), mark)?;
                Some(memory.inv_scale.clone())
            }
            Stage::Checked => {
                self.check_unchanged("step", optimizer.parameters())?;
                Some(memory.inv_scale.clone())
            }
            Stage::Unscaled => {
                self.check_unchanged("step", optimizer.parameters())?;
                None
            }
            Stage::Stepped => return Err(ScalerMisuse::AlreadyStepped.into()),
        };
        let (first, clip) = match self.clip.clone() {
            Some(clip) => (Some(clip.first), Some(clip.coefficient)),
            None => (inv_scale, None),
        };
        let inputs = StepInputs {
            found_inf: Some(self.found_inf.clone()),
            inv_scale: first,
            clip,
        };
        memory.timed(STEP_TIME, || optimizer.step(&inputs))?;
        self.stage = Stage::Stepped;
        Ok(())
    }

    /// Records the step of optimizer `id` just enqueued, as step `number`.
    pub(super) fn record(&self, memory: &ScaleMemory, id: &OptimizerId, number: u64) -> Result<()> {
        let counts = self.gradients.counts().expect("a pass came before");
        let norm = self.gradients.total_norm().filter(|_| self.norm_taken);
        let operands = RecordOperands {
            journal: memory.journal.words().span()?,
            found_inf: self.found_inf.span()?,
            scale: memory.scale.span()?,
            counts: counts.span()?,
            total_norm: norm.map(Tensor::span).transpose()?,
            found: id.lost_weights().map(Tensor::span).transpose()?,
            optimizer: self.recorded_as.expect("a pass came before"),
            step: number,
        };
        let recorded = record_step(memory.context().stream(), &operands);
        recorded
            .map_err(|error| error.although("the step is enqueued, and only its record is missing"))
    }

    fn pass(
        &mut self,
        op: &'static str,
        memory: &ScaleMemory,
        parameters: &[Parameter],
        mark: UnscaleMark,
        pass: Pass<'_>,
    ) -> Result<()> {
        for parameter in parameters {
            check_origin(op, parameter, mark, self.restored)?;
        }
        let names = parameters.iter().map(Parameter::name);
        if self.recorded_as.is_none() || !names.eq(self.names.iter().map(String::as_str)) {
            let (number, names) = memory.name(parameters, self.recorded_as);
            (self.recorded_as, self.names) = (Some(number), names);
        }
        let (gradients, flag) = (&mut self.gradients, self.found_inf.span()?);
        let any = memory.timed(CHECK_TIME, || gradients.pass(parameters, pass, &flag));
        if any.is_err() && self.gradients.is_half_done() {
            // The flag may be set. It counts in the next update, which clears it.
            self.stage = Stage::Checked;
        }
        if !any? {
            return Err(ScalerMisuse::NothingChecked.into());
        }
        self.seen.clear();
        self.seen.extend(parameters.iter().map(last_term));
        Ok(())
    }

    /// Refuses gradients that the last pass did not cover. A gradient dropped since does no harm: its parameter does
    /// not move. Unscaled gradients may have been replaced; the caller is responsible for those.
    fn check_unchanged(&self, op: &'static str, parameters: &[Parameter]) -> Result<()> {
        if parameters.len() != self.seen.len() {
            let reason = format!(
                "the optimizer has {} parameters, but had {} when its gradients were checked",
                parameters.len(),
                self.seen.len()
            );
            return Err(Error::argument(op, reason));
        }
        for (parameter, seen) in parameters.iter().zip(&self.seen) {
            let Some(origin) = parameter.origin() else {
                continue;
            };
            let is_same = *seen == Some(origin.until);
            let what = match (seen, self.stage) {
                (None, _) => "was missing when the optimizer's gradients were checked",
                (_, Stage::Checked) if !is_same => "changed after it was checked",
                (_, Stage::Unscaled) if origin.tag.is_some() => "is still scaled",
                _ => continue,
            };
            let name = parameter.name();
            let reason = format!(
                "the gradient of `{name}` {what}; check, unscale or clip once all gradients are set"
            );
            return Err(Error::argument(op, reason));
        }
        Ok(())
    }
}

/// The moment of the last term of a parameter's gradient.
fn last_term(parameter: &Parameter) -> Option<u64> {
    parameter.origin().map(|origin| origin.until)
}

/// The pass for gradients that are still multiplied by the scale.
fn still_scaled(memory: &ScaleMemory, mark: UnscaleMark, kind: NormKind) -> Pass<'_> {
    match kind {
        NormKind::L2 => Pass::CheckUnlessProduced(CheckAtOnce {
            by: mark.tag(),
            inv_scale: &memory.inv_scale,
            meter: &memory.meter,
        }),
        _ => Pass::Check(Some(&memory.inv_scale), kind),
    }
}

/// Refuses gradients that were already unscaled through another optimizer (PyTorch divides those twice), were
/// multiplied by a scale other than this iteration's, or have terms from before the moment `restored` or from both
/// sides of an update.
fn check_origin(
    op: &'static str,
    parameter: &Parameter,
    mark: UnscaleMark,
    restored: u64,
) -> Result<()> {
    let Some(origin) = parameter.origin() else {
        return Ok(());
    };
    let refuse = |what: &str| {
        Err(Error::argument(
            op,
            format!("the gradient of `{}` {what}", parameter.name()),
        ))
    };
    if origin.since < restored {
        return refuse(
            "has terms from before the scaler's state was loaded; drop it with zero_grad, or set a newer one",
        );
    }
    if let Some(unscaled) = origin.unscaled {
        let same_iteration = (unscaled.scaler, unscaled.since) == (mark.scaler, mark.since);
        if same_iteration && unscaled.optimizer != mark.optimizer {
            return refuse("was already unscaled through another optimizer");
        }
    }
    if let Some(tag) = origin.tag
        && (tag.scaler, tag.since) != (mark.scaler, mark.since)
    {
        return refuse("was made with another scale than this scaler's current one");
    }
    if origin.since < mark.since && mark.since < origin.until {
        return refuse(
            "has terms from before and after an update, which may differ in scale; \
             update after all terms are added, or use another scaler",
        );
    }
    Ok(())
}

/// Describes an optimizer by its parameters: the name of the first, and how many more there are.
pub(super) fn told(parameters: &[Parameter]) -> String {
    match parameters {
        [] => "no parameters".to_owned(),
        [one] => format!("`{}`", one.name()),
        [first, more @ ..] => format!("`{}` and {} more", first.name(), more.len()),
    }
}

/// The error of `call` for a parameter that no kernel on the scaler's stream may touch.
pub(super) fn elsewhere(call: &'static str, parameter: &Parameter) -> Error {
    let name = parameter.name();
    let reason = format!("parameter `{name}` is on another stream than the scaler");
    Error::argument(call, reason)
}
