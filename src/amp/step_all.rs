//! Steps of several optimizers in one call.
//!
//! All are checked before the first step, so that [`SkipPolicy::AllOrNone`](crate::amp::SkipPolicy::AllOrNone) finds
//! in time who overflows. Steps cannot be taken back: a failure among them tells which were made.

use std::fmt;

use crate::amp::slot::Stage;
use crate::amp::{GradScaler, StepOutcome};
use crate::error::{Error, Result};
use crate::optim::Optimizer;

/// Why [`GradScaler::step_all`] ended early, and what it had done by then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub struct StepAllError {
    /// What went wrong.
    pub error: Error,
    /// Outcomes of the steps that came before, in the order of their optimizers; they are enqueued.
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
    /// Before any step.
    fn from(error: Error) -> Self {
        let stepped = Vec::new();
        Self { error, stepped }
    }
}

impl From<StepAllError> for Error {
    /// What went wrong, without the outcomes.
    fn from(failed: StepAllError) -> Self {
        failed.error
    }
}

impl GradScaler {
    /// Checks the gradients of all `optimizers` that were not checked yet, then enqueues all steps. Under
    /// [`SkipPolicy::AllOrNone`](crate::amp::SkipPolicy::AllOrNone) they are skipped if one of them overflows.
    ///
    /// # Errors
    /// Those of [`step`](Self::step), beside the outcomes of the steps before; if a check fails, nothing was stepped.
    /// The call may be made again for the optimizers that are left: those from `stepped.len()` on, or from one later
    /// on if the error says "the step is enqueued, and only its record is missing".
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
