//! The host side of a scaler's journal: reads it and maps numbers to names.
//!
//! The device writes it (see [`launch::journal`](crate::launch::journal)). No step reads it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::amp::outcome::{Outcome, OverflowReport, TensorOverflow, WeightReport};
use crate::amp::readback::Readback;
use crate::amp::stats::ScaleChange;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::journal::{
    CHANGES, JOURNAL_WORDS, LOSSES, NAMED_WORDS, OVERFLOW_HEAD, OVERFLOWS, SCALE_CHANGES, SKIPPED,
    change_words, counter, loss_words, overflow_words,
};
use crate::optim::WeightOverflow;
use crate::storage::{Context, Meter, Metered, Tensor};

/// Sets of parameter names kept after their optimizer was dropped or changed its parameters: the journal may still
/// refer to them.
const RETIRED_NAMES: usize = 4 * OVERFLOWS;

/// A journal on the device, and the names of the parameters it refers to.
#[derive(Debug)]
pub(super) struct Journal {
    words: Metered,
    names: Mutex<Names>,
    readback: Mutex<Readback>,
    /// Number of the last step that was enqueued.
    steps: AtomicU64,
}

/// Parameter names by the number under which an optimizer's steps are recorded.
#[derive(Debug, Default)]
struct Names {
    known: HashMap<u64, Arc<[String]>>,
    /// Numbers under which no more steps are recorded, oldest first.
    retired: VecDeque<u64>,
}

impl Journal {
    /// An empty journal; `meter` counts its device memory.
    pub(super) fn new(context: &Context, meter: &Arc<Meter>) -> Result<Self> {
        let words = Tensor::zeros(context, [JOURNAL_WORDS], DType::F64)?;
        Ok(Self {
            words: Metered::new(words, meter),
            names: Mutex::default(),
            readback: Mutex::new(Readback::new(context)?),
            steps: AtomicU64::new(0),
        })
    }

    /// Where the device writes.
    pub(super) fn words(&self) -> &Tensor {
        &self.words
    }

    /// A view of word `index`.
    pub(super) fn word(&self, index: usize) -> Result<Tensor> {
        self.words.narrow(0, index, 1)
    }

    /// Sets the parameter names for steps recorded under `optimizer`.
    pub(super) fn name(&self, optimizer: u64, names: Arc<[String]>) {
        self.names.lock().known.insert(optimizer, names);
    }

    /// Declares that no later step will be recorded under `optimizer`.
    pub(super) fn retire(&self, optimizer: u64) {
        let Names { known, retired } = &mut *self.names.lock();
        retired.push_back(optimizer);
        if retired.len() > RETIRED_NAMES {
            let oldest = retired.pop_front();
            oldest.and_then(|number| known.remove(&number));
        }
    }

    /// Number of current and former optimizers whose names are kept.
    #[cfg(test)]
    pub(super) fn names_len(&self) -> usize {
        self.names.lock().known.len()
    }

    /// Notes that step `step` was enqueued.
    pub(super) fn stepped(&self, step: u64) {
        self.steps.store(step, Ordering::Release);
    }

    /// Waits for everything enqueued so far and reads the journal.
    pub(super) fn read(&self) -> Result<Vec<f64>> {
        self.words.to_vec()
    }

    /// Waits, and returns the outcome of step `step`, from 1.
    pub(super) fn outcome(&self, step: u64) -> Result<Outcome> {
        self.outcome_in(&self.read()?, step)
    }

    /// As [`outcome`](Self::outcome), without waiting; `None` if the outcome is not known yet.
    pub(super) fn poll(&self, step: u64) -> Result<Option<Outcome>> {
        let steps = self.steps.load(Ordering::Acquire);
        let mut readback = self.readback.lock();
        let words = readback.poll(&self.words, step, steps)?;
        words.map(|words| self.outcome_in(words, step)).transpose()
    }

    /// An earlier copy of the journal, once, if one has arrived that was enqueued since the last
    /// [`outdate`](Self::outdate). Enqueues another copy if `again`. Does not wait.
    pub(super) fn late(&self, again: bool) -> Result<Option<Vec<f64>>> {
        let mut readback = self.readback.lock();
        let words = readback.take_in()?.map(<[f64]>::to_vec);
        if again {
            readback.start(&self.words, self.steps.load(Ordering::Acquire))?;
        }
        Ok(words)
    }

    /// Marks a pending copy as outdated, because the state it describes was replaced.
    pub(super) fn outdate(&self) {
        self.readback.lock().outdate();
    }

