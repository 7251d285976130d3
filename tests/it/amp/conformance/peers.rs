//! Cases 58 to 64: what other libraries do with the scale.

use kitsune::amp::{AlarmKind, AmpConfig, GradScaler, NanPolicy, ScaleProfile, ScalingMode};
use kitsune::optim::{Parameter, Sgd};
use kitsune::{Context, DType, Error, f16};

use super::{config, scale_and_tracker};
use crate::support::amp::{context, ones, scaler_with, set_grad, sgd, value};

/// A scaler, and one weight whose gradient it sees.
struct Run {
    scaler: GradScaler,
    weight: Parameter,
    optimizer: Sgd,
}

impl Run {
    fn new(context: &Context, config: AmpConfig) -> Self {
        let weight = ones(context, "w", &[0f32]);
        Self {
            scaler: scaler_with(context, config),
            optimizer: sgd(&[&weight], 1.0),
            weight,
        }
    }

    /// One step with this gradient; whether it was applied, and the scale after it.
    fn step(&mut self, gradient: f32) -> (bool, f64) {
        set_grad(&self.weight, &[gradient]);
        let outcome = self.scaler.step(&mut self.optimizer).unwrap();
        self.scaler.update().unwrap();
        (
            outcome.is_applied().unwrap(),
            self.scaler.get_scale().unwrap(),
        )
    }

    fn scales(&mut self, gradients: &[f32]) -> Vec<f64> {
        gradients
            .iter()
            .map(|gradient| self.step(*gradient).1)
            .collect()
    }
}

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

