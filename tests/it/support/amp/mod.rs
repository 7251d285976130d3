//! What the tests of mixed precision and optimizers share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a program takes the suites it needs"
)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod boxed;
pub mod oracle;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Element, HostConfig, Pool, PoolConfig, Tensor};

/// A context on the device under test, whose free memory is poisoned, so that nothing relies on fresh zeros.
pub fn context() -> Context {
    let device = crate::support::device::device(HostConfig::default());
    let pool = Pool::new(
        &device,
        PoolConfig {
            poison: true,
            ..PoolConfig::default()
        },
    )
    .unwrap();
    Context::with_pool(&pool).unwrap()
}

pub fn tensor<T: Element>(context: &Context, values: &[T]) -> Tensor {
    Tensor::from_slice(context, [values.len()], values).unwrap()
}

/// A parameter of these values.
pub fn parameter<T: Element>(context: &Context, name: &str, values: &[T]) -> Parameter {
    Parameter::new(name, tensor(context, values)).unwrap()
}

/// A parameter of ones with this gradient.
pub fn ones<T: Element>(context: &Context, name: &str, grad: &[T]) -> Parameter {
    let value = Tensor::full(context, [grad.len()], T::DTYPE, 1.0).unwrap();
    let parameter = Parameter::new(name, value).unwrap();
    set_grad(&parameter, grad);
    parameter
}

pub fn set_grad<T: Element>(parameter: &Parameter, grad: &[T]) {
    let value = parameter.value();
    let grad = Tensor::from_slice(value.context(), value.shape(), grad).unwrap();
    parameter.set_grad(grad).unwrap();
}

pub fn grad<T: Element>(parameter: &Parameter) -> Vec<T> {
    parameter.grad().unwrap().to_vec().unwrap()
}

pub fn value<T: Element>(parameter: &Parameter) -> Vec<T> {
    parameter.value().to_vec().unwrap()
}

/// Plain gradient descent of width 1 unless told otherwise.
pub fn sgd(parameters: &[&Parameter], learning_rate: f64) -> Sgd {
    let config = SgdConfig {
        learning_rate,
        ..SgdConfig::default()
    };
    Sgd::new(
        parameters
            .iter()
            .map(|parameter| (*parameter).clone())
            .collect(),
        config,
    )
    .unwrap()
}

/// A scaler of this scale that a loss was scaled with, so that steps are allowed.
pub fn scaler(context: &Context, init_scale: f64) -> GradScaler {
    scaler_with(
        context,
        AmpConfig {
            init_scale,
            ..AmpConfig::default()
        },
    )
}

pub fn scaler_with(context: &Context, config: AmpConfig) -> GradScaler {
    let scaler = GradScaler::new(context, config).unwrap();
    let loss = Tensor::full(context, [], DType::F32, 1.0).unwrap();
    scaler.scale(&loss).unwrap();
    scaler
}

/// The optimizer's flag now.
pub fn flag(scaler: &GradScaler, optimizer: &impl Optimizer) -> f32 {
    scaler.found_inf(optimizer).unwrap().item().unwrap()
}
