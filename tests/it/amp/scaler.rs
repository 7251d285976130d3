//! Steps of the scaler on a running device: skipping, reports, outcomes, clipping.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::amp::oracle::misuse;
use crate::support::amp::{
    context, grad, ones, parameter, scaler, scaler_with, set_grad, sgd, value,
};
use kitsune::amp::{AmpConfig, GradScaler, NormKind, Outcome, OverflowKind};
use kitsune::error::ScalerMisuse;
use kitsune::optim::{
    AdamW, AdamWConfig, Optimizer, OptimizerId, Parameter, Sgd, SgdConfig, StepInputs,
};
use kitsune::{DType, Error, Result, Tensor, f16};

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_skipped_step_changes_nothing_to_the_bit() {
    let context = context();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let weight = ones(&context, "w", &[0.3f32, -0.7, 11.0]);
        let other = parameter(&context, "half", &[f16::from_f32(0.1); 5]);
        set_grad(&other, &[f16::from_f32(0.5); 5]);
        let config = AdamWConfig {
            weight_decay: 0.5,
            learning_rate: 0.1,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(vec![weight.clone(), other.clone()], config).unwrap();
        let mut scaler = scaler(&context, 8.0);
        let applied = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        let state = |optimizer: &AdamW| {
            let all = |tensor: &Tensor| bits(&tensor.to_vec().unwrap());
            [
                bits(&value(&weight)),
                value::<f16>(&other)
                    .iter()
                    .map(|half| u32::from(half.to_bits()))
                    .collect(),
                all(optimizer.first_moment(0).unwrap()),
                all(optimizer.second_moment(0).unwrap()),
                all(optimizer.first_moment(1).unwrap()),
                all(optimizer.second_moment(1).unwrap()),
                all(optimizer.master_weight(1).unwrap()),
                optimizer.step_counts().to_vec().unwrap(),
            ]
        };
        let before = state(&optimizer);
        assert_eq!(before[7], [1, 1]);
        set_grad(&weight, &[1.0, bad, 1.0]);
        let skipped = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert_eq!(state(&optimizer), before);
        assert_eq!(
            (applied.is_applied().unwrap(), skipped.is_applied().unwrap()),
            (true, false)
        );
        assert_eq!(scaler.scale_factor().unwrap(), 4.0);
        // The next clean step goes on as if nothing had been.
        set_grad(&weight, &[1f32; 3]);
        let _ = scaler.step(&mut optimizer).unwrap();
        assert_ne!(state(&optimizer), before);
        assert_eq!(optimizer.step_counts().to_vec::<u32>().unwrap(), [2, 2]);
    }
}

#[test]
fn a_report_names_the_tensor_and_tells_inf_from_nan() {
    let context = context();
    let clean = ones(&context, "embedding", &[1f32; 4]);
    let infinite = ones(
        &context,
        "layer.0.weight",
        &[1.0, f32::INFINITY, f32::NEG_INFINITY],
    );
    let mixed = ones(&context, "layer.1.bias", &[f16::NAN, f16::INFINITY]);
    let mut optimizer = sgd(&[&clean, &infinite, &mixed], 1.0);
    let mut scaler = scaler(&context, 32.0);
    let Outcome::Skipped(report) = scaler.step(&mut optimizer).unwrap().wait().unwrap() else {
        panic!("the step was applied");
    };
    assert_eq!(
        (report.step, report.scale, report.tensor_count),
        (1, 32.0, 2)
    );
    let names: Vec<_> = report
        .tensors
        .iter()
        .map(|tensor| tensor.name.as_str())
        .collect();
    assert_eq!(names, ["layer.0.weight", "layer.1.bias"]);
    let facts = report
        .tensors
        .iter()
        .map(|t| (t.kind(), t.inf_count, t.nan_count, t.first_index));
    assert_eq!(
        facts.collect::<Vec<_>>(),
        [(OverflowKind::Inf, 2, 0, 1), (OverflowKind::NaN, 1, 1, 0)]
    );
    assert_eq!(
        report.to_string(),
        "step 1 skipped at scale 32: `layer.0.weight` has 2 inf, the first at 1; \
         `layer.1.bias` has 1 inf and 1 nan, the first at 0"
    );
    scaler.update().unwrap();
    let stats = scaler.stats().unwrap();
    assert_eq!(stats.overflows, [report]);
    assert!(
        stats
            .to_string()
            .starts_with("scale 16, 1 steps: 0 applied, 1 skipped (100.0 %)")
    );
}

