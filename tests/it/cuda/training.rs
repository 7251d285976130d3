//! Training on the CUDA device over a simulated driver, which runs the device kernels compiled for the host.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests load the simulated driver, and fail by panicking"
)]

use std::collections::BTreeSet;

use crate::support::cuda::Sim;
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamW, AdamWConfig, Moments, Optimizer, ParamGroup, Parameter};
use kitsune::{Context, DType, Result, Tensor, ops};

/// All that a training step may ask of the library: work for the stream. Nothing here waits, takes memory or gives it back.
const ENQUEUES: [&str; 6] = [
    "cuLaunchKernel",
    "cuMemcpyAsync",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    // Before an upload: whether its source is pinned, and must be kept for replays.
    "cuPointerGetAttribute",
    "cuStreamIsCapturing",
];

/// What is asked of the library that `ENQUEUES` does not allow, each once.
fn beyond_enqueuing(names: &[String]) -> BTreeSet<&str> {
    let names = names.iter().map(String::as_str);
    names.filter(|name| !ENQUEUES.contains(name)).collect()
}

/// A network of one hidden layer, and what trains it.
struct Trainer {
    context: Context,
    hidden: Parameter,
    output: Parameter,
    optimizer: AdamW,
    config: AmpConfig,
    scaler: GradScaler,
}

fn weight(context: &Context, name: &str, shape: [usize; 2]) -> Parameter {
    let value = |index: usize| (index as f32 * 0.618_034).fract() - 0.5;
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
    Parameter::new(name, Tensor::from_slice(context, shape, &values).unwrap()).unwrap()
}

impl Trainer {
    fn new(context: Context, config: AmpConfig) -> Self {
        let (hidden, output) = (
            weight(&context, "hidden", [32, 16]),
            weight(&context, "output", [10, 32]),
        );
        let parameters = vec![hidden.clone(), output.clone()];
        Self {
            optimizer: AdamW::new(parameters, AdamWConfig::default()).unwrap(),
            scaler: GradScaler::new(&context, config.clone()).unwrap(),
            context,
            hidden,
            output,
            config,
        }
    }

    /// Images and digits of batch `number`.
    fn batch(&self, number: u32) -> Result<(Tensor, Tensor)> {
        let pixels: Vec<f32> = (0..8 * 16)
            .map(|at| ((at + number) % 7) as f32 / 7.0)
            .collect();
        let digits: Vec<u32> = (0..8).map(|at| (at + number) % 10).collect();
        let images = Tensor::from_slice(&self.context, [8, 16], &pixels)?;
        let digits = Tensor::from_slice(&self.context, [8], &digits)?;
        Ok((images, digits))
    }

    fn step(&mut self, (images, digits): &(Tensor, Tensor)) -> Result<Tensor> {
        let scope = self.config.autocast();
        let below = ops::linear(images, self.hidden.value(), None)?;
        let active = ops::relu(below.output())?;
        let above = ops::linear(&active, self.output.value(), None)?;
        let loss = ops::softmax_cross_entropy(above.output(), digits)?;
        drop(scope);
        let above = above.backward(&self.scaler.scale(&loss)?.backward()?)?;
        let below = below.backward(&ops::relu_backward(below.output(), &above.input)?)?;
        self.output.set_grad(above.weight)?;
        self.hidden.set_grad(below.weight)?;
        self.scaler.clip_grad_norm(&self.optimizer, 1.0)?;
        drop(self.scaler.step(&mut self.optimizer)?);
        self.scaler.update()?;
        self.optimizer.zero_grad();
        Ok(loss.value().clone())
    }
}

fn trainer(config: AmpConfig) -> (Sim, Trainer) {
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    let trainer = Trainer::new(Context::new(&device).unwrap(), config);
    (sim, trainer)
}

/// Asserts that no call failed. Where the library knows nothing of an address, it is ordinary memory: that is asked
/// before each upload.
#[track_caller]
fn assert_no_failure(sim: &Sim) {
    let log = sim.log();
    let failed = |line: &&str| !line.ends_with(" 0") && !line.starts_with("cuPointerGetAttribute");
    assert_eq!(log.lines().find(failed), None);
}

#[test]
fn a_training_step_makes_nobody_wait() {
    let (sim, mut trainer) = trainer(AmpConfig::default());
    let mut losses = Vec::new();
    let mut log = String::new();
    for number in 0..15 {
        if number == 5 {
            log = sim.log();
        }
        let batch = trainer.batch(number).unwrap();
        losses.push(trainer.step(&batch).unwrap());
    }
    let names = sim.names_since(&log);
    assert!(names.iter().any(|name| name == "cuLaunchKernel"));
    assert_eq!(beyond_enqueuing(&names), BTreeSet::new());
    let loss: f32 = losses[14].item().unwrap();
    assert!(loss.is_finite() && loss < 4.0, "{loss}");
    assert_no_failure(&sim);
}

