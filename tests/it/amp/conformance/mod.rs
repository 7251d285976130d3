//! Conformance of mixed precision: numbered cases, each a behaviour of PyTorch 2.15 or of another library that
//! trains with loss scaling. Where we differ on purpose, the case states the other's result and ours.
//!
//! Vectors come from `tests/data/amp-oracle.json`, which PyTorch wrote, from the libraries' own tests, and
//! from the rules they document. Run on the host device, or as `KITSUNE_TEST_DEVICE` says on another.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a test fails by panicking, replays graphs, and reads f32 values written as f64"
)]

mod accounted;
mod autocast;
mod capture;
mod clip;
mod fp8;
mod gradients;
mod modes;
mod order;
mod peers;
mod precision;
mod restore;
mod scale;
mod several;
mod steps;
mod training;
mod update;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::{Context, Tensor};

/// Settings of this scale and interval.
fn config(init_scale: f64, growth_interval: u32) -> AmpConfig {
    AmpConfig {
        init_scale,
        growth_interval,
        ..AmpConfig::default()
    }
}

/// Scale and growth tracker.
fn scale_and_tracker(scaler: &GradScaler) -> (f64, u32) {
    let state = scaler.state_dict().unwrap();
    (state.scale.unwrap(), state.growth_tracker.unwrap())
}

/// A tensor of this shape and these f32 values.
fn shaped(context: &Context, shape: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(context, shape, values).unwrap()
}
