//! Clipping at every magnitude: clipped gradients are right wherever the norm can be told, in place, within a step,
//! and in every type; at ordinary limits they have PyTorch's bits.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "gradients are rounded to their types"
)]

use crate::support::amp::oracle::to_f64;
use crate::support::amp::{context, grad, parameter, scaler, set_grad, sgd, tensor, value};
use kitsune::optim::{
    Adam, AdamConfig, NormKind, Optimizer, Parameter, Sgd, StepInputs, clip_grad_norm,
};
use kitsune::{Context, DType, Element, Error, Tensor, bf16, f16};

/// What is left of `gradients` after clipping in place.
fn in_place<T: Element>(
    context: &Context,
    gradients: &[T],
    limit: f64,
    kind: NormKind,
) -> (f64, Vec<f64>) {
    let weight = parameter(context, "w", &vec![T::from_f64(0.0); gradients.len()]);
    set_grad(&weight, gradients);
    let norm = clip_grad_norm(context, std::slice::from_ref(&weight), limit, kind).unwrap();
    (norm.item().unwrap(), to_f64(&grad::<T>(&weight)))
}

/// By what a step moves weights of 0, downwards, whose gradients are `gradients` and clipped as the step reads them,
/// under a loss scale. `None` if the step is skipped.
fn within_a_step<T: Element>(
    context: &Context,
    gradients: &[T],
    limit: f64,
    kind: NormKind,
    scale: f64,
) -> Option<Vec<f64>> {
    let weight = parameter(context, "w", &vec![T::from_f64(0.0); gradients.len()]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(context, scale);
    set_grad(&weight, gradients);
    scaler.clip_grad_norm_by(&optimizer, limit, kind).unwrap();
    let outcome = scaler.step(&mut optimizer).unwrap();
    let moved = value::<T>(&weight).into_iter().map(|one| -one.to_f64());
    outcome.is_applied().unwrap().then(|| moved.collect())
}

/// The norm of `gradients`, without squares that could overflow or vanish.
fn norm_of(gradients: &[f64], kind: NormKind) -> f64 {
    let largest = gradients
        .iter()
        .fold(0.0, |max, one| f64::max(max, one.abs()));
    let shares = || gradients.iter().map(|one| one.abs() / largest);
    match kind {
        _ if largest == 0.0 => 0.0,
        NormKind::L1 => largest * shares().sum::<f64>(),
        NormKind::L2 => largest * shares().map(|one| one * one).sum::<f64>().sqrt(),
        NormKind::Max => largest,
    }
}

/// Asserts that `clipped` is `gradients` brought to `limit`: to `units` roundings, and to what PyTorch's epsilon takes
/// from ordinary limits.
#[track_caller]
fn assert_clipped<T: Element>(
    what: &str,
    gradients: &[f64],
    clipped: &[f64],
    limit: f64,
    kind: NormKind,
    smallest: f64,
) {
    let norm = norm_of(gradients, kind);
    let by_epsilon = if limit >= 0.1 { 1e-6 / limit } else { 0.0 };
    for (gradient, clipped) in gradients.iter().zip(clipped) {
        // Divided first: neither the product nor the quotient of norm and limit need be in range.
        let right = if norm > limit {
            gradient / norm * limit
        } else {
            *gradient
        };
        let bound = (by_epsilon + 3.0 * T::DTYPE.epsilon()) * right.abs() + smallest;
        assert!(
            (clipped - right).abs() <= bound,
            "{what}: {gradient:e} became {clipped:e}, not {right:e}"
        );
    }
}

const KINDS: [NormKind; 3] = [NormKind::L1, NormKind::L2, NormKind::Max];

#[test]
fn f64_gradients_that_no_f32_holds_are_clipped() {
    let context = context();
    let gradients = [3e60, 4e60];
    let (norm, clipped) = in_place(&context, &gradients, 1.0, NormKind::L2);
    assert!((norm / 5e60 - 1.0).abs() < 1e-15, "{norm:e}");
    let moved = within_a_step(&context, &gradients, 1.0, NormKind::L2, 1024.0).unwrap();
    for clipped in [clipped, moved] {
        assert!((clipped[0] - 0.6).abs() < 1e-15, "{clipped:?}");
        assert!((clipped[1] - 0.8).abs() < 1e-15, "{clipped:?}");
    }
    // In place after `unscale`, and then a step.
    let weight = parameter(&context, "w", &[0f64; 2]);
    let mut optimizer = Adam::new(vec![weight.clone()], AdamConfig::default()).unwrap();
    let mut scaler = scaler(&context, 1024.0);
    set_grad(&weight, &gradients.map(|one| one * 1024.0));
    scaler.unscale(&optimizer).unwrap();
    scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
    let _ = scaler.step(&mut optimizer).unwrap();
    let clipped = grad::<f64>(&weight);
    assert!((clipped[0] - 0.6).abs() < 1e-15, "{clipped:?}");
    let first = optimizer.first_moment(0).unwrap().to_vec::<f64>().unwrap();
    assert!((first[1] - 0.08).abs() < 1e-15, "{first:?}");
}

#[test]
fn small_limits_are_kept() {
    let context = context();
    for exponent in 2..=40 {
        let limit = 10f64.powi(-exponent);
        for times in [1.5, 1e4] {
            let gradients = [0.6 * times * limit, -0.8 * times * limit];
            for kind in KINDS {
                let narrow = gradients.map(|one| one as f32);
                let (_, clipped) = in_place(&context, &narrow, limit, kind);
                let what = format!("{limit:e}, {kind:?}");
                let smallest = f64::from(f32::from_bits(1));
                assert_clipped::<f32>(&what, &to_f64(&narrow), &clipped, limit, kind, smallest);
                let (_, clipped) = in_place(&context, &gradients, limit, kind);
                assert_clipped::<f64>(&what, &gradients, &clipped, limit, kind, 0.0);
            }
        }
    }
}

/// Gradients of every magnitude of `T`, limits of many, in both ways and every kind of norm.
fn every_magnitude<T: Element>(exponents: impl Iterator<Item = i32>, smallest: f64) {
    let context = context();
    for exponent in exponents {
        let gradients = [3.0, -4.0, 0.0, 1e-3].map(|one| T::from_f64(one * 10f64.powi(exponent)));
        let wide = to_f64(&gradients);
        for limit in [0.0, 1e-30, 3e-9, 0.07, 0.1, 1.0, 5e12, 1e30] {
            for kind in KINDS {
                // The squares of an L2 norm must be in range, or be nothing beside the limit's.
                let told = kind != NormKind::L2 || exponent <= 150;
                let what = format!("1e{exponent} to {limit:e}, {kind:?}");
                let moved = within_a_step(&context, &gradients, limit, kind, 1.0);
                if !told {
                    // Never a step of zeros.
                    assert_eq!(moved, None, "{what}");
                    continue;
                }
                let moved = moved.unwrap_or_else(|| panic!("{what}: skipped"));
                assert_clipped::<T>(&what, &wide, &moved, limit, kind, smallest);
                let (_, clipped) = in_place(&context, &gradients, limit, kind);
                assert_clipped::<T>(&what, &wide, &clipped, limit, kind, smallest);
                // Under a loss scale, where the scaled gradients are in range.
                let scaled = gradients.map(|one| T::from_f64(one.to_f64() * 64.0));
                if !scaled.iter().all(|one| one.to_f64().is_finite()) {
                    continue;
                }
                let moved = within_a_step(&context, &scaled, limit, kind, 64.0);
                if let Some(moved) = moved {
                    assert_clipped::<T>(&what, &wide, &moved, limit, kind, 2.0 * smallest);
                } else {
                    assert!(kind == NormKind::L2 && exponent > 150, "{what}: skipped");
                }
            }
        }
    }
}

#[test]
fn f32_gradients_of_every_magnitude() {
    every_magnitude::<f32>(
        (-44..=36).step_by(5).chain([37]),
        f64::from(f32::from_bits(1)),
    );
}

#[test]
fn f64_gradients_of_every_magnitude() {
    every_magnitude::<f64>(
        (-300..=300).step_by(75).chain([145, 307]),
        f64::from_bits(1),
    );
}

#[test]
fn bf16_gradients_of_every_magnitude() {
    let smallest = bf16::from_bits(1).to_f64();
    every_magnitude::<bf16>([-38, -20, 0, 20, 37].into_iter(), smallest);
}

#[test]
fn f16_gradients_of_every_magnitude() {
    let smallest = f16::from_bits(1).to_f64();
    every_magnitude::<f16>((-6..=4).step_by(2), smallest);
}

#[test]
fn narrow_gradients_beside_wide_ones_are_clipped_by_the_same() {
    let context = context();
    for scale in [1.0, 65536.0] {
        let wide = parameter(&context, "wide", &[0f64]);
        let narrow = parameter(&context, "narrow", &[0f32]);
        let half = parameter(&context, "half", &[f16::ZERO]);
        let mut optimizer = sgd(&[&wide, &narrow, &half], 1.0);
        let mut scaler = scaler(&context, scale);
        set_grad(&wide, &[3e45 * scale]);
        set_grad(&narrow, &[4e30f32 * scale as f32]);
        set_grad(&half, &[f16::from_f32(2.0)]);
        scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
        assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
        assert!((value::<f64>(&wide)[0] + 1.0).abs() < 1e-12);
        let right = -f64::from(4e30f32) / 3e45;
        let moved = f64::from(value::<f32>(&narrow)[0]);
        assert!(
            (moved / right - 1.0).abs() < 2e-7,
            "{moved:e}, not {right:e}"
        );
        assert_eq!(value::<f16>(&half), [-f16::ZERO]);
    }
}

#[test]
fn no_norm_and_no_limit_make_no_nan() {
    let context = context();
    for kind in KINDS {
        for limit in [0.0, 1e-300, 1e-5, 1.0, f64::INFINITY] {
            assert_eq!(
                in_place(&context, &[0f32; 3], limit, kind),
                (0.0, vec![0.0; 3])
            );
            assert_eq!(
                in_place(&context, &[0f64; 3], limit, kind),
                (0.0, vec![0.0; 3])
            );
            let moved = within_a_step(&context, &[0f32; 3], limit, kind, 8.0);
            assert_eq!(moved, Some(vec![0.0; 3]));
        }
        assert_eq!(in_place(&context, &[3e38f32, 1e-44], 0.0, kind).1, [0.0; 2]);
        // A norm that vanishes does not save gradients from a limit of 0.
        assert_eq!(
            in_place(&context, &[3e-200f64, 1e-300], 0.0, kind).1,
            [0.0; 2]
        );
    }
}

#[test]
fn ordinary_limits_have_pytorchs_bits() {
    let context = context();
    for limit in [0.1, 0.125, 0.3, 1.0, 5.0, 1e4, 1e30] {
        for times in [0.9, 1.0, 1.1, 7.3, 1e6] {
            let wide: Vec<f64> = [0.36, -0.48, 0.8].map(|one| one * times * limit).to_vec();
            let narrow: Vec<f32> = wide.iter().map(|one| *one as f32).collect();
            // A reciprocal and a product, in the type of the gradients.
            let (norm, clipped) = in_place(&context, &narrow, limit, NormKind::L2);
            let factor = ((norm as f32 + 1e-6).recip() * limit as f32).min(1.0);
            let expected: Vec<f64> = narrow.iter().map(|one| f64::from(one * factor)).collect();
            assert_eq!(clipped, expected, "{times} times {limit}");
            let (norm, clipped) = in_place(&context, &wide, limit, NormKind::L2);
            let factor = ((norm + 1e-6).recip() * limit).min(1.0);
            let expected: Vec<f64> = wide.iter().map(|one| one * factor).collect();
            assert_eq!(clipped, expected, "{times} times {limit}");
        }
    }
}

#[test]
fn a_clip_coefficient_may_be_of_either_type() {
    let context = context();
    let run = |parameter: &Parameter, clip: Tensor| {
        let mut optimizer: Sgd = sgd(&[parameter], 1.0);
        let clip = Some(clip);
        optimizer.step(&StepInputs {
            clip,
            ..StepInputs::default()
        })
    };
    for f64_clip in [false, true] {
        let clip = |value: f64| match f64_clip {
            true => tensor(&context, &[value]),
            false => tensor(&context, &[value as f32]),
        };
        let wide = parameter(&context, "wide", &[0f64]);
        set_grad(&wide, &[0.5f64]);
        run(&wide, clip(0.1)).unwrap();
        let exact = if f64_clip { 0.1 } else { f64::from(0.1f32) };
        assert_eq!(value::<f64>(&wide), [-0.5 * exact]);
        let narrow = parameter(&context, "narrow", &[0f32]);
        set_grad(&narrow, &[0.5f32]);
        run(&narrow, clip(0.1)).unwrap();
        assert_eq!(value::<f32>(&narrow), [-0.05f32]);
    }
    let narrow = parameter(&context, "narrow", &[0f32]);
    set_grad(&narrow, &[0.5f32]);
    for dtype in [DType::F16, DType::Bf16, DType::U32] {
        let clip = Tensor::full(&context, [], dtype, 1.0).unwrap();
        assert!(
            matches!(run(&narrow, clip), Err(Error::InvalidArgument { .. })),
            "{dtype}"
        );
    }
    assert_eq!(value::<f32>(&narrow), [0.0]);
}
