//! Steps several optimizers in one call.
//!
//! All optimizers are checked before the first step, so that
//! [`SkipPolicy::AllOrNone`](crate::amp::SkipPolicy::AllOrNone) knows of every overflow in time. Steps cannot be
//! undone, so the error of a failed call lists the steps that were made.

use std::fmt;

use crate::amp::slot::Stage;
use crate::amp::{GradScaler, StepOutcome};
use crate::error::{Error, Result};
use crate::optim::Optimizer;

/// Why [`GradScaler::step_all`] ended early, and the steps it had enqueued by then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub struct StepAllError {
    /// What went wrong.
    pub error: Error,
    /// Outcomes of the steps already enqueued, in the order of their optimizers.
    pub stepped: Vec<StepOutcome>,
}

impl fmt::Display for StepAllError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.error)?;
        match self.stepped.len() {
            0 => Ok(()),
            1 => write!(f, "; the step before is enqueued"),
            count => write!(f, "; the {count} steps before are enqueued"),
        }
    }
}

impl From<Error> for StepAllError {
    /// An error before any step.
    fn from(error: Error) -> Self {
        let stepped = Vec::new();
        Self { error, stepped }
    }
}

impl From<StepAllError> for Error {
    /// The underlying error, without the outcomes.
    fn from(failed: StepAllError) -> Self {
        failed.error
    }
}

impl GradScaler {
    /// Checks the gradients of all `optimizers` that were not checked yet, then enqueues all steps. Under
    /// [`SkipPolicy::AllOrNone`](crate::amp::SkipPolicy::AllOrNone) all of them are skipped if one overflows.
    ///
    /// # Errors
    /// Those of [`step`](Self::step), with the outcomes of the steps before it. If a check fails, nothing was
    /// stepped. Repeat the call with the remaining optimizers: those from `stepped.len()` on, or from the one after
    /// it if the error says "the step is enqueued, and only its record is missing".
    pub fn step_all(
        &mut self,
        optimizers: &mut [&mut dyn Optimizer],
    ) -> Result<Vec<StepOutcome>, StepAllError> {
        for optimizer in &*optimizers {
            if self.stage(&**optimizer) == Stage::Ready {
                self.check(&**optimizer)?;
            }
        }
        let mut stepped = Vec::with_capacity(optimizers.len());
        for optimizer in optimizers {
            match self.step(&mut **optimizer) {
                Ok(outcome) => stepped.push(outcome),
                Err(error) => return Err(StepAllError { error, stepped }),
            }
        }
        Ok(stepped)
    }
}
