//! Cases 25 to 30: scaling losses, and saved states.

use kitsune::amp::{AmpConfig, GradScaler, ScalerState};
use kitsune::{DType, Error, Tensor};

use super::{config, scale_and_tracker};
use crate::support::amp::oracle::{number, oracle};
use crate::support::amp::{context, scaler, scaler_with, tensor};

#[test]
fn case_25_scale_nested() {
    let context = context();
    let scaler = scaler(&context, 2.0);
    let four = || Tensor::full(&context, [], DType::F32, 4.0).unwrap();
    let nested = (four(), (four(), four()), vec![(four(), (four(), four()))]);
    let (a, (b, c), list) = scaler.scale(&nested).unwrap();
    let (d, (e, f)) = &list[0];
    for scaled in [&a, &b, &c, d, e, f] {
        assert_eq!(scaled.item::<f32>().unwrap(), 8.0);
    }
    assert_eq!(
        nested.0.item::<f32>().unwrap(),
        4.0,
        "the argument is untouched"
    );
}

#[test]
fn case_26_scale_f16_1d() {
    // PyTorch keeps f16 from one dimension on.
    assert_eq!(number(&oracle()["scale_dtype"]["f16_1d"][1]), f64::INFINITY);
    let context = context();
    let loss = Tensor::full(&context, [1], DType::F16, 1.0).unwrap();
    let scaled = scaler(&context, 65536.0).scale(&loss).unwrap();
    assert_eq!(
        (scaled.dtype(), scaled.item::<f32>().unwrap()),
        (DType::F32, 65536.0)
    );
}

fn three() -> AmpConfig {
    AmpConfig {
        growth_factor: 4.0,
        backoff_factor: 0.5,
        ..config(3.0, 2)
    }
}

#[test]
fn case_27_state_roundtrip() {
    let context = context();
    let other = AmpConfig {
        growth_factor: 7.0,
        backoff_factor: 0.8,
        ..config(6.0, 1)
    };
    // PyTorch makes the scale at the first loss; here it is there from the start.
    for was_used in [true, false] {
        let make = |config| match was_used {
            true => scaler_with(&context, config),
            false => GradScaler::new(&context, config).unwrap(),
        };
        let (from, mut into) = (make(three()), make(other.clone()));
        into.load_state_dict(&from.state_dict().unwrap()).unwrap();
        let factors = (
            into.growth_factor(),
            into.backoff_factor(),
            into.growth_interval(),
        );
        assert_eq!(factors, (4.0, 0.5, 2));
        assert_eq!(scale_and_tracker(&into), (3.0, 0));
        // A tracker that is not 0 comes along, too.
        let later = ScalerState {
            growth_tracker: Some(1),
            ..from.state_dict().unwrap()
        };
        into.load_state_dict(&later).unwrap();
        assert_eq!(scale_and_tracker(&into), (3.0, 1));
        assert_eq!(into.state_dict().unwrap(), later);
    }
}

#[test]
fn case_28_pickle_like_roundtrip() {
    let context = context();
    let text =
        serde_json::to_string(&scaler_with(&context, three()).state_dict().unwrap()).unwrap();
    let mut into = GradScaler::new(&context, AmpConfig::default()).unwrap();
    into.load_state_dict(&serde_json::from_str(&text).unwrap())
        .unwrap();
    let scaled = into.scale(&tensor(&context, &[4f32])).unwrap();
    assert_eq!(scaled.item::<f32>().unwrap(), 12.0);
}

#[test]
fn case_29_load_empty() {
    let context = context();
    let empty = ScalerState::default();
    let refused = scaler(&context, 3.0).load_state_dict(&empty);
    assert!(matches!(refused, Err(Error::InvalidState { .. })));
    let disabled = AmpConfig {
        enabled: false,
        ..AmpConfig::default()
    };
    let mut disabled = GradScaler::new(&context, disabled).unwrap();
    disabled.load_state_dict(&empty).unwrap();
}

#[test]
fn case_30_load_invalid() {
    // PyTorch loads all of these.
    let context = context();
    let mut scaler = scaler(&context, 8.0);
    let good = scaler.state_dict().unwrap();
    let with = |change: fn(&mut ScalerState)| {
        let mut state = good.clone();
        change(&mut state);
        state
    };
    for (key, state) in [
        ("scale", with(|state| state.scale = Some(-5.0))),
        (
            "growth_factor",
            with(|state| state.growth_factor = Some(0.5)),
        ),
        (
            "backoff_factor",
            with(|state| state.backoff_factor = Some(9.0)),
        ),
        ("hysteresis", with(|state| state.hysteresis = Some(0))),
    ] {
        match scaler.load_state_dict(&state) {
            Err(Error::InvalidState { key: named, .. }) => assert_eq!(named, key),
            other => panic!("{key}: {other:?}"),
        }
        assert_eq!(scaler.state_dict().unwrap(), good, "{key}");
    }
    // A later version is named before its keys are complained about.
    let read = |text| {
        serde_json::from_str::<ScalerState>(text)
            .unwrap_err()
            .to_string()
    };
    assert!(read(r#"{"version": 9, "scales": [1.0]}"#).contains("version 9"));
    assert!(read(r#"{"version": 9, "scale": "high", "refill": 7}"#).contains("version 9"));
    assert!(read(r#"{"version": "2b", "scale": 1.0}"#).contains("version \"2b\" is not known"));
    // Of this version, the key that cannot be is named.
    assert!(read(r#"{"version": 1, "scales": [1.0]}"#).contains("unknown field `scales`"));
    let told = read(r#"{"version": 1, "scale": 2.0, "growth_factor": "two"}"#);
    assert!(told.contains("key `growth_factor`: invalid type"), "{told}");
    let told = read(r#"{"_growth_tracker": -1}"#);
    assert!(
        told.contains("key `_growth_tracker`: invalid value"),
        "{told}"
    );
}
