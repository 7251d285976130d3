//! The saved state of a scaler of 8-bit tensors.

use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Fp8Config, Fp8Scaling};
use crate::amp::versioned;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::AmaxAlgorithm;

/// Version of the layout. Version 1 had no recipe.
const VERSION: u32 = 2;

/// The scales that an update can produce.
const SCALES: RangeInclusive<f32> = f32::MIN_POSITIVE..=f32::MAX;

/// The state an [`Fp8Scaler`](super::Fp8Scaler) needs to resume.
///
/// It can only be read from self-describing formats such as JSON. A state of a later version is refused by its
/// version, whatever else it contains.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct Fp8State {
    /// Version of this layout.
    pub version: u32,
    /// The settings with which the scales were derived; absent in version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Fp8Recipe>,
    /// The tensors, in the order given to the scaler.
    pub tensors: Vec<Fp8TensorState>,
}

/// The settings from [`Fp8Config`] that determine scales, except the length of the histories.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fp8Recipe {
    /// As in [`Fp8Config`].
    pub scaling: Fp8Scaling,
    /// As in [`Fp8Config`].
    pub algorithm: AmaxAlgorithm,
    /// As in [`Fp8Config`].
    pub margin: u32,
    /// As in [`Fp8Config`].
    pub power_of_two: bool,
    /// As in [`Fp8Config`].
    pub epsilon: f32,
}

impl Fp8Recipe {
    fn of(config: &Fp8Config) -> Self {
        Self {
            scaling: config.scaling,
            algorithm: config.algorithm,
            margin: config.margin,
            power_of_two: config.power_of_two,
            epsilon: config.epsilon,
        }
    }

    /// `here`, with the numbers of this recipe.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for another rule, or an invalid number.
    fn apply(&self, here: &Fp8Config) -> Result<Fp8Config> {
        let rules: [(&str, String, String); 2] = [
            (
                "recipe/scaling",
                format!("{:?}", self.scaling),
                format!("{:?}", here.scaling),
            ),
            (
                "recipe/algorithm",
                format!("{:?}", self.algorithm),
                format!("{:?}", here.algorithm),
            ),
        ];
        for (key, saved, here) in rules {
            if saved != here {
                let reason = format!("saved with {saved}, but the scaler uses {here}");
                return Err(Error::state(key, reason));
            }
        }
        let config = Fp8Config {
            margin: self.margin,
            power_of_two: self.power_of_two,
            epsilon: self.epsilon,
            ..here.clone()
        };
        config.validate().map_err(|error| match error {
            Error::InvalidConfig { key, reason } => Error::state(format!("recipe/{key}"), reason),
            other => other,
        })?;
        Ok(config)
    }
}

/// Scale and history of one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fp8TensorState {
    /// Its name.
    pub name: String,
    /// Its 8-bit type.
    pub dtype: DType,
    /// Its scale.
    pub scale: f32,
    /// Its largest magnitudes: that of the current iteration, which is 0, then the oldest to the newest. A single 0
    /// for current scaling.
    pub history: Vec<f32>,
}

impl Serialize for Fp8State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Fp8State {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let state = versioned::checked(deserializer, VERSION)?;
        Self::deserialize(&state).map_err(D::Error::custom)
    }
}

impl Fp8State {
    /// The keys missing from this state, for which a scaler that loads it keeps its own settings: `recipe` in version
    /// 1.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        match self.recipe {
            Some(_) => Vec::new(),
            None => vec!["recipe"],
        }
    }

    pub(super) fn new(
        config: &Fp8Config,
        tensors: &[(String, DType)],
        scales: &[f32],
        history: &[f32],
    ) -> Self {
        let rows = history.chunks_exact(history.len() / tensors.len());
        Self {
            version: VERSION,
            recipe: Some(Fp8Recipe::of(config)),
            tensors: tensors
                .iter()
                .zip(scales.iter().zip(rows))
                .map(|((name, dtype), (scale, row))| Fp8TensorState {
                    name: name.clone(),
                    dtype: *dtype,
                    scale: *scale,
                    history: row.to_vec(),
                })
                .collect(),
        }
    }

    /// The settings that a scaler with the settings `here` resumes with: `here`, with the saved numbers.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an unknown version, another rule, or an invalid number.
    pub(super) fn config(&self, here: &Fp8Config) -> Result<Fp8Config> {
        if !(1..=VERSION).contains(&self.version) {
            let reason = format!("{} is not known; this is version {VERSION}", self.version);
            return Err(Error::state("version", reason));
        }
        match &self.recipe {
            Some(recipe) => recipe.apply(here),
            None => Ok(here.clone()),
        }
    }

    /// Scales and histories of `tensors`, whose order may differ from the saved one.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for the first that is missing, unknown, or invalid.
    pub(super) fn unpack(
        &self,
        tensors: &[(String, DType)],
        length: usize,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let invalid = |key: &str, reason: String| Err(Error::state(key, reason));
        let known: HashSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        let mut by_name = HashMap::with_capacity(self.tensors.len());
        for saved in &self.tensors {
            let name = saved.name.as_str();
            if !known.contains(name) {
                return invalid("tensors", format!("`{name}` is not one of the scaler's"));
            }
            if by_name.insert(name, saved).is_some() {
                return invalid("tensors", format!("`{name}` appears twice"));
            }
        }
        let (mut scales, mut history) = (Vec::new(), Vec::new());
        for (name, dtype) in tensors {
            let Some(saved) = by_name.get(name.as_str()) else {
                return invalid("tensors", format!("`{name}` is missing"));
            };
            saved.check(*dtype, length)?;
            scales.push(saved.scale);
            history.extend(&saved.history);
        }
        Ok((scales, history))
    }
}

impl Fp8TensorState {
    fn check(&self, dtype: DType, length: usize) -> Result<()> {
        let name = &self.name;
        let (key, reason) = if self.dtype != dtype {
            let reason = format!("`{name}` was saved as {}, but is {dtype} here", self.dtype);
            ("dtype", reason)
        } else if !SCALES.contains(&self.scale) {
            let reason = format!(
                "{:e}, of `{name}`, is not from 2^-126 to the largest f32",
                self.scale
            );
            ("scale", reason)
        } else if self.history.len() != length {
            let reason = format!(
                "`{name}` has {}, but the scaler keeps {length}",
                self.history.len()
            );
            ("history", reason)
        } else if let Some(amax) = self
            .history
            .iter()
            .find(|amax| !(0.0..=f32::MAX).contains(*amax))
        {
            (
                "history",
                format!("{amax:e}, of `{name}`, is not a magnitude"),
            )
        } else if self.history[0] != 0.0 {
            (
                "history",
                format!("`{name}` begins with {:e}, not with 0", self.history[0]),
            )
        } else {
            return Ok(());
        };
        Err(Error::state(key, reason))
    }
}
