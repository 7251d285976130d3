//! Which types ops compute in, and give, inside and outside autocast scopes.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use crate::support;
use kitsune::ops;
use kitsune::ops::autocast::autocast;
use kitsune::{Context, DType, HostConfig, Tensor};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

fn full(context: &Context, shape: [usize; 2], dtype: DType, value: f64) -> Tensor {
    Tensor::full(context, shape, dtype, value).unwrap()
}

#[test]
fn products_run_in_the_type_of_the_scope() {
    let context = context();
    for dtype in [DType::F16, DType::Bf16] {
        for given in [DType::F16, DType::Bf16, DType::F32] {
            let (a, b) = (
                full(&context, [2, 3], DType::F32, 1.0),
                full(&context, [3, 2], given, 2.0),
            );
            let _scope = autocast(true, dtype);
            let product = ops::matmul(&a, &b).unwrap();
            assert_eq!(product.dtype(), dtype);
            assert_eq!(
                product.cast(DType::F32).unwrap().to_vec::<f32>().unwrap(),
                [6.0; 4]
            );
            let weight = full(&context, [4, 3], given, 1.0);
            assert_eq!(
                ops::linear(&a, &weight, None).unwrap().output().dtype(),
                dtype
            );
        }
    }
}

#[test]
fn outside_a_scope_types_stay_and_do_not_mix() {
    let context = context();
    let (x, w) = (
        full(&context, [2, 3], DType::F16, 1.0),
        full(&context, [4, 3], DType::F32, 1.0),
    );
    let message = ops::linear(&x, &w, None).unwrap_err().to_string();
    assert!(
        message.contains("linear") && message.contains("f16 and f32"),
        "{message}"
    );
    assert_eq!(
        ops::linear(&w, &w, None).unwrap().output().dtype(),
        DType::F32
    );
    let _scope = autocast(false, DType::F16);
    assert!(ops::linear(&x, &w, None).is_err());
}

#[test]
fn f64_is_never_cast() {
    let context = context();
    let wide = full(&context, [2, 2], DType::F64, 1.0);
    let narrow = full(&context, [2, 2], DType::F32, 1.0);
    let _scope = autocast(true, DType::F16);
    assert_eq!(ops::matmul(&wide, &wide).unwrap().dtype(), DType::F64);
    assert!(ops::matmul(&wide, &narrow).is_err());
}

#[test]
fn sums_and_losses_run_in_f32_and_the_rest_as_it_comes() {
    let context = context();
    let x = full(&context, [64, 64], DType::F16, 60_000.0);
    let labels = Tensor::zeros(&context, [64], DType::U32).unwrap();
    let _scope = autocast(true, DType::F16);
    let sum = ops::sum(&x).unwrap();
    assert_eq!(
        (sum.dtype(), sum.item::<f32>().unwrap()),
        (DType::F32, 4096.0 * 60_000.0)
    );
    let loss = ops::softmax_cross_entropy(&x, &labels).unwrap();
    assert_eq!(loss.value().dtype(), DType::F32);
    assert_eq!(loss.backward().unwrap().dtype(), DType::F16);
    assert_eq!(ops::relu(&x).unwrap().dtype(), DType::F16);
    let single = full(&context, [64, 64], DType::F32, 1.0);
    assert_eq!(ops::gelu(&single).unwrap().dtype(), DType::F32);
    assert_eq!(ops::add(&x, &single).unwrap().dtype(), DType::F32);
}

#[test]
fn gradients_have_the_types_of_the_operands() {
    let context = context();
    let x = full(&context, [2, 3], DType::Bf16, 1.0);
    let weight = full(&context, [4, 3], DType::F32, 1.0);
    let bias = Tensor::full(&context, [4], DType::F32, 0.5).unwrap();
    let layer = {
        let _scope = autocast(true, DType::F16);
        ops::linear(&x, &weight, Some(&bias)).unwrap()
    };
    let output = layer.output();
    assert_eq!(
        (
            output.dtype(),
            output.to_vec::<kitsune::f16>().unwrap()[0].to_f32()
        ),
        (DType::F16, 3.5)
    );
    // The backward pass runs outside the scope, and in the type of the forward pass nevertheless.
    for dtype in [DType::F16, DType::F32] {
        let gradients = layer.backward(&full(&context, [2, 4], dtype, 1.0)).unwrap();
        assert_eq!(gradients.input.dtype(), DType::Bf16);
        assert_eq!(gradients.weight.dtype(), DType::F32);
        assert_eq!(gradients.weight.to_vec::<f32>().unwrap(), [2.0; 12]);
        let bias = gradients.bias.unwrap();
        assert_eq!(
            (bias.dtype(), bias.to_vec::<f32>().unwrap()),
            (DType::F32, vec![2.0; 4])
        );
    }
}

#[test]
fn gradients_that_overflow_the_type_of_the_scope_are_infinite() {
    let context = context();
    let (x, weight) = (
        full(&context, [4, 1], DType::F32, 1.0),
        full(&context, [1, 1], DType::F32, 1.0),
    );
    let grad_out = full(&context, [4, 1], DType::F32, 30_000.0);
    let layer = {
        let _scope = autocast(true, DType::F16);
        ops::linear(&x, &weight, None).unwrap()
    };
    let gradient = layer.backward(&grad_out).unwrap().weight;
    assert_eq!(gradient.item::<f32>().unwrap(), f32::INFINITY);
    let layer = ops::linear(&x, &weight, None).unwrap();
    assert_eq!(
        layer
            .backward(&grad_out)
            .unwrap()
            .weight
            .item::<f32>()
            .unwrap(),
        120_000.0
    );
}

#[test]
fn a_scope_that_unwinds_leaves_nothing_behind() {
    let context = context();
    let x = full(&context, [2, 2], DType::F32, 1.0);
    let outcome = std::panic::catch_unwind(|| {
        let _scope = autocast(true, DType::F16);
        panic!("on purpose");
    });
    assert!(outcome.is_err());
    assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F32);
}

#[test]
fn other_threads_are_not_in_the_scope() {
    let context = context();
    let x = full(&context, [2, 2], DType::F32, 1.0);
    let _scope = autocast(true, DType::Bf16);
    std::thread::scope(|threads| {
        let other = threads.spawn(|| ops::matmul(&x, &x).unwrap().dtype());
        assert_eq!(other.join().unwrap(), DType::F32);
    });
    assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::Bf16);
}
