//! The gradient scaler.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::amp::config::narrow;
use crate::amp::journal::{Journal, scale_changes};
use crate::amp::slot::{Slot, Stage, flag};
use crate::amp::{AmpConfig, Scalable, ScalerState, ScalerStats, StepOutcome};
use crate::dtype::DType;
use crate::error::{Error, Result, ScalerMisuse};
use crate::launch::journal::{
    BACKOFFS, GROWTHS, SKIPPED, SKIPPED_IN_A_ROW, STEPS, UPDATES, counter,
};
use crate::launch::{NormKind, ScaleOperands, inverse_scale, scale_update};
use crate::memory;
use crate::optim::{Optimizer, OptimizerId, Parameter, UnscaleMark};
use crate::storage::{Context, Tensor};

/// Optimizers one scaler can drive at a time: the size of its block of flags.
const OPTIMIZERS: usize = 256;

/// Scales losses so that small gradients survive 16 bits, keeps steps with infinite or NaN gradients from
/// being applied, and adapts the scale. [`amp`](crate::amp) tells the order of calls.
///
/// One scaler serves one stream. No call but those that say so waits for the device.
///
/// ```no_run
/// # use kitsune::{amp::*, optim::*, *};
/// # fn train(context: &Context, mut optimizer: Sgd, loss: Tensor) -> Result<()> {
/// let mut scaler = GradScaler::new(context, AmpConfig::default())?;
/// # let backward = |_: Tensor| ();
/// backward(scaler.scale(&loss)?);
/// let outcome = scaler.step(&mut optimizer)?;
/// scaler.update()?;
/// if !outcome.is_applied()? {
///     // Do not advance the schedule.
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GradScaler {
    id: u64,
    config: AmpConfig,
    /// `None` if disabled: a disabled scaler takes no memory.
    memory: Option<ScaleMemory>,
    slots: Vec<Slot>,
    /// Updates so far; tells gradients unscaled in this iteration from older ones.
    iteration: u64,
    steps: u64,
    /// Whether a loss was ever scaled. Atomic so that `scale` needs no exclusive access; nothing is
    /// published through it.
    scaled: AtomicBool,
}

/// Device memory of a scaler. It stays where it is as long as the scaler lives.
#[derive(Debug)]
pub(super) struct ScaleMemory {
    pub(super) scale: Tensor,
    pub(super) inv_scale: Tensor,
    growth_tracker: Tensor,
    flags: Tensor,
    pub(super) journal: Arc<Journal>,
    names: AtomicU64,
}

impl ScaleMemory {
    fn new(context: &Context, scale: f64) -> Result<Self> {
        let _tag = memory::tag("amp");
        let memory = Self {
            scale: Tensor::uninit(context, [], DType::F32)?,
            inv_scale: Tensor::uninit(context, [], DType::F32)?,
            growth_tracker: Tensor::uninit(context, [], DType::U32)?,
            flags: Tensor::zeros(context, [OPTIMIZERS], DType::F32)?,
            journal: Arc::new(Journal::new(context)?),
            names: AtomicU64::new(0),
        };
        memory.set(scale, 0)?;
        Ok(memory)
    }

    fn set(&self, scale: f64, growth_tracker: u32) -> Result<()> {
        let scale = narrow(scale);
        self.scale.copy_from_slice(&[scale])?;
        self.inv_scale.copy_from_slice(&[inverse_scale(scale)])?;
        self.growth_tracker.copy_from_slice(&[growth_tracker])
    }

    /// The number under which the journal will know optimizers with these parameters, and their names.
    pub(super) fn name(&self, parameters: &[Parameter]) -> (u64, Arc<[String]>) {
        // Relaxed: the number only has to be unique.
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let names: Arc<[String]> = parameters
            .iter()
            .map(|parameter| parameter.name().to_owned())
            .collect();
        self.journal.name(number, names.clone());
        (number, names)
    }

    fn operands(&self) -> Result<ScaleOperands> {
        Ok(ScaleOperands {
            scale: self.scale.span()?,
            inv_scale: self.inv_scale.span()?,
            growth_tracker: self.growth_tracker.span()?,
            flags: self.flags.span()?,
            journal: self.journal.words().span()?,
        })
    }
}