/// The library refuses in a capture what waits for a captured stream or asks an event of one; what takes memory or
/// gives it back, it allows to careful programs, and a primed capture needs none.
#[test]
fn a_captured_training_step_asks_for_nothing_that_a_capture_forbids() {
    let (sim, mut trainer) = trainer(AmpConfig::default());
    let batch = trainer.batch(0).unwrap();
    let first: f32 = trainer.step(&batch).unwrap().item().unwrap();
    let stream = trainer.context.stream().clone();
    let private = trainer.context.pool().private().unwrap();
    private.prime(|| trainer.step(&batch).map(drop)).unwrap();
    let log = sim.log();
    let mut loss = None;
    let graph = private.capture(&stream, || {
        loss = Some(trainer.step(&batch)?);
        Ok(())
    });
    let graph = graph.unwrap();
    let names = sim.names_since(&log);
    let place = |name: &str| names.iter().position(|called| called == name).unwrap();
    let (begin, end) = (
        place("cuStreamBeginCapture_v2"),
        place("cuStreamEndCapture"),
    );
    let captured = &names[begin + 1..end];
    assert!(captured.iter().any(|name| name == "cuLaunchKernel"));
    assert_eq!(beyond_enqueuing(captured), BTreeSet::new());
    for _ in 0..20 {
        // SAFETY: the graph's memory is its own, and its parameters live until the end.
        unsafe { graph.launch(&stream) }.unwrap();
    }
    let last: f32 = loss.unwrap().item().unwrap();
    assert!(last < first, "{first} at first, {last} in the end");
    assert_no_failure(&sim);
}

/// A step is two launches, whatever the number of groups and parameters; other settings are one copy, which nobody
/// waits for.
#[test]
fn groups_move_in_two_launches_and_take_settings_by_a_copy() {
    let (sim, trainer) = trainer(AmpConfig::default());
    let parameters: Vec<_> = (0..50)
        .map(|number| weight(&trainer.context, &number.to_string(), [7, 9]))
        .collect();
    for one in &parameters {
        let gradient = Tensor::full(&trainer.context, [7, 9], DType::F32, 1.0).unwrap();
        one.set_grad(gradient).unwrap();
    }
    let groups = parameters.chunks(5).enumerate().map(|(number, part)| {
        let config = AdamWConfig {
            amsgrad: number % 2 == 0,
            moments: [Moments::Full, Moments::Bf16][number / 2 % 2],
            ..AdamWConfig::default()
        };
        ParamGroup::new(part.to_vec(), config)
    });
    let mut optimizer = AdamW::with_groups(groups.collect()).unwrap();
    optimizer.step_unscaled().unwrap();
    let log = sim.log();
    optimizer.set_learning_rate(0.5).unwrap();
    optimizer.step_unscaled().unwrap();
    let names = sim.names_since(&log);
    let count = |name: &str| names.iter().filter(|called| *called == name).count();
    assert_eq!(
        (count("cuLaunchKernel"), count("cuMemcpyHtoDAsync_v2")),
        (2, 1),
        "{names:?}"
    );
    assert_eq!(beyond_enqueuing(&names), BTreeSet::new());
}

#[test]
fn watching_for_alarms_makes_nobody_wait() {
    let (sim, mut trainer) = trainer(AmpConfig {
        alarm_interval: 1,
        timing: true,
        ..AmpConfig::default()
    });
    let batch = trainer.batch(0).unwrap();
    for _ in 0..5 {
        trainer.step(&batch).unwrap();
    }
    let log = sim.log();
    for _ in 0..10 {
        trainer.step(&batch).unwrap();
    }
    let names = sim.names_since(&log);
    // Counters are copied in the stream's order, and an event tells when they are there.
    let watches = BTreeSet::from(["cuEventQuery", "cuEventRecord", "cuMemcpyDtoHAsync_v2"]);
    let beyond = beyond_enqueuing(&names);
    assert!(beyond.contains("cuEventQuery"), "{beyond:?}");
    assert!(beyond.is_subset(&watches), "{beyond:?}");
    let times = trainer.scaler.stats().unwrap().times.unwrap();
    assert!(times.check.as_nanos() > 0 && times.clip.as_nanos() > 0 && times.step.as_nanos() > 0);
}
