//! Every vector that PyTorch 2.15 gave for its `GradScaler`, against ours: the order of calls, and which steps are applied. Where we
//! differ on purpose, the test states PyTorch's result and ours.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the oracle writes f32 values as f64"
)]

use crate::support::amp::oracle::{misuse, number, oracle};
use crate::support::amp::{context, grad, ones, scaler, scaler_with, set_grad, sgd, tensor, value};
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::error::ScalerMisuse;
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Sgd, SgdConfig, StepInputs};

#[test]
fn nothing_comes_before_a_scaled_loss() {
    let oracle = oracle();
    let errors = &oracle["errors"];
    let says =
        |key: &str, text: &str| assert!(errors[key].as_str().unwrap().contains(text), "{key}");
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);

    let mut fresh = GradScaler::new(&context, AmpConfig::default()).unwrap();
    says("step_before_scale", "_scale is None");
    assert_eq!(
        misuse(fresh.step(&mut optimizer)),
        ScalerMisuse::NotScaled { call: "step" }
    );
    says("unscale_before_scale", "_scale is None");
    assert_eq!(
        misuse(fresh.unscale(&optimizer)),
        ScalerMisuse::NotScaled { call: "unscale" }
    );
    says("update_before_scale", "_scale is None");
    assert_eq!(
        misuse(fresh.update()),
        ScalerMisuse::NotScaled { call: "update" }
    );
}

#[test]
fn each_call_comes_once_between_updates() {
    let oracle = oracle();
    let errors = &oracle["errors"];
    let says =
        |key: &str, text: &str| assert!(errors[key].as_str().unwrap().contains(text), "{key}");
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);

    let mut scaler = scaler(&context, 4.0);
    says(
        "update_without_inf_checks",
        "No inf checks were recorded prior to update",
    );
    assert_eq!(misuse(scaler.update()), ScalerMisuse::NothingToUpdate);
    scaler.unscale(&optimizer).unwrap();
    says("double_unscale", "unscale_() has already been called");
    assert_eq!(
        misuse(scaler.unscale_(&optimizer)),
        ScalerMisuse::AlreadyUnscaled
    );
    let _ = scaler.step(&mut optimizer).unwrap();
    says(
        "unscale_after_step",
        "unscale_() is being called after step()",
    );
    assert_eq!(
        misuse(scaler.unscale(&optimizer)),
        ScalerMisuse::UnscaleAfterStep
    );
    says("step_twice", "step() has already been called");
    assert_eq!(
        misuse(scaler.step(&mut optimizer)),
        ScalerMisuse::AlreadyStepped
    );
    says(
        "pickle_mid_iter",
        "only be pickled at the beginning of an iteration",
    );
    assert_eq!(misuse(scaler.state_dict()), ScalerMisuse::MidIteration);
    // None of the refused calls changed anything: one division, one step.
    assert_eq!(
        (grad::<f32>(&weight), value::<f32>(&weight)),
        (vec![0.25], vec![0.75])
    );
    scaler.update().unwrap();

    weight.zero_grad();
    says(
        "step_no_grads",
        "No inf checks were recorded for this optimizer",
    );
    assert_eq!(
        misuse(scaler.step(&mut optimizer)),
        ScalerMisuse::NothingChecked
    );
    // PyTorch lets this pass and refuses the step that follows.
    says(
        "unscale_no_grads_then_step",
        "No inf checks were recorded for this optimizer",
    );
    assert_eq!(
        misuse(scaler.unscale(&optimizer)),
        ScalerMisuse::NothingChecked
    );
    assert_eq!(
        misuse(scaler.step(&mut optimizer)),
        ScalerMisuse::NothingChecked
    );
}

