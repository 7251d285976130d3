//! Settings of mixed precision.

use crate::amp::{NanPolicy, ScalingMode, SkipPolicy};
use crate::driver::{Device, DeviceKind, DeviceProperties};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::journal::RECENT_STEPS;
use crate::launch::{Refill, ScalePolicy};
use crate::ops::autocast::{AutocastGuard, autocast};

/// Settings of [`GradScaler`](crate::amp::GradScaler) and autocast. Defaults match PyTorch, which has no floor and no
/// cap.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AmpConfig {
    /// The type that operations run in under autocast: f16 or bf16. Default f16.
    pub dtype: DType,
    /// Off: scaling does nothing, steps are always applied, autocast casts nothing. Default on.
    pub enabled: bool,
    /// What a scaler does while enabled. Default [`ScalingMode::Scale`].
    pub mode: ScalingMode,
    /// Steps without overflow before the scale grows; from 1 to 2³¹ − 1. Default 2000.
    pub growth_interval: u32,
    /// Factor after an overflow; above 0 and below 1. Default 0.5.
    pub backoff_factor: f64,
    /// Factor after an interval without overflow; above 1 and finite. Default 2.
    pub growth_factor: f64,
    /// Scale to begin with, between floor and cap. Default 65536.
    pub init_scale: f64,
    /// Floor of the scale. Default 2⁻¹²⁶. Without a floor, a run that overflows for another reason than its scale
    /// ends with a scale of 0 and NaN weights.
    pub min_scale: f64,
    /// Cap of the scale. Default 2¹²⁶.
    pub max_scale: f64,
    /// The overflow, counted from 1, at which the scale backs off; earlier ones are tolerated. At least 1, the
    /// default.
    pub hysteresis: u32,
    /// When tolerated overflows are forgotten. Default at every clean update.
    pub refill: Refill,
    /// Whether the scale grows at the clean update after a whole interval, rather than at the interval's last.
    /// Default no.
    pub late_growth: bool,
    /// Which steps are skipped if one of several optimizers overflows. Default only that optimizer's.
    pub skip_policy: SkipPolicy,
    /// How NaN among the gradients is treated. Default as an overflow.
    pub nan_policy: NanPolicy,
    /// Skipped steps among the last 32 that raise an alarm, up to 32; 0 for no such alarm. Steps before the first
    /// applied one do not count, because the scale is still being found. Default 16.
    pub storm_skips: u32,
    /// Whether an overflow at the floor of the scale raises an alarm. Default yes.
    pub floor_alarm: bool,
    /// Updates between two alarm checks, for which [`update`](crate::amp::GradScaler::update) has the counters copied
    /// to the host without waiting for them. With 0 only [`alarm`](crate::amp::GradScaler::alarm) checks. Default 64.
    pub alarm_interval: u32,
    /// Whether the device times checks, clipping and steps, at a cost of six more kernels per step. Default no.
    pub timing: bool,
}

/// The range in which both a scale and its inverse are normal f32 numbers.
const SCALE_LIMITS: (f64, f64) = (f32::MIN_POSITIVE as f64, 1.0 / f32::MIN_POSITIVE as f64);

impl Default for AmpConfig {
    fn default() -> Self {
        Self {
            dtype: DType::F16,
            enabled: true,
            mode: ScalingMode::Scale,
            growth_interval: 2000,
            backoff_factor: 0.5,
            growth_factor: 2.0,
            init_scale: 65536.0,
            min_scale: SCALE_LIMITS.0,
            max_scale: SCALE_LIMITS.1,
            hysteresis: 1,
            refill: Refill::CleanUpdate,
            late_growth: false,
            skip_policy: SkipPolicy::Independent,
            nan_policy: NanPolicy::BackOff,
            storm_skips: 16,
            floor_alarm: true,
            alarm_interval: 64,
            timing: false,
        }
    }
}

impl AmpConfig {
    /// The settings that suit `device`: bf16 without scaling where it is native, from compute capability 8.0 on;
    /// otherwise f16 with scaling. The host computes neither natively and gets bf16, whose range makes scaling
    /// unnecessary.
    #[must_use]
    pub fn for_device(device: &Device) -> Self {
        Self::for_properties(device.properties())
    }

