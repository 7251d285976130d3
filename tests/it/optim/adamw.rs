//! AdamW against the same formula in f64, step counts, and master weights.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::amp::{context, ones, parameter, set_grad, value};
use kitsune::optim::{AdamW, AdamWConfig, MasterWeights, Optimizer};
use kitsune::{Context, DType, Element, Error, bf16, f16};

#[derive(Clone, Copy, Default)]
struct Reference {
    weight: f64,
    first: f64,
    second: f64,
}

impl Reference {
    fn step(&mut self, config: &AdamWConfig, count: i32, gradient: f64) {
        let (beta1, beta2) = config.betas;
        self.weight *= 1.0 - config.learning_rate * config.weight_decay;
        self.first = beta1 * self.first + (1.0 - beta1) * gradient;
        self.second = beta2 * self.second + (1.0 - beta2) * gradient * gradient;
        let first = self.first / (1.0 - beta1.powi(count));
        let second = self.second / (1.0 - beta2.powi(count));
        self.weight -= config.learning_rate * first / (second.sqrt() + config.epsilon);
    }
}

fn follows_the_reference<T: Element>(
    context: &Context,
    config: AdamWConfig,
    len: usize,
    tolerance: f64,
) {
    let start: Vec<T> = (0..len)
        .map(|at| T::from_f64(1.0 - (at % 7) as f64 / 4.0))
        .collect();
    let weight = parameter(context, "w", &start);
    let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
    let begin = |value: &T| Reference {
        weight: value.to_f64(),
        ..Reference::default()
    };
    let mut expected: Vec<_> = start.iter().map(begin).collect();
    for step in 1..=20 {
        let gradient = |at: usize| T::from_f64(((at * 5 + step * 11) % 23) as f64 / 8.0 - 1.0);
        let gradients: Vec<T> = (0..len).map(gradient).collect();
        set_grad(&weight, &gradients);
        optimizer.step_unscaled().unwrap();
        let count = i32::try_from(step).unwrap();
        for (expected, gradient) in expected.iter_mut().zip(&gradients) {
            expected.step(&config, count, gradient.to_f64());
        }
    }
    for (got, expected) in value::<T>(&weight).iter().zip(&expected) {
        let error = (got.to_f64() - expected.weight).abs();
        assert!(
            error <= tolerance * T::DTYPE.epsilon(),
            "{got} {}",
            expected.weight
        );
    }
    assert_eq!(optimizer.step_counts().to_vec::<u32>().unwrap(), [20]);
}

#[test]
fn every_type_follows_the_formula() {
    let context = context();
    let config = AdamWConfig {
        learning_rate: 0.01,
        ..AdamWConfig::default()
    };
    for len in [1, 1000, 70_001] {
        follows_the_reference::<f32>(&context, config, len, 32.0);
    }
    follows_the_reference::<f64>(&context, config, 1000, 64.0);
    follows_the_reference::<f16>(&context, config, 1000, 1.0);
    follows_the_reference::<bf16>(&context, config, 1000, 1.0);
    let heavy = AdamWConfig {
        weight_decay: 0.5,
        betas: (0.0, 0.5),
        ..config
    };
    follows_the_reference::<f32>(&context, heavy, 1000, 32.0);
}

