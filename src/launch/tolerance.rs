//! Defines how far a kernel's result may be from its reference.

use crate::dtype::DType;

/// Whether `actual`, of type `dtype`, is within `absolute + epsilon(dtype) · |reference|` of `reference`. Infinities
/// must have the same sign, and NaN matches only NaN.
pub(super) fn is_close(dtype: DType, absolute: f64, actual: f64, reference: f64) -> bool {
    if !actual.is_finite() || !reference.is_finite() {
        return actual == reference || actual.is_nan() && reference.is_nan();
    }
    (actual - reference).abs() <= absolute + dtype.epsilon() * reference.abs()
}

/// Panics at the first element that is not [close](is_close).
#[track_caller]
pub(super) fn assert_close(dtype: DType, absolute: f64, actual: &[f64], reference: &[f64]) {
    assert_eq!(actual.len(), reference.len());
    for (idx, (actual, reference)) in actual.iter().zip(reference).enumerate() {
        assert!(
            is_close(dtype, absolute, *actual, *reference),
            "{dtype} element {idx} is {actual:e}, not {reference:e}"
        );
    }
}

/// Panics at the first element that differs. NaN equals NaN.
#[track_caller]
pub(super) fn assert_same(what: &str, actual: &[f64], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    for (idx, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let same = actual == expected || actual.is_nan() && expected.is_nan();
        assert!(
            same,
            "{what}: element {idx} is {actual:e}, not {expected:e}"
        );
    }
}
