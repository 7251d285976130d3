//! Times a whole optimizer step with a scaler (check with norm, clip, AdamW, scale update), and compares it with a
//! copy, on all cores, of as many bytes as the step moves. The bytes are counted, not assumed.
//!
//! Steps and copies alternate, so that other load on the machine affects both. The figures are medians with minimum and
//! maximum, and the ratio of the two medians. The goal for 10⁸ parameters in f32 is at most 1.25 times the copy.
//! `cargo bench --bench amp_step -- 1e8` measures one size. `tests/peers/amp_step.py` does the same with PyTorch, and
//! alternates with this program if given its path: `--in-turn` makes one step for each line of standard input.
#![allow(clippy::print_stdout, reason = "figures are printed")]

#[path = "../tests/it/support/device/mod.rs"]
mod device;

use std::sync::Arc;
use std::time::{Duration, Instant};

use device::counted;
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Pool, PoolConfig, Tensor};
use rayon::prelude::*;

/// Tensors that the parameters are divided into.
const TENSORS: usize = 20;

/// The cases: name, types of weights and gradients, and whether gradients are checked while they are summed.
const CASES: [(&str, DType, DType, bool); 4] = [
    ("f32", DType::F32, DType::F32, false),
    ("f32, checked when summed", DType::F32, DType::F32, true),
    ("f16 with f32 masters", DType::F16, DType::F16, false),
    ("bf16 with f32 masters", DType::Bf16, DType::Bf16, false),
];

/// A scaler that has scaled a loss, an optimizer whose parameters have gradients, and a log of the bytes moved.
struct Trainer {
    log: Arc<counted::Log>,
    context: Context,
    scaler: GradScaler,
    optimizer: AdamW,
    produced: bool,
}

impl Trainer {
    fn new(parameters: usize, weights: DType, gradients: DType, produced: bool) -> Self {
        let log = Arc::default();
        let host = Device::host(HostConfig::default()).expect("the host has memory");
        let device = counted::device(&host, &log);
        let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
        let context = Context::with_pool(&pool).expect("the host has streams");
        let full = |dtype, value| {
            let len = parameters / TENSORS;
            Tensor::full(&context, [len], dtype, value).expect("there is memory")
        };
        let parameters = (0..TENSORS).map(|index| {
            let parameter = Parameter::new(format!("p{index}"), full(weights, 0.5));
            let parameter = parameter.expect("floats are parameters");
            parameter.set_grad(full(gradients, 0.25)).expect("it fits");
            parameter
        });
        let optimizer = AdamW::new(parameters.collect(), AdamWConfig::default());
        let config = AmpConfig {
            init_scale: 2.0,
            ..AmpConfig::default()
        };
        let scaler = GradScaler::new(&context, config).expect("the settings work");
        let loss = Tensor::full(&context, [], DType::F32, 1.0).expect("there is memory");
        scaler.scale(&loss).expect("floats can be scaled");
        Self {
            optimizer: optimizer.expect("the settings work"),
            scaler,
            context,
            log,
            produced,
        }
    }

    /// The work before the step, which is not measured.
    fn prepare(&self) {
        for parameter in self.optimizer.parameters().iter().filter(|_| self.produced) {
            let term = parameter.grad().expect("set above").duplicate();
            let term = term.expect("there is memory");
            // A new tensor, because the gradient stays from step to step and would grow.
            let first = Tensor::full(&self.context, term.shape(), term.dtype(), 0.125);
            let first = first.expect("there is memory");
            parameter.zero_grad();
            for term in [first, term] {
                let added = self.scaler.accumulate(parameter, term);
                added.expect("the types fit");
            }
        }
        self.wait();
    }

    fn wait(&self) {
        self.context.synchronize().expect("the stream works");
    }

    fn step(&mut self) {
        let norm = self.scaler.clip_grad_norm(&self.optimizer, 1.0);
        drop(norm.expect("gradients are there"));
        let outcome = self.scaler.step(&mut self.optimizer);
        drop(outcome.expect("the gradients fit"));
        self.scaler.update().expect("a step came before");
        self.wait();
    }

    /// Bytes that a step moves.
    fn traffic(&mut self) -> u64 {
        // The first step also builds tables.
        for _ in 0..2 {
            self.prepare();
            self.log.lock().clear();
            self.step();
        }
        counted::bytes(&self.log)
    }
}

/// Copies `from` to `to`, divided among all cores.
fn copy(from: &[u64], to: &mut [u64]) {
    let share = from.len().div_ceil(rayon::current_num_threads());
    let shares = from.par_chunks(share).zip(to.par_chunks_mut(share));
    shares.for_each(|(from, to)| to.copy_from_slice(from));
}

fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// Median, minimum and maximum, in milliseconds.
fn summary(mut times: Vec<Duration>) -> [f64; 3] {
    times.sort();
    [times[times.len() / 2], times[0], times[times.len() - 1]].map(|time| 1e3 * time.as_secs_f64())
}

fn measure(parameters: usize, rounds: usize) {
    for (name, weights, gradients, produced) in CASES {
        let mut trainer = Trainer::new(parameters, weights, gradients, produced);
        let bytes = trainer.traffic();
        let words = usize::try_from(bytes / 16).expect("it is in memory");
        let (from, mut to) = (vec![1; words], vec![0; words]);
        copy(&from, &mut to);
        let (mut copies, mut steps) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            copies.push(time(|| copy(&from, &mut to)));
            trainer.prepare();
            steps.push(time(|| trainer.step()));
        }
        let ([step, ..], [copy, ..]) = (summary(steps.clone()), summary(copies.clone()));
        println!(
            "{parameters:>9} parameters, {name}: {:.1} bytes each; step / copy {:.2}",
            bytes as f64 / parameters as f64,
            step / copy
        );
        for (what, times) in [("step", steps), ("copy", copies)] {
            let [median, least, most] = summary(times);
            println!("          {what}: median {median:.3} ms, least {least:.3}, most {most:.3}");
        }
    }
}

/// For each line of standard input, makes a step of each case with f32 weights, and prints their times on one line.
fn in_turn(parameters: usize) {
    let cases = CASES
        .iter()
        .filter(|(_, weights, ..)| *weights == DType::F32);
    let trainer = |&(_, weights, gradients, produced): &_| {
        let mut trainer = Trainer::new(parameters, weights, gradients, produced);
        trainer.traffic();
        trainer
    };
    let mut trainers: Vec<_> = cases.map(trainer).collect();
    for line in std::io::stdin().lines() {
        line.expect("input is text");
        let times = trainers.iter_mut().map(|trainer| {
            trainer.prepare();
            1e3 * time(|| trainer.step()).as_secs_f64()
        });
        println!(
            "{}",
            times
                .map(|time| format!("{time:.3}"))
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    if arguments.iter().any(|argument| argument == "--test") {
        // Only checks that the bench runs, with little memory.
        return measure(100_000, 1);
    }
    let sizes = [(1_000_000, 101), (10_000_000, 31), (100_000_000, 11)];
    let asked: Vec<f64> = arguments
        .iter()
        .filter_map(|one| one.parse().ok())
        .collect();
    let takes_turns = arguments.iter().any(|argument| argument == "--in-turn");
    for (parameters, rounds) in sizes {
        match asked.is_empty() || asked.contains(&(parameters as f64)) {
            true if takes_turns => return in_turn(parameters),
            true => measure(parameters, rounds),
            false => {}
        }
    }
}
