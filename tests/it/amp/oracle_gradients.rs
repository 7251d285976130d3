//! Every vector that PyTorch 2.15 gave for its `GradScaler`, against ours: unscaling, clipping and casts. Where we
//! differ on purpose, the test states PyTorch's result and ours.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the oracle writes f32 values as f64"
)]

use crate::support::amp::oracle::{assert_same, hex, number, numbers, oracle, to_f64};
use crate::support::amp::{
    context, flag, grad, ones, parameter, scaler, set_grad, sgd, tensor, value,
};
use kitsune::amp::NormKind;
use kitsune::optim::{Parameter, clip_grad_norm};
use kitsune::{Context, DType, Element, Error, Result, Tensor, bf16, f16};

/// Unscales `input` by `scale` and compares with vector `name`; gives our flag.
fn unscales<T: Element>(context: &Context, name: &str, input: &[T], scale: f64) -> (f32, f64) {
    let vector = &oracle()["unscale"][name];
    let weight = ones(context, "w", input);
    let optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(context, scale);
    scaler.unscale(&optimizer).unwrap();
    assert_same(&to_f64(&grad::<T>(&weight)), &numbers(&vector[0]), name);
    (flag(&scaler, &optimizer), number(&vector[1]))
}

#[test]
fn gradients_unscale_to_the_bit() {
    let context = context();
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let f32s: [(&str, &[f32], f64); 8] = [
        ("f32_quarter", &[4.0, -8.0, 0.0, -0.0], 4.0),
        ("f32_inf", &[4.0, inf], 4.0),
        ("f32_ninf", &[4.0, -inf], 4.0),
        ("f32_nan", &[4.0, nan], 4.0),
        ("f32_third", &[1.0, 2.0, 3.0, 7.0], 3.0),
        ("f32_inv1_passthrough", &[f32::from_bits(714), nan], 1.0),
        ("f32_denormal_result", &[1e-38], 65536.0),
        ("empty", &[], 2.0),
    ];
    for (name, input, scale) in f32s {
        let (ours, theirs) = unscales(&context, name, input, scale);
        assert_eq!(f64::from(ours), theirs, "{name}");
    }
    let half = |values: &[f64]| {
        values
            .iter()
            .map(|v| <f16 as Element>::from_f64(*v))
            .collect::<Vec<_>>()
    };
    let brain = |values: &[f64]| {
        values
            .iter()
            .map(|v| <bf16 as Element>::from_f64(*v))
            .collect::<Vec<_>>()
    };
    let flags = [
        unscales(&context, "f16_max", &half(&[65504.0, -65504.0]), 65536.0),
        unscales(
            &context,
            "f16_underflow",
            &half(&[1.0, 2f64.powi(-8), 2f64.powi(-9), 1e-7]),
            65536.0,
        ),
        unscales(&context, "bf16", &brain(&[256.0, 257.0, 3e38]), 65536.0),
        unscales(&context, "bf16_third", &brain(&[1.0, 3.0, 5.0]), 3.0),
        unscales(&context, "f64_big_ok", &[1e300], 2.0),
    ];
    for (ours, theirs) in flags {
        assert_eq!((f64::from(ours), theirs), (0.0, 0.0));
    }
}

#[test]
fn f64_gradients_are_not_narrowed() {
    let context = context();
    assert_eq!(numbers(&oracle()["unscale_f64_out_of_f32"][0]), [5e299]);
    assert_eq!(unscales(&context, "f64_big_ok", &[1e300], 2.0), (0.0, 0.0));
}