#[test]
fn a_report_counts_the_offenders_that_it_does_not_name() {
    let context = context();
    let weights: Vec<_> = (0..10)
        .map(|i| ones(&context, &format!("w{i}"), &[f32::NAN]))
        .collect();
    let mut optimizer = Sgd::new(weights, SgdConfig::default()).unwrap();
    let mut scaler = scaler(&context, 32.0);
    let Outcome::Skipped(report) = scaler.step(&mut optimizer).unwrap().wait().unwrap() else {
        panic!("the step was applied");
    };
    assert_eq!((report.tensors.len(), report.tensor_count), (8, 10));
    assert!(report.to_string().ends_with("; and 2 more"));
}

#[test]
fn outcomes_can_be_asked_late() {
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler_with(
        &context,
        AmpConfig {
            growth_interval: 2,
            ..AmpConfig::default()
        },
    );
    let step = |scaler: &mut GradScaler, optimizer: &mut Sgd, gradient: f32| {
        set_grad(&weight, &[gradient]);
        let outcome = scaler.step(optimizer).unwrap();
        scaler.update().unwrap();
        outcome
    };
    let pattern: Vec<bool> = (0..40).map(|step| step % 4 != 1).collect();
    let outcomes: Vec<_> = pattern
        .iter()
        .map(|clean| {
            step(
                &mut scaler,
                &mut optimizer,
                if *clean { 0.0 } else { f32::INFINITY },
            )
        })
        .collect();
    // Ten skips among forty steps: all are remembered.
    let told: Vec<_> = outcomes
        .iter()
        .map(|outcome| outcome.is_applied().unwrap())
        .collect();
    assert_eq!(told, pattern);
    let stats = scaler.stats().unwrap();
    assert_eq!(
        (stats.steps, stats.applied, stats.skipped, stats.updates),
        (40, 30, 10, 40)
    );
    assert_eq!(
        (stats.skipped_in_a_row, stats.backoffs, stats.skip_rate()),
        (0, 10, 0.25)
    );
    let scales: Vec<_> = stats
        .scale_history
        .iter()
        .map(|change| change.scale)
        .collect();
    assert_eq!(scales.len() as u64, stats.growths + stats.backoffs);
    assert_eq!((scales[0], *scales.last().unwrap()), (32768.0, stats.scale));
    // After sixteen more skips the first ones are forgotten, but never told wrong; totals stay exact.
    for _ in 0..16 {
        let _ = step(&mut scaler, &mut optimizer, f32::NAN);
    }
    for (outcome, clean) in outcomes.iter().zip(pattern) {
        assert!(
            outcome
                .wait()
                .is_err_and(|error| matches!(error, Error::InvalidArgument { .. })),
            "{clean}"
        );
    }
    let stats = scaler.stats().unwrap();
    assert_eq!(
        (stats.steps, stats.skipped, stats.skipped_in_a_row),
        (56, 26, 16)
    );
    assert_eq!(stats.overflows.len(), 16);
    assert!(step(&mut scaler, &mut optimizer, 0.0).is_applied().unwrap());
}

