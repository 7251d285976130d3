//! Bytes that a step moves for each parameter: counted from what every launch says it reads and writes, which
//! `tests/it/kernels/traffic.rs` holds against what device code touches.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "drivers work on plain addresses, and a test fails by panicking"
)]

use std::sync::Arc;

use crate::support::amp::scaler;
use crate::support::device::{counted, device};
use kitsune::amp::GradScaler;
use kitsune::optim::{AdamW, AdamWConfig, MasterWeights, Moments, Parameter};
use kitsune::{Context, DType, HostConfig, Tensor};

/// A scaler, an optimizer of parameters of one type with gradients of another, and what they enqueue.
struct Trainer {
    log: Arc<counted::Log>,
    context: Context,
    scaler: GradScaler,
    optimizer: AdamW,
}

impl Trainer {
    /// Two tensors, one of them of `len` elements and three chunks or more.
    fn new(len: usize, weights: DType, gradients: DType, config: AdamWConfig) -> Self {
        let log = Arc::default();
        let device = counted::device(&device(HostConfig::default()), &log);
        let context = Context::new(&device).unwrap();
        let parameter = |len: usize| {
            let value = Tensor::full(&context, [len], weights, 0.5).unwrap();
            let parameter = Parameter::new(format!("p{len}"), value).unwrap();
            let gradient = Tensor::full(&context, [len], gradients, 0.25).unwrap();
            parameter.set_grad(gradient).unwrap();
            parameter
        };
        let parameters = vec![parameter(len), parameter(77)];
        Self {
            optimizer: AdamW::new(parameters, config).unwrap(),
            scaler: scaler(&context, 2.0),
            context,
            log,
        }
    }

    /// Check, clip, step and update.
    fn step(&mut self) {
        let norm = self.scaler.clip_grad_norm(&self.optimizer, 1.0).unwrap();
        drop((norm, self.scaler.step(&mut self.optimizer).unwrap()));
        self.scaler.update().unwrap();
    }

    /// What the second step enqueues, and the bytes it moves: the first makes tables.
    fn second_step(mut self) -> (Vec<&'static str>, u64) {
        self.step();
        self.log.lock().clear();
        self.step();
        self.context.synchronize().unwrap();
        (counted::names(&self.log), counted::bytes(&self.log))
    }
}

const LENGTHS: [usize; 2] = [150_001, 250_001];

/// Bytes for each parameter, by the difference of two sizes: what a step moves beside elements falls out.
fn bytes_for_each(weights: DType, gradients: DType, config: AdamWConfig) -> f64 {
    let trainer = |len| Trainer::new(len, weights, gradients, config);
    let bytes = LENGTHS.map(|len| trainer(len).second_step().1);
    (bytes[1] - bytes[0]) as f64 / (LENGTHS[1] - LENGTHS[0]) as f64
}

#[test]
fn a_step_in_f32_moves_32_bytes_for_each_parameter() {
    let config = AdamWConfig::default();
    assert_eq!(bytes_for_each(DType::F32, DType::F32, config), 32.0);
}

#[test]
fn a_step_of_half_gradients_with_f32_masters_moves_30() {
    let config = AdamWConfig::default();
    for half in [DType::F16, DType::Bf16] {
        assert_eq!(bytes_for_each(half, half, config), 30.0);
        // A weight in f32 is its own master.
        assert_eq!(bytes_for_each(DType::F32, half, config), 28.0);
    }
}

#[test]
fn masters_cut_in_two_save_2_and_moments_in_bf16_8() {
    let full = AdamWConfig {
        master_weights: MasterWeights::Split,
        ..AdamWConfig::default()
    };
    let narrow = AdamWConfig {
        moments: Moments::Bf16,
        ..full
    };
    assert_eq!(bytes_for_each(DType::Bf16, DType::Bf16, full), 28.0);
    assert_eq!(bytes_for_each(DType::Bf16, DType::Bf16, narrow), 20.0);
    // Only bf16 can be cut.
    assert_eq!(bytes_for_each(DType::F16, DType::F16, full), 30.0);
}

#[test]
fn beside_elements_a_step_moves_next_to_nothing() {
    let (names, bytes) =
        Trainer::new(LENGTHS[0], DType::F32, DType::F32, AdamWConfig::default()).second_step();
    let elements = 32 * (LENGTHS[0] as u64 + 77);
    // The norm that the caller is given.
    assert_eq!(bytes, elements + 16);
    let expected = [
        "gradient_check",
        "clip_coefficient",
        "cast_f64_f64",
        "adam_prepare",
        "adam",
        "step_record",
        "scale_update",
    ];
    assert_eq!(names, expected);
}