    fn for_properties(properties: &DeviceProperties) -> Self {
        let is_native =
            properties.kind == DeviceKind::Host || properties.compute_capability >= Some((8, 0));
        if is_native {
            Self::bf16()
        } else {
            Self::default()
        }
    }

    /// bf16 without scaling: steps with infinite or NaN gradients are skipped.
    #[must_use]
    pub fn bf16() -> Self {
        Self {
            dtype: DType::Bf16,
            mode: ScalingMode::CheckOnly,
            ..Self::default()
        }
    }

    /// Refuses values that cannot work. PyTorch accepts most of them.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of the first such field.
    pub fn validate(&self) -> Result<()> {
        let refuse = |key, reason: String| Err(Error::config(key, reason));
        if !self.dtype.is_half() {
            return refuse("dtype", format!("{} is neither f16 nor bf16", self.dtype));
        }
        if self.growth_interval == 0 || i32::try_from(self.growth_interval).is_err() {
            return refuse(
                "growth_interval",
                format!("{} is not from 1 to 2^31 - 1", self.growth_interval),
            );
        }
        if !(self.backoff_factor > 0.0 && self.backoff_factor < 1.0) {
            return refuse(
                "backoff_factor",
                format!("{} is not above 0 and below 1", self.backoff_factor),
            );
        }
        if !(self.growth_factor > 1.0 && self.growth_factor.is_finite()) {
            return refuse(
                "growth_factor",
                format!("{} is not above 1 and finite", self.growth_factor),
            );
        }
        for (key, value) in [("min_scale", self.min_scale), ("max_scale", self.max_scale)] {
            if !(SCALE_LIMITS.0..=SCALE_LIMITS.1).contains(&value) {
                return refuse(key, format!("{value} is not from 2^-126 to 2^126"));
            }
        }
        if self.min_scale > self.max_scale {
            let reason = format!("{} is above max_scale, {}", self.min_scale, self.max_scale);
            return refuse("min_scale", reason);
        }
        self.validate_counts()?;
        self.check_scale(self.init_scale)
            .map_err(|reason| Error::config("init_scale", reason))
    }

    fn validate_counts(&self) -> Result<()> {
        if self.hysteresis == 0 {
            return Err(Error::config("hysteresis", "must be at least 1, not 0"));
        }
        if self.nan_policy == NanPolicy::ErrorAfter(0) {
            return Err(Error::config("nan_policy", "needs at least 1 step, not 0"));
        }
        if self.storm_skips > RECENT_STEPS {
            let reason = format!("{} is not from 0 to {RECENT_STEPS}", self.storm_skips);
            return Err(Error::config("storm_skips", reason));
        }
        Ok(())
    }

    /// The mode that applies under these settings: [`ScalingMode::Off`] if disabled.
    #[must_use]
    pub fn effective_mode(&self) -> ScalingMode {
        if self.enabled {
            self.mode
        } else {
            ScalingMode::Off
        }
    }

    /// Opens a scope in which operations run in these settings' type, or unchanged if disabled. It ends when the
    /// guard is dropped; see [`autocast`].
    #[must_use = "the scope ends when its guard is dropped"]
    pub fn autocast(&self) -> AutocastGuard {
        autocast(self.enabled, self.dtype)
    }

    /// Runs `body` in such a scope.
    pub fn in_autocast<R>(&self, body: impl FnOnce() -> R) -> R {
        let _scope = self.autocast();
        body()
    }

    /// Refuses a `scale` that these settings do not allow, with the reason.
    pub(super) fn check_scale(&self, scale: f64) -> Result<(), String> {
        if (self.min_scale..=self.max_scale).contains(&scale) {
            return Ok(());
        }
        Err(format!(
            "{scale:e} is not from min_scale, {:e}, to max_scale, {:e}",
            self.min_scale, self.max_scale
        ))
    }

    pub(super) fn policy(&self) -> ScalePolicy {
        let (min_scale, max_scale) = match self.mode {
            // With floor and cap equal, the scale cannot move.
            ScalingMode::CheckOnly => (1.0, 1.0),
            _ => (narrow(self.min_scale), narrow(self.max_scale)),
        };
        ScalePolicy {
            growth_factor: self.growth_factor,
            backoff_factor: self.backoff_factor,
            growth_interval: self.growth_interval,
            min_scale,
            max_scale,
            hysteresis: self.hysteresis,
            refill: self.refill,
            late_growth: self.late_growth,
        }
    }
}

