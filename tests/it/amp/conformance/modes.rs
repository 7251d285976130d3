//! States that go from a scaler of one mode into one of another.

use kitsune::amp::{
    AmpConfig, AmpOptimizer, GradScaler, KeptScale, NanPolicy, ScalerState, ScalingMode,
};
use kitsune::checkpoint::Checkpoint;
use kitsune::{Context, Error, f16};

use super::scale_and_tracker;
use crate::support::amp::{context, ones, parameter, scaler_with, set_grad, sgd, tensor, value};

/// Settings of this mode that are no defaults.
fn config(mode: ScalingMode) -> AmpConfig {
    AmpConfig {
        mode,
        init_scale: 4096.0,
        growth_interval: 10,
        ..AmpConfig::default()
    }
}

fn new(context: &Context, mode: ScalingMode) -> GradScaler {
    scaler_with(context, config(mode))
}

/// A scaler of this mode that goes on from `state`, which went through JSON.
fn resumed(context: &Context, mode: ScalingMode, state: &ScalerState) -> GradScaler {
    let mut scaler = new(context, mode);
    let text = serde_json::to_string(state).unwrap();
    let state: ScalerState = serde_json::from_str(&text).unwrap();
    scaler.load_state_dict(&state).unwrap();
    scaler
}

/// Steps with these gradients.
fn step(context: &Context, scaler: &mut GradScaler, gradients: &[f32]) {
    let weight = ones(context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    for gradient in gradients {
        set_grad(&weight, &[*gradient]);
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    }
}

/// A scaling state: a scale of 1024 and a tracker of 2.
fn scaling_state(context: &Context) -> ScalerState {
    let mut scaler = new(context, ScalingMode::Scale);
    step(
        context,
        &mut scaler,
        &[f32::INFINITY, f32::INFINITY, 0.0, 0.0],
    );
    let state = scaler.state_dict().unwrap();
    assert_eq!((state.scale, state.growth_tracker), (Some(1024.0), Some(2)));
    state
}

#[test]
fn a_scale_outlasts_phases_that_need_none() {
    let context = context();
    let f16 = scaling_state(&context);
    let phases: [&[ScalingMode]; 5] = [
        &[ScalingMode::CheckOnly],
        &[ScalingMode::Off],
        &[ScalingMode::CheckOnly, ScalingMode::CheckOnly],
        &[
            ScalingMode::CheckOnly,
            ScalingMode::Off,
            ScalingMode::CheckOnly,
        ],
        &[ScalingMode::Off, ScalingMode::CheckOnly],
    ];
    for modes in phases {
        let mut state = f16.clone();
        for mode in modes {
            let mut scaler = resumed(&context, *mode, &state);
            assert_eq!(scaler.get_scale().unwrap(), 1.0);
            // Fewer than an interval, more than one, and a skipped step: nothing of it concerns the scale.
            let gradients = [&[0.0; 13][..], &[f32::INFINITY, 0.0]].concat();
            step(&context, &mut scaler, &gradients);
            assert_eq!(scaler.get_scale().unwrap(), 1.0);
            state = scaler.state_dict().unwrap();
        }
        let scaler = resumed(&context, ScalingMode::Scale, &state);
        assert_eq!(scaler.state_dict().unwrap(), f16, "{modes:?}");
        let scaled = scaler.scale(&tensor(&context, &[3f32])).unwrap();
        assert_eq!(scaled.to_vec::<f32>().unwrap(), [3072.0]);
    }
}

#[test]
fn tolerated_overflows_are_kept_with_the_scale() {
    let context = context();
    let f16 = ScalerState {
        hysteresis: Some(3),
        overflows: Some(2),
        ..scaling_state(&context)
    };
    let check = resumed(&context, ScalingMode::CheckOnly, &f16);
    let state = check.state_dict().unwrap();
    let kept = KeptScale {
        scale: 1024.0,
        growth_tracker: 2,
        overflows: 2,
    };
    assert_eq!((state.scale, state.kept_scale), (Some(1.0), Some(kept)));
    assert_eq!(state.mode, Some(ScalingMode::CheckOnly));
    let mut again = resumed(&context, ScalingMode::Scale, &state);
    assert_eq!(again.state_dict().unwrap(), f16);
    step(&context, &mut again, &[f32::INFINITY]);
    assert_eq!(again.get_scale().unwrap(), 512.0, "the third overflow");
}

#[test]
fn a_checking_scaler_has_no_scale_for_one_that_scales() {
    let context = context();
    let mut check = new(&context, ScalingMode::CheckOnly);
    step(&context, &mut check, &[0.0; 4]);
    let state = ScalerState {
        growth_interval: Some(7),
        ..check.state_dict().unwrap()
    };
    let scaler = resumed(&context, ScalingMode::Scale, &state);
    assert_eq!(scale_and_tracker(&scaler), (4096.0, 0));
    assert_eq!(scaler.growth_interval(), 7);
    assert_eq!(scaler.keeps_on_load(&state), ["scale"]);
    assert_eq!(check.keeps_on_load(&state), [""; 0]);
    // Gradients that f16 would lose: 2^-26 times 4096 is 2^-14.
    let weight = parameter(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler;
    let loss = tensor(&context, &[2f32.powi(-26)]);
    let scaled = scaler
        .scale(&loss)
        .unwrap()
        .cast(kitsune::DType::F16)
        .unwrap();
    weight.set_scaled_grad(scaled, scaler.tag()).unwrap();
    let weight_before = f16::from_f32(1.0).to_f32();
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    // Half the distance from 1 to the number below it in f32 is 2^-25: rounded to even, the weight stays; its gradient
    // did not vanish.
    assert_eq!(value::<f32>(&weight), [weight_before]);
    let grad = weight.grad().unwrap().to_vec::<f16>().unwrap();
    assert_eq!(grad[0].to_f32(), 2f32.powi(-14));

    // Its own goes back into it, trackers and all, also with limits that 1 is not within.
    let limited = AmpConfig {
        min_scale: 16.0,
        ..config(ScalingMode::CheckOnly)
    };
    let mut limited = scaler_with(&context, limited);
    step(&context, &mut limited, &[0.0; 3]);
    let state = limited.state_dict().unwrap();
    assert_eq!((state.scale, state.growth_tracker), (Some(1.0), Some(3)));
    let again = resumed(&context, ScalingMode::CheckOnly, &state);
    assert_eq!(again.state_dict().unwrap(), state);
}

#[test]
fn a_disabled_scaler_hands_on_what_it_was_given() {
    let context = context();
    let mut off = new(&context, ScalingMode::Off);
    assert!(off.state_dict().unwrap().is_empty());
    let empty = off.state_dict().unwrap();
    for mode in [ScalingMode::Scale, ScalingMode::CheckOnly] {
        match new(&context, mode).load_state_dict(&empty) {
            Err(Error::InvalidState { key, reason }) => {
                assert_eq!(key, "scale");
                assert!(reason.contains("disabled scaler"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    let f16 = scaling_state(&context);
    off.load_state_dict(&f16).unwrap();
    assert_eq!((off.get_scale().unwrap(), off.tag()), (1.0, None));
    assert_eq!(off.state_dict().unwrap(), f16);
    assert_eq!(off.keeps_on_load(&f16), [""; 0]);
    let unknown = ScalerState {
        version: Some(3),
        ..f16
    };
    assert!(off.load_state_dict(&unknown).is_err());
    off.load_state_dict(&empty).unwrap();
    assert!(off.state_dict().unwrap().is_empty());
}

#[test]
fn states_without_a_mode_still_load() {
    let context = context();
    let read = |text: &str| serde_json::from_str::<ScalerState>(text).unwrap();
    let torch = read(
        r#"{"scale": 256.0, "growth_factor": 2.0, "backoff_factor": 0.5,
            "growth_interval": 2000, "_growth_tracker": 7}"#,
    );
    let first = read(
        r#"{"version": 1, "scale": 256.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
            "_growth_tracker": 7, "min_scale": 1.0, "max_scale": 65536.0, "hysteresis": 2, "refill": "growth",
            "late_growth": true, "_overflows": 1}"#,
    );
    assert_eq!(first.lacks(), ["mode"]);
    let lacking = [
        "mode",
        "min_scale",
        "max_scale",
        "hysteresis",
        "refill",
        "late_growth",
    ];
    assert_eq!(torch.lacks(), lacking);
    assert_eq!(scaling_state(&context).lacks(), [""; 0]);
    assert_eq!(ScalerState::default().lacks(), [""; 0]);
    for state in [&torch, &first] {
        let scaler = resumed(&context, ScalingMode::Scale, state);
        assert_eq!(scale_and_tracker(&scaler), (256.0, 7));
        assert_eq!(scaler.keeps_on_load(state), state.lacks());
        let saved = scaler.state_dict().unwrap();
        assert_eq!(
            (saved.version, saved.mode),
            (Some(2), Some(ScalingMode::Scale))
        );
        assert_eq!(saved.lacks(), [""; 0]);
        // One that only checks would have saved a scale of 1.
        let check = resumed(&context, ScalingMode::CheckOnly, state)
            .state_dict()
            .unwrap();
        let scaler = resumed(&context, ScalingMode::Scale, &check);
        assert_eq!(scale_and_tracker(&scaler), (256.0, 7));
    }
    let ones = ScalerState {
        scale: Some(1.0),
        ..torch
    };
    let check = resumed(&context, ScalingMode::CheckOnly, &ones);
    assert_eq!(check.state_dict().unwrap().kept_scale, None);
    assert_eq!(check.state_dict().unwrap().growth_tracker, Some(7));
}

#[test]
fn modes_and_kept_scales_that_cannot_be_are_refused_by_name() {
    let context = context();
    let scaling = scaling_state(&context);
    let checking = resumed(&context, ScalingMode::CheckOnly, &scaling)
        .state_dict()
        .unwrap();
    let kept = |change: fn(&mut KeptScale)| {
        let mut kept = checking.kept_scale.unwrap();
        change(&mut kept);
        ScalerState {
            kept_scale: Some(kept),
            ..checking.clone()
        }
    };
    let with = |mode, scale| ScalerState {
        mode: Some(mode),
        scale: Some(scale),
        ..scaling.clone()
    };
    for (expected, state) in [
        ("mode", with(ScalingMode::Off, 1.0)),
        ("scale", with(ScalingMode::CheckOnly, 8.0)),
        (
            "kept_scale",
            ScalerState {
                kept_scale: checking.kept_scale,
                ..scaling.clone()
            },
        ),
        ("kept_scale/scale", kept(|kept| kept.scale = f64::NAN)),
        ("kept_scale/scale", kept(|kept| kept.scale = 0.0)),
        (
            "kept_scale/_growth_tracker",
            kept(|kept| kept.growth_tracker = 1 << 31),
        ),
    ] {
        for mode in [ScalingMode::Scale, ScalingMode::CheckOnly] {
            let mut scaler = new(&context, mode);
            let before = scaler.state_dict().unwrap();
            match scaler.load_state_dict(&state) {
                Err(Error::InvalidState { key, .. }) => assert_eq!(key, expected),
                other => panic!("{expected}: {other:?}"),
            }
            assert_eq!(scaler.state_dict().unwrap(), before);
        }
    }
    let read = |text| {
        serde_json::from_str::<ScalerState>(text)
            .unwrap_err()
            .to_string()
    };
    let told = read(r#"{"mode": "half"}"#);
    assert!(
        told.contains("key `mode`: unknown variant `half`"),
        "{told}"
    );
    assert!(read(r#"{"version": 3, "mode": "half"}"#).contains("version 3 is not known"));
    assert!(read(r#"{"version": 0}"#).contains("version 0 is not known"));
}

#[test]
fn the_alarm_of_a_checking_scaler_tells_the_scale_it_has() {
    let context = context();
    let config = AmpConfig {
        nan_policy: NanPolicy::ErrorAfter(1),
        alarm_interval: 1,
        ..AmpConfig::bf16()
    };
    let mut scaler = scaler_with(&context, config);
    let weight = parameter(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    set_grad(&weight, &[f32::NAN]);
    let mut step = || {
        let _ = scaler.step(&mut optimizer).unwrap();
        context.synchronize().unwrap();
        let updated = scaler.update();
        context.synchronize().unwrap();
        updated
    };
    step().unwrap();
    match step() {
        Err(Error::ScalerAlarm(alarm)) => assert_eq!(alarm.scale, 1.0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn checkpoints_carry_the_kept_scale() {
    let context = context();
    let joined = |mode| {
        let weight = parameter(&context, "w", &[1f32]);
        AmpOptimizer::new(sgd(&[&weight], 1.0), config(mode)).unwrap()
    };
    let through = |from: &AmpOptimizer<_>, into: &mut AmpOptimizer<_>| {
        let mut saved = Checkpoint::new();
        saved.add_amp_optimizer(from).unwrap();
        saved
            .restore()
            .amp_optimizer(into)
            .unwrap()
            .finish()
            .unwrap();
    };
    let mut first = joined(ScalingMode::Scale);
    first.scaler_mut().update_to(64.0).unwrap();
    let (mut check, mut off) = (joined(ScalingMode::CheckOnly), joined(ScalingMode::Off));
    let mut last = joined(ScalingMode::Scale);
    through(&first, &mut check);
    through(&check, &mut off);
    through(&off, &mut last);
    assert_eq!(last.state_dict().unwrap(), first.state_dict().unwrap());
    assert_eq!(last.scaler().get_scale().unwrap(), 64.0);
}
