//! Adam and AdamW with every option against the formula in f64; groups; settings that change between steps, also of
//! captured ones; masters cut in two; moments in bf16.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    reason = "a test fails by panicking, replays graphs, and counts in floats"
)]

use crate::support::amp::{context, ones, parameter, scaler, set_grad, value};
use kitsune::optim::{
    Adam, AdamConfig, AdamFamily, AdamFamilyConfig, AdamW, AdamWConfig, MasterWeights, Moments,
    Optimizer, ParamGroup, Parameter, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Element, Error, Tensor, bf16, f16};

/// A weight with its moments, in f64.
#[derive(Clone, Copy, Default)]
struct Reference {
    weight: f64,
    first: f64,
    second: f64,
    largest: f64,
}

impl Reference {
    fn step<const DECOUPLED: bool>(
        &mut self,
        config: &AdamFamilyConfig<DECOUPLED>,
        count: i32,
        mut gradient: f64,
    ) {
        let (beta1, beta2) = config.betas;
        if DECOUPLED {
            self.weight *= 1.0 - config.learning_rate * config.weight_decay;
        } else {
            gradient += config.weight_decay * self.weight;
        }
        self.first = beta1 * self.first + (1.0 - beta1) * gradient;
        self.second = beta2 * self.second + (1.0 - beta2) * gradient * gradient;
        self.largest = self.largest.max(self.second);
        let second = if config.amsgrad {
            self.largest
        } else {
            self.second
        };
        let first = self.first / (1.0 - beta1.powi(count));
        let second = second / (1.0 - beta2.powi(count));
        self.weight -= config.learning_rate * first / (second.sqrt() + config.epsilon);
    }
}

/// Gradients that shrink, so that the largest second moment is an old one.
fn gradient(at: usize, step: usize) -> f64 {
    (((at * 5 + step * 11) % 23) as f64 / 8.0 - 1.0) / step as f64
}

fn follows_the_reference<T: Element, const DECOUPLED: bool>(
    context: &Context,
    config: AdamFamilyConfig<DECOUPLED>,
    len: usize,
    tolerance: f64,
) {
    let start: Vec<T> = (0..len)
        .map(|at| T::from_f64(1.0 - (at % 7) as f64 / 4.0))
        .collect();
    let weight = parameter(context, "w", &start);
    let mut optimizer = AdamFamily::new(vec![weight.clone()], config).unwrap();
    let begin = |value: &T| Reference {
        weight: value.to_f64(),
        ..Reference::default()
    };
    let mut expected: Vec<_> = start.iter().map(begin).collect();
    for step in 1..=20 {
        let gradients: Vec<T> = (0..len).map(|at| T::from_f64(gradient(at, step))).collect();
        set_grad(&weight, &gradients);
        optimizer.step_unscaled().unwrap();
        let count = i32::try_from(step).unwrap();
        for (expected, gradient) in expected.iter_mut().zip(&gradients) {
            expected.step(&config, count, gradient.to_f64());
        }
    }
    for (got, expected) in value::<T>(&weight).iter().zip(&expected) {
        let error = (got.to_f64() - expected.weight).abs();
        let bound = tolerance * T::DTYPE.epsilon();
        assert!(error <= bound, "{config:?}: {got} {}", expected.weight);
    }
}

fn every_type_follows<const DECOUPLED: bool>(amsgrad: bool, weight_decay: f64) {
    let context = context();
    let config = AdamFamilyConfig::<DECOUPLED> {
        learning_rate: 0.01,
        weight_decay,
        amsgrad,
        ..AdamFamilyConfig::default()
    };
    for len in [1, 1000, 70_001] {
        follows_the_reference::<f32, DECOUPLED>(&context, config, len, 32.0);
    }
    follows_the_reference::<f64, DECOUPLED>(&context, config, 1000, 64.0);
    follows_the_reference::<f16, DECOUPLED>(&context, config, 1000, 1.0);
    follows_the_reference::<bf16, DECOUPLED>(&context, config, 1000, 1.0);
    let split = AdamFamilyConfig {
        master_weights: MasterWeights::Split,
        ..config
    };
    follows_the_reference::<bf16, DECOUPLED>(&context, split, 1001, 1.0);
    follows_the_reference::<f16, DECOUPLED>(&context, split, 1001, 1.0);
    let rough = AdamFamilyConfig {
        moments: Moments::Bf16,
        ..config
    };
    // 20 steps of 0.01, each off by some of the 1/128 by which a moment may be.
    let off = 0.2 / 128.0 / DType::F32.epsilon();
    follows_the_reference::<f32, DECOUPLED>(&context, rough, 1000, off);
    follows_the_reference::<f64, DECOUPLED>(&context, rough, 1000, 64.0);
}