/// A scale as the device keeps it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "scales are kept in f32; settings are checked"
)]
pub(super) fn narrow(scale: f64) -> f32 {
    scale as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut AmpConfig)) -> &'static str {
        let mut config = AmpConfig::default();
        change(&mut config);
        match config.validate() {
            Err(Error::InvalidConfig { key, .. }) => key,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn devices_get_the_type_they_compute_in() {
        let device = Device::host(crate::HostConfig::default()).unwrap();
        let mut properties = device.properties().clone();
        let mut chosen = |kind, compute_capability| {
            (properties.kind, properties.compute_capability) = (kind, compute_capability);
            let config = AmpConfig::for_properties(&properties);
            config.validate().unwrap();
            (config.dtype, config.mode)
        };
        let bf16 = (DType::Bf16, ScalingMode::CheckOnly);
        let f16 = (DType::F16, ScalingMode::Scale);
        assert_eq!(chosen(DeviceKind::Host, None), bf16);
        assert_eq!(chosen(DeviceKind::Cuda, Some((9, 0))), bf16);
        assert_eq!(chosen(DeviceKind::Cuda, Some((8, 0))), bf16);
        assert_eq!(chosen(DeviceKind::Cuda, Some((7, 5))), f16);
    }

    /// Sets one field to a number.
    type Set = fn(&mut AmpConfig, f64);

    #[test]
    fn no_number_that_cannot_work_passes() {
        AmpConfig::default().validate().unwrap();
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        // Numbers that every field refuses, followed by those that only one of them refuses.
        let bad = [nan, -nan, 0.0, -0.0, -1.0, -f64::MIN_POSITIVE, inf, -inf];
        let fields: [(&str, Set, &[f64]); 5] = [
            (
                "init_scale",
                |config, x| config.init_scale = x,
                &[1e-300, 1e300],
            ),
            (
                "min_scale",
                |config, x| config.min_scale = x,
                &[1e-40, 1e300],
            ),
            (
                "max_scale",
                |config, x| config.max_scale = x,
                &[1e-40, f64::from(f32::MAX)],
            ),
            (
                "growth_factor",
                |config, x| config.growth_factor = x,
                &[1.0, 0.5, 1e-300],
            ),
            (
                "backoff_factor",
                |config, x| config.backoff_factor = x,
                &[1.0, 2.0],
            ),
        ];
        for (field, set, more) in fields {
            for value in bad.iter().chain(more) {
                let named = refused(|config| set(config, *value));
                assert_eq!(named, field, "{value}");
                let mut config = AmpConfig::default();
                set(&mut config, *value);
                let reason = config.validate().unwrap_err().to_string();
                assert!(
                    reason.contains(&format!("{value}")) || reason.contains(&format!("{value:e}")),
                    "{reason}"
                );
            }
        }
    }

    #[test]
    fn counts_and_limits_that_cannot_work_are_refused_by_name() {
        for value in [0, 1 << 31, u32::MAX] {
            let named = refused(|config| config.growth_interval = value);
            assert_eq!(named, "growth_interval");
        }
        for dtype in [DType::F32, DType::F64, DType::U32] {
            assert_eq!(refused(|config| config.dtype = dtype), "dtype");
        }
        // A floor above the cap, and initial scales outside of floor and cap.
        let crossed = refused(|config| (config.min_scale, config.max_scale) = (8.0, 4.0));
        assert_eq!(crossed, "min_scale");
        assert_eq!(refused(|config| config.max_scale = 1024.0), "init_scale");
        assert_eq!(refused(|config| config.min_scale = 1e6), "init_scale");
        assert_eq!(refused(|config| config.hysteresis = 0), "hysteresis");
        assert_eq!(refused(|config| config.storm_skips = 33), "storm_skips");
        let nan_policy = refused(|config| config.nan_policy = NanPolicy::ErrorAfter(0));
        assert_eq!(nan_policy, "nan_policy");
    }
}
