//! The outcome of a step.

use std::fmt;
use std::sync::Arc;

use crate::amp::journal::Journal;
use crate::error::Result;
use crate::optim::WeightOverflow;

/// An enqueued step. The device decides whether it is applied. Asking waits for the device; not asking costs nothing.
///
/// Ask at any time, even many steps later. The answer can be lost only after sixteen later steps were skipped; the
/// totals in [`ScalerStats`](crate::amp::ScalerStats) always stay exact.
#[derive(Clone, Debug)]
#[must_use = "a step may have been skipped; ask `is_applied` or `wait`, or drop the outcome with `let _ =`"]
pub struct StepOutcome {
    /// The journal and the step's number in it; `None` if nothing could skip the step.
    pending: Option<(Arc<Journal>, u64)>,
}

/// The outcome of one step.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// The weights were moved.
    Applied,
    /// Gradients were not finite; weights, optimizer state and step counts are as before.
    Skipped(OverflowReport),
}

impl StepOutcome {
    pub(super) fn applied() -> Self {
        Self { pending: None }
    }

    pub(super) fn pending(journal: Arc<Journal>, step: u64) -> Self {
        Self {
            pending: Some((journal, step)),
        }
    }

    /// Waits for the step and returns whether it moved the weights. Advance schedules and averages by this, not by
    /// the number of calls.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn is_applied(&self) -> Result<bool> {
        Ok(matches!(self.wait()?, Outcome::Applied))
    }

    /// The outcome, if it is known by now; `None` while the step is pending. Does not wait: the first call asks the
    /// device for its counters, and a later one finds them. One copy of the counters answers for all steps enqueued
    /// before it.
    ///
    /// # Errors
    /// As [`wait`](Self::wait), and [`Error::Capturing`](crate::Error::Capturing) during a capture.
    pub fn poll(&self) -> Result<Option<Outcome>> {
        match &self.pending {
            None => Ok(Some(Outcome::Applied)),
            Some((journal, step)) => journal.poll(*step),
        }
    }

    /// Waits for the step and returns its outcome.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if work of the stream failed;
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the answer was lost, as the type describes.
    pub fn wait(&self) -> Result<Outcome> {
        match &self.pending {
            None => Ok(Outcome::Applied),
            Some((journal, step)) => journal.outcome(*step),
        }
    }
}

impl StepOutcome {
    /// Waits for the step and reports the weights that it made infinite or NaN; `None` if there are none. Finite
    /// gradients can do this, above all to 16-bit weights, whose f32 masters may still be finite. Elements that were
    /// not finite before the step do not count. Also `None` if the scaler is disabled, because nothing is recorded
    /// then (use [`Optimizer::take_weight_overflows`](crate::optim::Optimizer::take_weight_overflows)), and for
    /// optimizers from outside this crate.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn weight_overflows(&self) -> Result<Option<WeightReport>> {
        match &self.pending {
            None => Ok(None),
            Some((journal, step)) => journal.lost_weights(*step),
        }
    }
}

/// The weights that an applied step made infinite or NaN.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct WeightReport {
    /// The step's number, from 1, among all calls of `step`. A replay has the number of the call that was
    /// captured.
    pub step: u64,
    /// The scale its gradients had.
    pub scale: f64,
    /// The weights that became infinite or NaN, in the order of the parameters; the first eight.
    pub tensors: Vec<WeightOverflow>,
    /// How many there are.
    pub tensor_count: u64,
}

impl fmt::Display for WeightReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} applied at scale {}: ", self.step, self.scale)?;
        for (index, tensor) in self.tensors.iter().enumerate() {
            let lead = if index == 0 { "" } else { "; " };
            write!(f, "{lead}{tensor}")?;
        }
        match self.tensor_count - self.tensors.len() as u64 {
            0 => Ok(()),
            more => write!(f, "; and {more} more"),
        }
    }
}

/// Why a step was skipped.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct OverflowReport {
    /// The step's number, from 1, among all calls of `step`. A replay has the number of the call that was
    /// captured.
    pub step: u64,
    /// The scale its gradients had.
    pub scale: f64,
    /// The gradients that are not finite, in the order of the parameters; the first eight.
    pub tensors: Vec<TensorOverflow>,
    /// How many there are.
    pub tensor_count: u64,
    /// The total norm, if it was computed. It can be the only cause: finite f64 gradients may be too large to square.
    /// If neither a gradient nor the norm is infinite or NaN, another optimizer overflowed, in this process or in
    /// another one.
    pub total_norm: Option<f64>,
}

/// The elements of one gradient that are not finite.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorOverflow {
    /// The parameter's name.
    pub name: String,
    /// Infinite elements; stops counting at 2³² − 1.
    pub inf_count: u64,
    /// NaN elements; stops counting at 2³² − 1.
    pub nan_count: u64,
    /// Position of the first such element, counted in elements from the start of the gradient's memory. For a
    /// gradient in index order this is its index.
    pub first_index: u64,
}

/// The kind of a number that is not finite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OverflowKind {
    /// Infinity: usually the scale is too large.
    Inf,
    /// Not a number: often a fault that no scale can fix.
    NaN,
}

impl TensorOverflow {
    /// NaN if there is any, else infinity.
    #[must_use]
    pub fn kind(&self) -> OverflowKind {
        if self.nan_count > 0 {
            OverflowKind::NaN
        } else {
            OverflowKind::Inf
        }
    }
}

impl fmt::Display for OverflowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Inf => "inf",
            Self::NaN => "nan",
        })
    }
}

impl fmt::Display for TensorOverflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` has ", self.name)?;
        match (self.inf_count, self.nan_count) {
            (inf, 0) => write!(f, "{inf} inf")?,
            (0, nan) => write!(f, "{nan} nan")?,
            (inf, nan) => write!(f, "{inf} inf and {nan} nan")?,
        }
        write!(f, ", the first at {}", self.first_index)
    }
}

impl fmt::Display for OverflowReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} skipped at scale {}: ", self.step, self.scale)?;
        for (index, tensor) in self.tensors.iter().enumerate() {
            let lead = if index == 0 { "" } else { "; " };
            write!(f, "{lead}{tensor}")?;
        }
        let more = self.tensor_count - self.tensors.len() as u64;
        match (self.tensor_count, self.total_norm) {
            (0, Some(norm)) => write!(f, "the total norm is {norm}"),
            (0, None) => write!(f, "another optimizer overflowed"),
            _ if more > 0 => write!(f, "; and {more} more"),
            _ => Ok(()),
        }
    }
}
