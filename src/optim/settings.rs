//! Settings that may change between steps: named numbers, changed all or not at all.

use crate::error::{Error, Result};
use crate::launch::update_pass::SETTING_WORDS;
use crate::optim::rows::Needs;

/// The settings of one kind of optimizer.
pub(super) trait Settings: Clone {
    /// The numbers that may change between steps, with their names.
    fn numbers(&mut self) -> Vec<(&'static str, &mut f64)>;

    /// Refuses values that cannot work.
    fn validate(&self) -> Result<()>;

    /// Refuses values that need other state than an optimizer made with `self` has.
    fn allows(&self, changed: &Self) -> Result<()>;

    /// What a parameter with these settings needs kept beside it.
    fn needs(&self) -> Needs;

    /// The settings as kernels read them.
    fn words(&self) -> [u64; SETTING_WORDS];
}

/// The numbers of `settings` with their names.
pub(super) fn named<S: Settings>(settings: &S) -> Vec<(&'static str, f64)> {
    let mut copy = settings.clone();
    let numbers = copy.numbers().into_iter();
    numbers.map(|(name, number)| (name, *number)).collect()
}

/// `settings` with other numbers.
pub(super) fn with_numbers<S: Settings>(settings: &S, changes: &[(&str, f64)]) -> Result<S> {
    let mut copy = settings.clone();
    for (name, value) in changes {
        let mut numbers = copy.numbers();
        match numbers.iter_mut().find(|(known, _)| known == name) {
            Some((_, number)) => **number = *value,
            None => {
                let known: Vec<_> = numbers.iter().map(|(known, _)| *known).collect();
                let reason = format!("there is no `{name}`, only {}", known.join(", "));
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

/// Refuses a change of something that was decided when the optimizer was made.
pub(super) fn unchanged<T: PartialEq>(key: &'static str, old: &T, new: &T) -> Result<()> {
    if old == new {
        return Ok(());
    }
    Err(Error::config(
        key,
        "was decided when the optimizer was made",
    ))
}

/// `outcome` with the number of the group in its error.
pub(super) fn of_group<T>(group: usize, outcome: Result<T>) -> Result<T> {
    outcome.map_err(|error| match error {
        Error::InvalidConfig { key, reason } => {
            Error::config(key, format!("group {group}: {reason}"))
        }
        other => other,
    })
}
