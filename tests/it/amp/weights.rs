//! Weights that become infinite or NaN in steps that are applied: counted by element, named by parameter.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::amp::boxed::Boxed;
use crate::support::amp::{context, parameter, scaler, scaler_with, set_grad, value};
use kitsune::amp::{AmpConfig, GradScaler, ScalingMode, StepOutcome, WeightReport};
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, MasterWeights, Moments, Optimizer, Parameter, Sgd,
    SgdConfig, WeightOverflow,
};
use kitsune::{Context, DType, Element, Tensor, bf16, f16};

/// One step; its outcome after the update.
fn step<O: Optimizer + ?Sized>(scaler: &mut GradScaler, optimizer: &mut O) -> StepOutcome {
    let outcome = scaler.step(optimizer).unwrap();
    scaler.update().unwrap();
    outcome
}

/// Names, infinities, NaN and first places of a report.
fn told(report: &WeightReport) -> Vec<(&str, u64, u64, u64)> {
    let tell = |one: &'_ WeightOverflow| (one.inf_count, one.nan_count, one.first_index);
    let tensors = report.tensors.iter().map(|one| (&*one.name, tell(one)));
    tensors
        .map(|(name, (inf, nan, first))| (name, inf, nan, first))
        .collect()
}

/// Every optimizer, with steps as wide as `width` for a gradient of -1.
fn optimizers(parameters: &[Parameter], width: f64, masters: MasterWeights) -> Vec<Boxed> {
    let sgd = SgdConfig {
        learning_rate: width,
        master_weights: masters,
        ..SgdConfig::default()
    };
    let momentum = SgdConfig {
        momentum: 0.5,
        ..sgd
    };
    let adamw = AdamWConfig {
        learning_rate: width,
        weight_decay: 0.0,
        master_weights: masters,
        ..AdamWConfig::default()
    };
    let adam = AdamConfig {
        learning_rate: width,
        amsgrad: true,
        moments: Moments::Bf16,
        master_weights: masters,
        ..AdamConfig::default()
    };
    vec![
        Boxed(Box::new(Sgd::new(parameters.to_vec(), sgd).unwrap())),
        Boxed(Box::new(Sgd::new(parameters.to_vec(), momentum).unwrap())),
        Boxed(Box::new(AdamW::new(parameters.to_vec(), adamw).unwrap())),
        Boxed(Box::new(Adam::new(parameters.to_vec(), adam).unwrap())),
    ]
}

/// A weight of `T` at its largest number, one at a third of it, and one in f32: the first is moved out of its range.
fn leaves_its_type<T: Element>(largest: f64, width: f64, gradients: DType, masters: MasterWeights) {
    let context = context();
    for which in 0..4 {
        let what = format!("{} {gradients} {masters:?}, optimizer {which}", T::DTYPE);
        let mut values = [largest / 4.0, -largest / 4.0, largest, largest / 4.0].map(T::from_f64);
        values[1] = T::from_f64(-largest / 2.0);
        let edge = parameter(&context, "edge", &values);
        let inside = parameter(&context, "inside", &[T::from_f64(largest / 4.0); 3]);
        let single = parameter(&context, "single", &[1f32; 3]);
        let all = [inside, edge.clone(), single];
        let mut optimizer = optimizers(&all, width, masters).remove(which);
        let mut scaler = scaler(&context, 4.0);
        let outcome = {
            for parameter in &all {
                let len = parameter.value().len();
                let gradient = Tensor::full(&context, [len], gradients, -4.0).unwrap();
                parameter.set_grad(gradient).unwrap();
            }
            step(&mut scaler, &mut optimizer)
        };
        assert!(outcome.is_applied().unwrap(), "{what}");
        let report = outcome.weight_overflows().unwrap();
        let report = report.unwrap_or_else(|| panic!("{what}: no report"));
        assert_eq!(
            (report.step, report.scale, report.tensor_count),
            (1, 4.0, 1),
            "{what}"
        );
        assert_eq!(told(&report), [("edge", 1, 0, 2)], "{what}");
        let now = value::<T>(&edge)
            .iter()
            .map(|one| one.to_f64())
            .collect::<Vec<_>>();
        assert_eq!(now[2], f64::INFINITY, "{what}");
        assert!(now[0].is_finite() && now[1].is_finite(), "{what}");
        // What is infinite already is not told again.
        let again = step(&mut scaler, &mut optimizer);
        assert!(again.is_applied().unwrap());
        assert_eq!(again.weight_overflows().unwrap(), None, "{what}");
        let stats = scaler.stats().unwrap();
        assert_eq!(
            (stats.infinite_weights, stats.weight_overflows),
            (1, vec![report]),
            "{what}"
        );
        assert_eq!(optimizer.take_weight_overflows().unwrap(), [], "{what}");
    }
}

