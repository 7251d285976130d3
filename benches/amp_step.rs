//! The whole optimizer step under a scaler: check with norm, clip, AdamW, next scale, on f32 parameters.
//!
//! A parameter takes 32 bytes of traffic: the check reads the gradient; AdamW reads gradient, weight and two
//! moments and writes the latter three. Beside each size stands a copy of as many bytes (16 read, 16 written
//! for each parameter) by all cores. The goal for 10⁸ parameters is at most 1.25 times the copy.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamW, AdamWConfig, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Pool, PoolConfig, Tensor};
use rayon::prelude::*;

const PARAMETERS: [usize; 3] = [1_000_000, 10_000_000, 100_000_000];

/// Tensors that the parameters are spread over.
const TENSORS: usize = 20;

/// Bytes that a step reads and writes for each parameter.
const TRAFFIC: usize = 32;

/// A scaler that has scaled something, and an optimizer whose parameters have gradients.
fn trainer(parameters: usize) -> (Context, GradScaler, AdamW) {
    let device = Device::host(HostConfig::default()).expect("the host has memory");
    let pool = Pool::new(&device, PoolConfig::default()).expect("the default settings work");
    let context = Context::with_pool(&pool).expect("the host has streams");
    let full = |value| {
        Tensor::full(&context, [parameters / TENSORS], DType::F32, value).expect("there is memory")
    };
    let parameters = (0..TENSORS)
        .map(|index| {
            let parameter =
                Parameter::new(format!("p{index}"), full(0.5)).expect("floats are parameters");
            parameter.set_grad(full(0.25)).expect("the gradient fits");
            parameter
        })
        .collect();
    let optimizer = AdamW::new(parameters, AdamWConfig::default()).expect("the settings work");
    let config = AmpConfig {
        init_scale: 2.0,
        ..AmpConfig::default()
    };
    let scaler = GradScaler::new(&context, config).expect("the settings work");
    scaler.scale(&full(1.0)).expect("floats can be scaled");
    (context, scaler, optimizer)
}

fn step(context: &Context, scaler: &mut GradScaler, optimizer: &mut AdamW) {
    scaler
        .clip_grad_norm(optimizer, 1.0)
        .expect("gradients are there");
    let _ = scaler.step(optimizer).expect("the gradients fit");
    scaler.update().expect("a step came before");
    context.stream().synchronize().expect("the stream works");
}

/// `to = from`, a share of both for each core.
fn copy(from: &[u64], to: &mut [u64]) {
    let share = from.len().div_ceil(rayon::current_num_threads());
    let shares = from.par_chunks(share).zip(to.par_chunks_mut(share));
    shares.for_each(|(from, to)| to.copy_from_slice(from));
}

fn steps(criterion: &mut Criterion) {
    // A check that the bench runs needs no gigabytes.
    let smoke = std::env::args().any(|argument| argument == "--test");
    let mut group = criterion.benchmark_group("amp_step");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(8));
    for parameters in PARAMETERS.into_iter().take(if smoke { 1 } else { 3 }) {
        group.throughput(Throughput::Bytes((TRAFFIC * parameters) as u64));
        let words = TRAFFIC / 2 * parameters / size_of::<u64>();
        let (from, mut to) = (vec![1; words], vec![0; words]);
        group.bench_function(BenchmarkId::new("copy", parameters), |bencher| {
            bencher.iter(|| copy(&from, &mut to));
        });
        drop((from, to));
        let (context, mut scaler, mut optimizer) = trainer(parameters);
        group.bench_function(BenchmarkId::new("clip_adamw", parameters), |bencher| {
            bencher.iter(|| step(&context, &mut scaler, &mut optimizer));
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
