//! The state of an optimizer as a value, and tensors that are saved and found again by name.
//!
//! A tensor of an optimizer is named for its parameter: `layer1.weight/first_moment`. So the order of
//! parameters may change between saving and loading, and a parameter that is missing is told by its name.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::optim::{Optimizer, Parameter};
use crate::storage::{Attempt, HostTensor, Load, Tensor};

/// Tensors by their names.
pub type NamedTensors = BTreeMap<String, HostTensor>;

/// What an optimizer needs to go on where it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Its groups of parameters.
    pub groups: Vec<GroupState>,
    /// What [`Optimizer::state`] lists, as `parameter/tensor`.
    pub tensors: NamedTensors,
}

/// A group of parameters that share settings.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupState {
    /// Names of the parameters, in order.
    pub parameters: Vec<String>,
    /// What [`Optimizer::settings`] lists.
    pub settings: BTreeMap<String, f64>,
}

/// A device tensor under the name it is saved by.
pub(crate) type Live = (String, Tensor);

/// The values of parameters under their names.
pub(crate) fn values(parameters: &[Parameter]) -> Vec<Live> {
    let live = |parameter: &Parameter| (parameter.name().to_owned(), parameter.value().clone());
    parameters.iter().map(live).collect()
}

/// The elements of `live` now. Waits for the device.
///
/// # Errors
/// [`Error::InvalidState`] for a name that stands twice; [`Error::Driver`] if work of the stream failed.
pub(crate) fn save_named(live: Vec<Live>) -> Result<NamedTensors> {
    let mut saved = BTreeMap::new();
    for (name, tensor) in live {
        let host = tensor.to_host()?;
        if saved.contains_key(&name) {
            return Err(Error::state(name, "the name stands twice"));
        }
        saved.insert(name, host);
    }
    Ok(saved)
}

/// What is to be written so that `live` has the elements of `saved`.
///
/// # Errors
/// [`Error::InvalidState`] for the first name that is not on both sides, or whose shape or type differs.
pub(crate) fn match_named(
    live: Vec<Live>,
    saved: &NamedTensors,
) -> Result<Vec<(Tensor, HostTensor)>> {
    let mut left: BTreeMap<&str, &HostTensor> = saved
        .iter()
        .map(|(name, tensor)| (name.as_str(), tensor))
        .collect();
    let mut writes = Vec::with_capacity(live.len());
    for (name, tensor) in live {
        let Some(host) = left.remove(name.as_str()) else {
            let why = match saved.contains_key(&name) {
                true => "the name stands twice here",
                false => "the saved state has no such tensor",
            };
            return Err(Error::state(name, why));
        };
        if host.dtype() != tensor.dtype() || host.shape() != tensor.shape() {
            let (saved, here) = (
                (host.shape(), host.dtype()),
                (tensor.shape(), tensor.dtype()),
            );
            let reason = format!(
                "{} of {} was saved, {} of {} is here",
                saved.0, saved.1, here.0, here.1
            );
            return Err(Error::state(name, reason));
        }
        writes.push((tensor, host.clone()));
    }
    match left.keys().next() {
        None => Ok(writes),
        Some(name) => Err(Error::state(*name, "there is no such tensor here")),
    }
}

/// The state of `optimizer` now. Waits for the device.
pub(super) fn save<O: Optimizer + ?Sized>(optimizer: &O) -> Result<OptimizerState> {
    Ok(OptimizerState {
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
            // JSON has no such numbers.
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
        })
    };
    optimizer
        .groups()
        .into_iter()
        .enumerate()
        .map(group)
        .collect()
}

/// Loading `state` into `optimizer`, checked and ready.
///
/// # Errors
/// [`Error::InvalidState`] with the tensor, the setting or the group that does not fit.
pub(crate) fn load<'a, O: Optimizer + ?Sized>(
    optimizer: &'a mut O,
    state: &OptimizerState,
) -> Result<Load<'a>> {
    let here = groups(optimizer)?;
    if here.len() != state.groups.len() {
        let reason = format!("{} were saved, {} are here", state.groups.len(), here.len());
        return Err(Error::state("groups", reason));
    }
    for (number, (here, saved)) in here.iter().zip(&state.groups).enumerate() {
        if here.parameters != saved.parameters {
            let pairs = here.parameters.iter().zip(&saved.parameters);
            let differing = pairs
                .filter(|(here, saved)| here != saved)
                .map(|(_, saved)| saved);
            let name = differing.chain(saved.parameters.last()).next();
            let key = name.map_or("parameters", String::as_str);
            let reason = format!("group {number} does not have the parameters that were saved");
            return Err(Error::state(key, reason));
        }
        if !here.settings.keys().eq(saved.settings.keys()) {
            let known: Vec<_> = here.settings.keys().map(String::as_str).collect();
            let reason = format!("group {number} has the settings {}", known.join(", "));
            return Err(Error::state("settings", reason));
        }
        if let Some((name, value)) = saved.settings.iter().find(|(_, value)| !value.is_finite()) {
            return Err(Error::state(name, format!("{value} is not finite")));
        }
    }
    let writes = match_named(live(optimizer), &state.tensors)?;
    let settings = |groups: &[GroupState]| {
        let settings = groups.iter().map(|group| group.settings.clone());
        settings.collect()
    };
    Ok(Load::writing(writes).after(Settings {
        before: settings(&here),
        after: settings(&state.groups),
        optimizer,
    }))
}

/// The settings of all groups, and what they are to become.
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
        // Groups before the one that refused were changed; what these had they can have again.
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
