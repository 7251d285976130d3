//! Policies of a scaler, each a small enum, and named presets for the numbers that other libraries use.
//!
//! A [`ScaleProfile`] gives the settings under which the scale moves exactly as in that library. Everything else
//! stays as in PyTorch: a profile copies the numbers, not the points at which those libraries wait for the device.

use crate::amp::AmpConfig;
use crate::launch::Refill;

/// What a scaler does with losses and steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalingMode {
    /// Nothing: every step is applied. The scaler takes no memory.
    Off,
    /// Skips steps with infinite or NaN gradients; the scale is always 1. For bf16, whose range is that of f32.
    CheckOnly,
    /// Also scales losses. For f16.
    #[default]
    Scale,
}

/// Which steps are skipped when one of several optimizers overflows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipPolicy {
    /// Only that optimizer's, as in PyTorch.
    #[default]
    Independent,
    /// Those of all optimizers. All must be checked before the first step of the iteration; a later check is refused.
    AllOrNone,
}

/// How a step with NaN among its gradients is treated. It is skipped in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NanPolicy {
    /// As an overflow: the scale backs off, as in PyTorch.
    #[default]
    BackOff,
    /// Ignored if there is no infinity as well: scale and trackers stay unchanged. Each process decides by its own
    /// gradients; where several must keep the same scale, use another policy.
    Ignore,
    /// The scale backs off, and this many such steps in a row raise an [alarm](crate::Error::ScalerAlarm). At least
    /// 1.
    ErrorAfter(u32),
}

/// The library whose rule the scale follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleProfile {
    /// PyTorch's `GradScaler`: 2¹⁶, doubled after 2,000 clean steps, halved at every overflow.
    #[default]
    Torch,
    /// Apex's `update_scale_hysteresis`: as PyTorch, but tolerates the first overflow after a clean step.
    ApexHysteresis,
    /// Megatron's `DynamicGradScaler`: 2³², 1,000 steps, floor 1; tolerates one overflow between two growths.
    Megatron,
    /// DeepSpeed's `DynamicLossScaler`: 2¹⁶, floor 1; tolerates one overflow between two growths; grows at the clean
    /// step after 1,000 others.
    DeepSpeed,
}

impl ScaleProfile {
    /// The settings of the profile.
    #[must_use]
    pub fn config(self) -> AmpConfig {
        let torch = AmpConfig::default();
        match self {
            Self::Torch => torch,
            Self::ApexHysteresis => AmpConfig {
                hysteresis: 2,
                ..torch
            },
            Self::Megatron => AmpConfig {
                init_scale: 2f64.powi(32),
                growth_interval: 1000,
                min_scale: 1.0,
                hysteresis: 2,
                refill: Refill::Growth,
                ..torch
            },
            Self::DeepSpeed => AmpConfig {
                growth_interval: 1000,
                min_scale: 1.0,
                hysteresis: 2,
                refill: Refill::Growth,
                late_growth: true,
                ..torch
            },
        }
    }
}
