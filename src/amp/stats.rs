//! What a scaler did so far.

use std::fmt;
use std::time::Duration;

use crate::amp::{OverflowReport, WeightReport};
use crate::error::ScalerAlarm;
use crate::launch::journal::{CHECK_TIME, CLIP_TIME, STEP_TIME, counter};
use crate::units::Bytes;

/// One change of the scale.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleChange {
    /// The update that made it, from 1.
    pub update: u64,
    /// The scale after it.
    pub scale: f64,
}

/// What the device spent, replays included, as its own clock shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// In checking and unscaling gradients, norms included.
    pub check: Duration,
    /// In clipping beyond that: the coefficient, and multiplying in place.
    pub clip: Duration,
    /// In optimizer steps.
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
/// Loading a state keeps the totals and the reports, and begins anew with what describes the training's course:
/// [`skipped_in_a_row`](Self::skipped_in_a_row), [`last_good_scale`](Self::last_good_scale),
/// [`scale_history`](Self::scale_history) and [`alarm`](Self::alarm).
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct ScalerStats {
    /// The scale now.
    pub scale: f64,
    /// Clean updates since the scale last changed.
    pub growth_tracker: u32,
    /// Calls of `step`.
    pub steps: u64,
    /// Steps that moved the weights.
    pub applied: u64,
    /// Steps that were skipped.
    pub skipped: u64,
    /// Steps that were skipped since the last one that was not.
    pub skipped_in_a_row: u64,
    /// Skipped steps that had a NaN among their gradients.
    pub nan_steps: u64,
    /// The scale of the last step that was applied.
    pub last_good_scale: Option<f64>,
    /// Calls of `update`.
    pub updates: u64,
    /// Updates that made the scale larger after a clean interval.
    pub growths: u64,
    /// Updates that saw an overflow.
    pub backoffs: u64,
    /// The last 32 changes of the scale, oldest first.
    pub scale_history: Vec<ScaleChange>,
    /// The last 16 skipped steps, oldest first.
    pub overflows: Vec<OverflowReport>,
    /// Elements of weights that applied steps made infinite or NaN.
    pub infinite_weights: u64,
    /// The last 16 applied steps that did, oldest first.
    pub weight_overflows: Vec<WeightReport>,
    /// What there is to be alarmed about.
    pub alarm: Option<ScalerAlarm>,
    /// Times, if [`AmpConfig::timing`](crate::amp::AmpConfig::timing) is on.
    pub times: Option<StepTimes>,
    /// Bytes of the pool that this scaler holds, rounded as the pool rounds them: scale, trackers, flags and journal;
    /// for each optimizer it drives, or drove until another takes its place, the table of its gradients and what a check
    /// finds out about them; and what
    /// [`GradScaler::accumulate`](crate::amp::GradScaler::accumulate) found, which the parameters keep. Not the
    /// gradients, nor the tables of optimizers. The journal's copy in pinned memory is not the pool's, and not counted.
    pub scratch_bytes: u64,
    /// The most bytes it held at one time.
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
