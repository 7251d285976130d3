//! An optimizer with its scaler: the common loop in three calls.
//!
//! [`AmpOptimizer::step`] does everything that belongs between two iterations, in the one correct order: set the
//! schedule's learning rate, clip, step, update averages and step count while the flag is still set, update the
//! scale. It does not wait for the device, except as far as [`AppliedSteps`] does for a schedule.
//!
//! Must not know: how an optimizer moves a weight.

use crate::amp::config::narrow;
use crate::amp::slot::Stage;
use crate::amp::{
    AmpConfig, AppliedSteps, AppliedStepsState, GradScaler, ScalerState, StepOutcome,
};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::NormKind;
use crate::ops::Loss;
use crate::ops::autocast::AutocastGuard;
use crate::optim::{
    Ema, EmaState, Optimizer, OptimizerState, Parameter, Schedule, first_repeated, load_optimizer,
    saved_groups, setting_names,
};
use crate::storage::{Load, Tensor};

/// The setting that a schedule moves.
const LEARNING_RATE: &str = "learning_rate";
/// The names under which a load can keep the norm limit, the schedule's form and the averages' decay.
const CLIP: &str = "clip";
const SCHEDULE: &str = "schedule";
const EMA_DECAY: &str = "ema_decay";

/// An optimizer, the [`GradScaler`] that drives it, and optionally clipping, a schedule and averages.
///
/// ```
/// use kitsune::amp::{AmpConfig, AmpOptimizer};
/// use kitsune::optim::{AdamW, AdamWConfig, Decay, Parameter, Schedule};
/// use kitsune::{Context, DType, Device, Tensor, ops};
///
/// # fn main() -> kitsune::Result<()> {
/// let context = Context::new(&Device::auto()?)?;
/// let weight = Parameter::new("weight", Tensor::full(&context, [3, 4], DType::F32, 0.1)?)?;
/// # let data = Tensor::full(&context, [2, 4], DType::F32, 1.0)?;
/// # let labels = Tensor::from_slice(&context, [2], &[0u32, 2])?;
/// let adamw = AdamW::new(vec![weight.clone()], AdamWConfig::default())?;
/// let decay = Decay::Cosine { steps: 1000, floor: 0.1 };
/// let mut optimizer = AmpOptimizer::new(adamw, AmpConfig::default())?
///     .with_clip(1.0)?
///     .with_schedule(Schedule { warmup: 100, decay })?
///     .with_ema(0.999)?;
/// for _ in 0..3 {
///     let scope = optimizer.autocast();
///     let layer = ops::linear(&data, weight.value(), None)?;
///     let loss = ops::softmax_cross_entropy(layer.output(), &labels)?;
///     drop(scope);
///     let grad = optimizer.backward(&loss)?;
///     optimizer.accumulate(&weight, layer.backward(&grad)?.weight)?;
///     let _ = optimizer.step()?;
///     optimizer.zero_grad();
/// }
/// # assert_eq!(optimizer.applied_steps().expect("a schedule").exact()?, 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AmpOptimizer<O> {
    optimizer: O,
    scaler: GradScaler,
    clip: Option<(f64, NormKind)>,
    schedule: Option<Scheduled>,
    ema: Option<Ema>,
}

/// A schedule, the rates it multiplies, and the step count that advances it.
#[derive(Debug)]
struct Scheduled {
    schedule: Schedule,
    /// The base learning rate of each group.
    base_rates: Vec<f64>,
    applied: AppliedSteps,
}

/// An [`AmpOptimizer`] as a value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AmpOptimizerState {
    /// The state of the optimizer.
    pub optimizer: OptimizerState,
    /// The limit of the gradients' norm. `None` in files of version 1: loading leaves the limit unchanged.
    pub clip: Option<ClipState>,
    /// The state of the scaler.
    pub scaler: ScalerState,
    /// The position in the schedule, if there is one.
    pub schedule: Option<ScheduleState>,
    /// The averages, if there are any.
    pub ema: Option<EmaState>,
}

impl AmpOptimizerState {
    /// Keys missing from this state, scaler aside, as `part/key`. An optimizer that loads it keeps its own values for
    /// them.
    #[must_use]
    pub fn lacks(&self) -> Vec<String> {
        let rule = self.optimizer.lacks().into_iter();
        let rule = rule.map(|what| format!("optimizer/{what}"));
        let clip = self.clip.is_none().then(|| "optimizer/clip".to_owned());
        let form = self.schedule.as_ref();
        let form = form.filter(|schedule| schedule.form.is_none());
        rule.chain(clip)
            .chain(form.map(|_| "schedule/form".to_owned()))
            .collect()
    }
}

