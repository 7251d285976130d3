//! Settings of scaling to 8 bits.

use crate::dtype::Overflow;
use crate::error::{Error, Result};
use crate::launch::{AmaxAlgorithm, AmaxSource, Fp8Policy};

/// The source of a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fp8Scaling {
    /// The largest magnitudes of earlier iterations.
    #[default]
    Delayed,
    /// The tensor itself, which is read twice.
    Current,
}

/// Settings of [`Fp8Scaler`](super::Fp8Scaler). Defaults match Transformer Engine.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fp8Config {
    /// The source of scales. Default [`Fp8Scaling::Delayed`].
    pub scaling: Fp8Scaling,
    /// For delayed scaling: iterations whose largest magnitudes are remembered, the current one included; from 1 to
    /// 65536. Default 1024.
    pub history_length: usize,
    /// Which of them sets the scale. Default the largest.
    pub algorithm: AmaxAlgorithm,
    /// Powers of two kept free above the largest magnitude, as headroom for growth within an iteration; from 0 to 64.
    /// Default 0.
    pub margin: u32,
    /// Whether scales are rounded down to powers of two, which scale without rounding. Default no.
    pub power_of_two: bool,
    /// For current scaling: the lower bound on largest magnitudes; finite and not negative. Default 0.
    pub epsilon: f32,
    /// How elements that are too large are converted. Default [`Overflow::Saturate`].
    pub overflow: Overflow,
}

const HISTORY_MAX: usize = 65_536;
const MARGIN_MAX: u32 = 64;

impl Default for Fp8Config {
    fn default() -> Self {
        Self {
            scaling: Fp8Scaling::Delayed,
            history_length: 1024,
            algorithm: AmaxAlgorithm::Max,
            margin: 0,
            power_of_two: false,
            epsilon: 0.0,
            overflow: Overflow::Saturate,
        }
    }
}

impl Fp8Config {
    /// Settings for current scaling.
    #[must_use]
    pub fn current() -> Self {
        Self {
            scaling: Fp8Scaling::Current,
            ..Self::default()
        }
    }

    /// Refuses invalid values.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of the first such field.
    pub fn validate(&self) -> Result<()> {
        if !(1..=HISTORY_MAX).contains(&self.history_length) {
            let reason = format!("{} is not from 1 to {HISTORY_MAX}", self.history_length);
            return Err(Error::config("history_length", reason));
        }
        if self.margin > MARGIN_MAX {
            let reason = format!("{} is not from 0 to {MARGIN_MAX}", self.margin);
            return Err(Error::config("margin", reason));
        }
        if !(0.0..=f32::MAX).contains(&self.epsilon) {
            let reason = format!("{} is not from 0 to the largest f32", self.epsilon);
            return Err(Error::config("epsilon", reason));
        }
        Ok(())
    }

    /// The number of largest magnitudes kept for each tensor.
    pub(super) fn places(&self) -> usize {
        match self.scaling {
            Fp8Scaling::Delayed => self.history_length,
            Fp8Scaling::Current => 1,
        }
    }

    pub(super) fn policy(&self) -> Fp8Policy {
        Fp8Policy {
            source: match self.scaling {
                Fp8Scaling::Delayed => AmaxSource::History(self.algorithm),
                Fp8Scaling::Current => AmaxSource::Current {
                    epsilon: self.epsilon,
                },
            },
            margin: self.margin,
            power_of_two: self.power_of_two,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let refused = |config: Fp8Config| match config.validate() {
            Err(Error::InvalidConfig { key, .. }) => key,
            other => panic!("{other:?}"),
        };
        let base = Fp8Config::default;
        base().validate().unwrap();
        Fp8Config::current().validate().unwrap();
        for history_length in [0, HISTORY_MAX + 1] {
            let config = Fp8Config {
                history_length,
                ..base()
            };
            assert_eq!(refused(config), "history_length");
        }
        let config = Fp8Config {
            margin: 65,
            ..base()
        };
        assert_eq!(refused(config), "margin");
        for epsilon in [-1.0, f32::NAN, f32::INFINITY] {
            let config = Fp8Config { epsilon, ..base() };
            assert_eq!(refused(config), "epsilon");
        }
    }
}
