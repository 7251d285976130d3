//! Values of ops, views as their operands, and what they refuse.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(
    unsafe_code,
    reason = "spans are made by hand to test what launchers refuse"
)]

use crate::support;
use kitsune::launch::{self, Accumulate, Matrix, Span};
use kitsune::ops;
use kitsune::{Context, DType, Error, HostConfig, Result, Tensor, f16};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

fn tensor<const N: usize>(context: &Context, shape: [usize; N], values: &[f32]) -> Tensor {
    Tensor::from_slice(context, shape, values).unwrap()
}

fn refusal<T>(outcome: Result<T>) -> String {
    match outcome {
        Err(error @ (Error::InvalidArgument { .. } | Error::UnsupportedDtype { .. })) => {
            error.to_string()
        }
        Err(error) => panic!("refused for another reason: {error}"),
        Ok(_) => panic!("not refused"),
    }
}

#[test]
fn products_of_views() {
    let context = context();
    let a = tensor(&context, [2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let gram = ops::matmul(&a, &a.transpose(0, 1).unwrap()).unwrap();
    assert_eq!(gram.to_vec::<f32>().unwrap(), [14.0, 32.0, 32.0, 77.0]);
    let right = a.narrow(1, 1, 2).unwrap();
    let square = ops::matmul(&right, &right).unwrap();
    assert_eq!(square.to_vec::<f32>().unwrap(), [19.0, 24.0, 40.0, 51.0]);
    let none = ops::matmul(&a.narrow(1, 0, 0).unwrap(), &a.narrow(0, 0, 0).unwrap()).unwrap();
    assert_eq!(none.to_vec::<f32>().unwrap(), [0.0; 6]);
}

#[test]
fn the_bias_costs_no_rounding_of_its_own() {
    let context = context();
    // The product, 1 + 2^-11, is a tie in f16 and would go to 1, as would its sum with the bias.
    let half =
        |shape: [usize; 2], value: f64| Tensor::full(&context, shape, DType::F16, value).unwrap();
    let x =
        Tensor::from_slice(&context, [1, 2], &[f16::ONE, f16::from_f32(2f32.powi(-11))]).unwrap();
    let bias = Tensor::full(&context, [1], DType::F16, 2f64.powi(-11)).unwrap();
    let output = ops::linear(&x, &half([1, 2], 1.0), Some(&bias))
        .unwrap()
        .into_output();
    assert_eq!(output.item::<f16>().unwrap().to_f32(), 1.0 + 2f32.powi(-10));
}

#[test]
fn reductions_and_accuracy() {
    let context = context();
    let x = tensor(&context, [2, 3], &[1.0, 5.0, 2.0, f32::NAN, 0.0, 9.0]);
    assert_eq!(ops::argmax(&x).unwrap().to_vec::<u32>().unwrap(), [1, 0]);
    let across = ops::argmax(&x.transpose(0, 1).unwrap()).unwrap();
    assert_eq!(across.to_vec::<u32>().unwrap(), [1, 0, 1]);
    let labels = Tensor::from_slice(&context, [2], &[1u32, 2]).unwrap();
    assert_eq!(ops::accuracy(&x, &labels).unwrap(), 0.5);
    let first = x.narrow(0, 0, 1).unwrap();
    assert_eq!(ops::sum(&first).unwrap().item::<f32>().unwrap(), 8.0);
    assert_eq!(
        ops::mean(&first.narrow(1, 0, 2).unwrap())
            .unwrap()
            .item::<f32>()
            .unwrap(),
        3.0
    );
    let none = x.narrow(0, 0, 0).unwrap();
    assert_eq!(ops::sum(&none).unwrap().item::<f32>().unwrap(), 0.0);
    assert!(ops::mean(&none).unwrap().item::<f32>().unwrap().is_nan());
    assert!(
        ops::accuracy(&none, &labels.narrow(0, 0, 0).unwrap())
            .unwrap()
            .is_nan()
    );
}

#[test]
fn operands_are_not_written() {
    let context = context();
    let values = [1.0, -2.0, 3.0, -4.0];
    let x = tensor(&context, [2, 2], &values);
    let labels = Tensor::zeros(&context, [2], DType::U32).unwrap();
    let grad = ops::relu_backward(&x, &x).unwrap();
    assert_eq!(grad.to_vec::<f32>().unwrap(), [1.0, 0.0, 3.0, 0.0]);
    assert_eq!(
        ops::add(&x, &x).unwrap().to_vec::<f32>().unwrap(),
        [2.0, -4.0, 6.0, -8.0]
    );
    let loss = ops::softmax_cross_entropy(&x, &labels).unwrap();
    let scale = tensor(&context, [], &[2.0]);
    let scaled = loss.scaled_by(&scale).unwrap();
    let (once, twice) = (loss.backward().unwrap(), scaled.backward().unwrap());
    let doubled = ops::add(&once, &once).unwrap().to_vec::<f32>().unwrap();
    assert_eq!(twice.to_vec::<f32>().unwrap(), doubled);
    assert_eq!(x.to_vec::<f32>().unwrap(), values);
}

#[test]
fn shapes_and_types_that_do_not_fit_are_named() {
    let context = context();
    let zeros = |shape: &[usize], dtype| Tensor::zeros(&context, shape, dtype).unwrap();
    let x = zeros(&[2, 3], DType::F32);
    let names = |message: &str, parts: &[&str]| {
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    };
    names(
        &refusal(ops::matmul(&x, &x)),
        &["matmul", "[2, 3] · [2, 3]"],
    );
    names(
        &refusal(ops::matmul(&x, &zeros(&[3], DType::F32))),
        &["matmul", "[3]"],
    );
    let bias = zeros(&[3], DType::F32);
    names(
        &refusal(ops::linear(&x, &x, Some(&bias))),
        &["linear", "x [2, 3]", "bias [3]"],
    );
    names(
        &refusal(ops::linear(&x, &zeros(&[2, 2], DType::F32), None)),
        &["weight [2, 2]"],
    );
    let layer = ops::linear(&x, &x, None).unwrap();
    names(
        &refusal(layer.backward(&x)),
        &["linear_backward", "[2, 2]", "[2, 3]"],
    );
    names(&refusal(ops::add(&x, &bias)), &["add", "[2, 3]", "[3]"]);
    let integers = zeros(&[2, 3], DType::U32);
    names(&refusal(ops::mul(&integers, &integers)), &["mul", "u32"]);
    names(
        &refusal(ops::matmul(&integers, &zeros(&[3, 2], DType::U32))),
        &["matmul", "u32"],
    );
    names(&refusal(ops::sum(&integers)), &["sum", "u32"]);
    names(&refusal(ops::relu(&integers)), &["relu", "u32"]);
    names(
        &refusal(ops::argmax(&zeros(&[2, 0], DType::F32))),
        &["argmax"],
    );
    let entropy = |logits: &Tensor, labels: &Tensor| ops::softmax_cross_entropy(logits, labels);
    names(
        &refusal(entropy(&x, &zeros(&[3], DType::U32))),
        &["cross_entropy", "[3]"],
    );
    names(
        &refusal(entropy(&x, &zeros(&[2], DType::F32))),
        &["cross_entropy", "f32"],
    );
    names(
        &refusal(entropy(&integers, &zeros(&[2], DType::U32))),
        &["cross_entropy", "u32"],
    );
}

#[test]
fn operands_of_two_streams_are_refused() {
    let first = context();
    let second = Context::with_pool(first.pool()).unwrap();
    let (a, b) = (
        tensor(&first, [1, 1], &[1.0]),
        tensor(&second, [1, 1], &[1.0]),
    );
    for message in [
        refusal(ops::add(&a, &b)),
        refusal(ops::matmul(&a, &b)),
        refusal(ops::linear(&a, &a, Some(&b.reshape([1]).unwrap()))),
        refusal(ops::gelu_backward(&a, &b)),
    ] {
        assert!(message.contains("stream"), "{message}");
    }
}

#[test]
fn launchers_refuse_what_does_not_fit() {
    let context = context();
    let stream = context.stream();
    let tensors = [DType::F32, DType::F32, DType::U32, DType::F16]
        .map(|dtype| Tensor::zeros(&context, [8], dtype).unwrap());
    let span = |tensor: &Tensor| {
        let (ptr, dtype, stream) = (tensor.ptr(), tensor.dtype(), stream.id());
        // SAFETY: the tensor is dense, lives on this stream, and outlives every launch below.
        unsafe { Span::new(ptr, tensor.len(), dtype, stream) }
    };
    let [x, other, labels, half] = tensors.each_ref().map(span);

    assert!(refusal(launch::cast(stream, &x, &x.sub(0, 7))).contains("elements"));
    assert!(refusal(launch::cast(stream, &x.sub(0, 4), &x.sub(2, 4))).contains("overlaps"));
    assert!(refusal(launch::cast(stream, &x, &labels)).contains("u32"));
    assert!(refusal(launch::add(stream, &x, &other, &x.sub(1, 7))).contains("elements"));
    assert!(refusal(launch::scale(stream, &x, &half.sub(0, 1), &other)).contains("f16"));
    assert!(refusal(launch::scale(stream, &x, &other.sub(3, 1), &other)).contains("overlaps"));
    assert!(refusal(launch::add_bias(stream, &x, &other.sub(0, 3), &x)).contains("rows"));
    assert!(refusal(launch::sum_rows(stream, &x, &other.sub(0, 0))).contains("rows"));
    assert!(refusal(launch::sum(stream, &x, &half.sub(0, 1))).contains("f16"));
    assert!(refusal(launch::argmax_rows(stream, &x, &labels.sub(0, 3))).contains("rows"));

    let matrix = |span, rows, columns| Matrix::dense(span, rows, columns).unwrap();
    let multiply = |a: &Matrix, b: &Matrix, out: &Span| {
        refusal(launch::matmul(stream, a, b, out, Accumulate::Overwrite))
    };
    let (square, half_square) = (matrix(&x, 2, 2), matrix(&half, 2, 2));
    assert!(multiply(&square, &matrix(&other, 1, 2), &labels).contains("u32"));
    assert!(multiply(&square, &matrix(&x, 1, 2), &other.sub(0, 4)).contains("does not fit"));
    assert!(multiply(&square, &square, &x.sub(2, 4)).contains("overlaps"));
    assert!(multiply(&square, &half_square, &other.sub(0, 4)).contains("f16"));
    let taken = Some(&x);
    let (add, out) = (Accumulate::Add, other.sub(0, 4));
    let multiply = launch::matmul_with(taken, stream, &square, &square, &out, add);
    assert!(refusal(multiply).contains("overlaps"));
    // In place is in order where the elements have one size.
    launch::add(stream, &x, &other, &x).unwrap();
    launch::cast(stream, &x, &x).unwrap();
    context.synchronize().unwrap();
}

/// An operand of another stream is refused under the name of the op, not of the kernel that would meet it.
#[test]
fn operands_of_two_streams_are_refused_by_the_op() {
    let here = context();
    let there = Context::new(here.device()).unwrap();
    let ones =
        |context: &Context, shape: &[usize]| Tensor::full(context, shape, DType::F32, 1.0).unwrap();
    let ids = |context: &Context| Tensor::from_slice(context, [2], &[0u32, 1]).unwrap();
    let (x, far) = (ones(&here, &[2, 2]), ones(&there, &[2, 2]));
    let (row, far_row) = (ones(&here, &[2]), ones(&there, &[2]));
    let linear = ops::linear(&x, &x, Some(&row)).unwrap();
    let norm = ops::layer_norm(&x, &row, &row).unwrap();
    let attention = ops::causal_attention(&ones(&here, &[2, 6]), 1, 2).unwrap();
    let refusals = [
        ("matmul", "b", ops::matmul(&x, &far).err()),
        ("linear", "weight", ops::linear(&x, &far, None).err()),
        ("linear", "bias", ops::linear(&x, &x, Some(&far_row)).err()),
        ("linear_backward", "grad_out", linear.backward(&far).err()),
        (
            "layer_norm",
            "bias",
            ops::layer_norm(&x, &row, &far_row).err(),
        ),
        ("layer_norm_backward", "grad_out", norm.backward(&far).err()),
        (
            "causal_attention_backward",
            "grad_out",
            attention.backward(&far).err(),
        ),
        (
            "softmax_cross_entropy",
            "labels",
            ops::softmax_cross_entropy(&x, &ids(&there)).err(),
        ),
        ("embedding", "ids", ops::embedding(&x, &ids(&there)).err()),
        (
            "embedding_backward",
            "grad_out",
            ops::embedding_backward(&x, &ids(&here), &far).err(),
        ),
    ];
    for (op, operand, refusal) in refusals {
        match refusal {
            Some(Error::InvalidArgument { op: named, reason }) => {
                assert_eq!(named, op);
                assert!(
                    reason.starts_with(&format!("{operand} is on another stream")),
                    "{op}: {reason}"
                );
            }
            other => panic!("{op}: {other:?}"),
        }
    }
    // Autocast casts nothing before that is noticed.
    let _scope = kitsune::amp::autocast(true, DType::F16);
    assert!(matches!(
        ops::matmul(&x, &far),
        Err(Error::InvalidArgument { op: "matmul", .. })
    ));
}
