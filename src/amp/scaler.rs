//! The gradient scaler.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::amp::alarm::{alarm, last_good};
use crate::amp::config::narrow;
use crate::amp::journal::scale_changes;
use crate::amp::memory::{OPTIMIZERS, ScaleMemory};
use crate::amp::slot::{Slot, Stage, elsewhere, told};
use crate::amp::{
    AmpConfig, KeptScale, NanPolicy, Scalable, ScalerState, ScalerStats, ScalingMode, SkipPolicy,
    StepOutcome, StepTimes,
};
use crate::error::{Error, Result, ScalerAlarm, ScalerMisuse};
use crate::launch::journal::{
    BACKOFFS, GROWTHS, LOST_WEIGHTS, NAN_STEPS, SKIPPED, SKIPPED_IN_A_ROW, STEPS, UPDATES, counter,
};
use crate::launch::{Change, NormKind, scale_update};
use crate::optim::{CheckAtOnce, Optimizer, OptimizerId, Parameter, ScaleTag, UnscaleMark, moment};
use crate::storage::{Context, Tensor};

/// Scales losses so that small gradients survive 16 bits, skips steps with infinite or NaN gradients, and adapts the
/// scale. See [`amp`](crate::amp) for the order of calls.
///
/// One scaler serves one stream. Only calls that say so wait for the device.
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
    /// Lives as long as the scaler. Optimizers hold it weakly, to know which scaler drives them.
    id: Arc<u64>,
    pub(super) config: AmpConfig,
    /// `None` if disabled: a disabled scaler takes no memory.
    pub(super) memory: Option<ScaleMemory>,
    pub(super) slots: Vec<Slot>,
    /// The moment of the last update, from which on the scale has its current value as far as the host knows.
    /// Distinguishes this iteration's gradients from older ones.
    pub(super) since: u64,
    /// The moment the state was last loaded; 0 if never.
    pub(super) restored: u64,
    steps: u64,
    /// Updates since the last alarm check.
    pub(super) unwatched: u32,
    /// The value of `since` when a loss was last scaled; 0 if none ever was. Atomic so that `scale` needs no
    /// exclusive access; it publishes nothing.
    scaled: AtomicU64,
    /// If only checking: the scale of the preceding scaling phase.
    pub(super) kept_scale: Option<KeptScale>,
    /// If disabled: the state that was last loaded, to be saved again.
    pub(super) held: ScalerState,
}

