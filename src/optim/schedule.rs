//! How the learning rate changes over a run: a warmup, then a decay.
//!
//! A schedule is a function of the number of steps applied so far; it counts nothing itself. Advanced by calls
//! instead of applied steps, it would run ahead while steps are skipped. Use
//! [`AppliedSteps`](../amp/struct.AppliedSteps.html) as the count.

use std::f64::consts::PI;

use crate::error::{Error, Result};
use crate::optim::settings::not_negative;

/// The factor on the learning rate: it rises linearly to 1, then falls.
///
/// ```
/// use kitsune::optim::{Decay, Schedule};
///
/// let schedule = Schedule { warmup: 4, decay: Decay::Cosine { steps: 10, floor: 0.1 } };
/// assert_eq!(schedule.factor(0), 0.25);
/// assert_eq!(schedule.factor(4), 1.0);
/// assert_eq!(schedule.factor(1000), 0.1);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Steps until the factor is 1. The first step has 1 / warmup. Default 0.
    pub warmup: u64,
    /// The decay after it. Default [`Decay::Constant`].
    pub decay: Decay,
}

/// How the factor falls after the warmup, over `steps` applied steps. It then stays at `floor`, from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Decay {
    /// It does not fall.
    #[default]
    Constant,
    /// Linearly.
    Linear {
        /// Steps until the floor.
        steps: u64,
        /// The last factor.
        floor: f64,
    },
    /// Like half a period of a cosine: slowly, fast, slowly.
    Cosine {
        /// Steps until the floor.
        steps: u64,
        /// The last factor.
        floor: f64,
    },
}

impl Schedule {
    /// Refuses invalid values.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of the field.
    pub fn validate(&self) -> Result<()> {
        let (Decay::Linear { steps, floor } | Decay::Cosine { steps, floor }) = self.decay else {
            return Ok(());
        };
        if steps == 0 {
            return Err(Error::config("steps", "a decay takes at least one step"));
        }
        not_negative("floor", floor)?;
        if floor > 1.0 {
            return Err(Error::config("floor", format!("{floor} is above 1")));
        }
        Ok(())
    }

    /// The factor for the step after `applied` applied steps.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a share of a count of steps")]
    pub fn factor(&self, applied: u64) -> f64 {
        if applied < self.warmup {
            return (applied + 1) as f64 / self.warmup as f64;
        }
        let past = applied - self.warmup;
        let share = |steps: u64| past.min(steps) as f64 / steps as f64;
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear { steps, floor } => 1.0 - (1.0 - floor) * share(steps),
            // At the end the cosine is exactly -1, and the factor exactly the floor.
            Decay::Cosine { steps, floor } => {
                floor + (1.0 - floor) * (1.0 + (PI * share(steps)).cos()) / 2.0
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(schedule: &Schedule, steps: impl Iterator<Item = u64>) -> Vec<f64> {
        steps.map(|applied| schedule.factor(applied)).collect()
    }

    #[test]
    fn factors_are_those_of_the_formula() {
        let linear = Schedule {
            warmup: 2,
            decay: Decay::Linear {
                steps: 4,
                floor: 0.5,
            },
        };
        let expected = [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.5];
        assert_eq!(factors(&linear, 0..8), expected);
        let cosine = Schedule {
            warmup: 0,
            decay: Decay::Cosine {
                steps: 3,
                floor: 0.0,
            },
        };
        let got = factors(&cosine, 0..5);
        for (got, expected) in got.iter().zip([1.0, 0.75, 0.25, 0.0, 0.0]) {
            assert!((got - expected).abs() < 1e-15, "{got} {expected}");
        }
        assert_eq!(
            factors(&Schedule::default(), [0, u64::MAX].into_iter()),
            [1.0; 2]
        );
        let long = Schedule {
            warmup: u64::MAX,
            decay: Decay::Constant,
        };
        assert_eq!(long.factor(u64::MAX - 1), 1.0);
    }

    #[test]
    fn values_that_cannot_work_are_named() {
        for (decay, named) in [
            (
                Decay::Linear {
                    steps: 0,
                    floor: 0.0,
                },
                "steps",
            ),
            (
                Decay::Cosine {
                    steps: 1,
                    floor: 1.5,
                },
                "floor",
            ),
            (
                Decay::Linear {
                    steps: 1,
                    floor: f64::NAN,
                },
                "floor",
            ),
        ] {
            match (Schedule { warmup: 0, decay }).validate() {
                Err(Error::InvalidConfig { key, .. }) => assert_eq!(key, named),
                other => panic!("{decay:?} gave {other:?}"),
            }
        }
    }
}
