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
    /// Goes with the scaler. Optimizers hold it weakly, to know the scaler that drives them.
    id: Arc<u64>,
    pub(super) config: AmpConfig,
    /// `None` if disabled: a disabled scaler takes no memory.
    pub(super) memory: Option<ScaleMemory>,
    pub(super) slots: Vec<Slot>,
    /// Since when the scale is what it is, as far as the host can tell: the moment of the last update. Tells
    /// this iteration's gradients from older ones.
    pub(super) since: u64,
    /// When the state was loaded last; 0 if it never was.
    pub(super) restored: u64,
    steps: u64,
    /// Updates since the host last looked for an alarm.
    pub(super) unwatched: u32,
    /// `since` when a loss was scaled last; 0 if none ever was. Atomic so that `scale` needs no exclusive access;
    /// nothing is published through it.
    scaled: AtomicU64,
    /// If only checking: the scale of the scaling phase before.
    pub(super) kept_scale: Option<KeptScale>,
    /// If disabled: the state that was loaded last, to be saved again.
    pub(super) held: ScalerState,
}

impl GradScaler {
    /// A scaler for gradients on the context's stream. The scale exists from now on.
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

    /// `outputs` multiplied by the scale, on the device: a tensor, a loss, or a tuple, slice or vector of
    /// such. The same, sharing memory, if disabled or if only checking. Tensors become f32 (f64 stays f64), so
    /// that no product overflows 16 bits.
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

    /// What gradients of losses scaled since the last update can be marked with, by
    /// [`Parameter::set_scaled_grad`](crate::optim::Parameter::set_scaled_grad); `None` if losses are not scaled.
    ///
    /// Take it where the loss is scaled if an update, or the loading of a state, may come before the gradient is set:
    /// the tag then says so, and the gradient is refused.
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
    /// [`check`](Self::check), [`clip_grad_norm`](Self::clip_grad_norm) and [`step`](Self::step) then do not read that
    /// gradient to check it: what they find, norm included, is the same to the bit. They read it as ever if it was
    /// made by no such sum (the first term becomes the gradient as it is), or belongs to another iteration, for norms
    /// other than L2, and if it was written since through this crate. Who writes it otherwise, say in an all-reduce,
    /// calls [`Tensor::mark_written`] on it.
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

    /// Checks the optimizer's gradients for infinities and NaN without changing them. [`step`](Self::step) does
    /// it by itself; before it, only [`SkipPolicy::AllOrNone`] needs it.
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

    /// Divides the optimizer's gradients by the scale in place, and checks them, so that they can be looked
    /// at or clipped before [`step`](Self::step). Gradients may be of any float type, f16 too. Unlike
    /// PyTorch's, the check sees a gradient that dividing by a scale below 1 made infinite.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as the table in [`amp`](crate::amp) says, if no parameter has a gradient, if another
    /// scaler drives the optimizer, or if [`SkipPolicy`] forbids it by now; [`Error::InvalidArgument`] if a
    /// gradient was already unscaled through another optimizer, was made with another scale or has terms of
    /// two, lies on another stream, or shares memory with another one. Nothing was changed.
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
    /// place. [`optim::clip_grad_norm`](crate::optim::clip_grad_norm) tells how exact results are.
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

    /// Enqueues the optimizer's step, which skips itself on the device if a gradient is infinite or NaN.
    /// Gradients are checked first unless that was done. The host does not wait; the outcome can be asked.
    ///
    /// A skipped step leaves weights, optimizer state and step counts as they were, to the bit. Gradients
    /// that were not unscaled stay scaled: the step divides them as it reads.
    ///
    /// # Errors
    /// [`ScalerMisuse`] as the table in [`amp`](crate::amp) says, or if no parameter has a gradient;
    /// otherwise as [`unscale`](Self::unscale) and the optimizer's step. Nothing was stepped, and the same call may be
    /// made again: but for an [`Error::Driver`] that says "the step is enqueued, and only its record is missing".
    /// After that one go on with [`update`](Self::update); statistics and reports lack the step.
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

    /// Adapts the scale to what the optimizers' checks found since the last update, and makes all of them
    /// ready. However many overflowed, the scale backs off once.
    ///
    /// From time to time ([`AmpConfig::alarm_interval`]) the device is asked for its counters, and a later
    /// call tells if they are alarming. Replays of a captured update do not ask; [`alarm`](Self::alarm) does.
    ///
    /// # Errors
    /// [`ScalerMisuse::NothingToUpdate`] if no optimizer was unscaled, clipped or stepped;
    /// [`ScalerMisuse::NotScaled`] if no loss was ever scaled; [`Error::ScalerAlarm`] if steps go on being
    /// skipped: then the update was enqueued all the same, and the training may go on.
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

    /// Sets the scale, whatever was found, and makes all optimizers ready. The growth tracker keeps its
    /// value. Does nothing if disabled or only checking.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a scale outside of floor and cap.
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

    /// Looks for an alarm if it is time to, without waiting.
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

    /// What there is to be alarmed about, whether or not [`update`](Self::update) looks for it. Waits for the
    /// device.
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

    /// The optimizer's overflow flag: an f32 that is not 0 if one of its gradients was found not finite since
    /// the last update. Combine it over all ranks with a maximum between [`unscale`](Self::unscale) and
    /// [`step`](Self::step); a sum does as well. `None` if disabled, or before the first call for the
    /// optimizer.
    #[must_use]
    pub fn found_inf<O: Optimizer + ?Sized>(&self, optimizer: &O) -> Option<&Tensor> {
        let slot = self.slots.iter().find(|slot| slot.is_for(optimizer.id()));
        slot.map(Slot::found_inf)
    }

    /// What was done for the optimizer since the last update.
    pub(super) fn stage<O: Optimizer + ?Sized>(&self, optimizer: &O) -> Stage {
        let slot = self.slots.iter().find(|slot| slot.is_for(optimizer.id()));
        slot.map_or(Stage::Ready, Slot::stage)
    }

    /// Whether losses are scaled.
    pub(super) fn is_scaling(&self) -> bool {
        self.config.effective_mode() == ScalingMode::Scale
    }

    /// Names this scaler among all that ever were, and tells whether it is gone.
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
        // Relaxed: see the field. Where losses are not scaled, nothing can have been forgotten.
        if self.scaled.load(Ordering::Relaxed) > 0 || !self.is_scaling() {
            return Ok(());
        }
        Err(ScalerMisuse::NotScaled { call }.into())
    }

    /// Refuses a gradient for `parameter` that cannot be of this iteration: the last loss was scaled before the state
    /// was loaded.
    pub(super) fn expect_fresh_loss(&self, op: &'static str, parameter: &Parameter) -> Result<()> {
        // Relaxed: see the field.
        let scaled = self.scaled.load(Ordering::Relaxed);
        if scaled == 0 || scaled >= self.restored || !self.is_scaling() {
            return Ok(());
        }
        let name = parameter.name();
        let reason = format!(
            "the gradient of `{name}` comes of a loss that was scaled before the scaler's state was loaded; scale a \
             loss first, or vouch for the gradient with accumulate_scaled_grad"
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

    /// The optimizer's slot, made at its first call; `None` if disabled.
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
            // Before the optimizer is claimed: another scaler may be the right one.
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
            // With one flag for all, whoever overflows skips all steps.
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