#[test]
fn every_option_follows_the_formula() {
    for amsgrad in [false, true] {
        for weight_decay in [0.0, 0.3] {
            every_type_follows::<false>(amsgrad, weight_decay);
            every_type_follows::<true>(amsgrad, weight_decay);
        }
    }
}

#[test]
fn defaults_are_those_of_pytorch() {
    let (l2, decoupled) = (AdamConfig::default(), AdamWConfig::default());
    assert_eq!((l2.weight_decay, decoupled.weight_decay), (0.0, 0.01));
    assert_eq!(
        (l2.betas, l2.epsilon, l2.learning_rate),
        ((0.9, 0.999), 1e-8, 1e-3)
    );
    let read: AdamWConfig = serde_json::from_str(r#"{"moments": "bf16"}"#).unwrap();
    let expected = AdamWConfig {
        moments: Moments::Bf16,
        ..decoupled
    };
    assert_eq!(read, expected);
    assert!(serde_json::from_str::<AdamConfig>(r#"{"rate": 1}"#).is_err());
}

/// All bits of an optimizer and its parameters.
fn bits(optimizer: &dyn Optimizer) -> Vec<(String, Vec<u64>)> {
    let parameters = optimizer.parameters().iter().enumerate();
    let tensors = parameters.flat_map(|(index, parameter)| {
        let state = optimizer.state(index).into_iter();
        let value = std::iter::once(("value", parameter.value().clone()));
        state.chain(value).map(|(name, tensor)| {
            let name = format!("{} of {}", name, parameter.name());
            (name, bits_of(&tensor))
        })
    });
    tensors.collect()
}

fn bits_of(tensor: &Tensor) -> Vec<u64> {
    fn of<T: Element>(tensor: &Tensor) -> Vec<u64> {
        let values = tensor.to_vec::<T>().unwrap();
        values
            .iter()
            .map(|value| value.to_f64().to_bits())
            .collect()
    }
    match tensor.dtype() {
        DType::F16 => of::<f16>(tensor),
        DType::Bf16 => of::<bf16>(tensor),
        DType::F32 => of::<f32>(tensor),
        DType::U32 => of::<u32>(tensor),
        _ => of::<f64>(tensor),
    }
}

const LEN: usize = 301;

fn weights(context: &Context, count: usize) -> Vec<Parameter> {
    let values: Vec<f32> = (0..LEN).map(|at| (at % 17) as f32 / 8.0 - 1.0).collect();
    let name = |index| format!("w{index}");
    (0..count)
        .map(|index| parameter(context, &name(index), &values))
        .collect()
}

fn set_gradients(parameters: &[Parameter], step: usize) {
    for (index, parameter) in parameters.iter().enumerate() {
        let values = (0..LEN).map(|at| gradient(at + index, step) as f32);
        set_grad(parameter, &values.collect::<Vec<_>>());
    }
}

#[test]
fn groups_move_as_optimizers_of_their_own_would() {
    let context = context();
    let configs = [
        AdamWConfig::default(),
        AdamWConfig {
            learning_rate: 0.1,
            betas: (0.5, 0.9),
            epsilon: 1e-3,
            ..AdamWConfig::default()
        },
        AdamWConfig {
            weight_decay: 0.0,
            amsgrad: true,
            ..AdamWConfig::default()
        },
    ];
    let together = weights(&context, 6);
    let groups = configs.iter().zip(together.chunks(2));
    let groups = groups.map(|(config, part)| ParamGroup::new(part.to_vec(), *config));
    let mut one = AdamW::with_groups(groups.collect()).unwrap();
    let alone = weights(&context, 6);
    let optimizers = configs.iter().zip(alone.chunks(2));
    let optimizers = optimizers.map(|(config, part)| AdamW::new(part.to_vec(), *config).unwrap());
    let mut several: Vec<_> = optimizers.collect();
    assert_eq!(one.groups(), [0..2, 2..4, 4..6]);
    for step in 1..=4 {
        if step == 3 {
            one.set_settings(1, &[("learning_rate", 0.2), ("beta1", 0.6)])
                .unwrap();
            several[1]
                .set_settings(0, &[("learning_rate", 0.2), ("beta1", 0.6)])
                .unwrap();
            assert_eq!(one.group_config(1).unwrap().betas, (0.6, 0.9));
        }
        set_gradients(&together, step);
        set_gradients(&alone, step);
        one.step_unscaled().unwrap();
        several
            .iter_mut()
            .for_each(|one| one.step_unscaled().unwrap());
    }
    let separate: Vec<_> = several.iter().flat_map(|one| bits(one)).collect();
    assert_eq!(bits(&one), separate);

    let together = weights(&context, 2);
    let fast = SgdConfig {
        learning_rate: 0.5,
        momentum: 0.9,
        nesterov: true,
        ..SgdConfig::default()
    };
    let group = |index: usize, config| ParamGroup::new(vec![together[index].clone()], config);
    let mut sgd = Sgd::with_groups(vec![group(0, SgdConfig::default()), group(1, fast)]).unwrap();
    let alone = weights(&context, 2);
    let mut several = [
        Sgd::new(vec![alone[0].clone()], SgdConfig::default()).unwrap(),
        Sgd::new(vec![alone[1].clone()], fast).unwrap(),
    ];
    for step in 1..=3 {
        set_gradients(&together, step);
        set_gradients(&alone, step);
        sgd.step_unscaled().unwrap();
        several
            .iter_mut()
            .for_each(|one| one.step_unscaled().unwrap());
    }
    assert_eq!(
        bits(&sgd),
        several.iter().flat_map(|one| bits(one)).collect::<Vec<_>>()
    );
    sgd.set_learning_rate(0.25).unwrap();
    assert_eq!(sgd.group_config(1).unwrap().learning_rate, 0.25);
}

#[test]
fn errors_name_the_setting_and_its_group() {
    let context = context();
    let all = weights(&context, 2);
    let group = |index: usize, config| ParamGroup::new(vec![all[index].clone()], config);
    let default = AdamWConfig::default;
    let wrong = AdamWConfig {
        epsilon: f64::NAN,
        ..default()
    };
    let message = AdamW::with_groups(vec![group(0, default()), group(1, wrong)]).unwrap_err();
    assert!(
        message.to_string().contains("epsilon: group 1: NaN"),
        "{message}"
    );
    let twice = AdamW::with_groups(vec![group(0, default()), group(0, default())]);
    assert!(
        twice
            .unwrap_err()
            .to_string()
            .contains("`w0` is given twice")
    );
    assert!(AdamW::with_groups(vec![]).is_err());
}

#[test]
fn changes_that_cannot_be_are_refused_as_a_whole() {
    let context = context();
    let all = weights(&context, 2);
    let group = |index: usize, config| ParamGroup::new(vec![all[index].clone()], config);
    let default = AdamWConfig::default;
    let mut optimizer = AdamW::with_groups(vec![group(0, default()), group(1, default())]).unwrap();
    let refused = |optimizer: &mut AdamW, what: &str, changes: &[(&str, f64)]| {
        let message = optimizer.set_settings(1, changes).unwrap_err().to_string();
        assert!(message.contains(what), "{message}");
        assert_eq!(optimizer.group_config(1), Some(&default()));
    };
    let rate = ("learning_rate", 1.0);
    refused(
        &mut optimizer,
        "betas: group 1: 1 is",
        &[rate, ("beta2", 1.0)],
    );
    refused(
        &mut optimizer,
        "weight_decay: group 1: -1",
        &[rate, ("weight_decay", -1.0)],
    );
    refused(
        &mut optimizer,
        "group 1: there is no `momentum`",
        &[rate, ("momentum", 0.5)],
    );
    assert!(optimizer.set_settings(2, &[]).is_err());
    assert!(optimizer.set_learning_rate(-1.0).is_err());
    let kept = [
        (
            "amsgrad",
            AdamWConfig {
                amsgrad: true,
                ..default()
            },
        ),
        (
            "moments",
            AdamWConfig {
                moments: Moments::Bf16,
                ..default()
            },
        ),
        (
            "master_weights",
            AdamWConfig {
                master_weights: MasterWeights::Off,
                ..default()
            },
        ),
        (
            "seed",
            AdamWConfig {
                seed: 1,
                ..default()
            },
        ),
    ];
    for (key, config) in kept {
        match optimizer.set_group_config(1, config) {
            Err(Error::InvalidConfig { key: named, reason }) => {
                assert_eq!(named, key);
                assert!(reason.starts_with("group 1: cannot change"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A graph that captured a step follows settings that change afterwards, and bias corrections go on.
#[test]
fn a_captured_step_reads_settings_when_it_runs() {
    let run = |captured: bool| {
        let context = context();
        let all = weights(&context, 2);
        set_gradients(&all, 1);
        let group = |index: usize| {
            let config = AdamWConfig {
                moments: if index == 0 {
                    Moments::Full
                } else {
                    Moments::Bf16
                },
                ..AdamWConfig::default()
            };
            ParamGroup::new(vec![all[index].clone()], config)
        };
        let mut optimizer = AdamW::with_groups(vec![group(0), group(1)]).unwrap();
        optimizer.step_unscaled().unwrap();
        let graph = captured.then(|| {
            let capture = context.stream().capture(|| {
                // The settings that there are may be set again, others not: a graph would bring them back.
                optimizer.set_learning_rate(1e-3)?;
                let refused = optimizer.set_learning_rate(0.5);
                assert!(
                    matches!(refused, Err(Error::Capturing { .. })),
                    "{refused:?}"
                );
                optimizer.step_unscaled()
            });
            capture.unwrap()
        });
        for step in 1..6 {
            let rate = 0.1 / step as f64;
            optimizer
                .set_settings(0, &[("learning_rate", rate)])
                .unwrap();
            optimizer
                .set_settings(1, &[("weight_decay", rate), ("beta1", 0.5)])
                .unwrap();
            match &graph {
                // SAFETY: the graph touches the optimizer and its parameters, which are alive.
                Some(graph) => unsafe { graph.launch(context.stream()) }.unwrap(),
                None => optimizer.step_unscaled().unwrap(),
            }
        }
        bits(&optimizer)
    };
    let eager = run(false);
    assert_eq!(run(true), eager);
    let constant = {
        let context = context();
        let all = weights(&context, 2);
        set_gradients(&all, 1);
        let mut optimizer = AdamW::new(all, AdamWConfig::default()).unwrap();
        (0..6).for_each(|_| optimizer.step_unscaled().unwrap());
        bits(&optimizer)
    };
    assert_ne!(constant[3], eager[3], "other settings, other weights");
}

/// The largest second moment keeps what the second one forgets.
#[test]
fn amsgrad_divides_by_the_largest() {
    let context = context();
    let train = |amsgrad| {
        let weight = ones(&context, "w", &[8f32; 3]);
        let config = AdamConfig {
            amsgrad,
            betas: (0.0, 0.5),
            ..AdamConfig::default()
        };
        let mut optimizer = Adam::new(vec![weight.clone()], config).unwrap();
        optimizer.step_unscaled().unwrap();
        set_grad(&weight, &[1f32, 1.0, f32::NAN]);
        (0..10).for_each(|_| optimizer.step_unscaled().unwrap());
        (value::<f32>(&weight), optimizer)
    };
    let ((plain, without), (with, optimizer)) = (train(false), train(true));
    assert!(without.largest_second_moment(0).is_none());
    let largest = optimizer
        .largest_second_moment(0)
        .unwrap()
        .to_vec::<f32>()
        .unwrap();
    assert_eq!(largest[0], 32.0);
    assert!(largest[2].is_nan() && with[2].is_nan());
    assert!(with[0] > plain[0], "smaller steps: {with:?} {plain:?}");
}

#[test]
fn remainders_are_dropped_when_parameters_are_reloaded() {
    let context = context();
    let config = AdamWConfig {
        master_weights: MasterWeights::Split,
        ..AdamWConfig::default()
    };
    let weight = ones(&context, "w", &[bf16::ONE; 5]);
    let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
    assert!(optimizer.master_weight(0).is_none());
    let remainder = optimizer.master_remainder(0).unwrap().clone();
    assert_eq!((remainder.dtype(), remainder.len()), (DType::U32, 3));
    assert_eq!(remainder.to_vec::<u32>().unwrap(), [0; 3]);
    optimizer.step_unscaled().unwrap();
    assert!(
        remainder
            .to_vec::<u32>()
            .unwrap()
            .iter()
            .all(|word| *word != 0)
    );
    weight.value().fill(3.0).unwrap();
    optimizer.reload_master_weights().unwrap();
    assert_eq!(remainder.to_vec::<u32>().unwrap(), [0; 3]);
    optimizer.set_learning_rate(0.0).unwrap();
    optimizer.step_unscaled().unwrap();
    assert_eq!(value::<bf16>(&weight), [bf16::from_f32(3.0); 5]);
}

/// Whatever is kept, in fresh memory that held other bytes: zero at first, and untouched by a skipped step.
#[test]
fn state_begins_as_zeros_and_a_skipped_step_leaves_it() {
    for amsgrad in [false, true] {
        for moments in [Moments::Full, Moments::Bf16] {
            for master_weights in [MasterWeights::Off, MasterWeights::F32, MasterWeights::Split] {
                let context = context();
                drop(Tensor::full(&context, [100_000], DType::F32, f64::NAN).unwrap());
                let config = AdamWConfig {
                    amsgrad,
                    moments,
                    master_weights,
                    seed: 3,
                    ..AdamWConfig::default()
                };
                let weight = ones(&context, "w", &[bf16::from_f32(0.3); 777]);
                let other = ones(&context, "v", &[0.3f32; 5]);
                let all = vec![weight.clone(), other];
                let mut optimizer = AdamW::new(all, config).unwrap();
                for (name, values) in bits(&optimizer) {
                    let is_zeroed =
                        !name.starts_with("value") && !name.starts_with("master_weight");
                    assert!(!is_zeroed || values.iter().all(|bits| *bits == 0), "{name}");
                }
                let mut scaler = scaler(&context, 8.0);
                let mut step = |optimizer: &mut AdamW, applied: bool| {
                    let outcome = scaler.step(optimizer).unwrap();
                    scaler.update().unwrap();
                    assert_eq!(outcome.is_applied().unwrap(), applied);
                };
                // Also a first step may overflow.
                for bad in [f32::INFINITY, f32::NAN] {
                    let good = weight.grad().unwrap();
                    let before = bits(&optimizer);
                    set_grad(&weight, &[bf16::from_f32(bad); 777]);
                    step(&mut optimizer, false);
                    assert_eq!(bits(&optimizer), before);
                    weight.set_grad(good).unwrap();
                    step(&mut optimizer, true);
                    assert_ne!(bits(&optimizer), before);
                }
            }
        }
    }
}

/// Equal gradients are rounded by other chances in another chunk, in another tensor, and with another seed.
#[test]
fn chances_differ_by_place_tensor_and_seed() {
    const CHUNK: usize = 65_536;
    let context = context();
    let moments = |seed: u64| {
        let parameters = ["a", "b"].map(|name| {
            let value = Tensor::zeros(&context, [2 * CHUNK], DType::F32).unwrap();
            let parameter = Parameter::new(name, value).unwrap();
            let gradient = Tensor::full(&context, [2 * CHUNK], DType::F32, 0.3).unwrap();
            parameter.set_grad(gradient).unwrap();
            parameter
        });
        let config = AdamConfig {
            moments: Moments::Bf16,
            seed,
            ..AdamConfig::default()
        };
        let mut adam = Adam::new(parameters.to_vec(), config).unwrap();
        adam.step_unscaled().unwrap();
        [0, 1].map(|index| {
            let moment = adam.first_moment(index).unwrap();
            moment.to_vec::<bf16>().unwrap()
        })
    };
    let [[first, second], [other, _]] = [moments(1), moments(2)];
    assert!(first[..CHUNK] != first[CHUNK..], "chunks");
    assert!(first != second, "tensors");
    assert!(first != other, "seeds");
}
