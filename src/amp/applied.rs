//! Counts applied steps without waiting for them.
//!
//! A learning-rate schedule should not advance when a step is skipped, but the host learns of a skip only when the
//! device gets there. [`AppliedSteps`] therefore counts with a fixed delay: it takes a step as applied until [`LAG`]
//! later ones were enqueued, and only then uses its outcome. The count before each step thus depends on the outcomes
//! alone and not on the device's pace, so the same run always has the same learning rates, even if it was stopped and
//! resumed.
//!
//! The flag that decides a step is copied to pinned memory behind it. The host reads the copy when it is [`LAG`]
//! steps old; by then it has usually arrived.

use std::collections::VecDeque;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::memory::{PinnedBlock, PinnedPool};
use crate::storage::Tensor;

/// Steps by which the count lags.
const LAG: usize = 8;

/// The count of an optimizer's applied steps.
///
/// [`count`](Self::count) before step *k*, from 0, is *k* less the skipped steps among those up to *k* − 9; the last
/// eight are taken as applied. The host waits only if the device is more than eight steps behind, and only for the
/// oldest of them, so the device still has eight steps of work.
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
    /// Skipped steps, not counting the recent ones.
    skipped: u64,
    /// The last steps, oldest first.
    recent: VecDeque<Recent>,
    pinned: Option<PinnedPool>,
}

#[derive(Debug)]
enum Recent {
    /// A copy of the flag that has not been read yet.
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
    /// The skipped ones among those older than the last eight.
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

    /// Records the last step by the flag that decided it: an f32 on the device, or `None` for a step that could not
    /// be skipped. Call it between [`step`](crate::amp::GradScaler::step) and
    /// [`update`](crate::amp::GradScaler::update), which clears the flag.
    ///
    /// A captured step does not run and is not counted, and neither are its replays.
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

    /// Steps applied, with the delay that the type describes.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.steps - self.skipped
    }

    /// Steps recorded, skipped or not.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The exact number of applied steps. Waits for the device; [`count`](Self::count) is unaffected.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed.
    pub fn exact(&self) -> Result<u64> {
        let state = self.state_dict()?;
        let skipped = state.recent.iter().filter(|applied| !**applied).count();
        Ok(self.count() - skipped as u64)
    }

    /// The count as a value, to resume from exactly. Waits for the device.
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

    /// Resumes from `state`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for impossible counts. Nothing was changed.
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
