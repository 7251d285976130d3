//! Every vector that PyTorch 2.15 gave for its `GradScaler`, against ours: the scale, its settings and saved states. Where we
//! differ on purpose, the test states PyTorch's result and ours.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the oracle writes f32 values as f64"
)]

use crate::support::amp::oracle::{assert_same, hex, number, numbers, oracle, to_f64};
use crate::support::amp::{context, grad, ones, scaler, set_grad, sgd};
use kitsune::amp::{
    AmpConfig, GradScaler, ScalePolicy, ScaleState, ScalerState, inverse_scale, next_scale,
};
use kitsune::{DType, Error, Tensor};
use serde_json::Value;

/// One vector of `_amp_update_scale_`: scale, tracker, flag, growth, backoff, interval.
struct Update {
    scale: f32,
    tracker: i64,
    flag: f32,
    growth: f64,
    backoff: f64,
    interval: i64,
    expected: (f32, i64),
}

fn updates() -> Vec<Update> {
    let oracle = oracle();
    let parse = |(key, result): (&String, &Value)| {
        let key: Vec<f64> = key
            .trim_matches(['(', ')'])
            .split(", ")
            .map(|field| field.parse().unwrap())
            .collect();
        Update {
            scale: key[0] as f32,
            tracker: key[1] as i64,
            flag: key[2] as f32,
            growth: key[3],
            backoff: key[4],
            interval: key[5] as i64,
            expected: (number(&result[0]) as f32, result[1].as_i64().unwrap()),
        }
    };
    let updates: Vec<_> = oracle["update"]
        .as_object()
        .unwrap()
        .iter()
        .map(parse)
        .collect();
    assert_eq!(updates.len(), 26);
    updates
}

#[test]
fn scale_updates_by_the_rule() {
    let (mut kept, mut grown, mut refused) = (0, 0, 0);
    for update in updates() {
        let Update {
            scale,
            tracker,
            flag,
            growth,
            backoff,
            interval,
            expected,
        } = update;
        let what = format!("{scale} {tracker} {flag} {growth} {backoff} {interval}");
        if interval <= 0 {
            // PyTorch takes it and never grows; it cannot be configured here.
            assert_eq!(expected, (scale, tracker + 1), "{what}");
            let growth_interval = u32::try_from(interval).unwrap_or(0);
            assert!(
                AmpConfig {
                    growth_interval,
                    ..AmpConfig::default()
                }
                .validate()
                .is_err()
            );
            refused += 1;
            continue;
        }
        let policy = ScalePolicy {
            growth_factor: growth,
            backoff_factor: backoff,
            growth_interval: u32::try_from(interval).unwrap(),
            min_scale: 0.0,
            ..ScalePolicy::default()
        };
        let state = ScaleState {
            scale,
            growth_tracker: u32::try_from(tracker).unwrap(),
            overflows: 0,
        };
        let next = next_scale(&policy, state, flag);
        let got = (next.scale, i64::from(next.growth_tracker));
        if flag == 0.0 && tracker >= interval {
            // PyTorch tests for equality: a tracker past the interval counts on, and never grows again
            // (after 2³¹ updates it wraps).
            assert_eq!(
                expected,
                (scale, i64::from((tracker as i32).wrapping_add(1))),
                "{what}"
            );
            assert_eq!(got, (scale * growth as f32, 0), "{what}");
            grown += 1;
        } else {
            let (a, b) = (f64::from(got.0), f64::from(expected.0));
            assert_same(&[a], &[b], &what);
            assert_eq!(got.1, expected.1, "{what}");
            kept += 1;
        }
    }
    assert_eq!((kept, grown, refused), (21, 3, 2));
}

