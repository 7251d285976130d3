//! Reading the oracle: what PyTorch 2.15 gave, in `tests/data/amp-oracle.json`.
#![allow(
    clippy::cast_possible_truncation,
    reason = "the oracle writes f32 values as f64"
)]

use kitsune::error::ScalerMisuse;
use kitsune::{Element, Error};
use serde_json::Value;

pub fn oracle() -> Value {
    serde_json::from_str(include_str!("../../../data/amp-oracle.json")).unwrap()
}

/// A number as the oracle writes it.
pub fn number(value: &Value) -> f64 {
    match value.as_str() {
        Some("inf") => f64::INFINITY,
        Some("-inf") => f64::NEG_INFINITY,
        Some("nan") => f64::NAN,
        Some(other) => panic!("{other}"),
        None => exact(value.as_f64().unwrap()),
    }
}

/// The f32 that was meant: reading JSON may be wrong in the last bit of an f64.
pub fn exact(value: f64) -> f64 {
    let narrow = f64::from(value as f32);
    if (narrow - value).abs() <= 4.0 * f64::EPSILON * value.abs() {
        narrow
    } else {
        value
    }
}

pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(number).collect()
}

/// Equal to the bit, NaN being equal to NaN.
pub fn assert_same(got: &[f64], expected: &[f64], what: &str) {
    let same = got.len() == expected.len()
        && got
            .iter()
            .zip(expected)
            .all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan());
    assert!(same, "{what}: {got:?}, expected {expected:?}");
}

pub fn to_f64<T: Element>(values: &[T]) -> Vec<f64> {
    values.iter().map(|value| value.to_f64()).collect()
}

/// A number as Python's `float.hex` writes it.
pub fn hex(text: &str) -> f64 {
    let Some(digits) = text.strip_prefix("0x1.") else {
        assert_eq!(text, "inf");
        return f64::INFINITY;
    };
    let (fraction, exponent) = digits.split_once('p').unwrap();
    let bits = u64::from_str_radix(fraction, 16).unwrap();
    let fraction = 1.0 + bits as f64 / 16f64.powi(i32::try_from(fraction.len()).unwrap());
    fraction * 2f64.powi(exponent.parse().unwrap())
}

pub fn misuse<T: std::fmt::Debug>(result: kitsune::Result<T>) -> ScalerMisuse {
    match result {
        Err(Error::Scaler(misuse)) => misuse,
        other => panic!("{other:?}"),
    }
}
