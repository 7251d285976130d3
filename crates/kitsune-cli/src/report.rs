//! The result of a training run, as a table and as JSON.

use kitsune::DType;
use kitsune::amp::OverflowKind;
use kitsune::units::Bytes;
use serde::Serialize;

use crate::summary::{plural, table};

/// The result of a run. The field names are the keys of the JSON output, which is part of the command's interface.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// Name of the device.
    pub(crate) device: String,
    /// Element type of the matrix products.
    pub(crate) dtype: DType,
    /// The network: the widths of its layers, or the sizes of the transformer.
    pub(crate) model: String,
    pub(crate) steps: u64,
    /// The first step of this run: 1, or the step after the last one of the resumed run.
    pub(crate) first_step: u64,
    /// Whether the resumed run was trained on different data; `null` if its file does not say. Absent unless a run was
    /// resumed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_changed: Option<Option<bool>>,
    pub(crate) seed: u64,
    /// Wall time of the training steps, without loading and testing.
    pub(crate) seconds: f64,
    /// Loss of the last batch.
    pub(crate) final_loss: f32,
    /// Mean loss of every 16 steps, and of the remaining steps.
    pub(crate) loss_curve: Vec<f32>,
    /// Share of the test images, or characters, that are predicted correctly, in 0.0..=1.0.
    pub(crate) test_accuracy: f64,
    /// The loss scale at the end.
    pub(crate) scale: f64,
    /// Steps skipped because a gradient was not finite.
    pub(crate) overflow_steps: u64,
    /// Which gradients were not finite, and when.
    pub(crate) overflows: Vec<Overflow>,
    /// Driver calls that allocated memory.
    pub(crate) driver_allocs: u64,
    /// The same after the third step, when the pool has seen all sizes of the run.
    pub(crate) driver_allocs_after_step_3: u64,
    pub(crate) peak_requested_bytes: u64,
    pub(crate) peak_allocated_bytes: u64,
    pub(crate) peak_reserved_bytes: u64,
}

/// A gradient that was not finite.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Overflow {
    /// The step, counted from 1.
    pub(crate) step: u64,
    /// The parameter whose gradient it is.
    pub(crate) tensor: String,
    /// `inf` or `nan`.
    pub(crate) kind: OverflowKind,
}

impl Report {
    /// One JSON object on one line. A loss that is not a number becomes `null`.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a struct of numbers and strings is always JSON")
    }

    /// A table for display.
    pub(crate) fn to_table(&self) -> String {
        let here = self.steps + 1 - self.first_step;
        let per_second = here as f64 / self.seconds.max(1e-9);
        let after = match self.first_step {
            1 => String::new(),
            first => format!(", after {} resumed", first - 1),
        };
        let overflows = self.overflows.iter().map(|overflow| {
            format!(
                "\nstep {}: {} in {}",
                overflow.step, overflow.kind, overflow.tensor
            )
        });
        table(&[
            ("device", self.device.clone()),
            ("model", format!("{} in {}", self.model, self.dtype)),
            (
                "steps",
                format!(
                    "{here} in {:.1} s ({per_second:.0}/s){after}, seed {}",
                    self.seconds, self.seed
                ),
            ),
            ("final loss", format!("{:.4}", self.final_loss)),
            (
                "test accuracy",
                format!("{:.2} %", self.test_accuracy * 100.0),
            ),
            ("loss scale", self.scale.to_string()),
            (
                "overflow",
                plural(self.overflow_steps, "step") + " skipped" + &overflows.collect::<String>(),
            ),
            (
                "driver calls",
                format!(
                    "{} for memory, {} after step 3",
                    self.driver_allocs, self.driver_allocs_after_step_3
                ),
            ),
            (
                "peak memory",
                format!(
                    "{} requested, {} allocated, {} reserved",
                    Bytes(self.peak_requested_bytes),
                    Bytes(self.peak_allocated_bytes),
                    Bytes(self.peak_reserved_bytes)
                ),
            ),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            device: "host".to_owned(),
            dtype: DType::F16,
            model: "64-10".to_owned(),
            steps: 100,
            first_step: 1,
            data_changed: None,
            seed: 1,
            seconds: 2.0,
            final_loss: 0.25,
            loss_curve: vec![0.5, 0.25],
            test_accuracy: 0.975,
            scale: 32768.0,
            overflow_steps: 1,
            overflows: vec![Overflow {
                step: 3,
                tensor: "hidden.weight".to_owned(),
                kind: OverflowKind::Inf,
            }],
            driver_allocs: 4,
            driver_allocs_after_step_3: 0,
            peak_requested_bytes: 1000,
            peak_allocated_bytes: 1024,
            peak_reserved_bytes: 2 << 20,
        }
    }

    #[test]
    fn the_table_reads() {
        let expected = "\
device         host
model          64-10 in f16
steps          100 in 2.0 s (50/s), seed 1
final loss     0.2500
test accuracy  97.50 %
loss scale     32768
overflow       1 step skipped
               step 3: inf in hidden.weight
driver calls   4 for memory, 0 after step 3
peak memory    1000 B requested, 1.0 KiB allocated, 2.0 MiB reserved
";
        assert_eq!(report().to_table(), expected);
        let resumed = Report {
            first_step: 41,
            ..report()
        };
        let steps = "steps          60 in 2.0 s (30/s), after 40 resumed, seed 1\n";
        assert!(resumed.to_table().contains(steps), "{}", resumed.to_table());
    }

    #[test]
    fn json_says_null_for_what_is_no_number() {
        let mut report = report();
        report.final_loss = f32::NAN;
        assert!(report.to_json().contains("\"final_loss\":null"));
        assert!(report.to_json().contains("\"dtype\":\"f16\""));
    }
}
