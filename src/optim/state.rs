//! The state of an optimizer as a value, and tensors that are saved and restored by name.
//!
//! A tensor of an optimizer is named after its parameter: `layer1.weight/first_moment`. The order of parameters may
//! therefore change between saving and loading, and errors name missing parameters.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};
use crate::optim::matching::{Matched, Misfits};
use crate::optim::{Flags, Optimizer, Parameter};
use crate::storage::{Attempt, HostTensor, Load, Tensor};

/// Tensors by their names.
pub type NamedTensors = BTreeMap<String, HostTensor>;

/// The state an optimizer needs to resume.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// The value of [`Optimizer::rule`]. `None` for an optimizer without a rule, and in files of version 1; rule and
    /// flags are then not compared.
    pub rule: Option<String>,
    /// Its groups of parameters.
    pub groups: Vec<GroupState>,
    /// The tensors of [`Optimizer::state`], as `parameter/tensor`.
    pub tensors: NamedTensors,
}

impl OptimizerState {
    /// The keys missing from this state, for which an optimizer that loads it keeps its own values without comparing.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        match self.rule {
            Some(_) => Vec::new(),
            None => vec!["rule", "flags"],
        }
    }
}

/// A group of parameters that share settings.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    /// Names of the parameters, in order.
    pub parameters: Vec<String>,
    /// The settings of [`Optimizer::settings`].
    pub settings: BTreeMap<String, f64>,
    /// The flags of [`Optimizer::flags`].
    #[serde(default, skip_serializing_if = "Flags::is_empty")]
    pub flags: Flags,
}

/// A device tensor under the name it is saved by.
pub(crate) type Live = (String, Tensor);

/// The values of parameters under their names.
pub(crate) fn values(parameters: &[Parameter]) -> Vec<Live> {
    let live = |parameter: &Parameter| (parameter.name().to_owned(), parameter.value().clone());
    parameters.iter().map(live).collect()
}

/// The current elements of `live`. Waits for the device.
///
/// # Errors
/// [`Error::InvalidState`] for a name that appears twice; [`Error::Driver`] if work of the stream failed.
pub(crate) fn save_named(live: Vec<Live>) -> Result<NamedTensors> {
    let mut saved = BTreeMap::new();
    for (name, tensor) in live {
        let host = tensor.to_host()?;
        if saved.contains_key(&name) {
            return Err(Error::state(name, "the name appears twice"));
        }
        saved.insert(name, host);
    }
    Ok(saved)
}

/// The writes that give `live` the elements of `saved`.
///
/// # Errors
/// [`Error::InvalidState`] with every name that only one side has, or whose shape or type differs.
pub(crate) fn match_named(
    live: Vec<Live>,
    saved: &NamedTensors,
) -> Result<Vec<(Tensor, HostTensor)>> {
    let (writes, misfits) = compare(live, saved);
    misfits.refuse()?;
    Ok(writes)
}

/// Compares `live` with `saved`: the writes for tensors that fit, and the misfits in the order of `live`, followed by
/// tensors that were only saved.
fn compare(live: Vec<Live>, saved: &NamedTensors) -> (Vec<(Tensor, HostTensor)>, Misfits) {
    let mut left: BTreeMap<&str, &HostTensor> = saved
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let (mut writes, mut misfits) = (Vec::with_capacity(live.len()), Misfits::default());
    for (name, tensor) in live {
        let Some(host) = left.remove(name.as_str()) else {
            let why = match saved.contains_key(&name) {
                true => "the name appears twice here",
                false => "the saved state has no such tensor",
            };
            misfits.add(name, why);
            continue;
        };
        if host.dtype() == tensor.dtype() && host.shape() == tensor.shape() {
            writes.push((tensor, host.clone()));
            continue;
        }
        let reason = format!(
            "saved as {} of {}, but is {} of {} here",
            host.shape(),
            host.dtype(),
            tensor.shape(),
            tensor.dtype()
        );
        misfits.add(name, reason);
    }
    for name in left.keys() {
        misfits.add(*name, "was saved, but there is no such tensor here");
    }
    (writes, misfits)
}

/// The current state of `optimizer`. Waits for the device.
pub(super) fn save<O: Optimizer + ?Sized>(optimizer: &O) -> Result<OptimizerState> {
    Ok(OptimizerState {
        rule: optimizer.rule().map(str::to_owned),
        groups: groups(optimizer)?,
        tensors: save_named(live(optimizer))?,
    })
}

fn live<O: Optimizer + ?Sized>(optimizer: &O) -> Vec<Live> {
    let mut live = Vec::new();
    for (index, parameter) in optimizer.parameters().iter().enumerate() {
        for (name, tensor) in optimizer.state(index) {
            live.push((format!("{}/{name}", parameter.name()), tensor));
        }
    }
    live
}