impl GradScaler {
    /// A scaler for gradients on the context's stream. Allocates the scale.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::OutOfMemory`].
    pub fn new(context: &Context, config: AmpConfig) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        config.validate()?;
        let memory = match config.effective_mode() {
            ScalingMode::Off => None,
            ScalingMode::CheckOnly => Some(ScaleMemory::new(context, 1.0, config.timing)?),
            ScalingMode::Scale => {
                Some(ScaleMemory::new(context, config.init_scale, config.timing)?)
            }
        };
        Ok(Self {
            // Relaxed: the number only has to be unique.
            id: Arc::new(NEXT.fetch_add(1, Ordering::Relaxed)),
            config,
            memory,
            slots: Vec::new(),
            since: moment(),
            restored: 0,
            steps: 0,
            unwatched: 0,
            scaled: AtomicU64::new(0),
            kept_scale: None,
            held: ScalerState::default(),
        })
    }

    /// Multiplies `outputs` by the scale, on the device: a tensor, a loss, or a tuple, slice or vector of such.
    /// Returns them unchanged, sharing their memory, if disabled or only checking. Tensors become f32 (f64 stays
    /// f64), so that no product overflows 16 bits.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for integers and 8-bit types; [`Error::InvalidArgument`] on another stream than the
    /// scaler's; [`Error::OutOfMemory`].
    pub fn scale<S: Scalable + ?Sized>(&self, outputs: &S) -> Result<S::Output> {
        let memory = self.memory.as_ref().filter(|_| self.is_scaling());
        let scaled = outputs.scaled_by(memory.map(|memory| &*memory.scale))?;
        // Relaxed: see the field.
        self.scaled.store(self.since, Ordering::Relaxed);
        Ok(scaled)
    }

    /// The tag for gradients of losses scaled since the last update, to pass to
    /// [`Parameter::set_scaled_grad`](crate::optim::Parameter::set_scaled_grad). `None` if losses are not scaled.
    ///
    /// If an update or a load may happen before the gradient is set, take the tag where the loss is scaled: the
    /// gradient of an outdated tag is refused.
    #[must_use]
    pub fn tag(&self) -> Option<ScaleTag> {
        self.is_scaling().then(|| ScaleTag {
            scaler: *self.id,
            since: self.since,
        })
    }

    /// Adds `grad` to the parameter's gradient, as
    /// [`Parameter::accumulate_scaled_grad`](crate::optim::Parameter::accumulate_scaled_grad) does with this
    /// scaler's [`tag`](Self::tag), and checks the sum in the pass that writes it.
    ///
    /// [`check`](Self::check), [`clip_grad_norm`](Self::clip_grad_norm) and [`step`](Self::step) then need not read
    /// that gradient to check it; their results, norm included, are bit-identical. They still read it if it has only
    /// one term (the first term becomes the gradient as it is), belongs to another iteration, was written since
    /// through this crate, or for norms other than L2. Code that writes it in another way, say in an all-reduce, must
    /// call [`Tensor::mark_written`] on it.
    ///
    /// # Errors
    /// As [`Parameter::accumulate_scaled_grad`](crate::optim::Parameter::accumulate_scaled_grad), and
    /// [`Error::InvalidArgument`] for a parameter on another stream than the scaler's, or if a state was loaded after the
    /// last loss was scaled. Nothing was added.
    pub fn accumulate(&self, parameter: &Parameter, grad: Tensor) -> Result<()> {
        let op = "accumulate";
        let Some(memory) = &self.memory else {
            return parameter.accumulate(op, grad, None, None);
        };
        if parameter.value().context().stream().id() != memory.context().stream().id() {
            return Err(elsewhere(op, parameter));
        }
        self.expect_fresh_loss(op, parameter)?;
        let check = CheckAtOnce {
            by: ScaleTag {
                scaler: *self.id,
                since: self.since,
            },
            inv_scale: &memory.inv_scale,
            meter: &memory.meter,
        };
        parameter.accumulate(op, grad, self.tag(), Some(&check))
    }

    /// Checks the optimizer's gradients for infinities and NaN without changing them. [`step`](Self::step) does so
    /// itself; only [`SkipPolicy::AllOrNone`] needs this call before it.
    ///
    /// # Errors
    /// As [`unscale`](Self::unscale).
    pub fn check<O: Optimizer + ?Sized>(&mut self, optimizer: &O) -> Result<()> {
        let mark = self.mark(optimizer.id());
        match self.slot("check", optimizer)? {
            Some((memory, slot)) => slot.check("check", memory, optimizer.parameters(), mark),
            None => Ok(()),
        }
    }

    /// Divides the optimizer's gradients by the scale in place, and checks them, so that they can be inspected or
    /// clipped before [`step`](Self::step). Gradients may have any float type, including f16. Unlike PyTorch's, the
    /// check catches a gradient that became infinite when it was divided by a scale below 1.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as in the table of [`amp`](crate::amp), if no parameter has a gradient, if another scaler
    /// drives the optimizer, or if [`SkipPolicy`] no longer allows the call; [`Error::InvalidArgument`] if a gradient
    /// was already unscaled through another optimizer, was made with another scale or has terms of two, lies on
    /// another stream, or shares memory with another one. Nothing was changed.
    pub fn unscale<O: Optimizer + ?Sized>(&mut self, optimizer: &O) -> Result<()> {
        let mark = self.mark(optimizer.id());
        match self.slot("unscale", optimizer)? {
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

    /// Clips the optimizer's gradients to a total L2 norm of `max_norm`, and returns the unscaled norm they had: an
    /// f64 on the device. See [`clip_grad_norm_by`](Self::clip_grad_norm_by).
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
    /// After [`unscale`](Self::unscale), gradients are multiplied in place, as in PyTorch. Without it they stay
    /// scaled and unchanged: the pass that checks them also computes the norm, and the step unscales and clips as it
    /// reads. This saves two passes over all gradients.
    ///
    /// The norm is computed in f64 over all gradients. An infinite or NaN norm is an overflow: the step is skipped
    /// and the scale backs off, where PyTorch would step with gradients of zero. A disabled scaler clips in place.
    /// [`optim::clip_grad_norm`](crate::optim::clip_grad_norm) describes the accuracy.
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
        match self.slot("clip_grad_norm", optimizer)? {
            Some((memory, slot)) => slot.clip(memory, parameters, mark, (max_norm, kind)),
            None => {
                let Some(first) = parameters.first() else {
                    return Err(ScalerMisuse::NothingChecked.into());
                };
                crate::optim::clip_grad_norm(first.value().context(), parameters, max_norm, kind)
            }
        }
    }

    /// Enqueues the optimizer's step, which skips itself on the device if a gradient is infinite or NaN. Checks the
    /// gradients first if that was not done yet. The host does not wait; ask the returned outcome.
    ///
    /// A skipped step leaves weights, optimizer state and step counts as they were, to the bit. Gradients
    /// that were not unscaled stay scaled: the step divides them as it reads.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as in the table of [`amp`](crate::amp), or if no parameter has a gradient; otherwise as
    /// [`unscale`](Self::unscale) and the optimizer's step. Nothing was stepped, and the call may be repeated. The
    /// exception is an [`Error::Driver`] that says "the step is enqueued, and only its record is missing": continue
    /// with [`update`](Self::update) then; statistics and reports lack the step.
    pub fn step<O: Optimizer + ?Sized>(&mut self, optimizer: &mut O) -> Result<StepOutcome> {
        let mark = self.mark(optimizer.id());
        let number = self.steps + 1;
        match self.slot("step", optimizer)? {
            None => {
                optimizer.step_unscaled()?;
                self.steps = number;
                Ok(StepOutcome::applied())
            }
            Some((memory, slot)) => {
                slot.step(memory, optimizer, mark)?;
                let recorded = slot.record(memory, optimizer.id(), number);
                let journal = memory.journal.clone();
                journal.stepped(number);
                self.steps = number;
                recorded.map(|()| StepOutcome::pending(journal, number))
            }
        }
    }

    /// Adapts the scale to the results of the optimizers' checks since the last update, and makes all optimizers
    /// ready. The scale backs off once, however many optimizers overflowed.
    ///
    /// Enqueues one kernel; `src/launch/scale_update.rs` states the rule.
    ///
    /// Every [`AmpConfig::alarm_interval`] updates it requests the device's counters, and a later call raises an
    /// alarm if they call for one. Replays of a captured update do not request them; call [`alarm`](Self::alarm)
    /// there.
    ///
    /// # Errors
    /// [`ScalerMisuse::NothingToUpdate`] if no optimizer was checked, unscaled, clipped or stepped;
    /// [`ScalerMisuse::NotScaled`] if no loss was ever scaled; [`Error::ScalerAlarm`] if steps keep being skipped.
    /// The update was enqueued in spite of the alarm, and training may continue.
    pub fn update(&mut self) -> Result<()> {
        if self.memory.is_some() {
            self.require_scaled("update")?;
            if self.slots.iter().all(|slot| slot.stage() == Stage::Ready) {
                return Err(ScalerMisuse::NothingToUpdate.into());
            }
        }
        let ignore_nan = self.config.nan_policy == NanPolicy::Ignore;
        self.advance(Change::Rule { ignore_nan })?;
        self.watch()
    }

    /// Sets the scale regardless of the checks, and makes all optimizers ready. The growth tracker keeps its value.
    /// Does nothing if disabled or only checking.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a scale below the floor or above the cap.
    pub fn update_to(&mut self, new_scale: f64) -> Result<()> {
        if !self.is_scaling() {
            return Ok(());
        }
        let checked = self.config.check_scale(new_scale);
        checked.map_err(|reason| Error::argument("update_to", reason))?;
        self.advance(Change::Set(narrow(new_scale)))
    }

    fn advance(&mut self, change: Change) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        let stream = memory.context().stream();
        scale_update(stream, &memory.operands()?, &self.config.policy(), change)?;
        self.slots.iter_mut().for_each(Slot::reset);
        self.since = moment();
        Ok(())
    }

    /// Checks for an alarm if one is due, without waiting.
    fn watch(&mut self) -> Result<()> {
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        if self.config.alarm_interval == 0 {
            return Ok(());
        }
        self.unwatched = self.unwatched.saturating_add(1);
        let stream = memory.context().stream();
        let is_due = self.unwatched >= self.config.alarm_interval
            && !stream.driver().is_capturing(stream.raw())?;
        if is_due {
            self.unwatched = 0;
        }
        let Some(words) = memory.journal.late(is_due)? else {
            return Ok(());
        };
        let scale = match scale_changes(&words).last() {
            Some(change) => change.scale,
            None if self.is_scaling() => self.config.init_scale,
            None => 1.0,
        };
        match alarm(&words, &self.config, scale) {
            Some(alarm) => Err(Error::ScalerAlarm(Box::new(alarm))),
            None => Ok(()),
        }
    }

    /// The current alarm, if any, whether or not [`update`](Self::update) checks for alarms. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn alarm(&self) -> Result<Option<ScalerAlarm>> {
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        let words = memory.journal.read()?;
        Ok(alarm(&words, &self.config, self.scale_factor()?))
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

    /// The optimizer's overflow flag: an f32 that is nonzero if one of its gradients was infinite or NaN since the
    /// last update. Across ranks, combine it with a maximum between [`unscale`](Self::unscale) and
    /// [`step`](Self::step); a sum also works. `None` if disabled, or before the first call for the optimizer.
    #[must_use]
    pub fn found_inf<O: Optimizer + ?Sized>(&self, optimizer: &O) -> Option<&Tensor> {
        let slot = self.slots.iter().find(|slot| slot.is_for(optimizer.id()));
        slot.map(Slot::found_inf)
    }

    /// The stage that the optimizer has reached since the last update.
    pub(super) fn stage<O: Optimizer + ?Sized>(&self, optimizer: &O) -> Stage {
        let slot = self.slots.iter().find(|slot| slot.is_for(optimizer.id()));
        slot.map_or(Stage::Ready, Slot::stage)
    }

    /// Whether losses are scaled.
    pub(super) fn is_scaling(&self) -> bool {
        self.config.effective_mode() == ScalingMode::Scale
    }

    /// Identifies this scaler uniquely, and reveals whether it was dropped.
    #[cfg(feature = "metrics")]
    pub(crate) fn token(&self) -> std::sync::Weak<dyn std::any::Any + Send + Sync> {
        let id: std::sync::Weak<u64> = Arc::downgrade(&self.id);
        id
    }

    /// Whether gradients are checked at all.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.memory.is_some()
    }

    /// The current settings.
    #[must_use]
    pub fn config(&self) -> &AmpConfig {
        &self.config
    }

    /// Factor after an interval without overflow. Also valid if disabled.
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

    /// Statistics so far. Waits for the device.
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
        let scale = self.scale_factor()?;
        Ok(ScalerStats {
            scale,
            growth_tracker: memory.trackers()?.growth,
            steps: count(STEPS),
            applied: count(STEPS) - count(SKIPPED),
            skipped: count(SKIPPED),
            skipped_in_a_row: count(SKIPPED_IN_A_ROW),
            nan_steps: count(NAN_STEPS),
            last_good_scale: last_good(&words),
            updates: count(UPDATES),
            growths: count(GROWTHS),
            backoffs: count(BACKOFFS),
            scale_history: scale_changes(&words),
            overflows: memory.journal.overflows(&words),
            infinite_weights: count(LOST_WEIGHTS),
            weight_overflows: memory.journal.weight_overflows(&words),
            alarm: alarm(&words, &self.config, scale),
            times: self.config.timing.then(|| StepTimes::read(&words)),
            scratch_bytes: memory.meter.current(),
            scratch_peak_bytes: memory.meter.peak(),
        })
    }

    fn require_scaled(&self, call: &'static str) -> Result<()> {
        // Relaxed: see the field. Without scaling, `scale` is optional.
        if self.scaled.load(Ordering::Relaxed) > 0 || !self.is_scaling() {
            return Ok(());
        }
        Err(ScalerMisuse::NotScaled { call }.into())
    }

    /// Refuses a gradient for `parameter` if the last loss was scaled before the state was loaded: it cannot belong
    /// to this iteration.
    pub(super) fn expect_fresh_loss(&self, op: &'static str, parameter: &Parameter) -> Result<()> {
        // Relaxed: see the field.
        let scaled = self.scaled.load(Ordering::Relaxed);
        if scaled == 0 || scaled >= self.restored || !self.is_scaling() {
            return Ok(());
        }
        let name = parameter.name();
        let reason = format!(
            "the gradient of `{name}` comes from a loss scaled before the scaler's state was loaded; scale a \
             loss first, or add the gradient with accumulate_scaled_grad, which does not check"
        );
        Err(Error::argument(op, reason))
    }

    fn mark(&self, id: &OptimizerId) -> UnscaleMark {
        UnscaleMark {
            scaler: *self.id,
            since: self.since,
            optimizer: id.number(),
        }
    }

    /// The optimizer's slot, created at its first call; `None` if disabled.
    fn slot<O: Optimizer + ?Sized>(
        &mut self,
        call: &'static str,
        optimizer: &O,
    ) -> Result<Option<(&ScaleMemory, &mut Slot)>> {
        let id = optimizer.id();
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        self.require_scaled(call)?;
        let all_or_none = self.config.skip_policy == SkipPolicy::AllOrNone;
        let known = self.slots.iter().position(|slot| slot.is_for(id));
        let is_checked = known.is_some_and(|index| self.slots[index].stage() != Stage::Ready);
        let any_stepped = self.slots.iter().any(|slot| slot.stage() == Stage::Stepped);
        if all_or_none && any_stepped && !(is_checked && call == "step") {
            return Err(ScalerMisuse::CheckedTooLate { call }.into());
        }
        let index = match known.or_else(|| self.slots.iter().position(Slot::is_free)) {
            Some(index) => index,
            None if self.slots.len() == OPTIMIZERS => {
                let reason = format!("a scaler drives at most {OPTIMIZERS} optimizers at a time");
                return Err(Error::argument(call, reason));
            }
            None => self.slots.len(),
        };
        if known.is_none() {
            // Checked before the optimizer is claimed, because another scaler may be the right one.
            let stream = memory.context().stream().id();
            let is_elsewhere =
                |parameter: &&Parameter| parameter.value().context().stream().id() != stream;
            if let Some(parameter) = optimizer.parameters().iter().find(is_elsewhere) {
                return Err(elsewhere(call, parameter));
            }
            if !id.claim(&self.id) {
                let parameters = told(optimizer.parameters());
                return Err(ScalerMisuse::OtherScaler { parameters }.into());
            }
            // With a shared flag, one overflow skips all steps.
            let flag = memory.flag(if all_or_none { 0 } else { index })?;
            let slot = Slot::new(id, memory, flag, self.restored);
            if index == self.slots.len() {
                self.slots.push(slot);
            } else if let Some(number) =
                std::mem::replace(&mut self.slots[index], slot).recorded_as()
            {
                memory.journal.retire(number);
            }
        }
        Ok(Some((memory, &mut self.slots[index])))
    }
}
