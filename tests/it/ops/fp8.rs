//! Tensors of 8 bits: what they can do, and that everything else refuses them by name.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use kitsune::amp::{AmpConfig, GradScaler, autocast};
use kitsune::memory::PinnedPool;
use kitsune::ops;
use kitsune::optim::Parameter;
use kitsune::{Context, DType, Error, F8E4M3, F8E5M2, HostConfig, Overflow, Tensor, bf16};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.cast(DType::F32).unwrap().to_vec().unwrap()
}

#[test]
fn they_are_made_filled_copied_and_viewed() {
    let context = context();
    let codes: Vec<_> = (0..12).map(|n| F8E4M3::from_bits(0x30 + n)).collect();
    let tensor = Tensor::from_slice(&context, [3, 4], &codes).unwrap();
    assert_eq!(tensor.buffer().bytes(), 12);
    assert_eq!(tensor.to_vec::<F8E4M3>().unwrap(), codes);

    let column = tensor.narrow(1, 1, 1).unwrap();
    let expected = [codes[1], codes[5], codes[9]];
    assert_eq!(column.to_vec::<F8E4M3>().unwrap(), expected);
    let turned = tensor.transpose(0, 1).unwrap().contiguous().unwrap();
    assert_eq!(
        turned.to_vec::<F8E4M3>().unwrap()[..3],
        [codes[0], codes[4], codes[8]]
    );
    let wide = tensor.transpose(0, 1).unwrap().cast(DType::F16).unwrap();
    assert_eq!(numbers(&wide), numbers(&turned));
    let rounded = Tensor::zeros(&context, [4, 3], DType::F8E5M2).unwrap();
    rounded.copy_from(&tensor.transpose(0, 1).unwrap()).unwrap();
    let expected: Vec<_> = numbers(&turned).into_iter().map(F8E5M2::from_f32).collect();
    assert_eq!(rounded.to_vec::<F8E5M2>().unwrap(), expected);

    column.fill(3.3).unwrap();
    assert_eq!(
        tensor.to_vec::<F8E4M3>().unwrap()[4..7],
        [codes[4], F8E4M3::from_f32(3.25), codes[6]]
    );
    let elsewhere = Context::with_pool(context.pool()).unwrap();
    assert_eq!(
        numbers(&tensor.copy_to(&elsewhere).unwrap()),
        numbers(&tensor)
    );
    let mut pinned = PinnedPool::new(context.device()).allocate(12).unwrap();
    tensor.copy_to_pinned(&mut pinned).unwrap();
    let full = Tensor::full(&context, [3, 4], DType::F8E4M3, -1e6).unwrap();
    assert!(
        full.to_vec::<F8E4M3>()
            .unwrap()
            .iter()
            .all(|code| code.is_nan())
    );
    full.copy_from_pinned(&mut pinned).unwrap();
    assert_eq!(numbers(&full), numbers(&tensor));
}

#[test]
fn casts_overflow_as_asked() {
    let context = context();
    let values = [0.5f32, 464.0, 465.0, -60_000.0, 70_000.0, f32::INFINITY];
    let x = Tensor::from_slice(&context, [2, 3], &values).unwrap();
    let infinite = numbers(&x.cast(DType::F8E5M2).unwrap());
    assert_eq!(
        infinite,
        [0.5, 448.0, 448.0, -57_344.0, f32::INFINITY, f32::INFINITY]
    );
    let turned = x.transpose(0, 1).unwrap();
    let saturated = turned.cast_with(DType::F8E4M3, Overflow::Saturate).unwrap();
    assert_eq!(
        numbers(&saturated),
        [0.5, -448.0, 448.0, 448.0, 448.0, 448.0]
    );
    let plain = turned.cast_with(DType::F8E4M3, Overflow::Infinity).unwrap();
    let is_nan: Vec<_> = numbers(&plain).iter().map(|value| value.is_nan()).collect();
    assert_eq!(is_nan, [false, true, false, true, true, true]);
    // Between the two 8-bit types, and to the same one.
    let narrower = x.cast(DType::F8E5M2).unwrap();
    let narrower = narrower
        .cast_with(DType::F8E4M3, Overflow::Saturate)
        .unwrap();
    assert_eq!(
        numbers(&narrower),
        [0.5, 448.0, 448.0, -448.0, 448.0, 448.0]
    );
    assert!(
        narrower
            .cast_with(DType::F8E4M3, Overflow::Infinity)
            .unwrap()
            .is_same(&narrower)
    );
    refused(
        "cast_with",
        DType::F16,
        x.cast_with(DType::F16, Overflow::Saturate),
    );
    let labels = Tensor::zeros(&context, [2], DType::U32).unwrap();
    refused("cast", DType::U32, labels.cast(DType::F8E4M3));
}