fn groups<O: Optimizer + ?Sized>(optimizer: &O) -> Result<Vec<GroupState>> {
    let group = |(number, range): (usize, std::ops::Range<usize>)| {
        let parameters = &optimizer.parameters()[range];
        let mut settings = BTreeMap::new();
        for (name, value) in optimizer.settings(number) {
            // JSON has no infinity and no NaN.
            if !value.is_finite() {
                return Err(Error::state(name, format!("{value} cannot be saved")));
            }
            settings.insert(name.to_owned(), value);
        }
        Ok(GroupState {
            parameters: parameters
                .iter()
                .map(|parameter| parameter.name().to_owned())
                .collect(),
            settings,
            flags: optimizer
                .flags(number)
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
        })
    };
    optimizer
        .groups()
        .into_iter()
        .enumerate()
        .map(group)
        .collect()
}

/// Prepares loading `state` into `optimizer`: checked but not carried out yet. Settings named in `kept` are left
/// unchanged.
///
/// # Errors
/// [`Error::InvalidState`] with the rule, the parameters or tensors, the setting or the group that does not fit.
pub(crate) fn load<'a, O: Optimizer + ?Sized>(
    optimizer: &'a mut O,
    state: &OptimizerState,
    kept: &[&str],
) -> Result<Load<'a>> {
    let rules = state.rule.as_deref().zip(optimizer.rule());
    if let Some((saved, here)) = rules.filter(|(saved, here)| saved != here) {
        let reason = format!("saved from {saved}, this is {here}");
        return Err(Error::state("rule", reason));
    }
    let here = groups(optimizer)?;
    let matched = Matched::new(&here, &state.groups)?;
    let (writes, misfits) = compare(live(optimizer), &state.tensors);
    let misfits = matched.misfits(misfits);
    // If all parameters are found, a misfit of flags or settings explains more than the misfits of tensors that
    // follow from it.
    if matched.is_whole() {
        if let Some((rule, _)) = rules {
            matched.check_flags(rule)?;
        }
        matched.check_settings(kept)?;
    }
    misfits.refuse()?;
    let after = matched.settings(kept)?;
    let before = here.iter().map(|group| group.settings.clone()).collect();
    Ok(Load::writing(writes).after(Settings {
        before,
        after,
        optimizer,
    }))
}

/// The names of the settings that `optimizer` has.
pub(crate) fn setting_names<O: Optimizer + ?Sized>(optimizer: &O) -> BTreeSet<&'static str> {
    let groups = 0..optimizer.groups().len();
    groups
        .flat_map(|group| optimizer.settings(group))
        .map(|(name, _)| name)
        .collect()
}

/// Refuses names in `kept` that are not settings of `optimizer`.
pub(super) fn check_kept<O: Optimizer + ?Sized>(optimizer: &O, kept: &[&str]) -> Result<()> {
    let known = setting_names(optimizer);
    match kept.iter().find(|name| !known.contains(*name)) {
        None => Ok(()),
        Some(name) => {
            let known: Vec<_> = known.into_iter().collect();
            let reason = format!("is not a setting; the settings are {}", known.join(", "));
            Err(Error::state(*name, reason))
        }
    }
}

/// For each group of `optimizer`, the indices of the saved groups that its parameters were in.
///
/// # Errors
/// As [`load`].
pub(crate) fn saved_groups<O: Optimizer + ?Sized>(
    optimizer: &O,
    state: &OptimizerState,
) -> Result<Vec<Vec<usize>>> {
    Ok(Matched::new(&groups(optimizer)?, &state.groups)?.sources())
}

/// The settings of all groups, before and after a load.
struct Settings<'a, O: ?Sized> {
    optimizer: &'a mut O,
    before: Vec<BTreeMap<String, f64>>,
    after: Vec<BTreeMap<String, f64>>,
}

impl<O: Optimizer + ?Sized> Settings<'_, O> {
    fn set(optimizer: &mut O, groups: &[BTreeMap<String, f64>]) -> Result<()> {
        for (number, settings) in groups.iter().enumerate() {
            let changes: Vec<_> = settings
                .iter()
                .map(|(name, value)| (name.as_str(), *value))
                .collect();
            optimizer.set_settings(number, &changes)?;
        }
        Ok(())
    }
}

impl<O: Optimizer + ?Sized> Attempt for Settings<'_, O> {
    fn make(&mut self) -> Result<()> {
        let Err(error) = Self::set(self.optimizer, &self.after) else {
            return Ok(());
        };
        // Groups before the one that refused were already changed. Their old settings were valid, so restoring them
        // succeeds.
        let _ = self.take_back();
        Err(match error {
            Error::InvalidConfig { key, reason } => Error::state(key, reason),
            other => other,
        })
    }

    fn take_back(&mut self) -> Result<()> {
        Self::set(self.optimizer, &self.before)
    }
}