#[test]
fn two_optimizers_share_a_scale() {
    let oracle = oracle();
    let context = context();
    assert_eq!(
        oracle["two_opts_one_inf"],
        "ok:([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], 64.0, [1.0, inf, 0.0078125])"
    );
    let (first, second) = (
        ones(&context, "a", &[128f32; 3]),
        ones(&context, "b", &[128f32, f32::INFINITY, 1.0]),
    );
    let (mut one, mut two) = (sgd(&[&first], 1.0), sgd(&[&second], 1.0));
    let mut scaler = scaler(&context, 128.0);
    scaler.unscale(&two).unwrap();
    let outcomes = [
        scaler.step(&mut one).unwrap(),
        scaler.step(&mut two).unwrap(),
    ];
    scaler.update().unwrap();
    assert_eq!(
        outcomes.map(|outcome| outcome.is_applied().unwrap()),
        [true, false]
    );
    assert_eq!(
        (value::<f32>(&first), value::<f32>(&second)),
        (vec![0.0; 3], vec![1.0; 3])
    );
    assert_eq!(grad::<f32>(&second), [1.0, f32::INFINITY, 0.0078125]);
    assert_eq!(scaler.scale_factor().unwrap(), 64.0);

    assert_eq!(oracle["two_opts_both_inf"], "ok:(64.0, 0)");
    scaler.update_to(128.0).unwrap();
    for (weight, optimizer) in [(&first, &mut one), (&second, &mut two)] {
        set_grad(weight, &[f32::INFINITY; 3]);
        let _ = scaler.step(optimizer).unwrap();
    }
    scaler.update().unwrap();
    let state = scaler.state_dict().unwrap();
    assert_eq!((state.scale, state.growth_tracker), (Some(64.0), Some(0)));

    assert_eq!(
        oracle["unscaled_but_unstepped_counts"],
        "ok:(64.0, [0.0, 0.0, 0.0])"
    );
    scaler.update_to(128.0).unwrap();
    scaler.unscale(&two).unwrap();
    let zeros = ones(&context, "c", &[128f32; 3]);
    let _ = scaler.step(&mut sgd(&[&zeros], 1.0)).unwrap();
    scaler.update().unwrap();
    assert_eq!(
        (scaler.scale_factor().unwrap(), value::<f32>(&zeros)),
        (64.0, vec![0.0; 3])
    );
}

#[test]
fn a_gradient_is_not_unscaled_twice() {
    // PyTorch divides the gradient of a parameter that two optimizers hold by the scale twice.
    assert_eq!(oracle()["shared_param_double_unscaled"], "ok:[1.0]");
    let context = context();
    let weight = ones(&context, "shared", &[16f32]);
    let (mut one, mut two) = (sgd(&[&weight], 1.0), sgd(&[&weight], 1.0));
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&one).unwrap();
    for refused in [scaler.unscale(&two).err(), scaler.step(&mut two).err()] {
        assert!(refused.unwrap().to_string().contains("`shared`"));
    }
    assert_eq!(grad::<f32>(&weight), [4.0]);
    let _ = scaler.step(&mut one).unwrap();
    scaler.update().unwrap();
    // Both may read it scaled.
    set_grad(&weight, &[4f32]);
    let _ = scaler.step(&mut one).unwrap();
    let _ = scaler.step(&mut two).unwrap();
    assert_eq!(value::<f32>(&weight), [1.0 - 4.0 - 1.0 - 1.0]);
}

