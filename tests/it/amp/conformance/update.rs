//! Cases 1 to 7: how one update moves the scale.

use kitsune::Context;
use kitsune::amp::{AmpConfig, ScalePolicy, ScaleState, ScalerState, next_scale};

use super::{config, scale_and_tracker};
use crate::support::amp::oracle::oracle;
use crate::support::amp::{context, parameter, scaler_with, set_grad, sgd};

/// Scale and tracker after updates that see these flags, from `config`'s scale and this tracker on.
fn updates(context: &Context, config: AmpConfig, tracker: u32, flags: &[f32]) -> Vec<(f64, u32)> {
    let weight = parameter(context, "w", &[1f32]);
    let optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler_with(context, config);
    let state = ScalerState {
        growth_tracker: Some(tracker),
        ..scaler.state_dict().unwrap()
    };
    scaler.load_state_dict(&state).unwrap();
    set_grad(&weight, &[0f32]);
    let mut seen = Vec::new();
    for flag in flags {
        scaler.unscale(&optimizer).unwrap();
        let found_inf = scaler.found_inf(&optimizer).unwrap();
        found_inf.copy_from_slice(&[*flag]).unwrap();
        scaler.update().unwrap();
        seen.push(scale_and_tracker(&scaler));
    }
    seen
}

fn quarter() -> AmpConfig {
    AmpConfig {
        backoff_factor: 0.25,
        ..config(4.0, 2)
    }
}

#[test]
fn case_01_update_two_clean() {
    let got = updates(&context(), quarter(), 0, &[0.0, 0.0]);
    assert_eq!(got, [(4.0, 1), (8.0, 0)]);
}

#[test]
fn case_02_update_overflow() {
    let got = updates(&context(), quarter(), 0, &[0.0, 0.0, 1.0]);
    assert_eq!(got[2], (2.0, 0));
}

#[test]
fn case_03_growth_not_past_f32() {
    let policy = ScalePolicy {
        growth_factor: 16.0,
        growth_interval: 1,
        ..ScalePolicy::default()
    };
    let state = ScaleState {
        scale: 1e38,
        growth_tracker: 0,
        overflows: 0,
    };
    assert_eq!(next_scale(&policy, state, 0.0), state);
    // On a device the scale stops at its cap, whose inverse is a normal number, before that.
    let cap = 2f64.powi(126);
    let config = AmpConfig {
        growth_factor: 4.0,
        ..config(cap / 2.0, 1)
    };
    let got = updates(&context(), config, 0, &[0.0, 0.0]);
    assert_eq!(got, [(cap, 0), (cap, 0)]);
}

#[test]
fn case_04_growth_nonpow2() {
    let config = AmpConfig {
        growth_factor: 1.1,
        ..config(65536.0, 1)
    };
    assert_eq!(updates(&context(), config, 0, &[0.0]), [(72089.6015625, 0)]);
}

#[test]
fn case_05_backoff_nonpow2() {
    let config = AmpConfig {
        backoff_factor: 0.3,
        ..config(65536.0, 5)
    };
    assert_eq!(
        updates(&context(), config, 0, &[1.0]),
        [(19660.80078125, 0)]
    );
}

#[test]
fn case_06_flag_any_nonzero() {
    let context = context();
    for flag in [2.0, -1.0, f32::NAN, 1e-40] {
        assert_eq!(
            updates(&context, config(8.0, 5), 3, &[flag]),
            [(4.0, 0)],
            "{flag}"
        );
    }
}

#[test]
fn case_07_tracker_past_interval() {
    // PyTorch compares for equality, and never grows again.
    let torch = &oracle()["update"]["(65536.0, 7, 0.0, 2.0, 0.5, 5)"];
    assert_eq!(
        (torch[0].as_f64(), torch[1].as_u64()),
        (Some(65536.0), Some(8))
    );
    let got = updates(&context(), config(65536.0, 5), 7, &[0.0]);
    assert_eq!(got, [(131072.0, 0)]);
}
