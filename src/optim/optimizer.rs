//! What an optimizer is to those who drive it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Result;
use crate::launch::update_pass::StepScalars;
use crate::optim::Parameter;
use crate::storage::Tensor;

/// Identity of an optimizer, never given twice in a process. Held by the optimizer for its whole life: when
/// the last clone is gone, whoever kept something for the optimizer may let go of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OptimizerId(Arc<u64>);

impl OptimizerId {
    /// An identity that no optimizer has had yet.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "a default value would not suggest a fresh one"
    )]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: the number only has to be unique.
        Self(Arc::new(NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// The number behind it.
    #[must_use]
    pub fn number(&self) -> u64 {
        *self.0
    }

    /// Tells, without keeping it, whether the optimizer still exists.
    pub(crate) fn downgrade(&self) -> std::sync::Weak<u64> {
        Arc::downgrade(&self.0)
    }
}

/// What decides and scales one step: f32 tensors of one element, read on the device when the step runs.
#[derive(Clone, Debug, Default)]
pub struct StepInputs {
    /// The step must change nothing at all unless this is 0. Any other value skips, NaN too.
    pub found_inf: Option<Tensor>,
    /// Gradients are still multiplied by the loss scale, and this is its inverse.
    pub inv_scale: Option<Tensor>,
    /// Gradients are to be multiplied by this after unscaling: the clip coefficient.
    pub clip: Option<Tensor>,
}

impl StepInputs {
    pub(super) fn scalars(&self) -> Result<StepScalars> {
        let span = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::span).transpose();
        Ok(StepScalars {
            found_inf: span(&self.found_inf)?,
            inv_scale: span(&self.inv_scale)?,
            clip: span(&self.clip)?,
        })
    }
}

/// Moves parameters by their gradients.
pub trait Optimizer {
    /// The identity this optimizer was made with.
    fn id(&self) -> &OptimizerId;

    /// The parameters it moves, always in the same order.
    fn parameters(&self) -> &[Parameter];

    /// Enqueues one step for every parameter that has a gradient. The host does not wait. Gradients are
    /// only read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the inputs do not fit or two gradients
    /// share memory; [`Error::OutOfMemory`](crate::Error::OutOfMemory) in a first step. Nothing was moved.
    fn step(&mut self, inputs: &StepInputs) -> Result<()>;

    /// One step with gradients that need neither unscaling nor clipping, which is always applied.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn step_unscaled(&mut self) -> Result<()> {
        self.step(&StepInputs::default())
    }

    /// Drops the gradients of all parameters.
    fn zero_grad(&self) {
        self.parameters().iter().for_each(Parameter::zero_grad);
    }
}