impl GradScaler {
    /// A scaler for gradients on the context's stream. The scale exists from now on.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::OutOfMemory`].
    pub fn new(context: &Context, config: AmpConfig) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        config.validate()?;
        let memory = config
            .enabled
            .then(|| ScaleMemory::new(context, config.init_scale))
            .transpose()?;
        Ok(Self {
            // Relaxed: the number only has to be unique.
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            config,
            memory,
            slots: Vec::new(),
            iteration: 0,
            steps: 0,
            scaled: AtomicBool::new(false),
        })
    }

    /// `outputs` multiplied by the scale, on the device: a tensor, a loss, or a tuple, slice or vector of
    /// such. The same, sharing memory, if disabled. Tensors become f32 (f64 stays f64), so that no product
    /// overflows 16 bits.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for integers; [`Error::InvalidArgument`] on another stream than the
    /// scaler's; [`Error::OutOfMemory`].
    pub fn scale<S: Scalable + ?Sized>(&self, outputs: &S) -> Result<S::Output> {
        let scaled = outputs.scaled_by(self.memory.as_ref().map(|memory| &memory.scale))?;
        // Relaxed: see the field.
        self.scaled.store(true, Ordering::Relaxed);
        Ok(scaled)
    }

    /// Divides the optimizer's gradients by the scale in place, and checks them, so that they can be looked
    /// at or clipped before [`step`](Self::step). Gradients may be of any float type, f16 too. Unlike
    /// PyTorch's, the check sees a gradient that dividing by a scale below 1 made infinite.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as the table in [`amp`](crate::amp) says, or if no parameter has a gradient;
    /// [`Error::InvalidArgument`] if a gradient was already unscaled through another optimizer, lies on
    /// another stream, or shares memory with another one. Nothing was changed.
    pub fn unscale<O: Optimizer + ?Sized>(&mut self, optimizer: &O) -> Result<()> {
        let mark = self.mark(optimizer.id());
        match self.slot("unscale", optimizer.id())? {
            Some((memory, slot)) => slot.unscale(memory, optimizer.parameters(), mark),
            None => Ok(()),
        }
    }

    /// [`unscale`](Self::unscale) under PyTorch's name.
    ///
    /// # Errors
    /// As [`unscale`](Self::unscale).
    pub fn unscale_<O: Optimizer + ?Sized>(&mut self, optimizer: &O) -> Result<()> {
        self.unscale(optimizer)
    }

    /// Clips the optimizer's gradients to a total L2 norm of `max_norm`, and gives the norm that they had
    /// (unscaled): an f64 on the device. As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    ///
    /// # Errors
    /// As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    pub fn clip_grad_norm<O: Optimizer + ?Sized>(
        &mut self,
        optimizer: &O,
        max_norm: f64,
    ) -> Result<Tensor> {
        self.clip_grad_norm_by(optimizer, max_norm, NormKind::L2)
    }

    /// [`clip_grad_norm`](Self::clip_grad_norm) under PyTorch's name.
    ///
    /// # Errors
    /// As [`clip_grad_norm_by`](Self::clip_grad_norm_by).
    pub fn clip_grad_norm_<O: Optimizer + ?Sized>(
        &mut self,
        optimizer: &O,
        max_norm: f64,
    ) -> Result<Tensor> {
        self.clip_grad_norm(optimizer, max_norm)
    }

    /// Clips to a total norm of the given kind.
    ///
    /// After [`unscale`](Self::unscale) gradients are multiplied in place, as in PyTorch. Without it they stay
    /// as they are, scaled: the one pass that checks them also takes the norm, and the step unscales and
    /// clips as it reads. That saves two passes over all gradients.
    ///
    /// The norm is taken in f64 over all gradients. An infinite or NaN norm is an overflow: the step is
    /// skipped and the scale backs off, where PyTorch steps with gradients of zero. If disabled, clips in
    /// place.
    ///
    /// # Errors
    /// As [`unscale`](Self::unscale), and [`Error::InvalidArgument`] for a negative or NaN `max_norm`.
    pub fn clip_grad_norm_by<O: Optimizer + ?Sized>(
        &mut self,
        optimizer: &O,
        max_norm: f64,
        kind: NormKind,
    ) -> Result<Tensor> {
        let mark = self.mark(optimizer.id());
        let parameters = optimizer.parameters();
        match self.slot("clip_grad_norm", optimizer.id())? {
            Some((memory, slot)) => slot.clip(memory, parameters, mark, (max_norm, kind)),
            None => {
                let Some(first) = parameters.first() else {
                    return Err(ScalerMisuse::NothingChecked.into());
                };
                crate::optim::clip_grad_norm(first.value().context(), parameters, max_norm, kind)
            }
        }
    }

    /// Enqueues the optimizer's step, which skips itself on the device if a gradient is infinite or NaN.
    /// Gradients are checked first unless that was done. The host does not wait; the outcome can be asked.
    ///
    /// A skipped step leaves weights, optimizer state and step counts as they were, to the bit. Gradients
    /// that were not unscaled stay scaled: the step divides them as it reads.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as the table in [`amp`](crate::amp) says, or if no parameter has a gradient;
    /// otherwise as [`unscale`](Self::unscale) and the optimizer's step.
    pub fn step<O: Optimizer + ?Sized>(&mut self, optimizer: &mut O) -> Result<StepOutcome> {
        let mark = self.mark(optimizer.id());
        let id = optimizer.id().clone();
        let number = self.steps + 1;
        match self.slot("step", &id)? {
            None => {
                optimizer.step_unscaled()?;
                self.steps += 1;
                Ok(StepOutcome::applied())
            }
            Some((memory, slot)) => {
                slot.step(memory, optimizer, mark, number)?;
                let journal = memory.journal.clone();
                self.steps = number;
                Ok(StepOutcome::pending(journal, number))
            }
        }
    }

    /// Adapts the scale to what the optimizers' checks found since the last update, and makes all of them
    /// ready. However many overflowed, the scale backs off once.
    ///
    /// # Errors
    /// [`ScalerMisuse::NothingToUpdate`] if no optimizer was unscaled, clipped or stepped;
    /// [`ScalerMisuse::NotScaled`] if no loss was ever scaled.
    pub fn update(&mut self) -> Result<()> {
        if self.memory.is_some() {
            self.require_scaled("update")?;
            if self.slots.iter().all(|slot| slot.stage() == Stage::Ready) {
                return Err(ScalerMisuse::NothingToUpdate.into());
            }
        }
        self.advance(None)
    }

    /// Sets the scale, whatever was found, and makes all optimizers ready. The growth tracker keeps its
    /// value. Does nothing if disabled.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a scale outside of floor and cap.
    pub fn update_to(&mut self, new_scale: f64) -> Result<()> {
        if self.memory.is_none() {
            return Ok(());
        }
        let checked = self.config.check_scale(new_scale);
        checked.map_err(|reason| Error::argument("update_to", reason))?;
        self.advance(Some(narrow(new_scale)))
    }

    fn advance(&mut self, forced: Option<f32>) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let stream = memory.context().stream();
        scale_update(stream, &memory.operands()?, &self.config.policy(), forced)?;
        self.slots.iter_mut().for_each(Slot::reset);
        self.iteration += 1;
        Ok(())
    }

    /// The scale, 1 if disabled. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn scale_factor(&self) -> Result<f64> {
        match &self.memory {
            None => Ok(1.0),
            Some(memory) => Ok(f64::from(memory.scale.item::<f32>()?)),
        }
    }

    /// [`scale_factor`](Self::scale_factor) under PyTorch's name.
    ///
    /// # Errors
    /// As [`scale_factor`](Self::scale_factor).
    pub fn get_scale(&self) -> Result<f64> {
        self.scale_factor()
    }

    /// The optimizer's overflow flag: an f32 that is not 0 if one of its gradients was found not finite since
    /// the last update. Combine it over all ranks with a maximum between [`unscale`](Self::unscale) and
    /// [`step`](Self::step); a sum does as well. `None` if disabled, or before the first call for the
    /// optimizer.
    #[must_use]
    pub fn found_inf<O: Optimizer + ?Sized>(&self, optimizer: &O) -> Option<&Tensor> {
        self.slots
            .iter()
            .find(|slot| slot.is_for(optimizer.id()))
            .map(Slot::found_inf)
    }

    /// Whether scaling is on.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.memory.is_some()
    }

    /// The settings now in force.
    #[must_use]
    pub fn config(&self) -> &AmpConfig {
        &self.config
    }

    /// Factor after an interval without overflow. Also answers if disabled.
    #[must_use]
    pub fn growth_factor(&self) -> f64 {
        self.config.growth_factor
    }

    /// Factor after an overflow.
    #[must_use]
    pub fn backoff_factor(&self) -> f64 {
        self.config.backoff_factor
    }

    /// Clean steps before the scale grows.
    #[must_use]
    pub fn growth_interval(&self) -> u32 {
        self.config.growth_interval
    }

    /// What is needed to go on later; empty if disabled. Waits for the device.
    ///
    /// # Errors
    /// [`ScalerMisuse::MidIteration`] if an update is due; [`Error::Driver`] if work of the stream failed.
    pub fn state_dict(&self) -> Result<ScalerState> {
        let Some(memory) = &self.memory else {
            return Ok(ScalerState::default());
        };
        if self.slots.iter().any(|slot| slot.stage() != Stage::Ready) {
            return Err(ScalerMisuse::MidIteration.into());
        }
        let tracker = memory.growth_tracker.item::<u32>()?;
        Ok(ScalerState::new(
            &self.config,
            self.scale_factor()?,
            tracker,
        ))
    }

    /// Goes on from a saved state: scale, tracker, factors and interval become those of `state`. Does
    /// nothing if disabled. Allowed at any time; what is under way with optimizers goes on.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the first key that is missing or cannot work. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &ScalerState) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let (config, growth_tracker) = state.apply(&self.config)?;
        memory.set(config.init_scale, growth_tracker)?;
        self.config = config;
        Ok(())
    }

    /// What happened so far. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn stats(&self) -> Result<ScalerStats> {
        let Some(memory) = &self.memory else {
            let (scale, steps) = (1.0, self.steps);
            return Ok(ScalerStats {
                scale,
                steps,
                applied: steps,
                ..ScalerStats::default()
            });
        };
        let words = memory.journal.read()?;
        let count = |which| counter(&words, which) as u64;
        Ok(ScalerStats {
            scale: self.scale_factor()?,
            growth_tracker: memory.growth_tracker.item::<u32>()?,
            steps: count(STEPS),
            applied: count(STEPS) - count(SKIPPED),
            skipped: count(SKIPPED),
            skipped_in_a_row: count(SKIPPED_IN_A_ROW),
            updates: count(UPDATES),
            growths: count(GROWTHS),
            backoffs: count(BACKOFFS),
            scale_history: scale_changes(&words),
            overflows: memory.journal.overflows(&words),
        })
    }

    fn require_scaled(&self, call: &'static str) -> Result<()> {
        // Relaxed: see the field.
        if self.scaled.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(ScalerMisuse::NotScaled { call }.into())
    }

    fn mark(&self, id: &OptimizerId) -> UnscaleMark {
        UnscaleMark {
            scaler: self.id,
            iteration: self.iteration,
            optimizer: id.number(),
        }
    }

    /// The optimizer's slot, made at its first call; `None` if disabled.
    fn slot(
        &mut self,
        call: &'static str,
        id: &OptimizerId,
    ) -> Result<Option<(&ScaleMemory, &mut Slot)>> {
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        self.require_scaled(call)?;
        let known = self.slots.iter().position(|slot| slot.is_for(id));
        let index = match known.or_else(|| self.slots.iter().position(Slot::is_free)) {
            Some(index) => index,
            None if self.slots.len() == OPTIMIZERS => {
                let reason = format!("a scaler drives at most {OPTIMIZERS} optimizers at a time");
                return Err(Error::argument(call, reason));
            }
            None => self.slots.len(),
        };
        if known.is_none() {
            let slot = Slot::new(id, flag(&memory.flags, index)?);
            if index == self.slots.len() {
                self.slots.push(slot);
            } else {
                self.slots[index] = slot;
            }
        }
        Ok(Some((memory, &mut self.slots[index])))
    }
}
