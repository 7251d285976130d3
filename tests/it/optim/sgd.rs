//! Gradient descent against the same formula in f64, and what parameters refuse.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use crate::support::amp::{context, grad, ones, parameter, scaler, set_grad, tensor, value};
use kitsune::optim::{MasterWeights, Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Element, Error, Tensor, bf16, f16};

/// One weight after another step, in f64.
fn reference(config: &SgdConfig, weight: &mut f64, buffer: &mut f64, gradient: f64) {
    let gradient = gradient + config.weight_decay * *weight;
    *buffer = config.momentum * *buffer + gradient;
    let direction = if config.nesterov {
        gradient + config.momentum * *buffer
    } else {
        *buffer
    };
    *weight -= config.learning_rate * direction;
}

fn gradient(at: usize, step: usize) -> f64 {
    ((at * 7 + step * 13) % 31) as f64 / 16.0 - 1.0
}

/// Five steps in type `T`; the tolerance is in units of the last place of 1.
fn follows_the_reference<T: Element>(
    context: &Context,
    config: SgdConfig,
    len: usize,
    tolerance: f64,
) {
    let start: Vec<T> = (0..len)
        .map(|at| T::from_f64(1.0 + (at % 5) as f64 / 8.0))
        .collect();
    let weight = parameter(context, "w", &start);
    let mut optimizer = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut expected: Vec<(f64, f64)> = start.iter().map(|value| (value.to_f64(), 0.0)).collect();
    for step in 0..5 {
        let gradients: Vec<T> = (0..len).map(|at| T::from_f64(gradient(at, step))).collect();
        set_grad(&weight, &gradients);
        optimizer.step_unscaled().unwrap();
        for ((value, buffer), gradient) in expected.iter_mut().zip(&gradients) {
            reference(&config, value, buffer, gradient.to_f64());
        }
    }
    for (got, (expected, _)) in value::<T>(&weight).iter().zip(&expected) {
        let error = (got.to_f64() - expected).abs();
        assert!(
            error <= tolerance * T::DTYPE.epsilon() * expected.abs().max(1.0),
            "{got} {expected}"
        );
    }
}

#[test]
fn every_type_follows_the_formula() {
    let context = context();
    let plain = SgdConfig {
        learning_rate: 0.1,
        ..SgdConfig::default()
    };
    let momentum = SgdConfig {
        momentum: 0.9,
        weight_decay: 0.01,
        ..plain
    };
    let nesterov = SgdConfig {
        nesterov: true,
        ..momentum
    };
    for config in [plain, momentum, nesterov] {
        for len in [1, 1000, 70_001] {
            follows_the_reference::<f32>(&context, config, len, 16.0);
        }
        follows_the_reference::<f64>(&context, config, 1000, 16.0);
        // With master weights only the last rounding shows.
        follows_the_reference::<f16>(&context, config, 1000, 1.0);
        follows_the_reference::<bf16>(&context, config, 1000, 1.0);
        let alone = SgdConfig {
            master_weights: MasterWeights::Off,
            ..config
        };
        follows_the_reference::<f16>(&context, alone, 1000, 8.0);
    }
}

#[test]
fn many_small_tensors_of_all_types_are_one_step() {
    let context = context();
    let weights: Vec<_> = (0..2000)
        .map(|index| {
            let name = format!("weight.{index}");
            match index % 3 {
                0 => ones(&context, &name, &[0.5f32; 3]),
                1 => ones(&context, &name, &[0.5f64]),
                _ => ones(&context, &name, &[f16::from_f32(0.5); 2]),
            }
        })
        .collect();
    let mut optimizer = Sgd::new(
        weights.clone(),
        SgdConfig {
            learning_rate: 1.0,
            ..SgdConfig::default()
        },
    )
    .unwrap();
    optimizer.step_unscaled().unwrap();
    for weight in &weights {
        let values = weight
            .value()
            .cast(DType::F64)
            .unwrap()
            .to_vec::<f64>()
            .unwrap();
        assert!(values.iter().all(|value| *value == 0.5), "{values:?}");
    }
}

