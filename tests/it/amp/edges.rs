//! A scaler off the beaten track: parameters that change, replays, calls that fail half way.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "replaying a graph is unsafe, and a test fails by panicking"
)]

use crate::support;
use std::sync::Arc;

use kitsune::amp::{AmpConfig, GradScaler, Outcome};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{
    AdamW, AdamWConfig, Ema, Optimizer, OptimizerId, Parameter, Sgd, SgdConfig, StepInputs,
};
use kitsune::{Context, DType, Device, Error, HostConfig, Result, Tensor};

fn new_context() -> Context {
    Context::new(&support::device::device(HostConfig::default())).unwrap()
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
    let inner = support::device::device(HostConfig::default());
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

fn filled(context: &Context, value: f64) -> Tensor {
    Tensor::full(context, [4], DType::F32, value).unwrap()
}

fn first(parameter: &Parameter) -> f32 {
    parameter.value().to_vec::<f32>().unwrap()[0]
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, named: &str) {
    match result {
        Err(Error::InvalidArgument { reason, .. }) => assert!(reason.contains(named), "{reason}"),
        other => panic!("{other:?}"),
    }
}

/// Ways to have gradients looked at before the step.
type Look = fn(&mut GradScaler, &Sgd) -> Result<()>;

const LOOKS: [(&str, Look); 3] = [
    ("check", |scaler, optimizer| scaler.check(optimizer)),
    ("clip", |scaler, optimizer| {
        scaler.clip_grad_norm(optimizer, 1e9).map(drop)
    }),
    ("unscale", |scaler, optimizer| scaler.unscale(optimizer)),
];

/// A gradient that comes after the others were looked at was neither checked nor unscaled: no step is taken with it.
#[test]
fn a_gradient_that_comes_late_is_refused() {
    let context = new_context();
    for (how, look) in LOOKS {
        let (a, b) = (parameter(&context, "a"), parameter(&context, "b"));
        let mut optimizer = Sgd::new(
            vec![a.clone(), b.clone()],
            SgdConfig {
                learning_rate: 1.0,
                ..SgdConfig::default()
            },
        )
        .unwrap();
        let mut scaler = scaled(&context);
        a.set_grad(filled(&context, 65536.0)).unwrap();
        look(&mut scaler, &optimizer).unwrap();
        b.set_grad(filled(&context, 65536.0)).unwrap();
        refused(scaler.step(&mut optimizer), "`b` was missing");
        assert_eq!((first(&a), first(&b)), (0.0, 0.0), "{how}");
        if how == "unscale" {
            refused(scaler.clip_grad_norm(&optimizer, 1.0), "`b` was missing");
            assert_eq!(a.grad().unwrap().to_vec::<f32>().unwrap(), [1.0; 4]);
        }
        // Without it the step goes on where it was.
        b.zero_grad();
        assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
        scaler.update().unwrap();
        assert_eq!((first(&a), first(&b)), (-1.0, 0.0), "{how}");
    }
}

#[test]
fn a_gradient_that_changes_after_the_check_is_refused() {
    let context = new_context();
    for (how, look) in LOOKS {
        let weight = parameter(&context, "w");
        let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        let mut scaler = scaled(&context);
        let scaled_grad = || scaler.scale(&filled(&context, 1.0)).unwrap();
        let (before, after) = (scaled_grad(), scaled_grad());
        weight.set_scaled_grad(before, scaler.tag()).unwrap();
        look(&mut scaler, &optimizer).unwrap();
        weight.set_scaled_grad(after, scaler.tag()).unwrap();
        let reason = match how {
            "unscale" => "`w` is still scaled",
            _ => "`w` changed after it was checked",
        };
        refused(scaler.step(&mut optimizer), reason);
        assert_eq!(first(&weight), 0.0, "{how}");
        // An unscaled gradient may be replaced by one that needs no scale, as in PyTorch; a checked one may not.
        weight.set_grad(filled(&context, 0.0)).unwrap();
        assert_eq!(
            scaler.step(&mut optimizer).is_ok(),
            how == "unscale",
            "{how}"
        );
        scaler.update().unwrap();
    }
}

#[test]
fn an_optimizer_that_changes_after_the_check_is_refused() {
    let context = new_context();
    let (a, b) = (parameter(&context, "a"), parameter(&context, "b"));
    a.set_grad(filled(&context, 1.0)).unwrap();
    let mut optimizer = Swap(OptimizerId::new(), vec![a.clone()]);
    let mut scaler = scaled(&context);
    scaler.check(&optimizer).unwrap();
    optimizer.1.push(b);
    refused(scaler.step(&mut optimizer), "2 parameters, but had 1");
    optimizer.1.pop();
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
}

/// Gradients may be there for some parameters in one step and for others in the next: those without one stay, weight,
/// moments and step count; a skipped step moves nobody; reports name the right one.
#[test]
fn gradients_may_differ_in_number_from_step_to_step() {
    let context = new_context();
    let parameters = ["a", "b", "c"].map(|name| parameter(&context, name));
    let mut optimizer = AdamW::new(parameters.to_vec(), AdamWConfig::default()).unwrap();
    let mut scaler = scaled(&context);
    let mut counts = [0; 3];
    let inf = f64::INFINITY;
    // What each parameter is given, and which overflows.
    let steps: [([Option<f64>; 3], Option<&str>); 6] = [
        ([Some(1.0), Some(1.0), None], None),
        ([None, Some(1.0), None], None),
        ([Some(1.0), Some(1.0), Some(inf)], Some("c")),
        ([Some(1.0), Some(1.0), Some(1.0)], None),
        ([None, None, Some(-inf)], Some("c")),
        ([Some(inf), None, Some(1.0)], Some("a")),
    ];
    for (number, (gradients, bad)) in steps.into_iter().enumerate() {
        let before = parameters.each_ref().map(first);
        for (parameter, gradient) in parameters.iter().zip(gradients) {
            parameter.zero_grad();
            if let Some(gradient) = gradient {
                parameter.set_grad(filled(&context, gradient)).unwrap();
            }
        }
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        match (outcome.wait().unwrap(), bad) {
            (Outcome::Applied, None) => {}
            (Outcome::Skipped(report), Some(bad)) => {
                let names: Vec<_> = report.tensors.iter().map(|one| &one.name[..]).collect();
                assert_eq!(names, [bad], "step {number}");
            }
            other => panic!("step {number}: {other:?}"),
        }
        let after = parameters.each_ref().map(first);
        for place in 0..3 {
            let moves = bad.is_none() && gradients[place].is_some();
            counts[place] += u32::from(moves);
            assert_eq!(
                before[place] != after[place],
                moves,
                "step {number}, {place}"
            );
        }
        assert_eq!(optimizer.step_counts().to_vec::<u32>().unwrap(), counts);
    }
    // None at all is an error, and the next step goes on.
    optimizer.zero_grad();
    assert!(scaler.step(&mut optimizer).is_err());
    parameters[0].set_grad(filled(&context, 1.0)).unwrap();
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
}

/// What `outcome` says went wrong.
fn refusal<T>(outcome: kitsune::Result<T>) -> String {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_lives_on_another_stream_is_named_and_left_alone() {
    let here = new_context();
    let there = Context::with_pool(here.pool()).unwrap();
    let one = |context: &Context| Tensor::full(context, [], DType::F32, 1.0).unwrap();
    let mut scaler = GradScaler::new(&here, AmpConfig::default()).unwrap();
    let told = refusal(scaler.scale(&one(&there)));
    assert!(told.starts_with("scale: Tensor(f32 []"), "{told}");
    assert!(
        told.ends_with("than the scaler; copy_to its context first"),
        "{told}"
    );
    scaler.scale(&one(&here)).unwrap();

    let weight = parameter(&there, "elsewhere");
    weight
        .set_grad(Tensor::full(&there, [4], DType::F32, 1.0).unwrap())
        .unwrap();
    let mut optimizer = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
    for (call, told) in [
        ("check", refusal(scaler.check(&optimizer))),
        ("unscale", refusal(scaler.unscale(&optimizer))),
        (
            "clip_grad_norm",
            refusal(scaler.clip_grad_norm(&optimizer, 1.0)),
        ),
        ("step", refusal(scaler.step(&mut optimizer))),
    ] {
        let expected =
            format!("{call}: parameter `elsewhere` is on another stream than the scaler");
        assert_eq!(told, expected);
    }
    // The wrong scaler has no claim to it.
    let mut right = GradScaler::new(&there, AmpConfig::default()).unwrap();
    right.scale(&one(&there)).unwrap();
    assert!(right.step(&mut optimizer).unwrap().is_applied().unwrap());

    let mut ema = Ema::new(&[weight], 0.5).unwrap();
    let told = refusal(ema.update(Some(&one(&here))));
    assert!(
        told.starts_with("Ema::update: the flag, Tensor(f32 []"),
        "{told}"
    );
    assert!(
        told.ends_with("is on another stream than the averages"),
        "{told}"
    );
}

#[test]
fn parameters_that_share_memory_are_refused_by_name() {
    let context = new_context();
    let both = Tensor::zeros(&context, [4, 2], DType::F32).unwrap();
    let part = |name: &str, start: usize, len: usize| {
        Parameter::new(name, both.narrow(0, start, len).unwrap()).unwrap()
    };
    let make = |parameters: [Parameter; 2]| Sgd::new(parameters.to_vec(), SgdConfig::default());
    let told = refusal(make([part("upper", 0, 3), part("lower", 2, 2)]));
    assert_eq!(told, "Sgd: parameters `upper` and `lower` share memory");
    let tied = AdamW::new(
        vec![part("a", 0, 4), part("b", 0, 4)],
        AdamWConfig::default(),
    );
    assert!(refusal(tied).contains("`a` and `b` share memory"));
    // Side by side they do not.
    make([part("upper", 0, 2), part("lower", 2, 2)]).unwrap();
}

#[test]
fn a_gradient_is_not_added_to_itself() {
    let context = new_context();
    let scaler = GradScaler::new(
        &context,
        AmpConfig {
            init_scale: 1.0,
            ..AmpConfig::default()
        },
    )
    .unwrap();
    let twos = || Tensor::full(&context, [4], DType::F32, 2.0).unwrap();
    for through_scaler in [false, true] {
        let weight = parameter(&context, "weight");
        let add = |gradient: Tensor| match through_scaler {
            false => weight.accumulate_grad(gradient),
            true => scaler.accumulate(&weight, gradient),
        };
        let gradient = twos();
        add(gradient.clone()).unwrap();
        let told = refusal(add(gradient.clone()));
        assert!(
            told.contains("`weight` has a gradient that shares memory"),
            "{told}"
        );
        add(gradient.duplicate().unwrap()).unwrap();
        assert_eq!(weight.grad().unwrap().to_vec::<f32>().unwrap(), [4.0; 4]);
    }
    // Where the sum has a buffer of its own, terms may come again.
    let weight = parameter(&context, "weight");
    weight.accumulate_in_f32().unwrap();
    let gradient = twos();
    for _ in 0..3 {
        weight.accumulate_grad(gradient.clone()).unwrap();
    }
    assert_eq!(weight.grad().unwrap().to_vec::<f32>().unwrap(), [6.0; 4]);
}