    fn outcome_in(&self, words: &[f64], step: u64) -> Result<Outcome> {
        let reports = self.overflows(words);
        let oldest = reports.first().map_or(u64::MAX, |report| report.step);
        let forgotten = counter(words, SKIPPED) > reports.len();
        if let Some(report) = reports.into_iter().rev().find(|report| report.step == step) {
            return Ok(Outcome::Skipped(report));
        }
        // All skipped steps from `oldest` on are remembered, so a later step that is not among them was applied.
        if forgotten && step < oldest {
            let reason =
                format!("step {step} was followed by more skipped steps than are remembered");
            return Err(Error::argument("StepOutcome::wait", reason));
        }
        Ok(Outcome::Applied)
    }

    /// Waits, and reports the weights that step `step`, from 1, made infinite or NaN.
    pub(super) fn lost_weights(&self, step: u64) -> Result<Option<WeightReport>> {
        let words = self.read()?;
        let reports = self.weight_overflows(&words);
        let oldest = reports.first().map_or(u64::MAX, |report| report.step);
        let forgotten = counter(&words, LOSSES) > reports.len();
        let found = reports.into_iter().rev().find(|report| report.step == step);
        if found.is_none() && forgotten && step < oldest {
            let reason = format!("step {step} was followed by more such steps than are remembered");
            return Err(Error::argument("StepOutcome::weight_overflows", reason));
        }
        Ok(found)
    }

    /// The remembered steps that made weights infinite or NaN, oldest first.
    pub(super) fn weight_overflows(&self, words: &[f64]) -> Vec<WeightReport> {
        let count = counter(words, LOSSES);
        let names = self.names.lock();
        let entry = |number| report(&words[loss_words(number)], &names.known);
        let reports = (count.saturating_sub(OVERFLOWS)..count).map(entry);
        reports.map(of_weights).collect()
    }

    /// The remembered skipped steps, oldest first.
    pub(super) fn overflows(&self, words: &[f64]) -> Vec<OverflowReport> {
        let count = counter(words, SKIPPED);
        let names = self.names.lock();
        (count.saturating_sub(OVERFLOWS)..count)
            .map(|number| report(&words[overflow_words(number)], &names.known))
            .collect()
    }
}

/// The remembered scale changes, oldest first.
pub(super) fn scale_changes(words: &[f64]) -> Vec<ScaleChange> {
    let count = counter(words, CHANGES);
    (count.saturating_sub(SCALE_CHANGES)..count)
        .map(|number| {
            let change = &words[change_words(number)];
            ScaleChange {
                update: counter(change, 0) as u64,
                scale: change[1],
            }
        })
        .collect()
}

/// `report` as a report about weights.
fn of_weights(report: OverflowReport) -> WeightReport {
    let tensors = report.tensors.into_iter().map(|tensor| WeightOverflow {
        name: tensor.name,
        inf_count: tensor.inf_count,
        nan_count: tensor.nan_count,
        first_index: tensor.first_index,
    });
    WeightReport {
        step: report.step,
        scale: report.scale,
        tensors: tensors.collect(),
        tensor_count: report.tensor_count,
    }
}

fn report(entry: &[f64], names: &HashMap<u64, Arc<[String]>>) -> OverflowReport {
    let names = names.get(&(counter(entry, 1) as u64));
    let tensor_count = counter(entry, 4);
    let tensor = |words: &[f64]| {
        let index = counter(words, 0);
        let name = names.and_then(|names| names.get(index));
        TensorOverflow {
            name: name
                .cloned()
                .unwrap_or_else(|| format!("parameter {index}")),
            inf_count: counter(words, 1) as u64,
            nan_count: counter(words, 2) as u64,
            first_index: counter(words, 3) as u64,
        }
    };
    OverflowReport {
        step: counter(entry, 0) as u64,
        scale: entry[2],
        total_norm: (!entry[3].is_nan()).then_some(entry[3]),
        tensors: entry[OVERFLOW_HEAD..]
            .chunks_exact(NAMED_WORDS)
            .take(tensor_count)
            .map(tensor)
            .collect(),
        tensor_count: tensor_count as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};

    #[test]
    fn names_are_forgotten_in_time() {
        let device = Device::host(HostConfig::default()).expect("the machine has memory");
        let journal = {
            let context = Context::new(&device).expect("a context");
            Journal::new(&context, &Arc::default()).expect("memory")
        };
        for number in 0..10_000 {
            journal.name(number, Arc::from([format!("w{number}")]));
            journal.retire(number);
        }
        journal.name(10_000, Arc::from(["living".to_owned()]));
        let names = journal.names.lock();
        assert_eq!(names.known.len(), RETIRED_NAMES + 1);
        assert!(names.known.contains_key(&9_999) && !names.known.contains_key(&0));
    }
}