#[test]
fn any_flag_but_zero_skips_a_step() {
    let oracle = oracle();
    let context = context();
    let flags = |key: &str| oracle[key].as_array().unwrap().clone();
    let inputs = |flag: f64| StepInputs {
        found_inf: Some(tensor(&context, &[flag as f32])),
        inv_scale: Some(tensor(&context, &[0.25f32])),
        clip: None,
    };
    // PyTorch's fused kernels skip only at exactly 1.0; a flag of 2.0 is what two ranks add up to.
    for vector in flags("fused_adam_found_inf_values") {
        let flag = number(&vector[0]);
        let weight = ones(&context, "w", &[8f32; 3]);
        let config = AdamWConfig {
            learning_rate: 0.1,
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
        optimizer.step(&inputs(flag)).unwrap();
        let (expected, steps) = if flag == 0.0 || flag == 1.0 {
            (number(&vector[1][0]), number(&vector[3]))
        } else {
            assert_eq!(number(&vector[1][0]), 0.9, "PyTorch steps");
            (1.0, 0.0)
        };
        for got in value::<f32>(&weight) {
            assert!((f64::from(got) - expected).abs() < 1e-7, "{flag}: {got}");
        }
        assert_eq!(
            f64::from(optimizer.step_counts().item::<u32>().unwrap()),
            steps,
            "{flag}"
        );
    }
    for vector in flags("fused_sgd_found_inf_values") {
        let flag = number(&vector[0]);
        let weight = ones(&context, "w", &[8f32; 3]);
        sgd(&[&weight], 0.1).step(&inputs(flag)).unwrap();
        let expected = if flag == 2.0 {
            1.0
        } else {
            number(&vector[1][0])
        };
        for got in value::<f32>(&weight) {
            assert!((f64::from(got) - expected).abs() < 1e-7, "{flag}: {got}");
        }
    }
}

#[test]
fn skipped_steps_leave_gradients_as_the_check_left_them() {
    let oracle = oracle();
    assert_eq!(
        oracle["fused_overflow_grads_left_scaled"],
        "ok:([1.0, 1.0, 1.0], [8.0, inf, 4.0], 2.0, None)"
    );
    assert_eq!(
        oracle["unfused_overflow_grads_unscaled"],
        "ok:([1.0, 1.0, 1.0], [2.0, inf, 1.0], 2.0, None)"
    );
    let context = context();
    for (unscale, expected) in [
        (false, [8.0, f32::INFINITY, 4.0]),
        (true, [2.0, f32::INFINITY, 1.0]),
    ] {
        let weight = ones(&context, "w", &[8f32, f32::INFINITY, 4.0]);
        let mut optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 4.0);
        if unscale {
            scaler.unscale(&optimizer).unwrap();
        }
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert_eq!(
            (value::<f32>(&weight), grad::<f32>(&weight)),
            (vec![1.0; 3], expected.to_vec())
        );
        assert_eq!(scaler.scale_factor().unwrap(), 2.0);
    }
}

#[test]
fn a_skipped_step_is_not_counted_by_the_optimizer() {
    for vector in oracle()["adam_step_count_after_skip"].as_array().unwrap() {
        assert_eq!((number(&vector[1]), number(&vector[2])), (1.0, 2.0));
    }
    let context = context();
    let weight = ones(&context, "w", &[4f32]);
    let mut optimizer = AdamW::new(vec![weight.clone()], AdamWConfig::default()).unwrap();
    let mut scaler = scaler(&context, 4.0);
    let mut counts = Vec::new();
    for value in [4.0, f32::INFINITY, 4.0] {
        set_grad(&weight, &[value]);
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        counts.push(optimizer.step_counts().item::<u32>().unwrap());
    }
    assert_eq!(counts, [1, 1, 2]);
}

#[test]
fn momentum_survives_an_overflow_in_the_first_step() {
    // PyTorch's fused kernel leaves the new momentum buffer unwritten, and reads it in the next step.
    let context = context();
    let weight = ones(&context, "w", &[4f32]);
    let config = SgdConfig {
        learning_rate: 0.1,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler_with(
        &context,
        AmpConfig {
            init_scale: 4.0,
            ..AmpConfig::default()
        },
    );
    let mut trace = Vec::new();
    for gradient in [f32::INFINITY, 4.0, 4.0] {
        set_grad(&weight, &[gradient]);
        let before = scaler.scale_factor().unwrap();
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        trace.push((
            before,
            (f64::from(value::<f32>(&weight)[0]) * 1e6).round() / 1e6,
        ));
    }
    assert_eq!(trace, [(4.0, 1.0), (2.0, 0.8), (2.0, 0.42)]);
}