#[track_caller]
fn refused<T>(name: &str, wanted: DType, result: kitsune::Result<T>) {
    match result.map(drop).unwrap_err() {
        Error::UnsupportedDtype { op, dtype } => assert_eq!((op, dtype), (name, wanted)),
        other => panic!("{name}: {other}"),
    }
}

#[test]
fn everything_that_computes_refuses_them_by_name() {
    let context = context();
    for dtype in DType::F8 {
        let make = |shape: &[usize]| Tensor::full(&context, shape, dtype, 1.0).unwrap();
        let (x, row) = (make(&[4, 4]), make(&[4]));
        let wide = Tensor::full(&context, [4, 4], DType::F32, 1.0).unwrap();
        let ids = Tensor::zeros(&context, [4], DType::U32).unwrap();
        refused("add", dtype, ops::add(&x, &x));
        refused("mul", dtype, ops::mul(&wide, &x));
        refused("relu", dtype, ops::relu(&x));
        refused("gelu", dtype, ops::gelu(&x));
        refused("relu_backward", dtype, ops::relu_backward(&wide, &x));
        refused("gelu_backward", dtype, ops::gelu_backward(&x, &x));
        refused("matmul", dtype, ops::matmul(&x, &x));
        refused("linear", dtype, ops::linear(&x, &x, Some(&row)));
        refused("linear", dtype, ops::linear(&wide, &x, None));
        refused("sum", dtype, ops::sum(&x));
        refused("mean", dtype, ops::mean(&x));
        refused("argmax_rows", dtype, ops::argmax(&x));
        refused(
            "softmax_cross_entropy",
            dtype,
            ops::softmax_cross_entropy(&x, &ids),
        );
        refused("embedding", dtype, ops::embedding(&x, &ids));
        refused("layer_norm", dtype, ops::layer_norm(&x, &row, &row));
        let qkv = make(&[4, 12]);
        let attention = ops::causal_attention(&qkv, 1, 4);
        refused("scaled_dot_product_attention", dtype, attention);
        refused("Parameter::new", dtype, Parameter::new("w", x.clone()));
        let weight = Parameter::new("w", wide.clone()).unwrap();
        refused("set_grad", dtype, weight.set_grad(x.clone()));
        let scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
        refused("scale", dtype, scaler.scale(&x));

        // A scope casts no weight of 8 bits: that takes a scale.
        let _scope = autocast(true, DType::F16);
        refused("linear", dtype, ops::linear(&wide, &x, None));
        refused("matmul", dtype, ops::matmul(&x, &x));
    }
}

#[test]
fn a_weight_that_is_kept_in_8_bits_is_cast_for_the_product() {
    let context = context();
    let x = Tensor::from_slice(&context, [1, 2], &[bf16::ONE, bf16::from_f32(-2.0)]).unwrap();
    let weight = Tensor::from_slice(&context, [2, 2], &[1.0f32, 0.5, 17.0, 19.0]).unwrap();
    let stored = weight.cast_with(DType::F8E4M3, Overflow::Saturate).unwrap();
    let layer = ops::linear(&x, &stored.cast(DType::Bf16).unwrap(), None).unwrap();
    assert_eq!(numbers(layer.output()), [0.0, 16.0 - 40.0]);
}