#[test]
fn a_16_bit_weight_that_leaves_its_type_is_told() {
    for gradients in [DType::F16, DType::F32, DType::Bf16] {
        for masters in [MasterWeights::F32, MasterWeights::Off, MasterWeights::Split] {
            leaves_its_type::<f16>(65504.0, 600.0, gradients, masters);
            // The sum is finite in f32.
            leaves_its_type::<bf16>(bf16::MAX.to_f64(), 1e36, gradients, masters);
        }
    }
}

#[test]
fn the_least_step_that_rounds_to_infinity_counts() {
    let context = context();
    for (width, lost) in [(15.0, false), (16.0, true)] {
        // 65,504 + 15 rounds down, 65,520 up.
        let weight = parameter(&context, "w", &[f16::MAX, f16::MIN]);
        set_grad(&weight, &[f16::from_f32(-1.0), f16::ONE]);
        let config = SgdConfig {
            learning_rate: width,
            ..SgdConfig::default()
        };
        let mut sgd = Sgd::new(vec![weight.clone()], config).unwrap();
        sgd.step_unscaled().unwrap();
        let told = sgd.take_weight_overflows().unwrap();
        assert_eq!(value::<f16>(&weight)[0].is_infinite(), lost);
        assert_eq!(
            told.iter().map(|one| one.inf_count).sum::<u64>(),
            if lost { 2 } else { 0 }
        );
        if lost {
            assert_eq!(told[0].to_string(), "`w` got 2 inf, the first at 0");
        }
        assert_eq!(sgd.take_weight_overflows().unwrap(), []);
    }
}

