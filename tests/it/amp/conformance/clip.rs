//! Cases 55 to 57: clipping by norm.

use kitsune::optim::{NormKind, Parameter, clip_grad_norm};
use kitsune::{Context, DType, Tensor, f16};

use crate::support::amp::oracle::{assert_same, number, numbers, oracle};
use crate::support::amp::{context, ones, scaler, sgd, tensor, value};

/// The norm, and the gradients after clipping.
fn clip(context: &Context, gradients: &[Tensor], max_norm: f64) -> (f64, Vec<f64>) {
    let weight = |gradient: &Tensor| {
        let value = Tensor::zeros(context, gradient.shape(), gradient.dtype()).unwrap();
        let weight = Parameter::new("w", value).unwrap();
        weight.set_grad(gradient.clone()).unwrap();
        weight
    };
    let weights: Vec<_> = gradients.iter().map(weight).collect();
    let norm = clip_grad_norm(context, &weights, max_norm, NormKind::L2).unwrap();
    let wide = |gradient: &Tensor| gradient.cast(DType::F64).unwrap().to_vec::<f64>().unwrap();
    (
        norm.item().unwrap(),
        gradients.iter().flat_map(wide).collect(),
    )
}

/// Compares with PyTorch's vector `name`.
fn agrees(context: &Context, name: &str, gradients: &[Tensor], max_norm: f64) {
    let vector = &oracle()["clip"][name];
    let (norm, clipped) = clip(context, gradients, max_norm);
    assert_same(&[norm], &[number(&vector[0])], name);
    let expected: Vec<_> = vector[2]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(numbers)
        .collect();
    assert_same(&clipped, &expected, name);
}

#[test]
fn case_55_clip_345() {
    let context = context();
    let three_four = || [tensor(&context, &[3f32]), tensor(&context, &[4f32])];
    for (name, max_norm) in [
        ("3-4-5_max1", 1.0),
        ("3-4-5_max10", 10.0),
        ("3-4-5_max5", 5.0),
        ("max0", 0.0),
    ] {
        agrees(&context, name, &three_four(), max_norm);
    }
    assert_eq!(clip(&context, &three_four(), 10.0).1, [3.0, 4.0]);
    assert_eq!(clip(&context, &three_four(), 0.0).1, [0.0, 0.0]);
}

#[test]
fn case_56_clip_inf_nan() {
    let context = context();
    let with = |bad: f32| [tensor(&context, &[1f32]), tensor(&context, &[bad])];
    agrees(&context, "inf", &with(f32::INFINITY), 1.0);
    agrees(&context, "nan", &with(f32::NAN), 1.0);
}

#[test]
fn case_57_clip_norm_overflow() {
    let context = context();
    // PyTorch: infinite norms, gradients of zero, and a step that is applied.
    for name in ["f16_norm_overflow", "f32_norm_sq_overflow"] {
        let vector = &oracle()["clip"][name];
        assert_eq!(number(&vector[0]), f64::INFINITY);
        assert_eq!(numbers(&vector[2][0]), [0.0; 4]);
    }
    let halves = [tensor(&context, &[f16::from_f32(60_000.0); 4])];
    assert_eq!(clip(&context, &halves, 1.0), (120_000.0, vec![0.5; 4]));
    let (norm, clipped) = clip(&context, &[tensor(&context, &[1e25f32; 2])], 1.0);
    assert!((norm / 1.414_213_562e25 - 1.0).abs() < 1e-6, "{norm}");
    assert!(
        clipped
            .iter()
            .all(|value| (value - 0.5f64.sqrt()).abs() < 1e-6)
    );
    // A norm that cannot be told even in f64 skips the step.
    let weight = ones(&context, "w", &[1e200f64]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 8.0);
    scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
    assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(value::<f64>(&weight), [1.0]);
}
