//! Putting a checkpoint back: every part is checked when it is named, and all of them change at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::DeserializeOwned;

use super::optimizer::OptimizerPart;
use super::{APPLIED, Checkpoint, EMA, MODEL, OPTIMIZER, Part, SCALER, SCHEDULE, within};
use crate::amp::fp8::{Fp8Scaler, Fp8State};
use crate::amp::{AmpOptimizer, AmpOptimizerState, AppliedSteps, GradScaler};
use crate::error::{Error, Result};
use crate::optim::{
    Ema, EmaState, Optimizer, Parameter, load_optimizer, match_named, setting_names, values,
};
use crate::storage::Load;

/// A restoration under way. Each method checks one part; [`finish`](Self::finish) changes all that was named,
/// or nothing.
#[must_use = "nothing is restored before `finish`"]
pub struct Restore<'a> {
    saved: &'a Checkpoint,
    load: Load<'a>,
    taken: BTreeSet<String>,
    lacks: Vec<String>,
    /// Settings that stay as they are, and whether some part has them.
    kept: BTreeMap<String, bool>,
}

impl<'a> Restore<'a> {
    pub(super) fn new(saved: &'a Checkpoint) -> Self {
        Self {
            saved,
            load: Load::default(),
            taken: BTreeSet::new(),
            lacks: Vec::new(),
            kept: BTreeMap::new(),
        }
    }

    /// Keeps the settings of these names as the program set them, in all optimizers that are named afterwards:
    /// `learning_rate`, `weight_decay` and so on, and of an [`AmpOptimizer`] also `clip`, `schedule` and `ema_decay`.
    /// With `learning_rate` goes what a schedule multiplies. Other settings become the saved ones.
    ///
    /// ```
    /// # use kitsune::checkpoint::Checkpoint;
    /// # use kitsune::optim::{Parameter, Sgd, SgdConfig};
    /// # use kitsune::{Context, DType, Device, Tensor};
    /// # fn main() -> kitsune::Result<()> {
    /// # let context = Context::new(&Device::auto()?)?;
    /// # let weight = Parameter::new("weight", Tensor::zeros(&context, [2], DType::F32)?)?;
    /// # let mut optimizer = Sgd::new(vec![weight], SgdConfig::default())?;
    /// # let mut saved = Checkpoint::new();
    /// # saved.add_optimizer("optimizer", &optimizer)?;
    /// optimizer.set_learning_rate(1e-4)?;
    /// let restore = saved.restore().keeping_settings(["learning_rate"]);
    /// restore.optimizer("optimizer", &mut optimizer)?.finish()?;
    /// assert_eq!(optimizer.config().learning_rate, 1e-4);
    /// # Ok(())
    /// # }
    /// ```
    pub fn keeping_settings<S: Into<String>>(mut self, names: impl IntoIterator<Item = S>) -> Self {
        let names = names.into_iter().map(|name| (name.into(), false));
        self.kept.extend(names);
        self
    }

    /// What the checkpoint did not say of the parts named so far, as `part/what`, and what therefore is as it was where
    /// the state goes: `optimizer/rule` if the rule could not be compared. Empty for files of this version, but for
    /// optimizers that do not say by which [rule](Optimizer::rule) they move parameters.
    #[must_use]
    pub fn lacks(&self) -> &[String] {
        &self.lacks
    }

    /// Gives `parameters` their saved values. Master weights are the optimizer's; without its part they are made anew
    /// from these values before its next step. Before launches of a graph that captured a step, call
    /// `reload_master_weights`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the name of the part, or of each tensor, that is missing on one side, differs in
    /// shape or type, or is named twice.
    pub fn model(mut self, parameters: &[Parameter]) -> Result<Self> {
        let part = self.take(MODEL)?;
        settings::<()>(MODEL, part)?;
        let writes = within(MODEL, match_named(values(parameters), &part.tensors))?;
        Ok(self.with(Load::writing(writes)))
    }

    /// Puts the part `name` into `optimizer`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`Optimizer::load_state_dict`].
    pub fn optimizer<O: Optimizer + ?Sized>(
        mut self,
        name: &str,
        optimizer: &'a mut O,
    ) -> Result<Self> {
        let (state, _) = OptimizerPart::read(name, self.take(name)?)?;
        if optimizer.rule().is_some() {
            self.lack(name, state.lacks());
        }
        let known = setting_names(optimizer);
        let kept = self.keep(|name| known.contains(name));
        let load = within(name, load_optimizer(optimizer, &state, &names(&kept)))?;
        Ok(self.with(load))
    }

    /// Puts the scaler's part into `scaler`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`GradScaler::load_state_dict`].
    pub fn scaler(mut self, scaler: &'a mut GradScaler) -> Result<Self> {
        let state = settings(SCALER, self.take(SCALER)?)?;
        self.lack(SCALER, scaler.keeps_on_load(&state));
        let load = within(SCALER, scaler.load(&state))?;
        Ok(self.with(load))
    }

