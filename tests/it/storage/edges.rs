//! Tensors at their edges: empty ones, views of them, and gradients without elements.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support;
use std::sync::Arc;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, HostConfig, Tensor};

fn context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
}

#[test]
fn views_of_empty_tensors_are_usable() {
    let context = context();
    let empty = Tensor::zeros(&context, [3, 0], DType::F32).unwrap();
    let view = empty.narrow(0, 2, 1).unwrap();
    view.fill(1.0).unwrap();
    assert!(view.to_vec::<f32>().unwrap().is_empty());
    assert!(view.duplicate().unwrap().is_empty());
    let huge = Tensor::zeros(&context, [usize::MAX, 0, usize::MAX], DType::F32).unwrap();
    let view = huge.narrow(0, 5, 3).unwrap().transpose(0, 2).unwrap();
    assert!(view.cast(DType::F16).unwrap().is_empty());
    assert!(view.contiguous().unwrap().is_empty());
    assert!(Tensor::zeros(&context, [usize::MAX / 2], DType::F32).is_err());
    assert!(Tensor::zeros(&context, [usize::MAX / 4], DType::F32).is_err());
}

#[test]
fn gradients_without_elements_are_stepped() {
    let context = context();
    let value = Tensor::zeros(&context, [4, 0], DType::F32).unwrap();
    let parameter = Parameter::new("empty", value).unwrap();
    let grad = Tensor::zeros(&context, [4, 0], DType::F16).unwrap();
    parameter.set_grad(grad).unwrap();
    let mut optimizer = Sgd::new(vec![parameter], SgdConfig::default()).unwrap();
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    let loss = Tensor::zeros(&context, [], DType::F32).unwrap();
    drop(scaler.scale(&loss).unwrap());
    let norm = scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
    assert_eq!(norm.item::<f64>().unwrap().to_bits(), 0);
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    optimizer.zero_grad();
    assert_eq!(scaler.stats().unwrap().applied, 1);
}

#[test]
fn a_copy_is_ordered_before_its_source_is_freed_whatever_fails() {
    let inner = support::device::device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let from = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let to = Context::with_pool(from.pool()).unwrap();
    let source = Tensor::full(&from, [1024], DType::F32, 3.0).unwrap();
    // The first wait holds the copy back until the source is written, the second the source's stream.
    faults.fail_nth(Some("stream_wait"), 2);
    let copy = source.copy_to(&to).unwrap();
    assert_eq!(faults.disarm(), 0, "the fault fired");
    assert_eq!(faults.calls("synchronize_stream"), 1, "the host waited");
    assert_eq!(copy.to_vec::<f32>().unwrap(), [3.0; 1024]);
}
