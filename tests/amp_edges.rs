//! A scaler off the beaten track: parameters that change, replays, calls that fail half way.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "replaying a graph is unsafe, and a test fails by panicking"
)]

mod device_support;

use std::sync::Arc;

use kitsune::amp::{AmpConfig, GradScaler, Outcome};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{Optimizer, OptimizerId, Parameter, Sgd, SgdConfig, StepInputs};
use kitsune::{Context, DType, Device, HostConfig, Result, Tensor};

fn new_context() -> Context {
    Context::new(&device_support::device(HostConfig::default())).unwrap()
}

fn parameter(context: &Context, name: &str) -> Parameter {
    Parameter::new(name, Tensor::zeros(context, [4], DType::F32).unwrap()).unwrap()
}

/// An optimizer whose parameters can be exchanged, and which moves nothing.
struct Swap(OptimizerId, Vec<Parameter>);

impl Optimizer for Swap {
    fn id(&self) -> &OptimizerId {
        &self.0
    }
    fn parameters(&self) -> &[Parameter] {
        &self.1
    }
    fn step(&mut self, _: &StepInputs) -> Result<()> {
        Ok(())
    }
}

/// A scaler that has scaled a loss.
fn scaled(context: &Context) -> GradScaler {
    let scaler = GradScaler::new(context, AmpConfig::default()).unwrap();
    let loss = Tensor::zeros(context, [], DType::F32).unwrap();
    drop(scaler.scale(&loss).unwrap());
    scaler
}

#[test]
fn names_follow_the_parameters() {
    let context = new_context();
    let mut scaler = scaled(&context);
    let mut optimizer = Swap(OptimizerId::new(), vec![parameter(&context, "old")]);
    let bad = || Tensor::full(&context, [4], DType::F32, f64::INFINITY).unwrap();
    optimizer.1[0].set_grad(bad()).unwrap();
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    optimizer.1 = vec![parameter(&context, "new")];
    optimizer.1[0].set_grad(bad()).unwrap();
    let outcome = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    let Outcome::Skipped(report) = outcome.wait().unwrap() else {
        panic!("the step was applied");
    };
    assert_eq!(report.tensors[0].name, "new");
}

#[test]
fn steps_after_replays_are_told_apart() {
    let context = new_context();
    let mut scaler = scaled(&context);
    let weight = parameter(&context, "w");
    let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
    let grad = Tensor::zeros(&context, [4], DType::F32).unwrap();
    weight.set_grad(grad.clone()).unwrap();
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    let graph = context
        .stream()
        .capture(|| {
            let _ = scaler.step(&mut optimizer)?;
            scaler.update()
        })
        .unwrap();
    for round in 0..6 {
        grad.fill(if round % 2 == 0 { f64::NAN } else { 0.0 })
            .unwrap();
        // SAFETY: the scaler, the weight and its gradient live on.
        unsafe { graph.launch(context.stream()) }.unwrap();
    }
    context.synchronize().unwrap();
    grad.fill(0.0).unwrap();
    let mut applied = Vec::new();
    for _ in 0..4 {
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        applied.push(outcome.is_applied().unwrap());
    }
    assert_eq!(applied, [true; 4]);
}

#[test]
fn a_failed_clip_does_not_leave_a_flag_behind() {
    let inner = device_support::device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    for nth in 1..4 {
        let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
        let mut scaler = scaled(&context);
        let weight = parameter(&context, "w");
        let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        weight
            .set_grad(Tensor::full(&context, [4], DType::F32, f64::INFINITY).unwrap())
            .unwrap();
        faults.fail_nth(Some("launch"), nth);
        let failed = scaler.clip_grad_norm(&optimizer, 1.0).is_err();
        faults.disarm();
        if !failed {
            continue;
        }
        // The program gives the batch up and goes on with the next.
        let _ = scaler.update();
        weight
            .set_grad(Tensor::zeros(&context, [4], DType::F32).unwrap())
            .unwrap();
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert!(outcome.is_applied().unwrap(), "launch {nth}");
    }
}