    /// Puts the part `name` into `scaler`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`Fp8Scaler::load_state_dict`].
    pub fn fp8_scaler(mut self, name: &str, scaler: &'a mut Fp8Scaler) -> Result<Self> {
        let state: Fp8State = settings(name, self.take(name)?)?;
        self.lack(name, state.lacks());
        let load = within(name, scaler.load(&state))?;
        Ok(self.with(load))
    }

    /// Puts the averages into `ema`.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn ema(mut self, ema: &'a mut Ema) -> Result<Self> {
        let state = self.ema_state()?;
        let load = within(EMA, ema.load(&state, false))?;
        Ok(self.with(load))
    }

    /// Puts the count into `applied`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`AppliedSteps::load_state_dict`].
    pub fn applied_steps(mut self, applied: &'a mut AppliedSteps) -> Result<Self> {
        let part = self.take(APPLIED)?;
        let state = AppliedSteps::from_state(&settings(APPLIED, part)?);
        let state = within(APPLIED, state)?;
        Ok(self.with(Load::default().then(move || *applied = state)))
    }

    /// Puts back all that `optimizer` holds.
    ///
    /// # Errors
    /// As the others; also if one side has a schedule or averages and the other has not.
    pub fn amp_optimizer<O: Optimizer>(
        mut self,
        optimizer: &'a mut AmpOptimizer<O>,
    ) -> Result<Self> {
        let (state, clip) = OptimizerPart::read(OPTIMIZER, self.take(OPTIMIZER)?)?;
        let state = AmpOptimizerState {
            optimizer: state,
            clip,
            scaler: settings(SCALER, self.take(SCALER)?)?,
            schedule: self.if_saved(SCHEDULE, |this| settings(SCHEDULE, this.take(SCHEDULE)?))?,
            ema: self.if_saved(EMA, Self::ema_state)?,
        };
        self.lacks.extend(state.lacks());
        self.lack(SCALER, optimizer.scaler().keeps_on_load(&state.scaler));
        let known = optimizer.setting_names();
        let kept = self.keep(|name| known.contains(&name));
        let load = optimizer.load(&state, &names(&kept))?;
        Ok(self.with(load))
    }

    /// Leaves the part `name` alone, which would otherwise have to be restored.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if there is none, or it is named twice.
    pub fn ignore(mut self, name: &str) -> Result<Self> {
        self.take(name)?;
        Ok(self)
    }

    /// Changes everything that was named, in stream order, and waits until it is done. Captured graphs find all
    /// memory where it was.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for a part of the checkpoint that was not named, a setting that its optimizer
    /// refuses, or one to be kept that no part has; [`Error::Driver`] if the driver refuses. Then all is as before; should it refuse that, too, the error
    /// says so.
    pub fn finish(self) -> Result<()> {
        let left = self.saved.parts().find(|name| !self.taken.contains(*name));
        if let Some(name) = left {
            let reason = "was saved, and nothing takes it; restore it or ignore it";
            return Err(Error::state(name, reason));
        }
        if let Some((name, _)) = self.kept.iter().find(|(_, is_known)| !**is_known) {
            let reason = "is to be kept, and is no setting of what was restored after it was named";
            return Err(Error::state(name, reason));
        }
        self.load.carry_out()
    }

    /// Those of the settings to be kept that a part has.
    fn keep(&mut self, is_known: impl Fn(&str) -> bool) -> Vec<String> {
        let known = self.kept.iter_mut().filter(|(name, _)| is_known(name));
        let kept = known.map(|(name, seen)| {
            *seen = true;
            name.clone()
        });
        kept.collect()
    }

    /// Notes what the part `name` does not say.
    fn lack(&mut self, name: &str, what: Vec<&'static str>) {
        let what = what.into_iter().map(|what| format!("{name}/{what}"));
        self.lacks.extend(what);
    }

    fn with(self, load: Load<'a>) -> Self {
        Self {
            load: self.load.and(load),
            ..self
        }
    }

    /// The part `name`, once.
    fn take(&mut self, name: &str) -> Result<&'a Part> {
        let Some(part) = self.saved.parts.get(name) else {
            return Err(Error::state(name, "the saved state has no such part"));
        };
        if !self.taken.insert(name.to_owned()) {
            return Err(Error::state(name, "is restored twice"));
        }
        Ok(part)
    }

    fn ema_state(&mut self) -> Result<EmaState> {
        let part = self.take(EMA)?;
        Ok(EmaState {
            decay: settings(EMA, part)?,
            averages: part.tensors.clone(),
        })
    }

    fn if_saved<T>(
        &mut self,
        name: &str,
        take: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<Option<T>> {
        self.saved
            .parts
            .contains_key(name)
            .then(|| take(self))
            .transpose()
    }
}

fn names(kept: &[String]) -> Vec<&str> {
    kept.iter().map(String::as_str).collect()
}

/// The settings of `part` as what they were.
fn settings<T: DeserializeOwned>(name: &str, part: &Part) -> Result<T> {
    T::deserialize(&part.settings).map_err(|error| Error::state(name, error.to_string()))
}

impl fmt::Debug for Restore<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Restore({:?}, {:?})", self.taken, self.load)
    }
}