#[test]
fn overflow_made_by_unscaling_counts() {
    // PyTorch looks before it multiplies: flag 0, and the infinity reaches the weights.
    let context = context();
    let (ours, theirs) = unscales(&context, "f32_inv_gt1_overflows", &[3e38f32, 2e38], 0.25);
    assert_eq!((ours, theirs), (1.0, 0.0));
    let (ours, theirs) = unscales(&context, "f16_inv_gt1", &[f16::from_f32(60_000.0)], 0.25);
    assert_eq!((ours, theirs), (1.0, 0.0));

    assert_eq!(
        oracle()["scale_lt1_unscale_overflow_undetected"],
        "ok:([-inf], 0.25)"
    );
    let weight = ones(&context, "w", &[2e38f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 0.25);
    let outcome = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    assert!(!outcome.is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [1.0]);
    assert_eq!(scaler.scale_factor().unwrap(), 0.125);
}

#[test]
fn a_flag_that_was_set_stays_set() {
    let vector = &oracle()["unscale"]["flag_preset_not_cleared"];
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 2.0);
    scaler.unscale(&optimizer).unwrap();
    scaler.update().unwrap();
    // Set from outside, as an exchange between ranks does.
    scaler
        .found_inf(&optimizer)
        .unwrap()
        .copy_from_slice(&[1f32])
        .unwrap();
    set_grad(&weight, &[1f32]);
    scaler.unscale(&optimizer).unwrap();
    assert_same(&to_f64(&grad::<f32>(&weight)), &numbers(&vector[0]), "grad");
    assert_eq!(f64::from(flag(&scaler, &optimizer)), number(&vector[1]));
    assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
}

#[test]
fn integers_are_no_gradients() {
    assert!(
        oracle()["unscale_int"]
            .as_str()
            .unwrap()
            .starts_with("NotImplementedError")
    );
    let context = context();
    let weight = parameter(&context, "w", &[1f32]);
    let refused = weight.set_grad(tensor(&context, &[1u32]));
    assert!(
        matches!(
            refused,
            Err(Error::UnsupportedDtype {
                dtype: DType::U32,
                ..
            })
        ),
        "{refused:?}"
    );
}

