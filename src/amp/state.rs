//! The saved state of a scaler.

use crate::amp::AmpConfig;
use crate::error::{Error, Result};

/// Version of the keys. Absent in what PyTorch saved, whose five keys mean the same.
const VERSION: u32 = 1;

/// What a scaler needs to go on where it was: PyTorch's five keys, and floor and cap, which PyTorch does not
/// have. All absent for a disabled scaler. A state that PyTorch saved can be loaded.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    /// As in [`AmpConfig`]; a scaler keeps its own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_scale: Option<f64>,
    /// As in [`AmpConfig`]; a scaler keeps its own if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_scale: Option<f64>,
}

impl ScalerState {
    pub(super) fn new(config: &AmpConfig, scale: f64, growth_tracker: u32) -> Self {
        Self {
            version: Some(VERSION),
            scale: Some(scale),
            growth_factor: Some(config.growth_factor),
            backoff_factor: Some(config.backoff_factor),
            growth_interval: Some(config.growth_interval),
            growth_tracker: Some(growth_tracker),
            min_scale: Some(config.min_scale),
            max_scale: Some(config.max_scale),
        }
    }

    /// Whether nothing is in it: it was saved from a disabled scaler.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `config` with what this state says, and the growth tracker; the scale is the initial scale.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an empty state, a missing key, or a value that cannot work.
    pub(super) fn apply(&self, config: &AmpConfig) -> Result<(AmpConfig, u32)> {
        let invalid = |key, reason: String| Error::InvalidState { key, reason };
        if self.is_empty() {
            let reason = "the state is empty; it was saved from a disabled scaler".to_owned();
            return Err(invalid("scale", reason));
        }
        if let Some(version) = self.version.filter(|version| *version != VERSION) {
            let reason = format!("{version} is not known; this is version {VERSION}");
            return Err(invalid("version", reason));
        }
        let missing = |key| {
            move || Error::InvalidState {
                key,
                reason: "the saved state has no such key".to_owned(),
            }
        };
        let restored = AmpConfig {
            init_scale: self.scale.ok_or_else(missing("scale"))?,
            growth_factor: self.growth_factor.ok_or_else(missing("growth_factor"))?,
            backoff_factor: self.backoff_factor.ok_or_else(missing("backoff_factor"))?,
            growth_interval: self
                .growth_interval
                .ok_or_else(missing("growth_interval"))?,
            min_scale: self.min_scale.unwrap_or(config.min_scale),
            max_scale: self.max_scale.unwrap_or(config.max_scale),
            ..config.clone()
        };
        let growth_tracker = self.growth_tracker.ok_or_else(missing("_growth_tracker"))?;
        if i32::try_from(growth_tracker).is_err() {
            return Err(invalid(
                "_growth_tracker",
                format!("{growth_tracker} is above 2^31 - 1"),
            ));
        }
        match restored.validate() {
            Ok(()) => Ok((restored, growth_tracker)),
            Err(Error::InvalidConfig {
                key: "init_scale",
                reason,
            }) => Err(invalid("scale", reason)),
            Err(Error::InvalidConfig { key, reason }) => Err(invalid(key, reason)),
            Err(other) => Err(other),
        }
    }
}
