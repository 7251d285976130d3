//! Casts of weights within autocast scopes: made once, anew after every write, and gone with the scope.
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]
#![allow(unsafe_code, reason = "launching a graph is")]

use crate::support;
use kitsune::ops;
use kitsune::ops::autocast::{Autocast, CastPolicy, OpLists, autocast};
use kitsune::optim::{Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, HostConfig, Tensor, f16};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

fn full(context: &Context, shape: [usize; 2], dtype: DType, value: f64) -> Tensor {
    Tensor::full(context, shape, dtype, value).unwrap()
}

fn weight(context: &Context, value: f64) -> Parameter {
    Parameter::new("weight", full(context, [2, 2], DType::F32, value)).unwrap()
}

/// Bytes that the cache holds now.
fn held(context: &Context) -> u64 {
    let tags = context.pool().tag_stats();
    let tag = tags.iter().find(|tag| tag.tag == "autocast");
    tag.map_or(0, |tag| tag.allocated_bytes.current)
}

/// The first element of `x · weight`, for an `x` of ones.
fn product(context: &Context, weight: &Tensor) -> f32 {
    let x = full(context, [2, 2], DType::F16, 1.0);
    let product = ops::matmul(&x, weight).unwrap();
    product.to_vec::<f16>().unwrap()[0].to_f32()
}

#[test]
fn a_weight_is_cast_once_and_dropped_with_the_outermost_scope() {
    let context = context();
    let weight = weight(&context, 3.0);
    let outer = autocast(true, DType::F16);
    assert_eq!(product(&context, weight.value()), 6.0);
    let once = held(&context);
    assert!(once > 0);
    {
        let _inner = autocast(true, DType::F16);
        assert_eq!(product(&context, weight.value()), 6.0);
        let layer = ops::linear(
            &full(&context, [1, 2], DType::F32, 1.0),
            weight.value(),
            None,
        );
        assert_eq!(layer.unwrap().into_output().dtype(), DType::F16);
    }
    assert_eq!(held(&context), once);
    {
        // Another type is another cast, a transposed view as well.
        let _inner = autocast(true, DType::Bf16);
        let x = full(&context, [2, 2], DType::F16, 1.0);
        ops::matmul(&x, weight.value()).unwrap();
        ops::matmul(&x, &weight.value().transpose(0, 1).unwrap()).unwrap();
    }
    assert_eq!(held(&context), 3 * once);
    drop(outer);
    assert_eq!(held(&context), 0);
}

#[test]
fn every_way_to_write_a_weight_is_seen() {
    let context = context();
    let weight = weight(&context, 1.0);
    let value = weight.value();
    let _scope = autocast(true, DType::F16);
    assert_eq!(product(&context, value), 2.0);
    let once = held(&context);
    value.fill(2.0).unwrap();
    assert_eq!(product(&context, value), 4.0);
    value.copy_from_slice(&[3.0f32; 4]).unwrap();
    assert_eq!(product(&context, value), 6.0);
    value.narrow(0, 0, 2).unwrap().fill(4.0).unwrap();
    assert_eq!(product(&context, value), 8.0);
    let other = full(&context, [2, 2], DType::F32, 5.0);
    value.copy_from(&other).unwrap();
    assert_eq!(product(&context, value), 10.0);
    let mut optimizer = Sgd::new(
        vec![weight.clone()],
        SgdConfig {
            learning_rate: 1.0,
            ..SgdConfig::default()
        },
    )
    .unwrap();
    weight
        .set_grad(full(&context, [2, 2], DType::F32, 4.0))
        .unwrap();
    optimizer.step_unscaled().unwrap();
    assert_eq!(product(&context, value), 2.0);
    assert_eq!(held(&context), once, "a stale cast was kept");
}

#[test]
fn activations_and_unscoped_weights_are_not_kept() {
    let context = context();
    let activation = full(&context, [2, 2], DType::F32, 1.0);
    let weight = weight(&context, 1.0);
    assert_eq!(activation.version(), None);
    let _scope = Autocast::new(DType::F16).caches_weights(false).enter();
    product(&context, &activation);
    product(&context, weight.value());
    assert_eq!(held(&context), 0);
    let _scope = autocast(true, DType::F16);
    product(&context, &activation);
    assert_eq!(held(&context), 0);
}

#[test]
fn other_threads_keep_their_own_casts() {
    let context = context();
    let weight = weight(&context, 1.0);
    let _scope = autocast(true, DType::F16);
    product(&context, weight.value());
    let once = held(&context);
    std::thread::scope(|threads| {
        let other = threads.spawn(|| {
            let _scope = autocast(true, DType::F16);
            product(&context, weight.value());
            held(&context)
        });
        assert_eq!(other.join().unwrap(), 2 * once);
    });
    assert_eq!(held(&context), once);
}

#[test]
fn a_panic_drops_the_casts() {
    let context = context();
    let weight = weight(&context, 1.0);
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _scope = autocast(true, DType::F16);
        product(&context, weight.value());
        panic!("on purpose");
    }));
    assert!(outcome.is_err());
    assert_eq!(held(&context), 0);
}

#[test]
fn a_capture_casts_for_itself() {
    let context = context();
    let weight = weight(&context, 1.0);
    let x = full(&context, [2, 2], DType::F16, 1.0);
    let out = full(&context, [2, 2], DType::F32, 0.0);
    let _scope = autocast(true, DType::F16);
    // A cast is kept, and memory of each size known, before the capture begins.
    for _ in 0..2 {
        out.copy_from(&ops::matmul(&x, weight.value()).unwrap())
            .unwrap();
    }
    context.stream().synchronize().unwrap();
    let private = context.pool().private().unwrap();
    let graph = private
        .capture(context.stream(), || {
            out.copy_from(&ops::matmul(&x, weight.value())?)
        })
        .unwrap();
    weight.value().fill(7.0).unwrap();
    // SAFETY: everything that the graph uses lives until the end of the test.
    unsafe { graph.launch(context.stream()) }.unwrap();
    assert_eq!(out.to_vec::<f32>().unwrap(), [14.0; 4]);
}

#[test]
fn ops_obey_the_lists_of_their_scope() {
    let context = context();
    let x = full(&context, [2, 2], DType::F16, 1.0);
    let _scope = Autocast::new(DType::Bf16)
        .lists(OpLists::cpu().with("matmul", CastPolicy::Single))
        .enter();
    assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F32);
    assert_eq!(
        ops::linear(&x, &x, None).unwrap().output().dtype(),
        DType::Bf16
    );
    let _inner = autocast(true, DType::Bf16);
    assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::Bf16);
}
