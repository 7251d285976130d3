//! Checks the update rule against other libraries' arithmetic, and how histories change.

use super::*;
use crate::dtype::Element;
use crate::launch::testing::{Array, numbers, run};
use crate::launch::tolerance::assert_same;

const DELAYED: Fp8Policy = Fp8Policy {
    source: AmaxSource::History(AmaxAlgorithm::Max),
    margin: 0,
    power_of_two: false,
};

const INF: f64 = f64::INFINITY;
const NAN: f64 = f64::NAN;

/// Scale, history and counts of one tensor after an update.
fn updated(policy: Fp8Policy, scale: f64, history: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let scales = Array::new(DType::F32, &[scale]);
    let largest = Array::new(DType::F32, &[448.0]);
    let row = Array::new(DType::F32, history);
    let counts = Array::new(DType::F64, &[0.0; FP8_COUNTS]);
    run(&Fp8Update {
        operands: Fp8Operands {
            scales: scales.span(),
            largest: largest.span(),
            history: row.span(),
            counts: counts.span(),
            length: history.len(),
        },
        policy,
    });
    (scales.values()[0], row.values(), counts.values())
}

#[test]
fn the_quotient_is_rounded_once() {
    for amax in numbers(3, 2000, 1000.0) {
        let amax = <f32 as Element>::from_f64(amax.abs());
        for (largest, margin) in [(448.0f32, 0), (57344.0, 0), (448.0, 2)] {
            let policy = Fp8Policy { margin, ..DELAYED };
            // In f32 like other libraries: the division rounds once, and the power of two is exact.
            let expected = largest / amax / [1.0, 2.0, 4.0][margin as usize];
            let scale = next_fp8_scale(&policy, largest, amax);
            assert_eq!(scale, expected, "{largest} {amax} {margin}");
            let floored = Fp8Policy {
                power_of_two: true,
                ..policy
            };
            let expected = 2f64.powf(f64::from(scale).log2().floor());
            let scale = next_fp8_scale(&floored, largest, amax);
            assert_eq!(f64::from(scale), expected, "{largest} {amax} {margin}");
        }
    }
}

#[test]
fn scales_stay_normal() {
    let floored = Fp8Policy {
        power_of_two: true,
        ..DELAYED
    };
    let wide = Fp8Policy {
        margin: 64,
        ..DELAYED
    };
    assert_eq!(next_fp8_scale(&DELAYED, 448.0, 1e-40), f32::MAX);
    assert_eq!(next_fp8_scale(&floored, 448.0, 1e-40), 2f32.powi(127));
    assert_eq!(next_fp8_scale(&wide, 448.0, 3e38), f32::MIN_POSITIVE);
    assert_eq!(next_fp8_scale(&floored, 448.0, 448.0), 1.0);
}

#[test]
fn histories_roll_and_the_running_one_begins_anew() {
    let (scale, row, counts) = updated(DELAYED, 1.0, &[2.0, 8.0, 3.0, 4.0]);
    assert_eq!((scale, row), (56.0, vec![0.0, 3.0, 4.0, 2.0]));
    assert_eq!(counts[UPDATES..], [1.0, 0.0, 2.0]);
    let recent = Fp8Policy {
        source: AmaxSource::History(AmaxAlgorithm::MostRecent),
        ..DELAYED
    };
    let (scale, row, _) = updated(recent, 1.0, &[2.0, 8.0, 3.0, 4.0]);
    assert_eq!((scale, row), (224.0, vec![0.0, 3.0, 4.0, 2.0]));
    let (scale, row, _) = updated(DELAYED, 1.0, &[2.0]);
    assert_eq!((scale, row), (224.0, vec![0.0]));
}

#[test]
fn what_tells_nothing_changes_nothing() {
    for amax in [0.0, INF, NAN] {
        let (scale, row, counts) = updated(DELAYED, 7.0, &[amax, 8.0, 3.0]);
        assert_eq!((scale, row), (7.0, vec![0.0, 8.0, 3.0]), "{amax}");
        let not_finite = f64::from(u8::from(!amax.is_finite()));
        assert_same("counts", &counts[UPDATES..], &[1.0, not_finite, amax]);
    }
}

#[test]
fn without_history() {
    let current = |epsilon| Fp8Policy {
        source: AmaxSource::Current { epsilon },
        ..DELAYED
    };
    for (epsilon, amax, expected) in [
        (0.0, 2.0, 224.0),
        (4.0, 2.0, 112.0),
        (0.0, 0.0, 1.0),
        (4.0, 0.0, 112.0),
        (4.0, INF, 1.0),
        (4.0, NAN, 1.0),
    ] {
        let (scale, row, _) = updated(current(epsilon), 7.0, &[amax]);
        assert_eq!((scale, row), (expected, vec![0.0]), "{epsilon} {amax}");
    }
}