/// Whether an [`AmpOptimizer`] clips, and to which norm.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipState {
    /// No clipping.
    Off,
    /// Clips to this L2 norm.
    MaxNorm(f64),
    /// Computes the norm but never clips a finite one.
    Unlimited,
}

/// The position of an [`AmpOptimizer`] in its schedule.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleState {
    /// The rates that the schedule multiplies: the learning rate of each group.
    pub base_rates: Vec<f64>,
    /// The count of applied steps.
    pub applied: AppliedStepsState,
    /// The schedule itself. Loading compares it and does not replace it. `None` in files of version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub form: Option<Schedule>,
}

impl<O: Optimizer> AmpOptimizer<O> {
    /// Wraps `optimizer` with a new scaler on its stream.
    ///
    /// # Errors
    /// As [`GradScaler::new`]; [`Error::InvalidArgument`] for an optimizer without parameters, or with two of one name.
    pub fn new(optimizer: O, config: AmpConfig) -> Result<Self> {
        let parameters = optimizer.parameters();
        let Some(first) = parameters.first() else {
            return Err(Error::argument("AmpOptimizer", "no parameters"));
        };
        if let Some((_, twice)) = first_repeated(parameters.iter().map(Parameter::name)) {
            let reason = format!("two parameters are named `{}`", parameters[twice].name());
            return Err(Error::argument("AmpOptimizer", reason));
        }
        let scaler = GradScaler::new(first.value().context(), config)?;
        Ok(Self {
            optimizer,
            scaler,
            clip: None,
            schedule: None,
            ema: None,
        })
    }

    /// Clips gradients to a total L2 norm of `max_norm` in each step.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or NaN norm, or a positive one that becomes 0 in the compute type of
    /// one of the parameters.
    pub fn with_clip(mut self, max_norm: f64) -> Result<Self> {
        self.check_max_norm(max_norm)
            .map_err(|reason| Error::argument("with_clip", reason))?;
        self.clip = Some((max_norm, NormKind::L2));
        Ok(self)
    }

    /// Refuses an invalid `max_norm`, with the reason.
    fn check_max_norm(&self, max_norm: f64) -> Result<(), String> {
        if max_norm.is_nan() || max_norm < 0.0 {
            return Err(format!("max_norm is {max_norm}, not zero or more"));
        }
        let is_narrow = |parameter: &Parameter| parameter.value().dtype() != DType::F64;
        if max_norm > 0.0
            && narrow(max_norm) == 0.0
            && self.optimizer.parameters().iter().any(is_narrow)
        {
            return Err(format!(
                "max_norm {max_norm:e} becomes 0 in f32, the type of the computation"
            ));
        }
        Ok(())
    }

    /// Before each step, multiplies the learning rates that the optimizer's groups have now by the schedule's factor.
    /// The factor advances on applied steps only, as [`AppliedSteps`] counts them.
    ///
    /// # Errors
    /// As [`Schedule::validate`]; [`Error::InvalidArgument`] for an optimizer with no `learning_rate` among its
    /// settings.
    pub fn with_schedule(mut self, schedule: Schedule) -> Result<Self> {
        schedule.validate()?;
        let rate = |group| {
            let rate = learning_rate(&self.optimizer, group);
            let reason = || format!("group {group} of the optimizer has no {LEARNING_RATE}");
            rate.ok_or_else(|| Error::argument("with_schedule", reason()))
        };
        let base_rates = (0..self.optimizer.groups().len()).map(rate);
        let base_rates = base_rates.collect::<Result<_>>()?;
        self.schedule = Some(Scheduled {
            schedule,
            base_rates,
            applied: AppliedSteps::new(),
        });
        Ok(self)
    }

    /// Keeps averages of the parameters, or of their f32 masters. They move on applied steps only.
    ///
    /// # Errors
    /// As [`Ema::of`].
    pub fn with_ema(mut self, decay: f64) -> Result<Self> {
        self.ema = Some(Ema::of(&self.optimizer, decay)?);
        Ok(self)
    }

