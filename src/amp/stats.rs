//! Statistics of a scaler.

use std::fmt;
use std::time::Duration;

use crate::amp::{OverflowReport, WeightReport};
use crate::error::ScalerAlarm;
use crate::launch::journal::{CHECK_TIME, CLIP_TIME, STEP_TIME, counter};
use crate::units::Bytes;

/// One change of the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleChange {
    /// The number of the update that made it, from 1.
    pub update: u64,
    /// The scale after it.
    pub scale: f64,
}

/// Time spent on the device, by its own clock, replays included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Checking and unscaling gradients, norms included.
    pub check: Duration,
    /// Clipping beyond that: computing the coefficient, and multiplying in place.
    pub clip: Duration,
    /// Optimizer steps.
    pub step: Duration,
}

impl StepTimes {
    pub(super) fn read(journal: &[f64]) -> Self {
        let time = |word| Duration::from_nanos(counter(journal, word) as u64);
        Self {
            check: time(CHECK_TIME),
            clip: time(CLIP_TIME),
            step: time(STEP_TIME),
        }
    }
}

/// Counts of a scaler since it was made. Totals are exact; lists hold the newest entries only.
///
/// Loading a state keeps the totals and the reports. It resets the fields that describe the current run:
/// [`skipped_in_a_row`](Self::skipped_in_a_row), [`last_good_scale`](Self::last_good_scale),
/// [`scale_history`](Self::scale_history) and [`alarm`](Self::alarm).
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ScalerStats {
    /// The current scale.
    pub scale: f64,
    /// Clean updates since the scale last changed.
    pub growth_tracker: u32,
    /// Calls of `step`.
    pub steps: u64,
    /// Steps that moved the weights.
    pub applied: u64,
    /// Steps that were skipped.
    pub skipped: u64,
    /// Steps skipped since the last applied one.
    pub skipped_in_a_row: u64,
    /// Skipped steps that had a NaN among their gradients.
    pub nan_steps: u64,
    /// The scale of the last applied step.
    pub last_good_scale: Option<f64>,
    /// Calls of `update`.
    pub updates: u64,
    /// Updates that grew the scale after a clean interval.
    pub growths: u64,
    /// Updates that saw an overflow.
    pub backoffs: u64,
    /// The last 32 changes of the scale, oldest first.
    pub scale_history: Vec<ScaleChange>,
    /// The last 16 skipped steps, oldest first.
    pub overflows: Vec<OverflowReport>,
    /// Elements of weights that applied steps made infinite or NaN.
    pub infinite_weights: u64,
    /// The last 16 applied steps that did so, oldest first.
    pub weight_overflows: Vec<WeightReport>,
    /// The current alarm, if any.
    pub alarm: Option<ScalerAlarm>,
    /// Times, if [`AmpConfig::timing`](crate::amp::AmpConfig::timing) is on.
    pub times: Option<StepTimes>,
    /// Pool memory that this scaler holds, rounded as the pool rounds it. Includes scale, trackers, flags and
    /// journal; for each optimizer that it drives, or drove until another took its slot, the table of its gradients
    /// and the results of its checks; and the results of
    /// [`GradScaler::accumulate`](crate::amp::GradScaler::accumulate), which the parameters keep. Excludes the
    /// gradients, the tables of the optimizers, and the journal's copy in pinned memory.
    pub scratch_bytes: u64,
    /// The most bytes it has held at once.
    pub scratch_peak_bytes: u64,
}

impl ScalerStats {
    /// Share of the steps that were skipped, from 0 to 1.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn skip_rate(&self) -> f64 {
        match self.steps {
            0 => 0.0,
            steps => self.skipped as f64 / steps as f64,
        }
    }
}

impl fmt::Display for ScalerStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "scale {}, {} steps: {} applied, {} skipped ({:.1} %); {} growths, {} backoffs; {} of scratch",
            self.scale,
            self.steps,
            self.applied,
            self.skipped,
            self.skip_rate() * 100.0,
            self.growths,
            self.backoffs,
            Bytes(self.scratch_bytes),
        )?;
        if let Some(StepTimes { check, clip, step }) = &self.times {
            write!(f, "\n  check {check:.1?}, clip {clip:.1?}, step {step:.1?}")?;
        }
        if let Some(alarm) = &self.alarm {
            write!(f, "\n  {alarm}")?;
        }
        for overflow in &self.overflows {
            write!(f, "\n  {overflow}")?;
        }
        for report in &self.weight_overflows {
            write!(f, "\n  {report}")?;
        }
        Ok(())
    }
}
