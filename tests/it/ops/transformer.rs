//! The ops of a transformer: gradients against finite differences in f64, and types under autocast.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use crate::support;
use kitsune::ops::{self, autocast::autocast};
use kitsune::{Context, DType, HostConfig, Tensor};

const STEP: f64 = 1e-5;

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

/// `len` numbers in (-1, 1).
fn numbers(seed: u64, len: usize) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| 2.0 * random.f64() - 1.0).collect()
}

/// Compares `gradient` with central differences of `f` around `at`.
fn assert_gradient(what: &str, at: &[f64], gradient: &Tensor, f: impl Fn(&[f64]) -> f64) {
    let gradient = gradient.to_vec::<f64>().unwrap();
    assert_eq!(at.len(), gradient.len(), "{what}");
    for idx in 0..at.len() {
        let moved = |by: f64| {
            let mut point = at.to_vec();
            point[idx] += by;
            f(&point)
        };
        let difference = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        assert!(
            (difference - gradient[idx]).abs() <= 1e-8 * (1.0 + difference.abs()),
            "{what}: element {idx} is {}, differences give {difference}",
            gradient[idx]
        );
    }
}

/// `Σ x·w`: makes one number of a tensor, such that its gradient is `w`.
fn weighted_sum(x: &Tensor, w: &Tensor) -> f64 {
    ops::sum(&ops::mul(x, w).unwrap()).unwrap().item().unwrap()
}

#[test]
fn attention() {
    let context = context();
    let (sequences, length, heads, width) = (2, 5, 3, 2);
    let (rows, columns) = (sequences * length, 3 * heads * width);
    let x = numbers(1, rows * columns);
    let grad = numbers(2, rows * columns / 3);
    let grad_out = Tensor::from_slice(&context, [rows, columns / 3], &grad).unwrap();
    let forward = |x: &[f64]| {
        let qkv = Tensor::from_slice(&context, [rows, columns], x).unwrap();
        ops::causal_attention(&qkv, heads, length).unwrap()
    };
    let gradient = forward(&x).backward(&grad_out).unwrap();
    assert_gradient("qkv", &x, &gradient, |x| {
        weighted_sum(forward(x).output(), &grad_out)
    });
}

#[test]
fn attention_sees_only_what_came_before() {
    let context = context();
    let (length, columns) = (6, 12);
    let x = numbers(3, length * columns);
    let run = |x: &[f64]| {
        let qkv = Tensor::from_slice(&context, [length, columns], x).unwrap();
        let attention = ops::causal_attention(&qkv, 2, length).unwrap();
        attention.output().to_vec::<f64>().unwrap()
    };
    let before = run(&x);
    // The first position takes its own value, and nothing else.
    assert_eq!(before[..4], x[8..12]);
    let mut later = x.clone();
    later[4 * columns..].fill(9.0);
    let after = run(&later);
    assert_eq!(before[..4 * 4], after[..4 * 4]);
    assert_ne!(before[4 * 4..], after[4 * 4..]);
}

#[test]
fn layer_norm() {
    let context = context();
    let (rows, columns) = (4, 7);
    let (x, w, b) = (
        numbers(1, rows * columns),
        numbers(2, columns),
        numbers(3, columns),
    );
    let grad_out = Tensor::from_slice(&context, [rows, columns], &numbers(4, x.len())).unwrap();
    let forward = |x: &[f64], w: &[f64], b: &[f64]| {
        let x = Tensor::from_slice(&context, [rows, columns], x).unwrap();
        let w = Tensor::from_slice(&context, [columns], w).unwrap();
        let b = Tensor::from_slice(&context, [columns], b).unwrap();
        ops::layer_norm(&x, &w, &b).unwrap()
    };
    let value =
        |x: &[f64], w: &[f64], b: &[f64]| weighted_sum(forward(x, w, b).output(), &grad_out);
    let gradients = forward(&x, &w, &b).backward(&grad_out).unwrap();
    assert_gradient("x", &x, &gradients.input, |x| value(x, &w, &b));
    assert_gradient("weight", &w, &gradients.weight, |w| value(&x, w, &b));
    assert_gradient("bias", &b, &gradients.bias, |b| value(&x, &w, b));
}

#[test]
fn embedding() {
    let context = context();
    let ids = Tensor::from_slice(&context, [4], &[2u32, 0, 2, 1]).unwrap();
    let table = numbers(1, 5 * 3);
    let grad_out = Tensor::from_slice(&context, [4, 3], &numbers(2, 12)).unwrap();
    let tensor = |table: &[f64]| Tensor::from_slice(&context, [5, 3], table).unwrap();
    let gradient = ops::embedding_backward(&tensor(&table), &ids, &grad_out).unwrap();
    assert_gradient("table", &table, &gradient, |table| {
        weighted_sum(&ops::embedding(&tensor(table), &ids).unwrap(), &grad_out)
    });
}

#[test]
fn types_under_autocast() {
    let context = context();
    let x = Tensor::full(&context, [4, 12], DType::F32, 0.5).unwrap();
    let ones = Tensor::full(&context, [12], DType::F32, 1.0).unwrap();
    let grad = Tensor::full(&context, [4, 4], DType::F16, 1.0).unwrap();
    let scope = autocast(true, DType::F16);
    let attention = ops::causal_attention(&x, 2, 2).unwrap();
    let norm = ops::layer_norm(&x.cast(DType::F16).unwrap(), &ones, &ones).unwrap();
    drop(scope);
    assert_eq!(attention.output().dtype(), DType::F16);
    assert_eq!(attention.backward(&grad).unwrap().dtype(), DType::F32);
    assert_eq!(norm.output().dtype(), DType::F32);
    let gradients = norm.backward(norm.output()).unwrap();
    assert_eq!(gradients.input.dtype(), DType::F16);
    assert_eq!(gradients.weight.dtype(), DType::F32);
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let context = context();
    let x = Tensor::full(&context, [4, 12], DType::F32, 0.5).unwrap();
    for (heads, length) in [(0, 2), (5, 2), (2, 3), (2, 0)] {
        assert!(ops::causal_attention(&x, heads, length).is_err());
    }
    let narrow = Tensor::full(&context, [3], DType::F32, 1.0).unwrap();
    assert!(ops::layer_norm(&x, &narrow, &narrow).is_err());
    let ids = Tensor::zeros(&context, [2], DType::U32).unwrap();
    assert!(ops::embedding_backward(&x, &ids, &x).is_err());
    assert!(ops::embedding(&x, &x).is_err());
}