#[test]
fn single_and_double_weights_count_too() {
    let context = context();
    let single = parameter(&context, "single", &[f32::MAX, 1.0]);
    let double = parameter(&context, "double", &[1.0, f64::MAX]);
    set_grad(&single, &[-1e38f32, 0.0]);
    set_grad(&double, &[0.0, -1e308f64]);
    let config = SgdConfig {
        learning_rate: 1.0,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(vec![single, double], config).unwrap();
    sgd.step_unscaled().unwrap();
    let told = sgd.take_weight_overflows().unwrap();
    let told: Vec<_> = told
        .iter()
        .map(|one| (&*one.name, one.inf_count, one.first_index))
        .collect();
    assert_eq!(told, [("single", 1, 0), ("double", 1, 1)]);
}

#[test]
fn nan_is_told_from_infinity() {
    let context = context();
    // Decay overflows, and a rate of 0 times infinity is NaN.
    let weight = parameter(&context, "w", &[1.0, 1e38f32, f32::NAN]);
    set_grad(&weight, &[1.0f32; 3]);
    let config = SgdConfig {
        learning_rate: 0.0,
        weight_decay: 10.0,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler(&context, 1.0);
    let outcome = step(&mut scaler, &mut sgd);
    assert!(value::<f32>(&weight)[1].is_nan());
    let report = outcome.weight_overflows().unwrap().unwrap();
    assert_eq!(told(&report), [("w", 0, 1, 1)]);
    let line = "step 1 applied at scale 1: `w` got 1 nan, the first at 1";
    assert_eq!(report.to_string(), line);
    assert!(scaler.stats().unwrap().to_string().contains(line));
}

#[test]
fn a_skipped_step_tells_of_no_weights() {
    let context = context();
    let weight = parameter(&context, "w", &[f16::MAX; 2]);
    set_grad(&weight, &[f16::INFINITY, f16::from_f32(-1000.0)]);
    for mut optimizer in optimizers(std::slice::from_ref(&weight), 1e4, MasterWeights::F32) {
        let mut scaler = scaler(&context, 2.0);
        let outcome = step(&mut scaler, &mut optimizer);
        assert!(!outcome.is_applied().unwrap());
        assert_eq!(outcome.weight_overflows().unwrap(), None);
        assert_eq!(scaler.stats().unwrap().infinite_weights, 0);
        assert_eq!(optimizer.take_weight_overflows().unwrap(), []);
    }
}

/// Everything goes at once, over chunks and parts that are not aligned; the first eight are named.
#[test]
fn many_elements_of_many_weights() {
    let context = context();
    let lens = [1usize, 33, 65_536, 65_537, 150_001, 0, 3, 5, 7, 9, 11];
    let weights = lens.iter().enumerate().map(|(number, len)| {
        let all = Tensor::full(&context, [len + 3], DType::F16, 65504.0).unwrap();
        let part = all.narrow(0, number % 3, *len).unwrap();
        Parameter::new(format!("w{number}"), part).unwrap()
    });
    let weights: Vec<_> = weights.collect();
    for weight in &weights {
        let shape = weight.value().shape();
        // The first element of each stays where it is.
        let gradient = Tensor::full(&context, shape, DType::F16, -1000.0).unwrap();
        if !gradient.is_empty() {
            gradient.narrow(0, 0, 1).unwrap().fill(0.0).unwrap();
        }
        weight.set_grad(gradient).unwrap();
    }
    let config = SgdConfig {
        learning_rate: 1.0,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(weights, config).unwrap();
    let mut scaler = scaler(&context, 1.0);
    let report = step(&mut scaler, &mut sgd)
        .weight_overflows()
        .unwrap()
        .unwrap();
    let lost = |len: &usize| u64::try_from(len.saturating_sub(1)).unwrap();
    let all: u64 = lens.iter().map(lost).sum();
    assert_eq!(scaler.stats().unwrap().infinite_weights, all);
    assert_eq!((report.tensors.len(), report.tensor_count), (8, 9));
    let expected =
        [1usize, 2, 3, 4, 6, 7, 8, 9].map(|at| (format!("w{at}"), lost(&lens[at]), 0, 1));
    for (told, expected) in told(&report).iter().zip(expected) {
        assert_eq!(
            *told,
            (expected.0.as_str(), expected.1, expected.2, expected.3)
        );
    }
    assert!(report.to_string().ends_with("; and 1 more"), "{report}");
}

#[test]
fn old_reports_are_forgotten_and_counts_are_not() {
    let context = context();
    let weight = parameter(&context, "w", &[f16::MAX]);
    let config = SgdConfig {
        learning_rate: 1.0,
        master_weights: MasterWeights::Off,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler(&context, 1.0);
    let mut outcomes = Vec::new();
    for number in 0..20 {
        weight.value().fill(65504.0).unwrap();
        // Every fourth step is harmless.
        let gradient = if number % 4 == 3 { 0.0 } else { -100.0 };
        set_grad(&weight, &[f16::from_f32(gradient)]);
        outcomes.push(step(&mut scaler, &mut sgd));
    }
    assert_eq!(scaler.stats().unwrap().infinite_weights, 15);
    for (number, outcome) in outcomes.iter().enumerate() {
        let report = outcome.weight_overflows().unwrap();
        assert_eq!(report.is_some(), number % 4 != 3, "{number}");
        assert!(outcome.is_applied().unwrap());
    }
    for _ in 0..3 {
        weight.value().fill(65504.0).unwrap();
        set_grad(&weight, &[f16::from_f32(-100.0)]);
        outcomes.push(step(&mut scaler, &mut sgd));
    }
    let stats = scaler.stats().unwrap();
    assert_eq!(
        (stats.infinite_weights, stats.weight_overflows.len()),
        (18, 16)
    );
    for lost in &outcomes[..2] {
        let error = lost.weight_overflows().unwrap_err().to_string();
        assert!(
            error.contains("more such steps than are remembered"),
            "{error}"
        );
    }
    assert!(outcomes[2].weight_overflows().unwrap().is_some());
    assert_eq!(outcomes[3].weight_overflows().unwrap(), None);
}

#[test]
fn without_a_scaler_the_optimizer_tells() {
    let context = context();
    for enabled in [false, true] {
        let weight = parameter(&context, "w", &[f16::MAX, f16::ZERO]);
        set_grad(&weight, &[f16::from_f32(-64.0), f16::ZERO]);
        let config = SgdConfig {
            learning_rate: 1.0,
            ..SgdConfig::default()
        };
        let mut sgd = Sgd::new(vec![weight], config).unwrap();
        if !enabled {
            // Nothing is recorded by a scaler that is off.
            let config = AmpConfig {
                mode: ScalingMode::Off,
                ..AmpConfig::default()
            };
            let outcome = step(&mut scaler_with(&context, config), &mut sgd);
            assert_eq!(outcome.weight_overflows().unwrap(), None);
        } else {
            sgd.step_unscaled().unwrap();
        }
        let told = sgd.take_weight_overflows().unwrap();
        assert_eq!(told.len(), 1);
        assert_eq!((&*told[0].name, told[0].inf_count), ("w", 1));
        // A master that came back does not count, one that leaves anew does.
        sgd.zero_grad();
        assert_eq!(sgd.take_weight_overflows().unwrap(), []);
    }
}

#[test]
fn a_weight_that_came_back_counts_again() {
    let context: Context = context();
    let weight = parameter(&context, "w", &[f16::MAX]);
    let config = SgdConfig {
        learning_rate: 1.0,
        ..SgdConfig::default()
    };
    let mut sgd = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler(&context, 1.0);
    // The f32 master goes to 65,604, back, and there once more.
    for (gradient, lost) in [(-100.0, true), (0.0, false), (100.0, false), (-100.0, true)] {
        set_grad(&weight, &[f16::from_f32(gradient)]);
        let report = step(&mut scaler, &mut sgd).weight_overflows().unwrap();
        assert_eq!(report.is_some(), lost, "{gradient}");
    }
    assert_eq!(scaler.stats().unwrap().infinite_weights, 2);
}
