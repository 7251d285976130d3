//! Cases 38 to 41: several models, losses, optimizers and devices.

use kitsune::amp::GradScaler;
use kitsune::optim::{Optimizer, Parameter};
use kitsune::{Context, Device, HostConfig};

use super::config;
use crate::support::amp::oracle::oracle;
use crate::support::amp::{
    context, flag, ones, parameter, scaler, scaler_with, set_grad, sgd, value,
};

/// The gradient of scale · w² / 2.
fn set_scaled(weight: &Parameter, scaler: &GradScaler) {
    let current = weight.value().duplicate().unwrap();
    weight
        .set_scaled_grad(scaler.scale(&current).unwrap(), scaler.tag())
        .unwrap();
}

#[test]
fn case_38_two_models_two_losses_two_opts() {
    let context = context();
    let weights = [
        parameter(&context, "w0", &[1f32; 8]),
        parameter(&context, "w1", &[2f32; 8]),
    ];
    let mut optimizers = [sgd(&[&weights[0]], 0.5), sgd(&[&weights[1]], 0.5)];
    let mut scaler = scaler_with(&context, config(128.0, 1));
    let mut applied = [0, 0];
    for batch in 0..4 {
        weights
            .iter()
            .for_each(|weight| set_scaled(weight, &scaler));
        if batch == 2 {
            weights[1]
                .grad()
                .unwrap()
                .narrow(0, 3, 1)
                .unwrap()
                .fill(f64::INFINITY)
                .unwrap();
        }
        scaler.unscale(&optimizers[0]).unwrap();
        for (optimizer, applied) in optimizers.iter_mut().zip(&mut applied) {
            let outcome = scaler.step(optimizer).unwrap();
            *applied += usize::from(outcome.is_applied().unwrap());
        }
        scaler.update().unwrap();
    }
    assert_eq!(applied, [4, 3]);
    assert_eq!(value::<f32>(&weights[0]), [0.0625; 8]);
    assert_eq!(value::<f32>(&weights[1]), [0.25; 8]);
    assert_eq!(scaler.get_scale().unwrap(), 128.0 * 8.0 * 0.5);
}

#[test]
fn case_39_multi_gpu() {
    // A scaler serves one stream; two of them that are told each other's flags keep one scale.
    let devices = Device::hosts(HostConfig::default(), 2).unwrap();
    let contexts: Vec<_> = devices
        .iter()
        .map(|device| Context::new(device).unwrap())
        .collect();
    let weights: Vec<_> = contexts
        .iter()
        .map(|context| parameter(context, "w", &[1f32; 8]))
        .collect();
    let mut optimizers: Vec<_> = weights.iter().map(|weight| sgd(&[weight], 0.5)).collect();
    let make = |context: &Context| scaler_with(context, config(128.0, 1));
    let mut scalers: Vec<_> = contexts.iter().map(make).collect();
    for batch in 0..4 {
        for (weight, scaler) in weights.iter().zip(&scalers) {
            set_scaled(weight, scaler);
        }
        if batch == 2 {
            weights[1]
                .grad()
                .unwrap()
                .narrow(0, 3, 1)
                .unwrap()
                .fill(f64::INFINITY)
                .unwrap();
        }
        for (scaler, optimizer) in scalers.iter_mut().zip(&optimizers) {
            scaler.unscale(optimizer).unwrap();
        }
        // One flag each, on its own device.
        let flags = [0, 1].map(|device| flag(&scalers[device], &optimizers[device]));
        assert_eq!(flags, if batch == 2 { [0.0, 1.0] } else { [0.0, 0.0] });
        let any = flags[0].max(flags[1]);
        for (scaler, optimizer) in scalers.iter_mut().zip(&mut optimizers) {
            let found_inf = scaler.found_inf(optimizer).unwrap();
            assert!(
                found_inf
                    .context()
                    .device()
                    .is_same(optimizer.parameters()[0].value().context().device())
            );
            found_inf.copy_from_slice(&[any]).unwrap();
            assert_eq!(
                scaler.step(optimizer).unwrap().is_applied().unwrap(),
                batch != 2
            );
            scaler.update().unwrap();
        }
        let scales = [0, 1].map(|device: usize| scalers[device].get_scale().unwrap());
        assert_eq!(scales[0], scales[1]);
    }
    assert_eq!(scalers[0].get_scale().unwrap(), 128.0 * 8.0 * 0.5);
    for weight in &weights {
        assert_eq!(value::<f32>(weight), [0.125; 8]);
    }
}

#[test]
fn case_40_both_overflow_one_backoff() {
    assert_eq!(oracle()["two_opts_both_inf"], "ok:(64.0, 0)");
    let context = context();
    let weights = [
        ones(&context, "a", &[f32::INFINITY]),
        ones(&context, "b", &[f32::INFINITY]),
    ];
    let mut optimizers = [sgd(&[&weights[0]], 1.0), sgd(&[&weights[1]], 1.0)];
    let mut scaler = scaler(&context, 128.0);
    for optimizer in &mut optimizers {
        let _ = scaler.step(optimizer).unwrap();
    }
    scaler.update().unwrap();
    assert_eq!(super::scale_and_tracker(&scaler), (64.0, 0));
}

#[test]
fn case_41_unscaled_never_stepped() {
    assert_eq!(
        oracle()["unscaled_but_unstepped_counts"],
        "ok:(64.0, [0.0, 0.0, 0.0])"
    );
    let context = context();
    let (good, bad) = (
        ones(&context, "a", &[128f32]),
        ones(&context, "b", &[f32::INFINITY]),
    );
    let (mut stepped, only_unscaled) = (sgd(&[&good], 1.0), sgd(&[&bad], 1.0));
    let mut scaler = scaler(&context, 128.0);
    scaler.unscale(&only_unscaled).unwrap();
    assert!(scaler.step(&mut stepped).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    assert_eq!(
        (scaler.get_scale().unwrap(), value::<f32>(&good)),
        (64.0, vec![0.0])
    );
    // It is ready again, as the other one.
    set_grad(&bad, &[64f32]);
    scaler.unscale(&only_unscaled).unwrap();
}
