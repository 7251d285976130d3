//! The saved state of a scaler.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;

use crate::amp::AmpConfig;
use crate::amp::memory::Trackers;
use crate::error::{Error, Result};
use crate::launch::Refill;

/// Version of the keys. Absent in what PyTorch saved, whose five keys mean the same.
const VERSION: u32 = 1;

macro_rules! state {
    ($($(#[$meta:meta])* $field:ident $key:literal: $type:ty,)*) => {
        /// What a scaler needs to go on where it was: PyTorch's five keys, and those for what PyTorch does not
        /// have, of which a scaler keeps its own where they are absent. All absent for a disabled scaler. A
        /// state that PyTorch saved can be loaded.
        ///
        /// Reading one of a later version fails with that version, whatever else is in it; of this version,
        /// unknown keys are refused.
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "Read")]
        pub struct ScalerState {
            $(
                $(#[$meta])*
                #[serde(rename = $key, skip_serializing_if = "Option::is_none")]
                pub $field: Option<$type>,
            )*
        }

        /// A state as it is read: with what its version does not know.
        #[derive(serde::Deserialize)]
        struct Read {
            $(#[serde(rename = $key, default)] $field: Option<$type>,)*
            #[serde(flatten)]
            unknown: BTreeMap<String, IgnoredAny>,
        }

        impl TryFrom<Read> for ScalerState {
            type Error = String;

            fn try_from(read: Read) -> Result<Self, String> {
                check_version(read.version)?;
                if let Some(key) = read.unknown.keys().next() {
                    return Err(format!("unknown key `{key}`"));
                }
                Ok(Self { $($field: read.$field,)* })
            }
        }
    };
}

state! {
    /// Version of this layout.
    version "version": u32,
    /// The scale.
    scale "scale": f64,
    /// As in [`AmpConfig`].
    growth_factor "growth_factor": f64,
    /// As in [`AmpConfig`].
    backoff_factor "backoff_factor": f64,
    /// As in [`AmpConfig`].
    growth_interval "growth_interval": u32,
    /// Clean updates since the scale last changed.
    growth_tracker "_growth_tracker": u32,
    /// As in [`AmpConfig`].
    min_scale "min_scale": f64,
    /// As in [`AmpConfig`].
    max_scale "max_scale": f64,
    /// As in [`AmpConfig`].
    hysteresis "hysteresis": u32,
    /// As in [`AmpConfig`].
    refill "refill": Refill,
    /// As in [`AmpConfig`].
    late_growth "late_growth": bool,
    /// Overflows that were tolerated and not forgotten; none if absent.
    overflows "_overflows": u32,
}

fn check_version(version: Option<u32>) -> Result<(), String> {
    match version.filter(|version| *version != VERSION) {
        Some(version) => Err(format!(
            "version {version} is not known; this is version {VERSION}"
        )),
        None => Ok(()),
    }
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
        check_version(self.version).map_err(|reason| Error::state("version", reason))?;
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