#[test]
fn gradients_of_16_bits_can_be_unscaled() {
    let oracle = oracle();
    let context = context();
    assert!(
        oracle["errors"]["fp16_grads"]
            .as_str()
            .unwrap()
            .starts_with("ValueError")
    );
    assert!(
        oracle["errors"]["fp16_grads_fused_opt_explicit_unscale"]
            .as_str()
            .unwrap()
            .starts_with("ValueError")
    );
    let four = f16::from_f32(4.0);
    let weight = ones(&context, "w", &[four; 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(grad::<f16>(&weight), [f16::ONE; 3]);
    let _ = scaler.step(&mut optimizer).unwrap();
    assert_eq!(value::<f16>(&weight), [f16::ZERO; 3]);
    scaler.update().unwrap();

    // Without unscale: params 0 as PyTorch's fused optimizer, which also writes back the gradient; ours
    // stays scaled.
    assert_eq!(
        oracle["errors"]["fp16_grads_fused_opt_allowed"],
        "ok:([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])"
    );
    let weight = ones(&context, "w", &[four; 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let _ = scaler.step(&mut optimizer).unwrap();
    assert_eq!(
        (value::<f16>(&weight), grad::<f16>(&weight)),
        (vec![f16::ZERO; 3], vec![four; 3])
    );

    assert_eq!(oracle["errors"]["bf16_grads"], "ok:[0.25, 0.25, 0.25]");
    let weight = ones(&context, "w", &[bf16::ONE; 3]);
    scaler.unscale(&sgd(&[&weight], 1.0)).unwrap();
    assert_eq!(grad::<bf16>(&weight), [bf16::from_f32(0.25); 3]);
}

#[test]
fn gradients_are_multiplied_by_the_inverse_never_divided() {
    let vectors = oracle()["fused_divides_vs_unfused_multiplies_scale3"].clone();
    let row = |index: usize| -> Vec<f64> {
        vectors[index]
            .as_array()
            .unwrap()
            .iter()
            .map(|text| hex(text.as_str().unwrap()))
            .collect()
    };
    let context = context();
    let grads = [1f32, 5.0, 7.0, 11.0];
    let multiplied: Vec<f64> = grads.map(|grad| f64::from(grad * (1.0f32 / 3.0))).to_vec();
    let theirs = (0..2)
        .find(|index| row(*index) == multiplied)
        .expect("one row is PyTorch's unfused result");
    assert_ne!(row(theirs), row(1 - theirs));
    let weight = ones(&context, "w", &grads);
    let mut scaler = scaler(&context, 3.0);
    let mut optimizer = sgd(&[&weight], 1.0);
    weight.value().fill(0.0).unwrap();
    let _ = scaler.step(&mut optimizer).unwrap();
    let negated: Vec<f64> = to_f64(&value::<f32>(&weight))
        .iter()
        .map(|value| -value)
        .collect();
    assert_same(&negated, &row(theirs), "folded into the step");
    scaler.update().unwrap();
    scaler.unscale(&optimizer).unwrap();
    assert_same(&to_f64(&grad::<f32>(&weight)), &row(theirs), "in place");
}

#[test]
fn casts_round_once_to_nearest() {
    let context = context();
    let cast = |value: f64, dtype| {
        let narrow = tensor(&context, &[value]).cast(dtype).unwrap();
        narrow.cast(DType::F64).unwrap().item::<f64>().unwrap()
    };
    for (value, expected) in [
        (65519.9, 65504.0),
        (65520.0, f64::INFINITY),
        (2f64.powi(-25), 0.0),
    ] {
        assert_eq!(cast(value, DType::F16), expected);
    }
    let max = bf16::MAX.to_f64();
    for (value, expected) in [
        (3.3961e38, max),
        (3.4e38, f64::INFINITY),
        (-3.4e38, f64::NEG_INFINITY),
    ] {
        assert_eq!(cast(value, DType::Bf16), expected);
    }
}

struct Clip {
    norm: f64,
    grads: Vec<Vec<f64>>,
}

/// Clips these gradients; also compares with the oracle unless the vector is a deviation.
fn clip(context: &Context, grads: &[Tensor], max_norm: f64, kind: NormKind) -> Result<Clip> {
    let weights: Vec<_> = grads
        .iter()
        .map(|grad| {
            let value = Tensor::zeros(context, grad.shape(), grad.dtype()).unwrap();
            let weight = Parameter::new("w", value).unwrap();
            weight.set_grad(grad.clone()).unwrap();
            weight
        })
        .collect();
    let norm = clip_grad_norm(context, &weights, max_norm, kind)?.item()?;
    let as_f64 = |tensor: &Tensor| tensor.cast(DType::F64)?.to_vec::<f64>();
    Ok(Clip {
        norm,
        grads: grads.iter().map(as_f64).collect::<Result<_>>()?,
    })
}

#[test]
fn clipping_gives_the_same_numbers() {
    let context = context();
    let f32s = |values: &[f32]| tensor(&context, values);
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let three_four = || vec![f32s(&[3.0]), f32s(&[4.0])];
    let signed = || vec![f32s(&[3.0]), f32s(&[-4.0])];
    let mixed = vec![tensor(&context, &[f16::from_f32(3.0)]), f32s(&[4.0])];
    let cases = [
        ("3-4-5_max1", three_four(), 1.0, NormKind::L2),
        ("3-4-5_max10", three_four(), 10.0, NormKind::L2),
        ("3-4-5_max5", three_four(), 5.0, NormKind::L2),
        ("max0", three_four(), 0.0, NormKind::L2),
        ("inf", vec![f32s(&[1.0]), f32s(&[inf])], 1.0, NormKind::L2),
        ("nan", vec![f32s(&[1.0]), f32s(&[nan])], 1.0, NormKind::L2),
        ("zero", vec![f32s(&[0.0, 0.0])], 1.0, NormKind::L2),
        ("linf", signed(), 1.0, NormKind::Max),
        ("l1", signed(), 1.0, NormKind::L1),
        ("mixed_f16_f32", mixed, 1.0, NormKind::L2),
    ];
    for (name, grads, max_norm, kind) in cases {
        let vector = &oracle()["clip"][name];
        let got = clip(&context, &grads, max_norm, kind).unwrap();
        assert_same(&[got.norm], &[number(&vector[0])], name);
        let expected: Vec<_> = vector[2].as_array().unwrap().iter().map(numbers).collect();
        assert_same(&got.grads.concat(), &expected.concat(), name);
    }
    assert_eq!(oracle()["clip"]["empty"], "ok:(0.0, 'torch.float32', [])");
    assert_eq!(
        clip_grad_norm(&context, &[], 1.0, NormKind::L2)
            .unwrap()
            .item::<f64>()
            .unwrap(),
        0.0
    );
}

#[test]
fn norms_do_not_overflow_the_type_of_a_gradient() {
    let context = context();
    // PyTorch: the norm is infinite, and every gradient becomes 0.
    for name in ["f16_norm_overflow", "f32_norm_sq_overflow"] {
        let vector = &oracle()["clip"][name];
        assert_eq!(
            (number(&vector[0]), numbers(&vector[2][0])),
            (f64::INFINITY, vec![0.0; 4])
        );
    }
    let got = clip(
        &context,
        &[tensor(&context, &[f16::from_f32(60_000.0); 4])],
        1.0,
        NormKind::L2,
    )
    .unwrap();
    // 60000 is not an f16; the nearest is 60000 itself, a multiple of 32.
    assert_eq!((got.norm, got.grads.concat()), (120_000.0, vec![0.5; 4]));
    let got = clip(
        &context,
        &[tensor(&context, &[1e25f32; 4])],
        1.0,
        NormKind::L2,
    )
    .unwrap();
    assert!((got.norm / 2e25 - 1.0).abs() < 1e-7);
    assert!(
        got.grads
            .concat()
            .iter()
            .all(|grad| (grad - 0.5).abs() < 1e-6)
    );
    // PyTorch takes the coefficient in bf16 and is half a percent off.
    assert_eq!(numbers(&oracle()["clip"]["bf16"][2][0]), [0.498046875; 4]);
    let got = clip(
        &context,
        &[tensor(&context, &[bf16::from_f32(300.0); 4])],
        1.0,
        NormKind::L2,
    )
    .unwrap();
    assert_eq!((got.norm, got.grads.concat()), (600.0, vec![0.5; 4]));
}

#[test]
fn a_negative_limit_is_refused() {
    // PyTorch turns every gradient round.
    assert_same(
        &numbers(&oracle()["clip"]["neg_max"][2][0]),
        &[f64::from(-0.599_999_9f32)],
        "torch",
    );
    let context = context();
    for max_norm in [-1.0, f64::NAN] {
        assert!(
            clip(
                &context,
                &[tensor(&context, &[3f32])],
                max_norm,
                NormKind::L2
            )
            .is_err()
        );
    }
}

#[test]
fn a_non_finite_norm_skips_the_step() {
    assert!(
        oracle()["clip"]["inf_err"]
            .as_str()
            .unwrap()
            .contains("non-finite")
    );
    let context = context();
    // Finite f64 gradients whose squares are not: PyTorch steps with zeros.
    for unscale_first in [false, true] {
        let weight = ones(&context, "w", &[1e200f64]);
        let mut optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 8.0);
        if unscale_first {
            scaler.unscale(&optimizer).unwrap();
        }
        let norm = scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert_eq!(norm.item::<f64>().unwrap(), f64::INFINITY);
        assert!(!outcome.is_applied().unwrap());
        assert_eq!(
            (value::<f64>(&weight), scaler.scale_factor().unwrap()),
            (vec![1.0], 4.0)
        );
    }
}