    /// Runs operations in the settings' 16-bit type while the guard lives.
    #[must_use]
    pub fn autocast(&self) -> AutocastGuard {
        self.scaler.config().autocast()
    }

    /// The gradient of the scaled loss with respect to the logits, from which the backward pass starts.
    ///
    /// # Errors
    /// As [`GradScaler::scale`] and [`Loss::backward`].
    pub fn backward(&self, loss: &Loss) -> Result<Tensor> {
        self.scaler.scale(loss)?.backward()
    }

    /// Adds `grad`, a result of [`backward`](Self::backward), to the gradient of `parameter` and marks it as scaled.
    /// `parameter` need not belong to this optimizer: another's gradient stays scaled until its own optimizer
    /// unscales it.
    ///
    /// # Errors
    /// As [`Parameter::accumulate_scaled_grad`], and [`Error::InvalidArgument`] if a state was loaded after the last loss
    /// was scaled.
    pub fn accumulate(&self, parameter: &Parameter, grad: Tensor) -> Result<()> {
        self.scaler.expect_fresh_loss("accumulate", parameter)?;
        parameter.accumulate_scaled_grad(grad, self.scaler.tag())
    }

    /// Enqueues a whole step, in the order described at the top of this module. Gradients stay until
    /// [`zero_grad`](Self::zero_grad).
    ///
    /// # Errors
    /// As the calls it is made of. A failure before the optimizer's step leaves weights, optimizer state and averages
    /// as they were: repeat the call, or update the [scaler](Self::scaler_mut) and continue with other gradients. A
    /// failure after it does not stop the remaining parts: the step's record, the averages, the count of applied
    /// steps, the scale's update. If the scale's update itself fails, call `scaler_mut().update()`.
    /// [`Error::ScalerAlarm`] is returned after everything was enqueued; training may continue.
    pub fn step(&mut self) -> Result<StepOutcome> {
        self.set_rates()?;
        if let Some((max_norm, kind)) = self.clip {
            self.scaler
                .clip_grad_norm_by(&self.optimizer, max_norm, kind)?;
        }
        let is_due = self.scaler.stage(&self.optimizer) == Stage::Stepped;
        let outcome = self.scaler.step(&mut self.optimizer);
        let has_stepped = self.scaler.stage(&self.optimizer) == Stage::Stepped;
        if outcome.is_err() && (is_due || !has_stepped) {
            return outcome;
        }
        let flag = self.scaler.found_inf(&self.optimizer);
        let averaged = self.ema.as_mut().map_or(Ok(()), |ema| ema.update(flag));
        let scheduled = self.schedule.as_mut();
        let counted = scheduled.map_or(Ok(()), |scheduled| scheduled.applied.record(flag));
        let updated = self.scaler.update();
        let outcome = outcome?;
        averaged.and(counted).and(updated)?;
        Ok(outcome)
    }

    /// Drops the gradients of all parameters.
    pub fn zero_grad(&self) {
        self.optimizer.zero_grad();
    }

    /// The factor on the learning rates in the next step; 1 without a schedule.
    #[must_use]
    pub fn schedule_factor(&self) -> f64 {
        self.schedule.as_ref().map_or(1.0, Scheduled::factor)
    }

    /// The optimizer.
    #[must_use]
    pub fn optimizer(&self) -> &O {
        &self.optimizer
    }

    /// The optimizer, to change its settings. A schedule overwrites its learning rates.
    pub fn optimizer_mut(&mut self) -> &mut O {
        &mut self.optimizer
    }

    /// The scaler.
    #[must_use]
    pub fn scaler(&self) -> &GradScaler {
        &self.scaler
    }

    /// The scaler, to look at gradients within an iteration or to set the scale.
    pub fn scaler_mut(&mut self) -> &mut GradScaler {
        &mut self.scaler
    }

    /// The count of applied steps that moves the schedule; `None` without one.
    #[must_use]
    pub fn applied_steps(&self) -> Option<&AppliedSteps> {
        self.schedule.as_ref().map(|scheduled| &scheduled.applied)
    }

    /// The averages, if they are kept.
    #[must_use]
    pub fn ema(&self) -> Option<&Ema> {
        self.ema.as_ref()
    }