#[test]
fn master_weights_keep_what_16_bits_lose() {
    let context = context();
    // A step of 10⁻⁴ is less than half the distance from 1 to the next bf16.
    let run = |master_weights| {
        let weight = ones(&context, "w", &[bf16::ONE; 4]);
        let config = AdamWConfig {
            learning_rate: 1e-4,
            weight_decay: 0.0,
            master_weights,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
        for _ in 0..100 {
            optimizer.step_unscaled().unwrap();
        }
        (value::<bf16>(&weight), optimizer)
    };
    let (alone, optimizer) = run(MasterWeights::Off);
    assert_eq!(alone, [bf16::ONE; 4]);
    assert!(optimizer.master_weight(0).is_none());
    let (with, optimizer) = run(MasterWeights::F32);
    let master = optimizer.master_weight(0).unwrap();
    assert_eq!(master.dtype(), DType::F32);
    let master = master.to_vec::<f32>().unwrap();
    assert!(
        master.iter().all(|weight| (weight - 0.99).abs() < 1e-5),
        "{master:?}"
    );
    let rounded: Vec<_> = master
        .iter()
        .map(|weight| bf16::from_f32(*weight))
        .collect();
    assert_eq!(with, rounded);
    assert_ne!(with, alone);
}

#[test]
fn master_weights_are_reloaded_on_request() {
    let context = context();
    let weight = ones(&context, "w", &[f16::ONE; 2]);
    let config = AdamWConfig {
        learning_rate: 0.0,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
    weight.value().fill(3.0).unwrap();
    optimizer.reload_master_weights().unwrap();
    optimizer.step_unscaled().unwrap();
    assert_eq!(value::<f16>(&weight), [f16::from_f32(3.0); 2]);
}

#[test]
fn each_parameter_counts_its_own_steps() {
    let context = context();
    let often = ones(&context, "often", &[1f32; 3]);
    let rarely = ones(&context, "rarely", &[1f32; 70_000]);
    let mut optimizer =
        AdamW::new(vec![often.clone(), rarely.clone()], AdamWConfig::default()).unwrap();
    optimizer.step_unscaled().unwrap();
    rarely.zero_grad();
    optimizer.step_unscaled().unwrap();
    assert_eq!(optimizer.step_counts().to_vec::<u32>().unwrap(), [2, 1]);
    set_grad(&rarely, &[1f32; 70_000]);
    optimizer.step_unscaled().unwrap();
    assert_eq!(optimizer.step_counts().to_vec::<u32>().unwrap(), [3, 2]);
}

#[test]
fn settings_are_checked() {
    let context = context();
    let default = AdamWConfig::default;
    for (key, config) in [
        (
            "learning_rate",
            AdamWConfig {
                learning_rate: f64::NAN,
                ..default()
            },
        ),
        (
            "betas",
            AdamWConfig {
                betas: (1.0, 0.9),
                ..default()
            },
        ),
        (
            "betas",
            AdamWConfig {
                betas: (0.9, -0.1),
                ..default()
            },
        ),
        (
            "epsilon",
            AdamWConfig {
                epsilon: -1e-8,
                ..default()
            },
        ),
        (
            "weight_decay",
            AdamWConfig {
                weight_decay: -0.1,
                ..default()
            },
        ),
    ] {
        match AdamW::new(vec![parameter(&context, "w", &[0f32])], config) {
            Err(Error::InvalidConfig { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn state_written_back_goes_on_to_the_bit() {
    let context = context();
    let make = || {
        let weight = ones(&context, "w", &[bf16::from_f32(0.75); 300]);
        let other = ones(&context, "v", &[0.75f32; 5]);
        let parameters = vec![other, weight];
        AdamW::new(parameters, AdamWConfig::default()).unwrap()
    };
    let everything = |optimizer: &AdamW| {
        let each = |(index, parameter): (usize, &kitsune::optim::Parameter)| {
            let mut tensors = optimizer.state(index);
            tensors.push(("value", parameter.value().clone()));
            tensors
        };
        let parameters = optimizer.parameters().iter().enumerate();
        parameters.flat_map(each).collect::<Vec<_>>()
    };
    let (mut first, mut second) = (make(), make());
    for _ in 0..3 {
        first.step_unscaled().unwrap();
    }
    for ((name, from), (same, to)) in everything(&first).into_iter().zip(everything(&second)) {
        assert_eq!(name, same);
        to.copy_from(&from).unwrap();
    }
    for optimizer in [&mut first, &mut second] {
        optimizer.step_unscaled().unwrap();
    }
    let numbers = |optimizer: &AdamW| {
        let read = |(name, tensor): (_, kitsune::Tensor)| {
            let values = match tensor.dtype() {
                DType::U32 => tensor
                    .to_vec::<u32>()
                    .unwrap()
                    .into_iter()
                    .map(f64::from)
                    .collect(),
                _ => tensor.cast(DType::F64).unwrap().to_vec::<f64>().unwrap(),
            };
            (name, values)
        };
        everything(optimizer)
            .into_iter()
            .map(read)
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers(&first), numbers(&second));
    let names: Vec<_> = first.state(1).iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["master_weight", "first_moment", "second_moment", "steps"]
    );
}
