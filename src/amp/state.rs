//! The saved state of a scaler.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use crate::amp::memory::Trackers;
use crate::amp::versioned;
use crate::amp::{AmpConfig, ScalingMode};
use crate::error::{Error, Result};
use crate::launch::Refill;

/// Version of the keys. Absent in PyTorch's states, whose five keys mean the same. Version 1 had neither `mode` nor
/// `kept_scale`.
const VERSION: u32 = 2;

/// The state a scaler needs to resume: PyTorch's five keys, and keys for what PyTorch does not have. Where one of the
/// latter is absent, a scaler keeps its own value ([`lacks`](Self::lacks)). All keys are absent for a disabled
/// scaler. States saved by PyTorch can be loaded.
/// [`GradScaler::load_state_dict`](crate::amp::GradScaler::load_state_dict) lists which states load into which
/// scaler.
///
/// Settings that concern the program rather than the scale are not saved: type, policies, alarms, timing.
///
/// It can only be read from self-describing formats such as JSON. A state of a later version is refused by its
/// version, whatever else it contains. In states of this version or earlier ones, unknown and invalid keys are
/// refused by name.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(remote = "Self", deny_unknown_fields)]
pub struct ScalerState {
    /// Version of this layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// The scaler's mode: [`ScalingMode::Scale`] or [`ScalingMode::CheckOnly`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<ScalingMode>,
    /// The scale; 1 for a scaler that only checks.
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
    /// Tolerated overflows that are not forgotten yet; 0 if absent.
    #[serde(rename = "_overflows", skip_serializing_if = "Option::is_none")]
    pub overflows: Option<u32>,
    /// For a scaler that only checks: the scale of the preceding scaling phase, for the next one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_scale: Option<KeptScale>,
}

/// A scale set aside while losses are not scaled, with its trackers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeptScale {
    /// The scale.
    pub scale: f64,
    /// Clean updates since it last changed.
    #[serde(rename = "_growth_tracker")]
    pub growth_tracker: u32,
    /// Tolerated overflows that are not forgotten yet.
    #[serde(rename = "_overflows")]
    pub overflows: u32,
}

