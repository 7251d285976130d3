//! The saved state of a scaler.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::amp::AmpConfig;
use crate::amp::memory::Trackers;
use crate::amp::versioned;
use crate::error::{Error, Result};
use crate::launch::Refill;

/// Version of the keys. Absent in what PyTorch saved, whose five keys mean the same.
const VERSION: u32 = 1;

/// What a scaler needs to go on where it was: PyTorch's five keys, and those for what PyTorch does not have, of which a
/// scaler keeps its own where they are absent. All absent for a disabled scaler. A state that PyTorch saved can be
/// loaded.
///
/// It is read from formats that tell what they hold, as JSON does. Reading one of a later version fails with that
/// version, whatever else is in it; of this version, keys that are unknown or hold something else are refused by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct ScalerState {
    /// Version of this layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// The scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth_factor: Option<f64>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff_factor: Option<f64>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub growth_interval: Option<u32>,
    /// Clean updates since the scale last changed.
    #[serde(rename = "_growth_tracker", skip_serializing_if = "Option::is_none")]
    pub growth_tracker: Option<u32>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_scale: Option<f64>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_scale: Option<f64>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hysteresis: Option<u32>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refill: Option<Refill>,
    /// As in [`AmpConfig`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub late_growth: Option<bool>,
    /// Overflows that were tolerated and not forgotten; none if absent.
    #[serde(rename = "_overflows", skip_serializing_if = "Option::is_none")]
    pub overflows: Option<u32>,
}

impl Serialize for ScalerState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        Self::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for ScalerState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let state = versioned::checked(deserializer, VERSION)?;
        Self::deserialize(&state).map_err(|error| {
            let reason = culprit(&state).unwrap_or_else(|| error.to_string());
            D::Error::custom(reason)
        })
    }
}

/// What is wrong with the first key of `state` that cannot be. Every key can do without the others.
fn culprit(state: &Value) -> Option<String> {
    state.as_object()?.iter().find_map(|(key, value)| {
        let alone = Value::Object([(key.clone(), value.clone())].into_iter().collect());
        let error = ScalerState::deserialize(&alone).err()?;
        Some(format!("key `{key}`: {error}"))
    })
}

impl ScalerState {
    pub(super) fn new(config: &AmpConfig, scale: f64, trackers: Trackers) -> Self {
        Self {
            version: Some(VERSION),
            scale: Some(scale),
            growth_factor: Some(config.growth_factor),
            backoff_factor: Some(config.backoff_factor),
            growth_interval: Some(config.growth_interval),
            growth_tracker: Some(trackers.growth),
            min_scale: Some(config.min_scale),
            max_scale: Some(config.max_scale),
            hysteresis: Some(config.hysteresis),
            refill: Some(config.refill),
            late_growth: Some(config.late_growth),
            overflows: Some(trackers.overflows),
        }
    }

    /// Whether nothing is in it: it was saved from a disabled scaler.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `config` with what this state says, and the trackers; the scale is the initial scale.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an empty state, a missing key, or a value that cannot work.
    pub(super) fn apply(&self, config: &AmpConfig) -> Result<(AmpConfig, Trackers)> {
        if self.is_empty() {
            let reason = "the state is empty; it was saved from a disabled scaler".to_owned();
            return Err(Error::state("scale", reason));
        }
        if let Some(version) = self.version.filter(|version| *version != VERSION) {
            let reason = format!("{version} is not known; this is version {VERSION}");
            return Err(Error::state("version", reason));
        }
        let missing = |key| move || Error::state(key, "the saved state has no such key");
        let restored = AmpConfig {
            init_scale: self.scale.ok_or_else(missing("scale"))?,
            growth_factor: self.growth_factor.ok_or_else(missing("growth_factor"))?,
            backoff_factor: self.backoff_factor.ok_or_else(missing("backoff_factor"))?,
            growth_interval: self
                .growth_interval
                .ok_or_else(missing("growth_interval"))?,
            min_scale: self.min_scale.unwrap_or(config.min_scale),
            max_scale: self.max_scale.unwrap_or(config.max_scale),
            hysteresis: self.hysteresis.unwrap_or(config.hysteresis),
            refill: self.refill.unwrap_or(config.refill),
            late_growth: self.late_growth.unwrap_or(config.late_growth),
            ..config.clone()
        };
        let growth_tracker = self.growth_tracker.ok_or_else(missing("_growth_tracker"))?;
        if i32::try_from(growth_tracker).is_err() {
            let reason = format!("{growth_tracker} is above 2^31 - 1");
            return Err(Error::state("_growth_tracker", reason));
        }
        match restored.validate() {
            Ok(()) => {
                let trackers = Trackers {
                    growth: growth_tracker,
                    overflows: self.overflows.unwrap_or(0),
                };
                Ok((restored, trackers))
            }
            Err(Error::InvalidConfig {
                key: "init_scale",
                reason,
            }) => Err(Error::state("scale", reason)),
            Err(Error::InvalidConfig { key, reason }) => Err(Error::state(key, reason)),
            Err(other) => Err(other),
        }
    }
}