#[test]
fn an_overflow_anywhere_is_found_once() {
    // Four kinds of gradients; infinity or NaN in each in turn, first, in the middle, or last.
    let context = context();
    for kind in 0..4 {
        for (row, column) in [(0, 0), (2, 2), (19, 4)] {
            for bad in [f32::INFINITY, f32::NAN] {
                let full = |dtype| Tensor::full(&context, [20, 20], dtype, 4.0).unwrap();
                let gradients = [
                    full(DType::F32),
                    full(DType::F32).narrow(1, 0, 5).unwrap(),
                    full(DType::F16),
                    full(DType::Bf16).transpose(0, 1).unwrap(),
                ];
                let victim = gradients[kind]
                    .narrow(0, row, 1)
                    .unwrap()
                    .narrow(1, column, 1)
                    .unwrap();
                victim
                    .copy_from(&Tensor::full(&context, [1, 1], DType::F32, f64::from(bad)).unwrap())
                    .unwrap();
                let weights: Vec<_> = gradients
                    .iter()
                    .enumerate()
                    .map(|(index, gradient)| {
                        let value =
                            Tensor::zeros(&context, gradient.shape(), gradient.dtype()).unwrap();
                        let weight = Parameter::new(format!("w{index}"), value).unwrap();
                        weight.set_grad(gradient.clone()).unwrap();
                        weight
                    })
                    .collect();
                let mut optimizer = Sgd::new(weights, SgdConfig::default()).unwrap();
                let mut scaler = scaler(&context, 4.0);
                let Outcome::Skipped(report) = scaler.step(&mut optimizer).unwrap().wait().unwrap()
                else {
                    panic!("missed");
                };
                assert_eq!(report.tensor_count, 1);
                let found = &report.tensors[0];
                assert_eq!(found.name, format!("w{kind}"));
                assert_eq!(found.inf_count + found.nan_count, 1);
                assert_eq!(found.kind() == OverflowKind::NaN, bad.is_nan());
            }
        }
    }
}

#[test]
fn strided_gradients_unscale_in_place_and_step_in_order() {
    let context = context();
    // 6 x 4 numbers seen as a transposed slice: element (i, j) of the gradient is 10 (j + 1) + i.
    let numbers: Vec<f32> = (0..24).map(|at| (10 * (at / 4) + at % 4) as f32).collect();
    for unscale in [false, true] {
        let storage = Tensor::from_slice(&context, [6, 4], &numbers).unwrap();
        let view = storage
            .narrow(0, 1, 3)
            .unwrap()
            .narrow(1, 0, 2)
            .unwrap()
            .transpose(0, 1)
            .unwrap();
        let weight =
            Parameter::new("w", Tensor::zeros(&context, [2, 3], DType::F32).unwrap()).unwrap();
        weight.set_grad(view.clone()).unwrap();
        let mut optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 2.0);
        if unscale {
            scaler.unscale(&optimizer).unwrap();
            assert_eq!(
                view.to_vec::<f32>().unwrap(),
                [5.0, 10.0, 15.0, 5.5, 10.5, 15.5]
            );
            // What lies between is untouched.
            let all = storage.to_vec::<f32>().unwrap();
            assert_eq!((all[0], all[6], all[7], all[16]), (0.0, 12.0, 13.0, 40.0));
        }
        for _ in 0..2 {
            let _ = scaler.step(&mut optimizer).unwrap();
            scaler.update().unwrap();
            if unscale {
                break;
            }
        }
        let steps = if unscale { 1.0 } else { 2.0 };
        let expected = [5.0f32, 10.0, 15.0, 5.5, 10.5, 15.5].map(|grad| -grad * steps);
        assert_eq!(value::<f32>(&weight), expected);
    }
}

#[test]
fn gradients_that_share_memory_are_refused() {
    let context = context();
    let (a, b) = (ones(&context, "a", &[1f32]), ones(&context, "b", &[1f32]));
    b.set_grad(a.grad().unwrap()).unwrap();
    let mut optimizer = sgd(&[&a, &b], 1.0);
    let mut scaler = scaler(&context, 2.0);
    assert!(matches!(
        scaler.unscale(&optimizer),
        Err(Error::InvalidArgument { .. })
    ));
    assert!(matches!(
        scaler.step(&mut optimizer),
        Err(Error::InvalidArgument { .. })
    ));
    assert_eq!(grad::<f32>(&a), [1.0]);
    // Nothing was begun: with gradients of their own it works.
    set_grad(&b, &[1f32]);
    scaler.unscale(&optimizer).unwrap();
}

#[test]
fn a_gradient_without_elements_counts_as_checked() {
    let context = context();
    let weight = ones::<f32>(&context, "w", &[]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 2.0);
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    assert_eq!(scaler.state_dict().unwrap().growth_tracker, Some(1));
}

