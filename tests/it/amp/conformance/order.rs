//! Cases 37 and 42 to 47: the order of calls, and gradients that do not fit it.

use crate::support;
use kitsune::amp::{AmpConfig, GradScaler, SkipPolicy};
use kitsune::error::ScalerMisuse;
use kitsune::optim::{NormKind, Optimizer, clip_grad_norm};
use kitsune::{Error, Tensor, f16};

use crate::support::amp::oracle::{misuse, oracle};
use crate::support::amp::{
    context, grad, ones, parameter, scaler, scaler_with, set_grad, sgd, tensor, value,
};

fn refused<T: std::fmt::Debug>(result: kitsune::Result<T>, named: &str) {
    match result {
        Err(Error::InvalidArgument { reason, .. }) => assert!(reason.contains(named), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn case_37_scale_changed_mid_window() {
    // A true gradient of 6 in two terms: 3 at scale 2, 3 at scale 8. PyTorch adds and divides by 8.
    assert_eq!((3.0 * 2.0 + 3.0 * 8.0) / 8.0, 3.75);
    let context = context();
    let weight = parameter(&context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 2.0);
    let term = |scaler: &GradScaler| scaler.scale(&tensor(&context, &[3f32])).unwrap();

    // Marked gradients are refused where they are added.
    weight.set_scaled_grad(term(&scaler), scaler.tag()).unwrap();
    scaler.update_to(8.0).unwrap();
    let added = weight.accumulate_scaled_grad(term(&scaler), scaler.tag());
    refused(added, "another loss scale");
    refused(scaler.step(&mut optimizer).map(drop), "another scale");
    // Others where they are used.
    scaler.update_to(2.0).unwrap();
    weight.set_grad(term(&scaler)).unwrap();
    scaler.update_to(8.0).unwrap();
    weight.accumulate_grad(term(&scaler)).unwrap();
    refused(scaler.unscale(&optimizer), "before and after an update");
    refused(
        scaler.clip_grad_norm(&optimizer, 1.0),
        "before and after an update",
    );
    refused(
        scaler.step(&mut optimizer).map(drop),
        "before and after an update",
    );
    assert_eq!(value::<f32>(&weight), [0.0]);
    // Within one window it is 6.
    weight.zero_grad();
    for _ in 0..2 {
        weight
            .accumulate_scaled_grad(term(&scaler), scaler.tag())
            .unwrap();
    }
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [-6.0]);
}

#[test]
fn case_42_shared_param() {
    // PyTorch divides it twice.
    assert_eq!(oracle()["shared_param_double_unscaled"], "ok:[1.0]");
    let context = context();
    let weight = ones(&context, "shared", &[16f32]);
    let (one, two) = (sgd(&[&weight], 1.0), sgd(&[&weight], 1.0));
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&one).unwrap();
    refused(scaler.unscale(&two), "`shared` was already unscaled");
    assert_eq!(grad::<f32>(&weight), [4.0]);
}

#[test]
fn case_43_double_unscale_unscale_after_step_step_twice() {
    let context = context();
    let weight = ones(&context, "w", &[4f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(
        misuse(scaler.unscale(&optimizer)),
        ScalerMisuse::AlreadyUnscaled
    );
    let _ = scaler.step(&mut optimizer).unwrap();
    assert_eq!(
        misuse(scaler.unscale(&optimizer)),
        ScalerMisuse::UnscaleAfterStep
    );
    assert_eq!(
        misuse(scaler.step(&mut optimizer)),
        ScalerMisuse::AlreadyStepped
    );
    assert_eq!(
        (value::<f32>(&weight), grad::<f32>(&weight)),
        (vec![0.0], vec![1.0])
    );
    // Ours alone: adding to a gradient that was divided, and a second scaler.
    refused(
        weight.accumulate_grad(tensor(&context, &[1f32])),
        "was divided",
    );
    scaler.update().unwrap();
    let mut second = support::amp::scaler(&context, 4.0);
    let other = ScalerMisuse::OtherScaler {
        parameters: "`w`".to_owned(),
    };
    assert_eq!(misuse(second.step(&mut optimizer)), other);
    assert_eq!(misuse(second.unscale(&optimizer)), other);
    assert_eq!(misuse(second.clip_grad_norm(&optimizer, 1.0)), other);
    let told = other.to_string();
    assert!(told.contains("the optimizer of `w`"), "{told}");
    drop(scaler);
    let _ = second.step(&mut optimizer).unwrap();
}

#[test]
fn case_44_step_without_grads_update_without_check_step_before_scale() {
    let context = context();
    let weight = parameter(&context, "w", &[4f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    let too_early = ScalerMisuse::NotScaled { call: "step" };
    assert_eq!(misuse(scaler.step(&mut optimizer)), too_early);
    scaler.scale(&tensor(&context, &[1f32])).unwrap();
    assert_eq!(
        misuse(scaler.step(&mut optimizer)),
        ScalerMisuse::NothingChecked
    );
    assert_eq!(misuse(scaler.update()), ScalerMisuse::NothingToUpdate);
    // PyTorch does not notice a missing unscale. A gradient that is marked tells.
    let scaled = || scaler.scale(&tensor(&context, &[1f32])).unwrap();
    weight.set_scaled_grad(scaled(), scaler.tag()).unwrap();
    refused(optimizer.step_unscaled(), "`w` is still scaled");
    let parameters = [weight.clone()];
    let clipped = clip_grad_norm(&context, &parameters, 1.0, NormKind::L2);
    refused(clipped, "`w` is still scaled");
    scaler.unscale(&optimizer).unwrap();
    assert!(clip_grad_norm(&context, &parameters, 1.0, NormKind::L2).is_ok());
}

#[test]
fn case_45_f16_grads() {
    let says = oracle()["errors"]["fp16_grads"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        says.starts_with("ValueError: Attempting to unscale FP16"),
        "{says}"
    );
    let context = context();
    let weight = ones(&context, "w", &[f16::from_f32(4.0); 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(grad::<f16>(&weight), [f16::ONE; 3]);
    let _ = scaler.step(&mut optimizer).unwrap();
    assert_eq!(value::<f16>(&weight), [f16::ZERO; 3]);
}

#[test]
fn case_46_fused_f16_grads() {
    // Parameter 0, as PyTorch's fused kernel gives; that one also writes the gradient back, as 1.
    let torch = oracle()["errors"]["fp16_grads_fused_opt_allowed"].clone();
    assert_eq!(torch, "ok:([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])");
    let context = context();
    let weight = ones(&context, "w", &[f16::from_f32(4.0); 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let _ = scaler(&context, 4.0).step(&mut optimizer).unwrap();
    assert_eq!(value::<f16>(&weight), [f16::ZERO; 3]);
    assert_eq!(
        grad::<f16>(&weight),
        [f16::from_f32(4.0); 3],
        "gradients are only read"
    );
}

#[test]
fn case_47_grads_broken_after_unscale() {
    let context = context();
    for bad in [f64::INFINITY, f64::NAN] {
        let weight = ones(&context, "w", &[1f32]);
        let mut optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 4.0);
        scaler.unscale(&optimizer).unwrap();
        weight.grad().unwrap().fill(bad).unwrap();
        assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
        assert!(!value::<f32>(&weight)[0].is_finite());
        // Whoever clips, as one does after changing gradients, has them looked at again.
        scaler.update().unwrap();
        weight.value().fill(1.0).unwrap();
        set_grad(&weight, &[1f32]);
        scaler.unscale(&optimizer).unwrap();
        weight.grad().unwrap().fill(bad).unwrap();
        scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
        assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
        assert_eq!(value::<f32>(&weight), [1.0]);
    }
}

#[test]
fn all_or_none_refuses_what_is_checked_too_late() {
    let context = context();
    let config = AmpConfig {
        skip_policy: SkipPolicy::AllOrNone,
        init_scale: 4.0,
        ..AmpConfig::default()
    };
    let (a, b) = (
        ones(&context, "a", &[4f32]),
        ones(&context, "b", &[f32::NAN]),
    );
    let (mut one, mut two) = (sgd(&[&a], 1.0), sgd(&[&b], 1.0));
    let mut scaler = scaler_with(&context, config);
    let _ = scaler.step(&mut one).unwrap();
    let late = ScalerMisuse::CheckedTooLate { call: "step" };
    assert_eq!(misuse(scaler.step(&mut two)), late);
    scaler.update().unwrap();
    assert_eq!(value::<f32>(&a), [0.0]);
    // Checked in time, one's NaN skips both, and the scale backs off once.
    let outcomes = scaler.step_all(&mut [&mut one, &mut two]).unwrap();
    scaler.update().unwrap();
    assert!(
        outcomes
            .iter()
            .all(|outcome| !outcome.is_applied().unwrap())
    );
    assert_eq!((value::<f32>(&a), value::<f32>(&b)), (vec![0.0], vec![1.0]));
    assert_eq!(scaler.get_scale().unwrap(), 2.0);
    let reports = scaler.stats().unwrap().overflows;
    assert!(
        reports[0]
            .to_string()
            .ends_with("another optimizer overflowed")
    );
    set_grad(&b, &[2f32]);
    let outcomes = scaler.step_all(&mut [&mut one, &mut two]).unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.is_applied().unwrap()));
    let state: Tensor = b.value().clone();
    assert_eq!(state.item::<f32>().unwrap(), 0.0);
}
