//! A scaler's device memory.
//!
//! Scale, inverse, trackers, flags and journal are allocated once and keep their addresses for the life of the
//! scaler, so captured steps stay valid.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::amp::config::narrow;
use crate::amp::journal::Journal;
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::journal::{
    CALIBRATED, CHANGES, CLOCK, FLOOR_HITS, INF_STEPS_SINCE_UPDATE, LAST_GOOD, NAN_IN_A_ROW,
    NAN_STEPS_SINCE_UPDATE, RECENT_SKIPS, SKIPPED_IN_A_ROW,
};
use crate::launch::stopwatch::stopwatch;
use crate::launch::{ScaleOperands, inverse_scale};
use crate::memory;
use crate::optim::Parameter;
use crate::storage::{Context, HostTensor, Meter, Metered, Tensor};

/// The most optimizers one scaler can drive at a time: the length of its array of flags.
pub(super) const OPTIMIZERS: usize = 256;

/// Journal words that describe the current run. Restoring a state resets them to 0; the totals count for the life of
/// the scaler.
const RUNNING_WORDS: [usize; 9] = [
    SKIPPED_IN_A_ROW,
    CHANGES,
    NAN_IN_A_ROW,
    CALIBRATED,
    RECENT_SKIPS,
    LAST_GOOD,
    FLOOR_HITS,
    NAN_STEPS_SINCE_UPDATE,
    INF_STEPS_SINCE_UPDATE,
];

/// Device memory of a scaler.
#[derive(Debug)]
pub(super) struct ScaleMemory {
    pub(super) scale: Metered,
    pub(super) inv_scale: Metered,
    trackers: Metered,
    flags: Metered,
    pub(super) journal: Arc<Journal>,
    /// Counts all device memory that serves the scaler, including memory outside this struct.
    pub(super) meter: Arc<Meter>,
    names: AtomicU64,
    timing: bool,
}

/// The values of the trackers.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Trackers {
    /// Clean updates since the scale last changed.
    pub(super) growth: u32,
    /// Tolerated overflows that are not forgotten yet.
    pub(super) overflows: u32,
}

impl ScaleMemory {
    pub(super) fn new(context: &Context, scale: f64, timing: bool) -> Result<Self> {
        let _tag = memory::tag("amp");
        let meter = Arc::default();
        let metered = |tensor| Metered::new(tensor, &meter);
        let memory = Self {
            scale: metered(Tensor::uninit(context, [], DType::F32)?),
            inv_scale: metered(Tensor::uninit(context, [], DType::F32)?),
            trackers: metered(Tensor::uninit(context, [2], DType::U32)?),
            flags: metered(Tensor::zeros(context, [OPTIMIZERS], DType::F32)?),
            journal: Arc::new(Journal::new(context, &meter)?),
            meter: meter.clone(),
            names: AtomicU64::new(0),
            timing,
        };
        memory.set(scale, Trackers::default())?;
        Ok(memory)
    }

    pub(super) fn context(&self) -> &Context {
        self.scale.context()
    }

    pub(super) fn set(&self, scale: f64, trackers: Trackers) -> Result<()> {
        let scale = narrow(scale);
        self.scale.copy_from_slice(&[scale])?;
        self.inv_scale.copy_from_slice(&[inverse_scale(scale)])?;
        self.trackers
            .copy_from_slice(&[trackers.growth, trackers.overflows])
    }

    /// The writes that restore `scale` and `trackers`. They clear all flags, and what the journal noted about the run
    /// so far does not count for the restored one. Skipped steps before the next applied one are expected, as at the
    /// start.
    pub(super) fn writes(
        &self,
        scale: f64,
        trackers: Trackers,
    ) -> Result<Vec<(Tensor, HostTensor)>> {
        let scale = narrow(scale);
        let one = |value: f32| HostTensor::from_slice([], &[value]);
        let words = [trackers.growth, trackers.overflows];
        let mut writes = vec![
            (self.scale.clone(), one(scale)?),
            (self.inv_scale.clone(), one(inverse_scale(scale))?),
            (self.trackers.clone(), HostTensor::from_slice([2], &words)?),
            (
                self.flags.clone(),
                HostTensor::from_slice([OPTIMIZERS], &[0f32; OPTIMIZERS])?,
            ),
        ];
        for word in RUNNING_WORDS {
            let zero = HostTensor::from_slice([1], &[0f64])?;
            writes.push((self.journal.word(word)?, zero));
        }
        Ok(writes)
    }

    /// The trackers. Waits for the device.
    pub(super) fn trackers(&self) -> Result<Trackers> {
        let words = self.trackers.to_vec::<u32>()?;
        Ok(Trackers {
            growth: words[0],
            overflows: words[1],
        })
    }

    /// Enqueues `work`. If steps are timed, the device adds the time it takes to word `total` of the journal. Fails
    /// if the start of the measurement cannot be enqueued, in which case nothing was, or if `work` fails. If only the
    /// end of the measurement cannot be enqueued, the time is lost and the call succeeds.
    pub(super) fn timed<R>(&self, total: usize, work: impl FnOnce() -> Result<R>) -> Result<R> {
        if !self.timing {
            return work();
        }
        let stream = self.context().stream();
        let clock = self.journal.word(CLOCK)?.span()?;
        let total = self.journal.word(total)?.span()?;
        stopwatch(stream, &clock, None)?;
        let result = work()?;
        // A lasting failure also fails the next call, which reports it.
        let _ = stopwatch(stream, &clock, Some(&total));
        Ok(result)
    }

    /// A zero-dimensional view of flag `index`.
    pub(super) fn flag(&self, index: usize) -> Result<Tensor> {
        self.flags.narrow(0, index, 1)?.reshape([])
    }

    /// Registers these parameters with the journal: returns a new number for them, and their names. The journal may
    /// forget the names under `old`.
    pub(super) fn name(&self, parameters: &[Parameter], old: Option<u64>) -> (u64, Arc<[String]>) {
        // Relaxed: the number only has to be unique.
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        let names: Arc<[String]> = parameters
            .iter()
            .map(|parameter| parameter.name().to_owned())
            .collect();
        self.journal.name(number, names.clone());
        if let Some(old) = old {
            self.journal.retire(old);
        }
        (number, names)
    }

    pub(super) fn operands(&self) -> Result<ScaleOperands> {
        Ok(ScaleOperands {
            scale: self.scale.span()?,
            inv_scale: self.inv_scale.span()?,
            trackers: self.trackers.span()?,
            flags: self.flags.span()?,
            journal: self.journal.words().span()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};

    /// An optimizer whose parameters change at every step retires its old names, so they do not accumulate.
    #[test]
    fn names_of_changing_parameters_do_not_pile_up() {
        let device = Device::host(HostConfig::default()).unwrap();
        let context = Context::new(&device).unwrap();
        let memory = ScaleMemory::new(&context, 1.0, false).unwrap();
        let value = Tensor::zeros(&context, [1], DType::F32).unwrap();
        let mut known = None;
        let mut most = 0;
        for step in 0..1000 {
            let parameter = Parameter::new(format!("w{step}"), value.clone()).unwrap();
            known = Some(memory.name(&[parameter], known).0);
            most = most.max(memory.journal.names_len());
        }
        assert!((2..=100).contains(&most), "{most}");
    }
}