#[test]
fn scale_updates_on_the_device() {
    let context = context();
    let mut run = 0;
    for update in updates() {
        let Update {
            scale,
            tracker,
            flag,
            growth,
            backoff,
            interval,
            expected,
        } = update;
        let state = ScalerState {
            scale: Some(f64::from(scale)),
            growth_factor: Some(growth),
            backoff_factor: Some(backoff),
            growth_interval: u32::try_from(interval).ok(),
            growth_tracker: u32::try_from(tracker).ok(),
            ..ScalerState::default()
        };
        let weight = ones(&context, "w", &[0f32]);
        let optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 2.0);
        let before = scaler.state_dict().unwrap();
        let loadable = interval > 0 && (f32::MIN_POSITIVE..=2f32.powi(126)).contains(&scale);
        assert_eq!(
            scaler.load_state_dict(&state).is_ok(),
            loadable,
            "{state:?}"
        );
        if !loadable {
            // PyTorch loads scales of 0, below 0, infinite and NaN. Here nothing was changed.
            assert_eq!(scaler.state_dict().unwrap(), before);
            continue;
        }
        set_grad(&weight, &[0f32]);
        scaler.unscale(&optimizer).unwrap();
        scaler
            .found_inf(&optimizer)
            .unwrap()
            .copy_from_slice(&[flag])
            .unwrap();
        scaler.update().unwrap();
        let state = scaler.state_dict().unwrap();
        if flag == 0.0 && tracker >= interval {
            let grown = f64::from(scale) * growth;
            assert_eq!((state.scale, state.growth_tracker), (Some(grown), Some(0)));
        } else {
            assert_eq!(state.scale, Some(f64::from(expected.0)));
            assert_eq!(state.growth_tracker.map(i64::from), Some(expected.1));
        }
        run += 1;
    }
    assert_eq!(run, 14);
}

#[test]
fn inverses_are_rounded_once() {
    for (scale, inverse) in oracle()["inv_scale_hex"].as_object().unwrap() {
        let scale: f64 = scale.parse().unwrap();
        let inverse = hex(inverse.as_str().unwrap());
        assert_same(
            &[f64::from(inverse_scale(scale as f32))],
            &[inverse],
            &scale.to_string(),
        );
    }
}

#[test]
fn the_scale_stops_at_its_floor() {
    // PyTorch's reaches 0 after 166 overflows, and never leaves it.
    assert_eq!(oracle()["halvings_until_zero"], 166);
    let backoffs = |min_scale: f32| {
        let policy = ScalePolicy {
            min_scale,
            ..policy(&AmpConfig::default())
        };
        let mut state = ScaleState {
            scale: 65536.0,
            growth_tracker: 0,
            overflows: 0,
        };
        let mut count = 0;
        loop {
            let next = next_scale(&policy, state, 1.0);
            if next.scale == state.scale {
                return (count, state.scale);
            }
            (state, count) = (next, count + 1);
        }
    };
    assert_eq!(backoffs(0.0), (166, 0.0));
    assert_eq!(backoffs(f32::MIN_POSITIVE), (142, f32::MIN_POSITIVE));
    assert_eq!(backoffs(1.0), (16, 1.0));
}

fn policy(config: &AmpConfig) -> ScalePolicy {
    ScalePolicy {
        growth_factor: config.growth_factor,
        backoff_factor: config.backoff_factor,
        growth_interval: config.growth_interval,
        min_scale: config.min_scale as f32,
        max_scale: config.max_scale as f32,
        ..ScalePolicy::default()
    }
}

