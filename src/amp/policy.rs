//! Choices that govern a scaler, each a small enum, and the named sets of numbers that other libraries use.
//!
//! A [`ScaleProfile`] gives the settings under which the scale moves as it does in that library, step for
//! step; everything else stays as in PyTorch. Only the numbers are taken over, not the libraries' waiting for
//! the device.

use crate::amp::AmpConfig;
use crate::launch::Refill;

/// What a scaler does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalingMode {
    /// Nothing: every step is applied. It takes no memory.
    Off,
    /// Steps with infinite or NaN gradients are skipped; the scale is 1 for ever. For bf16, whose range is
    /// that of f32.
    CheckOnly,
    /// Losses are scaled, too. For f16.
    #[default]
    Scale,
}

/// Which steps are skipped when one of several optimizers overflows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SkipPolicy {
    /// That optimizer's alone, as in PyTorch.
    #[default]
    Independent,
    /// Those of all optimizers that are checked before the first step of the iteration. An optimizer that is
    /// checked later is refused.
    AllOrNone,
}

/// What a step with NaN among its gradients means. It is skipped in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NanPolicy {
    /// An overflow like another: the scale backs off, as in PyTorch.
    #[default]
    BackOff,
    /// Nothing, if there is no infinity beside it: scale and trackers stay as they are. Each process decides
    /// by its own gradients; where several must keep the same scale, use another policy.
    Ignore,
    /// The scale backs off, and so many such steps in a row are an
    /// [alarm](crate::Error::ScalerAlarm). At least 1.
    ErrorAfter(u32),
}

/// Whose rule the scale follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleProfile {
    /// PyTorch's `GradScaler`: 2¹⁶, doubled after 2,000 clean steps, halved at every overflow.
    #[default]
    Torch,
    /// Apex's `update_scale_hysteresis`: as PyTorch, but the first overflow after a clean step is tolerated.
    ApexHysteresis,
    /// Megatron's `DynamicGradScaler`: 2³², 1,000 steps, floor 1; one overflow between two growths is
    /// tolerated.
    Megatron,
    /// DeepSpeed's `DynamicLossScaler`: 2¹⁶, floor 1; one overflow between two growths is tolerated; grows at
    /// the clean step after 1,000 others.
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