    /// The whole state as a value, except the parameters. Waits for the device.
    ///
    /// # Errors
    /// As [`GradScaler::state_dict`], [`Optimizer::state_dict`] and [`AppliedSteps::state_dict`].
    pub fn state_dict(&self) -> Result<AmpOptimizerState> {
        Ok(AmpOptimizerState {
            optimizer: self.optimizer.state_dict()?,
            clip: Some(match self.clip {
                None => ClipState::Off,
                Some((max_norm, _)) if max_norm.is_infinite() => ClipState::Unlimited,
                Some((max_norm, _)) => ClipState::MaxNorm(max_norm),
            }),
            scaler: self.scaler.state_dict()?,
            schedule: self.schedule.as_ref().map(Scheduled::state).transpose()?,
            ema: self.ema.as_ref().map(Ema::state_dict).transpose()?,
        })
    }

    /// Resumes from `state`, at any time. The optimizer loads as [`Optimizer::load_state_dict`] describes; clipping,
    /// averages and the position in the schedule become the saved ones. The schedule itself must equal the saved one.
    /// An iteration in progress is abandoned, as by [`GradScaler::load_state_dict`]. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the part that does not fit, including a schedule or averages that only one side
    /// has; [`Error::Driver`] if the driver refuses. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &AmpOptimizerState) -> Result<()> {
        self.load_state_dict_keeping(state, &[])
    }

    /// [`load_state_dict`](Self::load_state_dict), except that settings named in `kept` are left unchanged: settings
    /// of the optimizer (`learning_rate` includes the rates that the schedule multiplies), `clip`, `schedule` and
    /// `ema_decay`.
    ///
    /// # Errors
    /// As [`load_state_dict`](Self::load_state_dict), and for any other name.
    pub fn load_state_dict_keeping(
        &mut self,
        state: &AmpOptimizerState,
        kept: &[&str],
    ) -> Result<()> {
        let known = self.setting_names();
        if let Some(name) = kept.iter().find(|name| !known.contains(*name)) {
            let reason = format!("is not a setting; the settings are {}", known.join(", "));
            return Err(Error::state(*name, reason));
        }
        self.load(state, kept)?.carry_out()
    }

    /// The names of all settings that a load can keep.
    pub(crate) fn setting_names(&self) -> Vec<&'static str> {
        let names = setting_names(&self.optimizer).into_iter();
        let scheduled = self.schedule.is_some().then_some(SCHEDULE);
        let averaged = self.ema.is_some().then_some(EMA_DECAY);
        names
            .chain([CLIP])
            .chain(scheduled)
            .chain(averaged)
            .collect()
    }

    /// [`load_state_dict_keeping`](Self::load_state_dict_keeping), checked but not carried out yet.
    pub(crate) fn load(&mut self, state: &AmpOptimizerState, kept: &[&str]) -> Result<Load<'_>> {
        let is_kept = |name: &str| kept.contains(&name);
        let clip = match state.clip.filter(|_| !is_kept(CLIP)) {
            None => self.clip,
            Some(saved) => self.clip_of(saved)?,
        };
        let sources = saved_groups(&self.optimizer, &state.optimizer);
        let sources = sources.map_err(|error| error.within("optimizer"))?;
        let groups_saved = state.optimizer.groups.len();
        let optimizer = load_optimizer(&mut self.optimizer, &state.optimizer, kept);
        let scaler = self.scaler.load(&state.scaler);
        let mut load = optimizer
            .map_err(|error| error.within("optimizer"))?
            .and(scaler.map_err(|error| error.within("scaler"))?);
        match (&mut self.schedule, &state.schedule) {
            (None, None) => {}
            (Some(scheduled), Some(state)) => {
                scheduled.check_form(state.form.filter(|_| !is_kept(SCHEDULE)))?;
                let (saved_rates, applied) = Scheduled::check(state, groups_saved)?;
                let base_rates = match is_kept(LEARNING_RATE) {
                    true => scheduled.base_rates.clone(),
                    false => scheduled.regrouped(&saved_rates, &sources)?,
                };
                load = load.then(move || {
                    scheduled.base_rates = base_rates;
                    scheduled.applied = applied;
                });
            }
            (here, _) => return Err(one_sided("schedule", here.is_some())),
        }
        match (&mut self.ema, &state.ema) {
            (None, None) => {}
            (Some(ema), Some(state)) => {
                let averages = ema.load(state, is_kept(EMA_DECAY));
                load = load.and(averages.map_err(|error| error.within("ema"))?);
            }
            (here, _) => return Err(one_sided("ema", here.is_some())),
        }
        let limit = &mut self.clip;
        Ok(load.then(move || *limit = clip))
    }

    /// The saved limit, checked.
    fn clip_of(&self, saved: ClipState) -> Result<Option<(f64, NormKind)>> {
        let max_norm = match saved {
            ClipState::Off => return Ok(None),
            ClipState::MaxNorm(max_norm) => max_norm,
            ClipState::Unlimited => f64::INFINITY,
        };
        self.check_max_norm(max_norm)
            .map_err(|reason| Error::state("optimizer/clip", reason))?;
        Ok(Some((max_norm, NormKind::L2)))
    }

    /// Sets the learning rate of each group for the next step.
    fn set_rates(&mut self) -> Result<()> {
        let factor = self.schedule_factor();
        let Some(scheduled) = &self.schedule else {
            return Ok(());
        };
        for (group, base) in scheduled.base_rates.iter().enumerate() {
            let rate = base * factor;
            if learning_rate(&self.optimizer, group) != Some(rate) {
                self.optimizer
                    .set_settings(group, &[(LEARNING_RATE, rate)])?;
            }
        }
        Ok(())
    }
}