#[test]
fn only_parameters_with_a_gradient_move() {
    let context = context();
    let (moves, stays) = (
        ones(&context, "moves", &[1f32]),
        parameter(&context, "stays", &[1f32]),
    );
    let config = SgdConfig {
        learning_rate: 0.5,
        weight_decay: 0.5,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(vec![stays.clone(), moves.clone()], config).unwrap();
    optimizer.step_unscaled().unwrap();
    assert_eq!(
        (value::<f32>(&moves), value::<f32>(&stays)),
        (vec![0.25], vec![1.0])
    );
    optimizer.zero_grad();
    assert!(moves.grad().is_none());
    optimizer.step_unscaled().unwrap();
    assert_eq!(value::<f32>(&moves), [0.25]);
}

#[test]
fn gradients_add_up() {
    let context = context();
    let weight = parameter(&context, "w", &[0f32; 6]);
    let first = tensor(&context, &[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    weight.accumulate_grad(first.clone()).unwrap();
    weight
        .accumulate_grad(tensor(&context, &[f16::from_f32(0.5); 6]))
        .unwrap();
    assert_eq!(grad::<f32>(&weight), [1.5, 2.5, 3.5, 4.5, 5.5, 6.5]);
    // The sum is in the first gradient's memory, which was handed over.
    assert!(weight.grad().unwrap().is_same(&first));
    let matrix = Parameter::new("m", Tensor::zeros(&context, [2, 3], DType::F32).unwrap()).unwrap();
    let turned = first.reshape([3, 2]).unwrap().transpose(0, 1).unwrap();
    matrix.accumulate_grad(turned.clone()).unwrap();
    matrix.accumulate_grad(turned).unwrap();
    assert_eq!(grad::<f32>(&matrix), [3.0, 7.0, 11.0, 5.0, 9.0, 13.0]);
}

#[test]
fn gradients_that_do_not_fit_are_refused() {
    let context = context();
    let weight = parameter(&context, "w", &[0f32; 2]);
    for wrong in [
        tensor(&context, &[1f32; 3]),
        Tensor::zeros(&context, [1, 2], DType::F32).unwrap(),
        tensor(&context, &[1f64; 2]),
        tensor(&support::amp::context(), &[1f32; 2]),
    ] {
        let refused = weight.set_grad(wrong.clone());
        assert!(
            matches!(refused, Err(Error::InvalidArgument { .. })),
            "{refused:?}"
        );
        assert!(weight.accumulate_grad(wrong).is_err());
    }
    assert!(weight.grad().is_none());
    let square = Tensor::zeros(&context, [2, 2], DType::F32).unwrap();
    assert!(Parameter::new("w", square.narrow(1, 0, 1).unwrap()).is_err());
    assert!(Parameter::new("w", tensor(&context, &[1u32])).is_err());
}

#[test]
fn settings_and_parameters_are_checked() {
    let context = context();
    let weight = parameter(&context, "w", &[0f32]);
    let default = SgdConfig::default;
    for (key, config) in [
        (
            "learning_rate",
            SgdConfig {
                learning_rate: -1.0,
                ..default()
            },
        ),
        (
            "momentum",
            SgdConfig {
                momentum: f64::NAN,
                ..default()
            },
        ),
        (
            "weight_decay",
            SgdConfig {
                weight_decay: f64::INFINITY,
                ..default()
            },
        ),
        (
            "nesterov",
            SgdConfig {
                nesterov: true,
                ..default()
            },
        ),
    ] {
        match Sgd::new(vec![weight.clone()], config) {
            Err(Error::InvalidConfig { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{other:?}"),
        }
    }
    assert!(Sgd::new(vec![], default()).is_err());
    let twice = Sgd::new(vec![weight.clone(), weight.clone()], default());
    assert!(
        twice
            .unwrap_err()
            .to_string()
            .contains("`w` is given twice")
    );
    let elsewhere = parameter(&support::amp::context(), "e", &[0f32]);
    assert!(Sgd::new(vec![weight.clone(), elsewhere], default()).is_err());
    let mut optimizer = Sgd::new(vec![weight], default()).unwrap();
    assert!(optimizer.set_learning_rate(f64::NAN).is_err());
    optimizer.set_learning_rate(0.5).unwrap();
    assert_eq!(optimizer.config().learning_rate, 0.5);
}

#[test]
fn identities_are_never_given_twice() {
    let context = context();
    let weight = parameter(&context, "w", &[0f32]);
    let ids: std::collections::HashSet<u64> = (0..100)
        .map(|_| {
            Sgd::new(vec![weight.clone()], SgdConfig::default())
                .unwrap()
                .id()
                .number()
        })
        .collect();
    assert_eq!(ids.len(), 100);
}

#[test]
fn state_and_settings_are_known_by_name() {
    let context = context();
    let weight = parameter(&context, "w", &[f16::ONE; 3]);
    let config = SgdConfig {
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(vec![weight], config).unwrap();
    let names = |optimizer: &Sgd, index| {
        let state = optimizer.state(index).into_iter();
        state.map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(names(&optimizer, 0), ["master_weight", "momentum"]);
    assert_eq!(names(&optimizer, 1), [""; 0]);
    assert!(
        optimizer.state(0)[1]
            .1
            .is_same(optimizer.momentum_buffer(0).unwrap())
    );
    assert_eq!(optimizer.groups().len(), 1);
    let expected = [
        ("learning_rate", 1e-3),
        ("momentum", 0.9),
        ("weight_decay", 0.0),
    ];
    assert_eq!(optimizer.settings(0), expected);
    assert_eq!(optimizer.settings(1), []);

    let refused = |optimizer: &mut Sgd, group, changes: &[(&str, f64)]| {
        let error = optimizer.set_settings(group, changes).unwrap_err();
        assert_eq!(optimizer.settings(0), expected, "all or nothing");
        error.to_string()
    };
    let message = refused(
        &mut optimizer,
        0,
        &[("learning_rate", 1.0), ("momentum", -1.0)],
    );
    assert!(message.contains("momentum: group 0: -1"), "{message}");
    let message = refused(&mut optimizer, 0, &[("rate", 1.0)]);
    assert!(
        message.contains("no `rate`; known are learning_rate, momentum"),
        "{message}"
    );
    let message = refused(&mut optimizer, 1, &[]);
    assert!(message.contains("group 1 of 1"), "{message}");
    optimizer
        .set_settings(0, &[("learning_rate", 0.5), ("momentum", 0.0)])
        .unwrap();
    assert_eq!(optimizer.config().learning_rate, 0.5);
}

#[test]
fn momentum_needs_the_buffers_it_was_made_with() {
    let context = context();
    let weight = parameter(&context, "w", &[1f32]);
    let mut optimizer = Sgd::new(vec![weight], SgdConfig::default()).unwrap();
    let refused = optimizer.set_settings(0, &[("momentum", 0.9)]).unwrap_err();
    assert!(
        refused.to_string().contains("made without momentum"),
        "{refused}"
    );
}

/// Terms that are lost in a sum of 16 bits, and the tag of their scale.
#[test]
fn gradients_add_up_in_f32() {
    let context = context();
    let small = bf16::from_f32(1.0 / 512.0);
    let sum = |wide: bool| {
        let weight = ones(&context, "w", &[bf16::ONE; 33]);
        weight.zero_grad();
        if wide {
            weight.accumulate_in_f32().unwrap();
        }
        let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        let mut addresses = Vec::new();
        for _ in 0..2 {
            weight
                .accumulate_grad(tensor(&context, &[bf16::ONE; 33]))
                .unwrap();
            for _ in 0..64 {
                weight
                    .accumulate_grad(tensor(&context, &[small; 33]))
                    .unwrap();
            }
            let grad = weight.grad().unwrap();
            addresses.push((grad.dtype(), grad.ptr()));
            optimizer.step_unscaled().unwrap();
            let values = grad.cast(DType::F32).unwrap().to_vec::<f32>().unwrap();
            assert_eq!(values, [if wide { 1.125 } else { 1.0 }; 33]);
            optimizer.zero_grad();
            assert!(weight.grad().is_none());
        }
        addresses
    };
    assert_eq!(sum(false)[0].0, DType::Bf16);
    let addresses = sum(true);
    assert_eq!(addresses[0].0, DType::F32);
    assert_eq!(addresses[0], addresses[1], "the buffer stays");

    // A gradient that was set is the first term.
    let weight = ones(&context, "w", &[f16::ONE; 4]);
    weight.accumulate_in_f32().unwrap();
    weight
        .accumulate_grad(tensor(&context, &[f16::from_f32(2.0); 4]))
        .unwrap();
    assert_eq!(grad::<f32>(&weight), [3.0; 4]);
    let double = parameter(&context, "d", &[1f64]);
    let refused = double.accumulate_in_f32();
    assert!(
        matches!(refused, Err(Error::UnsupportedDtype { .. })),
        "{refused:?}"
    );
}

#[test]
fn sums_in_f32_keep_the_tag_of_their_scale() {
    let context = context();
    let weight = parameter(&context, "w", &[bf16::ZERO]);
    weight.accumulate_in_f32().unwrap();
    let config = SgdConfig {
        learning_rate: 1.0,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler(&context, 2.0);
    let term = |scale: f32| tensor(&context, &[bf16::from_f32(3.0 * scale)]);
    weight
        .accumulate_scaled_grad(term(2.0), scaler.tag())
        .unwrap();
    scaler.update_to(8.0).unwrap();
    let added = weight.accumulate_scaled_grad(term(8.0), scaler.tag());
    let message = added.unwrap_err().to_string();
    assert!(message.contains("another loss scale"), "{message}");
    assert!(
        scaler.step(&mut optimizer).is_err(),
        "a window of the old scale"
    );
    weight.zero_grad();
    for _ in 0..2 {
        weight
            .accumulate_scaled_grad(term(8.0), scaler.tag())
            .unwrap();
    }
    assert!(optimizer.step_unscaled().is_err(), "still scaled");
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<bf16>(&weight), [bf16::from_f32(-6.0)]);
}