#[test]
fn clipping_within_the_step_equals_clipping_after_unscale() {
    let context = context();
    let gradients: Vec<f32> = (0..1000).map(|at| (at as f32 - 300.0) * 0.37).collect();
    for kind in [NormKind::L1, NormKind::L2, NormKind::Max] {
        let run = |unscale: bool| {
            let weight = ones(&context, "w", &gradients);
            let mut optimizer = sgd(&[&weight], 1.0);
            let mut scaler = scaler(&context, 1024.0);
            if unscale {
                scaler.unscale(&optimizer).unwrap();
            }
            let norm = scaler.clip_grad_norm_by(&optimizer, 0.125, kind).unwrap();
            let _ = scaler.step(&mut optimizer).unwrap();
            scaler.update().unwrap();
            (
                norm.item::<f64>().unwrap(),
                value::<f32>(&weight),
                grad::<f32>(&weight),
            )
        };
        let (folded, in_place) = (run(false), run(true));
        assert_eq!((folded.0, &folded.1), (in_place.0, &in_place.1), "{kind:?}");
        // Folded, the gradients were only read.
        assert_eq!(folded.2, gradients);
        let largest = in_place
            .2
            .iter()
            .fold(0f32, |max, grad| max.max(grad.abs()));
        assert!(largest <= 0.125, "{largest}");
        let moved = in_place
            .1
            .iter()
            .zip(&in_place.2)
            .all(|(weight, grad)| *weight == 1.0 - grad);
        assert!(moved);
    }
}

#[test]
fn clipping_follows_the_order_of_calls() {
    let context = context();
    let weight = ones(&context, "w", &[8f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
    assert_eq!(
        misuse(scaler.unscale(&optimizer)),
        ScalerMisuse::AlreadyUnscaled
    );
    // A second limit replaces the first.
    let norm = scaler.clip_grad_norm_(&optimizer, 0.5).unwrap();
    let _ = scaler.step(&mut optimizer).unwrap();
    assert!(scaler.clip_grad_norm(&optimizer, 1.0).is_err());
    scaler.update().unwrap();
    assert_eq!(norm.item::<f64>().unwrap(), 2.0);
    assert!((value::<f32>(&weight)[0] - 0.5).abs() < 1e-5);
    // The limit is not remembered.
    let _ = scaler.step(&mut optimizer).unwrap();
    assert!((value::<f32>(&weight)[0] + 1.5).abs() < 1e-5);
    assert!(scaler.clip_grad_norm(&optimizer, -1.0).is_err());
}

#[test]
fn gradients_broken_after_unscale_are_not_checked_again() {
    // As in PyTorch: the check is the one taken at unscale.
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&optimizer).unwrap();
    weight.grad().unwrap().fill(f64::INFINITY).unwrap();
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [f32::NEG_INFINITY]);
}

/// Fails its first step.
struct Broken {
    inner: Sgd,
    failures: u32,
}

impl Optimizer for Broken {
    fn id(&self) -> &OptimizerId {
        self.inner.id()
    }

    fn parameters(&self) -> &[Parameter] {
        self.inner.parameters()
    }

    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        if self.failures > 0 {
            self.failures -= 1;
            return Err(Error::UnsupportedDtype {
                op: "broken",
                dtype: DType::U32,
            });
        }
        self.inner.step(inputs)
    }
}

#[test]
fn a_step_that_failed_can_be_tried_again() {
    let context = context();
    let weight = ones(&context, "w", &[8f32]);
    let mut optimizer = Broken {
        inner: sgd(&[&weight], 0.25),
        failures: 1,
    };
    let mut scaler = scaler(&context, 4.0);
    assert!(scaler.step(&mut optimizer).is_err());
    assert_eq!(value::<f32>(&weight), [1.0]);
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [0.5]);
    scaler.update().unwrap();
    assert_eq!(scaler.stats().unwrap().steps, 1);
    // A flag left by a failed step does not leak past the update.
    optimizer.failures = 1;
    set_grad(&weight, &[f32::NAN]);
    assert!(scaler.step(&mut optimizer).is_err());
    scaler.update().unwrap();
    set_grad(&weight, &[4f32]);
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [0.0]);
}