impl Scheduled {
    fn factor(&self) -> f64 {
        self.schedule.factor(self.applied.count())
    }

    fn state(&self) -> Result<ScheduleState> {
        Ok(ScheduleState {
            base_rates: self.base_rates.clone(),
            applied: self.applied.state_dict()?,
            form: Some(self.schedule),
        })
    }

    /// Refuses a schedule that differs from the saved one, if that is known.
    fn check_form(&self, saved: Option<Schedule>) -> Result<()> {
        match saved.filter(|saved| *saved != self.schedule) {
            None => Ok(()),
            Some(saved) => {
                let reason = format!(
                    "saved from {saved:?}, this is {:?}; keep `{SCHEDULE}` to continue with this one",
                    self.schedule
                );
                Err(Error::state("schedule/form", reason))
            }
        }
    }

    /// The rate of each group here, taken from the saved groups that its parameters were in.
    fn regrouped(&self, saved: &[f64], sources: &[Vec<usize>]) -> Result<Vec<f64>> {
        let refuse = |reason| Err(Error::state("schedule/base_rates", reason));
        let groups = sources.iter().zip(&self.base_rates).enumerate();
        let rates = groups.map(|(number, (sources, here))| {
            let mut rate = None;
            for source in sources {
                let Some(saved) = saved.get(*source).copied() else {
                    return refuse(format!("there is none for group {source}"));
                };
                match rate {
                    Some(other) if other != saved => {
                        return refuse(format!(
                            "the parameters of group {number} were saved in groups with {other:?} and {saved:?}"
                        ));
                    }
                    _ => rate = Some(saved),
                }
            }
            Ok(rate.unwrap_or(*here))
        });
        rates.collect()
    }

    /// The contents of `state`, which was saved with `groups` groups, checked.
    fn check(state: &ScheduleState, groups: usize) -> Result<(Vec<f64>, AppliedSteps)> {
        let ScheduleState {
            base_rates,
            applied,
            ..
        } = state;
        let refuse = |reason| Err(Error::state("schedule/base_rates", reason));
        if base_rates.len() != groups {
            let rates = base_rates.len();
            return refuse(format!("{rates} were saved, with {groups} groups"));
        }
        if let Some(rate) = base_rates
            .iter()
            .find(|rate| !(rate.is_finite() && **rate >= 0.0))
        {
            return refuse(format!("{rate} is not a finite number of 0 or more"));
        }
        let applied = AppliedSteps::from_state(applied);
        let applied = applied.map_err(|error| error.within("schedule"))?;
        Ok((base_rates.clone(), applied))
    }
}

fn learning_rate<O: Optimizer>(optimizer: &O, group: usize) -> Option<f64> {
    let settings = optimizer.settings(group);
    settings
        .into_iter()
        .find_map(|(name, value)| (name == LEARNING_RATE).then_some(value))
}

/// The error for a part that only one side has.
fn one_sided(part: &'static str, is_here: bool) -> Error {
    let reason = match is_here {
        true => "the saved state has no such part",
        false => "was saved, but this optimizer has none",
    };
    Error::state(part, reason)
}