impl KeptScale {
    fn trackers(self) -> Trackers {
        Trackers {
            growth: self.growth_tracker,
            overflows: self.overflows,
        }
    }
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

/// The error of the first invalid key of `state`. All keys are optional, so each can be parsed alone.
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
            mode: Some(config.mode),
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
            kept_scale: None,
        }
    }

    /// Whether the state is empty: it was saved from a disabled scaler.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The keys missing from this state, for which a scaler that loads it keeps its own settings. Empty for an empty
    /// state.
    ///
    /// A state of version 1 lacks `mode`. One saved by PyTorch lacks all keys that PyTorch does not have.
    #[must_use]
    pub fn lacks(&self) -> Vec<&'static str> {
        if self.is_empty() {
            return Vec::new();
        }
        let keys = [
            ("mode", self.mode.is_none()),
            ("min_scale", self.min_scale.is_none()),
            ("max_scale", self.max_scale.is_none()),
            ("hysteresis", self.hysteresis.is_none()),
            ("refill", self.refill.is_none()),
            ("late_growth", self.late_growth.is_none()),
        ];
        let lacking = keys.into_iter().filter(|(_, lacks)| *lacks);
        lacking.map(|(key, _)| key).collect()
    }

    /// Whether the state comes from a scaler that only checked and has no scale set aside.
    pub(super) fn has_no_scale(&self) -> bool {
        self.mode == Some(ScalingMode::CheckOnly) && self.kept_scale.is_none()
    }

    /// Refuses unknown versions.
    pub(super) fn check_version(&self) -> Result<()> {
        match self.version {
            Some(version) if !(1..=VERSION).contains(&version) => {
                let reason = format!("{version} is not known; this is version {VERSION}");
                Err(Error::state("version", reason))
            }
            _ => Ok(()),
        }
    }

    /// The values that an enabled scaler with the settings `here` resumes with.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for an empty state, a missing key, or an invalid value.
    pub(super) fn apply(&self, here: &AmpConfig) -> Result<Restored> {
        if self.is_empty() {
            let reason = "the state is empty; it was saved from a disabled scaler".to_owned();
            return Err(Error::state("scale", reason));
        }
        self.check_version()?;
        let missing = |key| move || Error::state(key, "the saved state has no such key");
        let scale = self.scale.ok_or_else(missing("scale"))?;
        let config = AmpConfig {
            growth_factor: self.growth_factor.ok_or_else(missing("growth_factor"))?,
            backoff_factor: self.backoff_factor.ok_or_else(missing("backoff_factor"))?,
            growth_interval: self
                .growth_interval
                .ok_or_else(missing("growth_interval"))?,
            min_scale: self.min_scale.unwrap_or(here.min_scale),
            max_scale: self.max_scale.unwrap_or(here.max_scale),
            hysteresis: self.hysteresis.unwrap_or(here.hysteresis),
            refill: self.refill.unwrap_or(here.refill),
            late_growth: self.late_growth.unwrap_or(here.late_growth),
            ..here.clone()
        };
        let saved = KeptScale {
            scale,
            growth_tracker: self.growth_tracker.ok_or_else(missing("_growth_tracker"))?,
            overflows: self.overflows.unwrap_or(0),
        };
        check_tracker("_growth_tracker", saved.growth_tracker)?;
        let was_scaling = self.was_scaling(here.effective_mode(), scale)?;
        let scaling = if was_scaling {
            Some(saved)
        } else {
            self.kept_scale
        };
        let config = AmpConfig {
            init_scale: scaling.map_or(config.init_scale, |scaling| scaling.scale),
            ..config
        };
        config.validate().map_err(|error| match error {
            Error::InvalidConfig { key, reason } => {
                let key = match key {
                    "init_scale" if was_scaling => "scale",
                    "init_scale" if scaling.is_some() => "kept_scale/scale",
                    other => other,
                };
                Error::state(key, reason)
            }
            other => other,
        })?;
        Ok(match here.effective_mode() {
            ScalingMode::Scale => Restored {
                scale: config.init_scale,
                trackers: scaling.map(KeptScale::trackers).unwrap_or_default(),
                kept_scale: None,
                config,
            },
            _ => Restored {
                scale: 1.0,
                trackers: match was_scaling {
                    true => Trackers::default(),
                    false => saved.trackers(),
                },
                kept_scale: scaling,
                config,
            },
        })
    }

    /// Whether the scaler that saved this state scaled losses. Without a saved mode, the answer depends on `here`,
    /// the mode of the scaler that loads it.
    fn was_scaling(&self, here: ScalingMode, scale: f64) -> Result<bool> {
        let refuse = |key, reason: String| Err(Error::state(key, reason));
        let mode = match self.mode {
            Some(ScalingMode::Off) => {
                return refuse(
                    "mode",
                    "a scaler that is off has no scale to save".to_owned(),
                );
            }
            Some(mode) => mode,
            // A scaler that only checks would have saved 1.
            None if scale.to_bits() != 1f64.to_bits() => ScalingMode::Scale,
            None => here,
        };
        let is_scaling = mode == ScalingMode::Scale;
        match &self.kept_scale {
            _ if !is_scaling && scale.to_bits() != 1f64.to_bits() => refuse(
                "scale",
                format!("{scale:e} is not 1, and the mode is check_only"),
            ),
            Some(_) if is_scaling => refuse(
                "kept_scale",
                "only a scaler that checks sets a scale aside".to_owned(),
            ),
            Some(kept) => {
                check_tracker("kept_scale/_growth_tracker", kept.growth_tracker)?;
                Ok(is_scaling)
            }
            None => Ok(is_scaling),
        }
    }
}

/// The values that a scaler resumes with.
#[derive(Debug)]
pub(super) struct Restored {
    /// Settings; the initial scale is the one that a scaling scaler would resume with.
    pub(super) config: AmpConfig,
    pub(super) scale: f64,
    pub(super) trackers: Trackers,
    pub(super) kept_scale: Option<KeptScale>,
}

fn check_tracker(key: &'static str, tracker: u32) -> Result<()> {
    match i32::try_from(tracker) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::state(key, format!("{tracker} is above 2^31 - 1"))),
    }
}
