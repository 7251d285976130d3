//! Settings that may change between steps: named numbers, changed all or not at all.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::update_pass::SETTING_WORDS;
use crate::optim::Parameter;
use crate::optim::rows::Needs;

/// The settings of one kind of optimizer.
pub(super) trait Settings: Clone {
    /// The numbers that may change between steps, with their names.
    fn numbers(&mut self) -> Vec<(&'static str, &mut f64)>;

    /// Refuses invalid values.
    fn validate(&self) -> Result<()>;

    /// Refuses values that are invalid in `precision`, the narrowest type that the group is computed in.
    fn validate_in(&self, precision: Precision) -> Result<()>;

    /// Choices that must agree between a saved state and the optimizer that loads it, for a group of `parameters`.
    fn flags(&self, parameters: &[Parameter]) -> Vec<(&'static str, String)>;

    /// Refuses values that need other state than an optimizer made with `self` has.
    fn allows(&self, changed: &Self) -> Result<()>;

    /// The state that a parameter with these settings needs.
    fn needs(&self) -> Needs;

    /// The settings as kernels read them.
    fn words(&self) -> [u64; SETTING_WORDS];
}

/// The type in which a group of parameters is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Precision {
    /// f32 for at least one parameter.
    F32,
    /// f64 for all parameters.
    F64,
}

impl Precision {
    /// The precision of a group of `parameters`.
    pub(super) fn of(parameters: &[Parameter]) -> Self {
        let is_wide = |parameter: &Parameter| parameter.value().dtype() == DType::F64;
        match parameters.iter().all(is_wide) {
            true => Self::F64,
            false => Self::F32,
        }
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "what the computation does with a setting"
    )]
    fn round(self, value: f64) -> f64 {
        match self {
            Self::F32 => f64::from(value as f32),
            Self::F64 => value,
        }
    }

    /// Refuses a nonzero number that rounds to 0 or to infinity in the computation.
    pub(super) fn check(self, key: &'static str, value: f64) -> Result<()> {
        let rounded = self.round(value);
        let becomes = match value {
            _ if value != 0.0 && rounded == 0.0 => "0",
            _ if value.is_finite() && rounded.is_infinite() => "infinite",
            _ => return Ok(()),
        };
        let reason = format!("{value:e} becomes {becomes} in f32, the type of the computation");
        Err(Error::config(key, reason))
    }

    /// Refuses a share below 1 that rounds to 1 in the computation.
    pub(super) fn check_below_one(self, key: &'static str, value: f64) -> Result<()> {
        self.check(key, value)?;
        if value < 1.0 && self.round(value) >= 1.0 {
            let reason = format!("{value:?} becomes 1 in f32, the type of the computation");
            return Err(Error::config(key, reason));
        }
        Ok(())
    }

    /// Refuses settings from which the computation derives `value`, if that is infinite there.
    pub(super) fn check_product(self, key: &'static str, what: &str, value: f64) -> Result<()> {
        if self.round(value).is_finite() {
            return Ok(());
        }
        let reason =
            format!("{what} is {value:e}, which is infinite in the type of the computation");
        Err(Error::config(key, reason))
    }
}

/// The numbers of `settings` with their names.
pub(super) fn named<S: Settings>(settings: &S) -> Vec<(&'static str, f64)> {
    let mut copy = settings.clone();
    let numbers = copy.numbers().into_iter();
    numbers.map(|(name, number)| (name, *number)).collect()
}

/// `settings` with `changes` applied.
pub(super) fn with_numbers<S: Settings>(settings: &S, changes: &[(&str, f64)]) -> Result<S> {
    let mut copy = settings.clone();
    for (name, value) in changes {
        let mut numbers = copy.numbers();
        match numbers.iter_mut().find(|(known, _)| known == name) {
            Some((_, number)) => **number = *value,
            None => {
                let known: Vec<_> = numbers.iter().map(|(known, _)| *known).collect();
                let reason = format!("there is no `{name}`; known are {}", known.join(", "));
                return Err(Error::config("settings", reason));
            }
        }
    }
    Ok(copy)
}

/// Refuses a setting that is negative, infinite or NaN.
pub(super) fn not_negative(key: &'static str, value: f64) -> Result<()> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(Error::config(
        key,
        format!("{value} is not a finite number of 0 or more"),
    ))
}

/// Refuses a change of a setting that is fixed when the optimizer is made.
pub(super) fn unchanged<T: PartialEq>(key: &'static str, old: &T, new: &T) -> Result<()> {
    if old == new {
        return Ok(());
    }
    Err(Error::config(
        key,
        "cannot change after the optimizer was made",
    ))
}

/// Adds the number of the group to the error of `outcome`.
pub(super) fn of_group<T>(group: usize, outcome: Result<T>) -> Result<T> {
    outcome.map_err(|error| match error {
        Error::InvalidConfig { key, reason } => {
            Error::config(key, format!("group {group}: {reason}"))
        }
        other => other,
    })
}
