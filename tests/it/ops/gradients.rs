//! Gradients of the ops against finite differences, in f64.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use crate::support;
use kitsune::ops::{self, Linear};
use kitsune::{Context, DType, HostConfig, Tensor};

const STEP: f64 = 1e-5;

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

/// `len` numbers in (-1, 1), without zeros: activations have a kink there.
fn numbers(seed: u64, len: usize) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(seed);
    let number = |_| (random.f64() + 0.01) * if random.bool() { 0.98 } else { -0.98 };
    (0..len).map(number).collect()
}

/// Compares `gradient` with central differences of `f` around `at`.
fn assert_gradient(what: &str, at: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> f64) {
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
fn linear() {
    let context = context();
    let (n, i, o) = (5, 4, 3);
    let (x, w, b, g) = (
        numbers(1, n * i),
        numbers(2, o * i),
        numbers(3, o),
        numbers(4, n * o),
    );
    let grad_out = Tensor::from_slice(&context, [n, o], &g).unwrap();
    let forward = |x: &[f64], w: &[f64], b: &[f64]| -> Linear {
        let x = Tensor::from_slice(&context, [n, i], x).unwrap();
        let w = Tensor::from_slice(&context, [o, i], w).unwrap();
        let b = Tensor::from_slice(&context, [o], b).unwrap();
        ops::linear(&x, &w, Some(&b)).unwrap()
    };
    let value =
        |x: &[f64], w: &[f64], b: &[f64]| weighted_sum(forward(x, w, b).output(), &grad_out);
    let gradients = forward(&x, &w, &b).backward(&grad_out).unwrap();
    assert_gradient("x", &x, &gradients.input.to_vec().unwrap(), |x| {
        value(x, &w, &b)
    });
    assert_gradient("w", &w, &gradients.weight.to_vec().unwrap(), |w| {
        value(&x, w, &b)
    });
    let bias = gradients.bias.unwrap().to_vec().unwrap();
    assert_gradient("b", &b, &bias, |b| value(&x, &w, b));
}

#[test]
fn linear_of_transposed_operands() {
    let context = context();
    let (n, i, o) = (4, 3, 2);
    let (x, w, g) = (numbers(1, n * i), numbers(2, o * i), numbers(3, n * o));
    // Every operand is a view across its memory.
    let view = |values: &[f64], rows: usize, columns: usize| {
        let tensor = Tensor::from_slice(&context, [columns, rows], values).unwrap();
        tensor.transpose(0, 1).unwrap()
    };
    let grad_out = view(&g, n, o);
    let forward = |x: &[f64], w: &[f64]| ops::linear(&view(x, n, i), &view(w, o, i), None).unwrap();
    let value = |x: &[f64], w: &[f64]| weighted_sum(forward(x, w).output(), &grad_out);
    let gradients = forward(&x, &w).backward(&grad_out).unwrap();
    assert!(gradients.bias.is_none());
    // Gradients are dense; lay them out as the values are.
    let laid_out = |gradient: &Tensor| gradient.transpose(0, 1).unwrap().to_vec().unwrap();
    assert_gradient("x", &x, &laid_out(&gradients.input), |x| value(x, &w));
    assert_gradient("w", &w, &laid_out(&gradients.weight), |w| value(&x, w));
}

#[test]
fn activations() {
    type Forward = fn(&Tensor) -> kitsune::Result<Tensor>;
    type Backward = fn(&Tensor, &Tensor) -> kitsune::Result<Tensor>;
    let both: [(&str, Forward, Backward); 2] = [
        ("relu", ops::relu, ops::relu_backward),
        ("gelu", ops::gelu, ops::gelu_backward),
    ];
    let context = context();
    let x: Vec<f64> = numbers(5, 40).iter().map(|x| x * 3.0).collect();
    let grad_out = Tensor::from_slice(&context, [5, 8], &numbers(6, 40)).unwrap();
    let tensor = |x: &[f64]| Tensor::from_slice(&context, [5, 8], x).unwrap();
    for (name, forward, backward) in both {
        let gradient = backward(&tensor(&x), &grad_out).unwrap();
        assert_gradient(name, &x, &gradient.to_vec().unwrap(), |x| {
            weighted_sum(&forward(&tensor(x)).unwrap(), &grad_out)
        });
    }
}

#[test]
fn cross_entropy() {
    let context = context();
    let (n, c) = (6, 5);
    let labels = Tensor::from_slice(&context, [n], &[0u32, 4, 2, 2, 1, 3]).unwrap();
    let scale = Tensor::full(&context, [], DType::F32, 8.0).unwrap();
    let logits = numbers(7, n * c);
    let loss = |logits: &[f64]| {
        let logits = Tensor::from_slice(&context, [n, c], logits).unwrap();
        ops::softmax_cross_entropy(&logits, &labels).unwrap()
    };
    let value = |logits: &[f64]| loss(logits).value().item::<f64>().unwrap();
    let gradient = loss(&logits).backward().unwrap();
    assert_gradient("loss", &logits, &gradient.to_vec().unwrap(), value);

    // Twice scaled: value, seed and gradient by the product.
    let scaled = loss(&logits)
        .scaled_by(&scale)
        .unwrap()
        .scaled_by(&scale)
        .unwrap();
    assert_eq!(scaled.value().item::<f64>().unwrap(), 64.0 * value(&logits));
    assert_eq!(scaled.seed().item::<f32>().unwrap(), 64.0);
    let gradient = scaled.backward().unwrap().to_vec().unwrap();
    assert_gradient("scaled", &logits, &gradient, |logits| 64.0 * value(logits));
}

/// A whole network, in f64: two layers, both activations, the loss.
#[test]
fn chain() {
    let context = context();
    let (n, i, h, c) = (4, 3, 5, 3);
    let labels = Tensor::from_slice(&context, [n], &[2u32, 0, 1, 1]).unwrap();
    let x = Tensor::from_slice(&context, [n, i], &numbers(8, n * i)).unwrap();
    let second = Tensor::from_slice(&context, [c, h], &numbers(10, c * h)).unwrap();
    let run = |first: &[f64]| {
        let first = Tensor::from_slice(&context, [h, i], first).unwrap();
        let hidden = ops::linear(&x, &first, None).unwrap();
        let active = ops::relu(&ops::gelu(hidden.output()).unwrap()).unwrap();
        let output = ops::linear(&active, &second, None).unwrap();
        let loss = ops::softmax_cross_entropy(output.output(), &labels).unwrap();
        (hidden, output, loss)
    };
    let first = numbers(9, h * i);
    let (hidden, output, loss) = run(&first);
    let gradient = output.backward(&loss.backward().unwrap()).unwrap().input;
    let active = ops::gelu(hidden.output()).unwrap();
    let gradient = ops::relu_backward(&active, &gradient).unwrap();
    let gradient = ops::gelu_backward(hidden.output(), &gradient).unwrap();
    let gradient = hidden.backward(&gradient).unwrap().weight.to_vec().unwrap();
    assert_gradient("chain", &first, &gradient, |first| {
        run(first).2.value().item::<f64>().unwrap()
    });
}