#[test]
fn an_interval_lowered_below_the_tracker_still_grows() {
    let torch = oracle()["interval_lowered_below_tracker"].clone();
    assert!(
        torch
            .as_array()
            .unwrap()
            .iter()
            .all(|entry| entry[0] == 4.0),
        "PyTorch never grows again"
    );
    let context = context();
    let weight = ones(&context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    let lowered = ScalerState {
        growth_interval: Some(5),
        growth_tracker: Some(7),
        ..scaler.state_dict().unwrap()
    };
    scaler.load_state_dict(&lowered).unwrap();
    set_grad(&weight, &[0f32]);
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    assert_eq!(scaler.scale_factor().unwrap(), 8.0);
}

#[test]
fn scales_without_a_usable_inverse_cannot_be_set() {
    // PyTorch multiplies by 1/0 = inf, makes 0 · inf = NaN, and reports no overflow.
    let oracle = oracle();
    assert_same(
        &numbers(&oracle["unscale"]["f32_inv_inf"][0]),
        &[f64::NAN, f64::INFINITY],
        "torch",
    );
    assert_eq!(number(&oracle["unscale"]["f32_inv_inf"][1]), 0.0);
    assert_eq!(oracle["zero_scale"], "ok:([nan], 0.0)");
    assert_eq!(
        oracle["denormal_scale"],
        "ok:([nan], 1.401298464324817e-45, inf)"
    );
    let context = context();
    let mut scaler = scaler(&context, 4.0);
    for scale in [0.0, 2f64.powi(-149), -1.0, f64::NAN, f64::INFINITY] {
        assert!(
            GradScaler::new(
                &context,
                AmpConfig {
                    init_scale: scale,
                    ..AmpConfig::default()
                }
            )
            .is_err()
        );
        assert!(scaler.update_to(scale).is_err());
    }
    assert_eq!(scaler.scale_factor().unwrap(), 4.0);
}

#[test]
fn a_new_scale_keeps_the_tracker() {
    let oracle = oracle();
    assert_eq!(
        oracle["new_scale"],
        "ok:(3, (7.5, 3), [0.03333333507180214, 0.03333333507180214, 0.03333333507180214])"
    );
    assert_eq!(oracle["new_scale_tensor_is_copied"], "ok:16.0");
    let context = context();
    let weight = ones(&context, "w", &[0f32; 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    for _ in 0..3 {
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    }
    assert_eq!(scaler.state_dict().unwrap().growth_tracker, Some(3));
    set_grad(&weight, &[1f32; 3]);
    scaler.unscale(&optimizer).unwrap();
    scaler.update_to(7.5).unwrap();
    let state = scaler.state_dict().unwrap();
    assert_eq!((state.scale, state.growth_tracker), (Some(7.5), Some(3)));
    // Unscaling the same gradient again is allowed now: 1 / 4 / 7.5.
    scaler.unscale(&optimizer).unwrap();
    assert_same(
        &to_f64(&grad::<f32>(&weight)),
        &[0.033_333_335_071_802_14; 3],
        "grad",
    );
}

#[test]
fn settings_that_cannot_work_are_refused() {
    type Change = fn(&mut AmpConfig);
    let oracle = oracle();
    let torch = |key: &str| oracle["errors"][key].as_str().unwrap().starts_with("ok:");
    let cases: [(&str, Change); 9] = [
        ("growth_1.0", |config| config.growth_factor = 1.0),
        ("growth_nan", |config| config.growth_factor = f64::NAN),
        ("backoff_1.0", |config| config.backoff_factor = 1.0),
        ("backoff_0", |config| config.backoff_factor = 0.0),
        ("backoff_neg", |config| config.backoff_factor = -0.5),
        ("init_scale_0", |config| config.init_scale = 0.0),
        ("init_scale_neg", |config| config.init_scale = -8.0),
        ("init_nan", |config| config.init_scale = f64::NAN),
        ("interval_0", |config| config.growth_interval = 0),
    ];
    for (key, change) in cases {
        let mut config = AmpConfig::default();
        change(&mut config);
        assert!(config.validate().is_err(), "{key}");
        // PyTorch refuses these two only.
        assert_eq!(
            torch(key),
            !["growth_1.0", "backoff_1.0"].contains(&key),
            "{key}"
        );
    }
    assert!(torch("interval_neg"), "which cannot even be written here");
    assert!(serde_json::from_str::<AmpConfig>(r#"{"growth_interval": -1}"#).is_err());
}

#[test]
fn saved_states_are_taken_whole_or_not_at_all() {
    let oracle = oracle();
    let says =
        |key: &str, text: &str| assert!(oracle["errors"][key].as_str().unwrap().contains(text));
    let context = context();
    let mut scaler = scaler(&context, 3.0);
    assert_eq!(oracle["scale_get_before_init"], 3.0);
    assert_eq!(scaler.get_scale().unwrap(), 3.0);
    let before = scaler.state_dict().unwrap();
    says("load_empty", "source state dict is empty");
    assert!(scaler.load_state_dict(&ScalerState::default()).is_err());
    // PyTorch has by then taken over the keys that come first.
    says("load_missing_key", "growth_factor");
    let partial = ScalerState {
        scale: Some(8.0),
        ..ScalerState::default()
    };
    let refused = scaler.load_state_dict(&partial);
    assert!(
        matches!(&refused, Err(Error::InvalidState { key, .. }) if key == "growth_factor"),
        "{refused:?}"
    );
    assert_eq!(scaler.state_dict().unwrap(), before);

    let disabled = AmpConfig {
        enabled: false,
        ..AmpConfig::default()
    };
    let mut disabled = GradScaler::new(&context, disabled).unwrap();
    assert_eq!(oracle["errors"]["disabled_state"], "{}");
    assert_eq!(
        serde_json::to_string(&disabled.state_dict().unwrap()).unwrap(),
        "{}"
    );
    assert_eq!(oracle["errors"]["load_into_disabled"], "ok:None");
    disabled.load_state_dict(&before).unwrap();
    // PyTorch forgets it.
    assert_eq!(disabled.state_dict().unwrap(), before);
    assert_eq!(oracle["errors"]["disabled_get_scale"], "1.0");
    assert_eq!(disabled.get_scale().unwrap(), 1.0);
    // PyTorch: AttributeError.
    says("disabled_get_growth_factor", "AttributeError");
    assert_eq!(disabled.growth_factor(), 2.0);
}

#[test]
fn losses_scale_to_f32() {
    let vectors = &oracle()["scale_dtype"];
    let context = context();
    let scaler = scaler(&context, 65536.0);
    let dtype = |name: &str| match vectors[name][0].as_str().unwrap() {
        "torch.float32" => DType::F32,
        "torch.float64" => DType::F64,
        other => panic!("{other}"),
    };
    for (name, input, factor) in [
        ("f16_0d", DType::F16, 1.0),
        ("bf16_0d", DType::Bf16, 1.0),
        ("f64_0d", DType::F64, 1.0),
        ("f32_0d", DType::F32, 2.0),
    ] {
        let scaled = scaler
            .scale(&Tensor::full(&context, [], input, factor).unwrap())
            .unwrap();
        assert_eq!(scaled.dtype(), dtype(name), "{name}");
        let scaled = scaled.cast(DType::F64).unwrap().item::<f64>().unwrap();
        assert_eq!(scaled, number(&vectors[name][1]), "{name}");
    }
    // PyTorch keeps 16 bits from one dimension on, where f16 overflows.
    assert_eq!(number(&vectors["f16_1d"][1]), f64::INFINITY);
    for (name, dtype) in [("f16_1d", DType::F16), ("bf16_1d", DType::Bf16)] {
        assert!(vectors[name][0].as_str().unwrap().ends_with("16"));
        let scaled = scaler
            .scale(&Tensor::full(&context, [1], dtype, 1.0).unwrap())
            .unwrap();
        assert_eq!(
            (scaled.dtype(), scaled.item::<f32>().unwrap()),
            (DType::F32, 65536.0)
        );
    }
    // PyTorch makes integers f32. A loss that is an integer is a mistake.
    assert_eq!(vectors["i32_0d"][0], "torch.float32");
    let integer = Tensor::full(&context, [], DType::U32, 3.0).unwrap();
    assert!(matches!(
        scaler.scale(&integer),
        Err(Error::UnsupportedDtype { .. })
    ));
}
