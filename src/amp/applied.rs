//! Counting the steps that were applied, without waiting for them.
//!
//! A schedule of learning rates should not move when a step is skipped, but whether one was is known on the
//! host only when the device has got there. [`AppliedSteps`] therefore counts late, and always equally late:
//! a step is taken for applied until [`LAG`] later ones were enqueued, and only then for what it was. So the
//! count before each step depends on the outcomes alone and not on the pace of the device: the same training
//! has the same learning rates each time, also when it was stopped and resumed in between.
//!
//! What decided a step, its flag, is copied to pinned memory behind it. The host reads a copy when it is
//! [`LAG`] steps old, which as a rule it has long been made by then.

use std::collections::VecDeque;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::{PinnedBlock, PinnedPool};
use crate::storage::Tensor;

/// Steps by which the count is late.
const LAG: usize = 8;

/// The count of an optimizer's applied steps.
///
/// [`count`](Self::count) before step *k* is *k* less the steps that were skipped among those up to *k* − 9;
/// the last eight are taken for applied. The host waits only if the device is more than eight steps behind, and
/// only for the oldest of them: the device still has eight steps of work.
///
/// ```
/// # use kitsune::{amp::*, optim::*, *};
/// # fn train(scaler: &mut GradScaler, optimizer: &mut Sgd) -> Result<()> {
/// let schedule = Schedule { warmup: 100, ..Schedule::default() };
/// let mut applied = AppliedSteps::new();
/// # for _ in 0..3 {
/// // In each iteration:
/// optimizer.set_learning_rate(0.1 * schedule.factor(applied.count()))?;
/// let _ = scaler.step(optimizer)?;
/// applied.record(scaler.found_inf(optimizer))?;
/// scaler.update()?;
/// # }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct AppliedSteps {
    steps: u64,
    /// Among those before the recent ones.
    skipped: u64,
    /// The last steps, oldest first.
    recent: VecDeque<Recent>,
    pinned: Option<PinnedPool>,
}

#[derive(Debug)]
enum Recent {
    /// A copy of the flag, under way.
    Pending(PinnedBlock),
    Known {
        applied: bool,
    },
}

/// An [`AppliedSteps`] as a value.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppliedStepsState {
    /// Steps recorded.
    pub steps: u64,
    /// Those of them that were skipped and count as such by now.
    pub skipped: u64,
    /// Which of the last eight were applied, oldest first.
    pub recent: Vec<bool>,
}

impl AppliedSteps {
    /// A count of no steps.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the step before, by the flag that decided it: an f32 on the device, or `None` for one that could
    /// not be skipped. To be called between [`step`](crate::amp::GradScaler::step) and
    /// [`update`](crate::amp::GradScaler::update), which clears the flag.
    ///
    /// A step that is being captured is not run and does not count, and neither do its replays.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a flag that is not one f32; [`Error::OutOfMemory`] in the first calls;
    /// [`Error::Driver`] if work of the stream failed.
    pub fn record(&mut self, found_inf: Option<&Tensor>) -> Result<()> {
        let step = match found_inf {
            None => Recent::Known { applied: true },
            Some(flag) => {
                let stream = flag.context().stream();
                if stream.driver().is_capturing(stream.raw())? {
                    return Ok(());
                }
                Recent::Pending(self.copy(flag)?)
            }
        };
        if self.recent.len() == LAG
            && let Some(oldest) = self.recent.front()
        {
            self.skipped += u64::from(!oldest.wait()?);
            self.recent.pop_front();
        }
        self.recent.push_back(step);
        self.steps += 1;
        Ok(())
    }

    /// Enqueues a copy of `flag` to pinned memory.
    fn copy(&mut self, flag: &Tensor) -> Result<PinnedBlock> {
        if flag.dtype() != DType::F32 || flag.len() != 1 {
            let reason = format!("{flag:?} is not one f32");
            return Err(Error::argument("record", reason));
        }
        let device = flag.context().device();
        let pinned = self.pinned.get_or_insert_with(|| PinnedPool::new(device));
        let mut block = pinned.allocate(size_of::<f32>() as u64)?;
        flag.copy_to_pinned(&mut block)?;
        Ok(block)
    }

    /// Steps applied, as far as the type says they count.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.steps - self.skipped
    }

    /// Steps recorded, skipped or not.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The steps applied in truth. Waits for the device; [`count`](Self::count) stays as it is.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn exact(&self) -> Result<u64> {
        let state = self.state_dict()?;
        let skipped = state.recent.iter().filter(|applied| !**applied).count();
        Ok(self.count() - skipped as u64)
    }

    /// The count as a value, from which it goes on as it would have. Waits for the device.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn state_dict(&self) -> Result<AppliedStepsState> {
        Ok(AppliedStepsState {
            steps: self.steps,
            skipped: self.skipped,
            recent: self
                .recent
                .iter()
                .map(Recent::wait)
                .collect::<Result<_>>()?,
        })
    }

    /// Goes on from `state`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for counts that cannot be. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &AppliedStepsState) -> Result<()> {
        *self = Self::from_state(state)?;
        Ok(())
    }

    pub(crate) fn from_state(state: &AppliedStepsState) -> Result<Self> {
        let AppliedStepsState {
            steps,
            skipped,
            recent,
        } = state;
        let expected = steps.min(&(LAG as u64));
        if recent.len() as u64 != *expected {
            let reason = format!(
                "{} outcomes, not {expected}, of {steps} steps",
                recent.len()
            );
            return Err(Error::state("recent", reason));
        }
        if *skipped > steps - expected {
            return Err(Error::state(
                "skipped",
                format!("{skipped} of {steps} steps"),
            ));
        }
        let known = recent
            .iter()
            .map(|applied| Recent::Known { applied: *applied });
        Ok(Self {
            steps: *steps,
            skipped: *skipped,
            recent: known.collect(),
            pinned: None,
        })
    }
}

impl Recent {
    /// Whether the step was applied, once the device has got there.
    fn wait(&self) -> Result<bool> {
        match self {
            Self::Pending(copy) => {
                let bytes = copy.as_slice()?;
                let bytes = bytes.try_into().expect("blocks of four bytes");
                // NaN is not equal to 0 either.
                Ok(f32::from_ne_bytes(bytes) == 0.0)
            }
            Self::Known { applied } => Ok(*applied),
        }
    }
}
