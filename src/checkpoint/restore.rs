//! Putting a checkpoint back: every part is checked when it is named, and all of them change at once.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::DeserializeOwned;

use super::{APPLIED, Checkpoint, EMA, MODEL, OPTIMIZER, Part, SCALER, SCHEDULE, within};
use crate::amp::fp8::Fp8Scaler;
use crate::amp::{AmpOptimizer, AmpOptimizerState, AppliedSteps, GradScaler};
use crate::error::{Error, Result};
use crate::optim::{
    Ema, EmaState, Optimizer, OptimizerState, Parameter, load_optimizer, match_named, values,
};
use crate::storage::Load;

/// A restoration under way. Each method checks one part; [`finish`](Self::finish) changes all that was named,
/// or nothing.
#[must_use = "nothing is restored before `finish`"]
pub struct Restore<'a> {
    saved: &'a Checkpoint,
    load: Load<'a>,
    taken: BTreeSet<String>,
}

impl<'a> Restore<'a> {
    pub(super) fn new(saved: &'a Checkpoint) -> Self {
        Self {
            saved,
            load: Load::default(),
            taken: BTreeSet::new(),
        }
    }

    /// Gives `parameters` their saved values. Master weights are the optimizer's: without it, call its
    /// `reload_master_weights` afterwards.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the name of the part or tensor that is missing on one side, differs in shape
    /// or type, or is named twice.
    pub fn model(mut self, parameters: &[Parameter]) -> Result<Self> {
        let part = self.take(MODEL)?;
        settings::<()>(MODEL, part)?;
        let writes = within(MODEL, match_named(values(parameters), &part.tensors))?;
        Ok(self.with(Load::writing(writes)))
    }

    /// Puts the part `name` into `optimizer`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and for settings that differ in name.
    pub fn optimizer<O: Optimizer + ?Sized>(
        mut self,
        name: &str,
        optimizer: &'a mut O,
    ) -> Result<Self> {
        let state = self.optimizer_state(name)?;
        let load = within(name, load_optimizer(optimizer, &state))?;
        Ok(self.with(load))
    }

    /// Puts the scaler's part into `scaler`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`GradScaler::load_state_dict`].
    pub fn scaler(mut self, scaler: &'a mut GradScaler) -> Result<Self> {
        let part = self.take(SCALER)?;
        let load = within(SCALER, scaler.load(&settings(SCALER, part)?))?;
        Ok(self.with(load))
    }

    /// Puts the part `name` into `scaler`.
    ///
    /// # Errors
    /// As [`model`](Self::model), and as [`Fp8Scaler::load_state_dict`].
    pub fn fp8_scaler(mut self, name: &str, scaler: &'a mut Fp8Scaler) -> Result<Self> {
        let part = self.take(name)?;
        let load = within(name, scaler.load(&settings(name, part)?))?;
        Ok(self.with(load))
    }

    /// Puts the averages into `ema`.
    ///
    /// # Errors
    /// As [`model`](Self::model).
    pub fn ema(mut self, ema: &'a mut Ema) -> Result<Self> {
        let state = self.ema_state()?;
        let load = within(EMA, ema.load(&state))?;
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
        let state = AmpOptimizerState {
            optimizer: self.optimizer_state(OPTIMIZER)?,
            scaler: settings(SCALER, self.take(SCALER)?)?,
            schedule: self.if_saved(SCHEDULE, |this| settings(SCHEDULE, this.take(SCHEDULE)?))?,
            ema: self.if_saved(EMA, Self::ema_state)?,
        };
        let load = optimizer.load(&state)?;
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
    /// [`Error::InvalidState`] for a part of the checkpoint that was not named, or a setting that its optimizer
    /// refuses; [`Error::Driver`] if the driver refuses. Then all is as before; should it refuse that, too, the error
    /// says so.
    pub fn finish(self) -> Result<()> {
        let left = self.saved.parts().find(|name| !self.taken.contains(*name));
        if let Some(name) = left {
            let reason = "was saved, and nothing takes it; restore it or ignore it";
            return Err(Error::state(name, reason));
        }
        self.load.carry_out()
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

    fn optimizer_state(&mut self, name: &str) -> Result<OptimizerState> {
        let part = self.take(name)?;
        Ok(OptimizerState {
            groups: settings(name, part)?,
            tensors: part.tensors.clone(),
        })
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

/// The settings of `part` as what they were.
fn settings<T: DeserializeOwned>(name: &str, part: &Part) -> Result<T> {
    T::deserialize(&part.settings).map_err(|error| Error::state(name, error.to_string()))
}

impl fmt::Debug for Restore<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Restore({:?}, {:?})", self.taken, self.load)
    }
}
