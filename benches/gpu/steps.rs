//! Whole optimizer steps on the tensors of a network: unscale, check, clip by the total norm, AdamW, next scale.
//!
//! `scripts/gpu/peers.py` does the same with PyTorch on tensors of the same shapes.

use std::sync::Arc;
use std::time::Instant;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::units::MIB;
use kitsune::{Context, DType, Device, Result, Tensor};
use serde_json::{Map, json};

use crate::clock::{Laps, median, repeat};
use crate::setting::Setting;

/// Names, width and layers of networks with about 10⁸ and 10⁹ parameters.
const NETWORKS: [(&str, usize, usize); 2] = [("1e8", 1024, 8), ("1e9", 2048, 20)];

/// Turns of the runway before a step: about ten milliseconds, enough for any host to enqueue it.
const RUNWAY: usize = 16;

/// Methods of a driver that block the host, or make the device wait for it.
const SYNCHRONISING: [&str; 8] = [
    "synchronize_stream",
    "synchronize_event",
    "copy_to_host",
    "allocate",
    "free",
    "allocate_pinned",
    "free_pinned",
    "unmap",
];

pub(crate) fn run(setting: &Setting) -> Result<()> {
    for (name, width, layers) in NETWORKS {
        let (width, layers) = (setting.size(width, 8), setting.size(layers, 2));
        let shapes = shapes(width, layers);
        let elements: usize = shapes.iter().map(|[rows, columns]| rows * columns).sum();
        // Weights, gradients, two moments, and what the pool rounds up.
        let needed = 16 * elements as u64 + 64 * MIB;
        if setting.device.memory_info()?.free < needed {
            setting.tell(
                "steps",
                name,
                json!({ "passed_over": "too little free memory" }),
            );
            continue;
        }
        let network = Network::new(&setting.device, &shapes)?;
        time(setting, &format!("kitsune/{name}"), elements, network)?;
    }
    count(setting)
}

/// The matrices and vectors of a transformer's layers.
fn shapes(width: usize, layers: usize) -> Vec<[usize; 2]> {
    let layer = [
        [3 * width, width],
        [3 * width, 1],
        [width, width],
        [width, 1],
        [4 * width, width],
        [4 * width, 1],
        [width, 4 * width],
        [width, 1],
        [width, 1],
        [width, 1],
    ];
    layer.repeat(layers)
}

/// Parameters with gradients, and what steps them.
struct Network {
    context: Context,
    optimizer: AdamW,
    scaler: GradScaler,
}

impl Network {
    fn new(device: &Device, shapes: &[[usize; 2]]) -> Result<Self> {
        let context = Context::new(device)?;
        let parameter = |(number, shape): (usize, &[usize; 2])| {
            let value = Tensor::full(&context, *shape, DType::F32, 0.02)?;
            let parameter = Parameter::new(format!("w{number}"), value)?;
            parameter.set_grad(Tensor::full(&context, *shape, DType::F32, 1e-4)?)?;
            Ok(parameter)
        };
        let parameters = shapes.iter().enumerate().map(parameter);
        let optimizer = AdamW::new(parameters.collect::<Result<_>>()?, AdamWConfig::default())?;
        // The gradients stay as they are from step to step, so they must not be scaled down.
        let config = AmpConfig {
            init_scale: 1.0,
            growth_interval: i32::MAX.unsigned_abs(),
            ..AmpConfig::default()
        };
        let scaler = GradScaler::new(&context, config)?;
        scaler.scale(&Tensor::full(&context, [], DType::F32, 1.0)?)?;
        Ok(Self {
            context,
            optimizer,
            scaler,
        })
    }

    /// One step; `mark` is called before it and behind each of its three parts.
    fn step(&mut self, mark: impl Fn(usize) -> Result<()>) -> Result<()> {
        mark(0)?;
        self.scaler.clip_grad_norm(&self.optimizer, 1.0)?;
        mark(1)?;
        drop(self.scaler.step(&mut self.optimizer)?);
        mark(2)?;
        self.scaler.update()?;
        mark(3)
    }
}

fn time(setting: &Setting, name: &str, elements: usize, mut network: Network) -> Result<()> {
    let context = network.context.clone();
    let laps = Laps::new(setting, context.stream(), 3)?;
    let times = repeat(|| {
        laps.runway(RUNWAY)?;
        network.step(|number| laps.mark(number))?;
        context.synchronize()?;
        Ok([laps.lap(0)?, laps.lap(1)?, laps.lap(2)?])
    })?;
    // Without the runway, for which a step that waits would wait as well.
    let host = repeat(|| {
        let start = Instant::now();
        network.step(|_| Ok(()))?;
        let host = start.elapsed().as_secs_f64() * 1e6;
        context.synchronize().map(|()| host)
    })?;
    let part = |number: usize| median(times.iter().map(|lap| lap[number]).collect());
    let whole = median(times.iter().map(|lap| lap.iter().sum()).collect());
    setting.tell(
        "steps",
        name,
        json!({
            "elements": elements,
            "tensors": network.optimizer.parameters().len(),
            "us": whole,
            "check_us": part(0),
            "adamw_us": part(1),
            "update_us": part(2),
            "host_us": median(host),
        }),
    );
    Ok(())
}

/// What ten steps ask of the driver.
fn count(setting: &Setting) -> Result<()> {
    const STEPS: u64 = 10;
    let counter = Arc::new(FaultDriver::new(Arc::clone(setting.device.driver())));
    let device = Device::from_driver(counter.clone());
    let mut network = Network::new(&device, &shapes(setting.size(256, 8), 4))?;
    for _ in 0..3 {
        network.step(|_| Ok(()))?;
    }
    counter.reset_calls();
    for _ in 0..STEPS {
        network.step(|_| Ok(()))?;
    }
    let total = counter.total_calls();
    let synchronising: u64 = SYNCHRONISING.iter().map(|call| counter.calls(call)).sum();
    let mut calls = Map::new();
    for call in [
        "launch",
        "copy",
        "copy_from_host",
        "fill",
        "record",
        "query_event",
    ] {
        calls.insert(call.to_owned(), (counter.calls(call) / STEPS).into());
    }
    setting.tell(
        "steps",
        "calls",
        json!({
            "steps": STEPS,
            "host_synchronisations": synchronising,
            "driver_calls_a_step": total / STEPS,
            "calls_a_step": calls,
        }),
    );
    network.context.synchronize()
}