#[test]
fn case_58_ds_all_overflow() {
    let context = context();
    for (floor, expected) in [
        (1.0, [8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (2.0, [8.0, 4.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]),
    ] {
        let config = AmpConfig {
            min_scale: floor,
            hysteresis: 1,
            ..AmpConfig {
                init_scale: 16.0,
                ..ScaleProfile::DeepSpeed.config()
            }
        };
        let mut run = Run::new(&context, config);
        let gradients = [INF, -INF, NAN, INF, -INF, NAN, INF, NAN];
        assert_eq!(run.scales(&gradients), expected);
        // DeepSpeed raises at the floor if told to. Here it is an error that can be asked for.
        let alarm = run.scaler.alarm().unwrap().unwrap();
        assert_eq!((alarm.kind, alarm.scale), (AlarmKind::AtFloor, floor));
        assert_eq!((alarm.last_good_scale, alarm.skipped_in_a_row), (None, 8));
    }
}

#[test]
fn case_59_ds_some_overflow() {
    let context = context();
    let config = AmpConfig {
        init_scale: 256.0,
        growth_interval: 2,
        hysteresis: 1,
        ..ScaleProfile::DeepSpeed.config()
    };
    let scales = Run::new(&context, config).scales(&[INF, NAN, 0.0, 0.0, 0.0, INF]);
    assert_eq!([scales[1], scales[4], scales[5]], [64.0, 128.0, 64.0]);
}

#[test]
fn case_60_ds_bf16_check_ignore() {
    let context = context();
    let mut check = Run::new(&context, AmpConfig::bf16());
    for skipped in 1..=3 {
        assert_eq!(check.step(INF), (false, 1.0));
        assert_eq!(check.scaler.stats().unwrap().skipped, skipped);
    }
    assert_eq!(check.step(2.0), (true, 1.0));
    assert_eq!(
        (value::<f32>(&check.weight), check.scaler.tag()),
        (vec![-1.0], None)
    );
    // A scale does not move it, and its floor is no alarm.
    check.scaler.update_to(8.0).unwrap();
    let f16 = scaler_with(&context, config(256.0, 2000))
        .state_dict()
        .unwrap();
    check.scaler.load_state_dict(&f16).unwrap();
    assert_eq!(check.scaler.get_scale().unwrap(), 1.0);
    check.step(INF);
    assert_eq!(check.scaler.alarm().unwrap(), None);

    let ignore = AmpConfig {
        mode: ScalingMode::Off,
        ..AmpConfig::bf16()
    };
    let mut ignore = Run::new(&context, ignore);
    assert_eq!(ignore.step(INF), (true, 1.0));
    assert_eq!(ignore.scaler.stats().unwrap().skipped, 0);
    // By the device's abilities: bf16 without scaling where it is native.
    let chosen = AmpConfig::for_device(context.device());
    assert_eq!(
        (chosen.dtype, chosen.mode),
        (DType::Bf16, ScalingMode::CheckOnly)
    );
}

#[test]
fn case_61_jmp_grow() {
    let context = context();
    let mut run = Run::new(&context, config(10.0, 20));
    for count in 1..20 {
        run.step(0.0);
        assert_eq!(scale_and_tracker(&run.scaler), (10.0, count));
    }
    run.step(0.0);
    assert_eq!(scale_and_tracker(&run.scaler), (20.0, 0));
}

#[test]
fn case_62_jmp_floor() {
    let context = context();
    // jmp takes a floor of 0. Here the scale keeps a normal inverse.
    assert!(
        AmpConfig {
            min_scale: 0.0,
            ..AmpConfig::default()
        }
        .validate()
        .is_err()
    );
    for floor in [0.3125, 1.0, AmpConfig::default().min_scale] {
        let config = AmpConfig {
            min_scale: floor,
            alarm_interval: 0,
            ..config(10.0, 20)
        };
        let mut run = Run::new(&context, config);
        for overflows in 1..=100 {
            let expected = (10.0 * 0.5f64.powi(overflows)).max(floor);
            assert_eq!(run.step(INF).1, expected, "{floor} {overflows}");
        }
    }
}

#[test]
fn case_63_consecutive_cap() {
    // optax skips two in a row, and takes the third, NaN and all. Here it is skipped, too, and an error.
    let context = context();
    let config = AmpConfig {
        nan_policy: NanPolicy::ErrorAfter(3),
        alarm_interval: 1,
        ..config(64.0, 2000)
    };
    let mut run = Run::new(&context, config);
    let applied = [1.0, NAN, NAN, 1.0, NAN, NAN].map(|gradient| run.step(gradient).0);
    assert_eq!(applied, [true, false, false, true, false, false]);
    assert_eq!(run.scaler.alarm().unwrap(), None);
    let before = value::<f32>(&run.weight);
    assert!(!run.step(NAN).0);
    assert_eq!(value::<f32>(&run.weight), before);
    assert_eq!(run.scaler.stats().unwrap().nan_steps, 5);
    let kind = AlarmKind::NaN { in_a_row: 3 };
    let alarm = run.scaler.alarm().unwrap().unwrap();
    assert_eq!((alarm.kind, alarm.last_good_scale), (kind, Some(16.0)));
    // Updates tell it a little later, without ever waiting: the counters they asked for have arrived by now.
    let _ = run.scaler.step(&mut run.optimizer).unwrap();
    match run.scaler.update() {
        Err(Error::ScalerAlarm(told)) => assert_eq!(told.kind, kind),
        other => panic!("{other:?}"),
    }
}

/// The flags of the traces: 1 for an overflow.
const FLAGS: [u8; 19] = [0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0];

#[test]
fn case_64_hysteresis_traces() {
    let context = context();
    let deepspeed = |hysteresis| AmpConfig {
        hysteresis,
        ..ScaleProfile::DeepSpeed.config()
    };
    let traces: [(AmpConfig, [u16; 19]); 5] = [
        (
            ScaleProfile::Torch.config(),
            [
                256, 256, 512, 512, 256, 128, 128, 64, 64, 64, 128, 128, 128, 256, 256, 128, 64,
                32, 32,
            ],
        ),
        (
            ScaleProfile::ApexHysteresis.config(),
            [
                256, 256, 512, 512, 512, 256, 256, 256, 256, 256, 512, 512, 512, 1024, 1024, 1024,
                512, 256, 256,
            ],
        ),
        (
            ScaleProfile::Megatron.config(),
            [
                256, 256, 512, 512, 512, 256, 256, 128, 128, 128, 256, 256, 256, 512, 512, 512,
                256, 128, 128,
            ],
        ),
        (
            deepspeed(1),
            [
                256, 256, 256, 512, 256, 128, 128, 64, 64, 64, 64, 128, 128, 128, 256, 128, 64, 32,
                32,
            ],
        ),
        (
            deepspeed(2),
            [
                256, 256, 256, 512, 512, 256, 256, 128, 128, 128, 128, 256, 256, 256, 512, 512,
                256, 128, 128,
            ],
        ),
    ];
    for (profile, expected) in traces {
        let config = AmpConfig {
            init_scale: 256.0,
            growth_interval: 3,
            ..profile
        };
        let gradients = FLAGS.map(|flag| if flag == 1 { INF } else { 0.0 });
        let scales = Run::new(&context, config.clone()).scales(&gradients);
        assert_eq!(scales, expected.map(f64::from), "{config:?}");
    }
    // A tolerated overflow is not forgotten by saving.
    let config = AmpConfig {
        init_scale: 256.0,
        ..ScaleProfile::Megatron.config()
    };
    let mut first = Run::new(&context, config);
    first.scales(&[INF, 0.0]);
    let state = first.scaler.state_dict().unwrap();
    let mut second = Run::new(&context, AmpConfig::default());
    second.scaler.load_state_dict(&state).unwrap();
    assert_eq!(second.step(INF).1, 128.0);
}

#[test]
fn nan_can_be_ignored() {
    let context = context();
    let config = AmpConfig {
        nan_policy: NanPolicy::Ignore,
        ..config(64.0, 3)
    };
    let mut run = Run::new(&context, config);
    assert_eq!(
        [0.0, 0.0].map(|gradient| run.step(gradient)),
        [(true, 64.0); 2]
    );
    // Skipped, and neither backed off nor counted as clean.
    assert_eq!(
        [NAN, NAN].map(|gradient| run.step(gradient)),
        [(false, 64.0); 2]
    );
    assert_eq!(scale_and_tracker(&run.scaler), (64.0, 2));
    assert_eq!(run.step(0.0), (true, 128.0));
    // An infinity backs off, also beside NaN.
    assert_eq!(run.step(INF), (false, 64.0));
    run.weight.zero_grad();
    let mixed = ones(&context, "mixed", &[f16::NAN, f16::INFINITY]);
    let _ = run.scaler.step(&mut sgd(&[&mixed], 1.0)).unwrap();
    run.scaler.update().unwrap();
    assert_eq!(run.scaler.get_scale().unwrap(), 32.0);
}

#[test]
fn a_storm_of_skips_is_an_alarm_and_calibration_is_not() {
    let context = context();
    let config = AmpConfig {
        alarm_interval: 0,
        ..config(2f64.powi(32), 2000)
    };
    let mut run = Run::new(&context, config);
    // Finding the scale takes as long as it takes.
    run.scales(&[INF; 20]);
    assert_eq!(run.scaler.alarm().unwrap(), None);
    run.step(0.0);
    let good = run.scaler.get_scale().unwrap();
    // Every second step: half of the last 32.
    for round in 0..16 {
        assert_eq!(run.scaler.alarm().unwrap(), None, "{round}");
        run.scales(&[0.0, INF]);
    }
    let alarm = run.scaler.alarm().unwrap().unwrap();
    let kind = AlarmKind::SkipStorm {
        skipped: 16,
        of: 32,
    };
    assert_eq!(
        (alarm.kind, alarm.last_good_scale),
        (kind, Some(good / 2f64.powi(15)))
    );
    assert_eq!(run.scaler.stats().unwrap().alarm, Some(alarm));
    assert!(
        alarm
            .to_string()
            .starts_with("16 of the last 32 steps were skipped")
    );
    // Whoever sets a scale calibrates anew.
    run.scaler.update_to(1024.0).unwrap();
    assert_eq!(run.scaler.alarm().unwrap(), None);
}
