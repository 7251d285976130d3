//! A training run, on the library's public API alone: what a trainer written with it looks like.
//!
//! Every step enqueues everything on one stream and goes on; the host waits only where it shows numbers.

mod network;

use std::time::Instant;

use kitsune::amp::{AmpConfig, GradScaler, OverflowReport, autocast};
use kitsune::ops::{self, Loss};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Pool, PoolConfig, Tensor, telemetry};

use self::network::Network;
use crate::args::{DeviceChoice, TrainArgs};
use crate::batches::Batches;
use crate::digits::{Digits, Images, PIXELS};
use crate::failure::Failure;
use crate::progress::{Progress, Standing};
use crate::report::{Overflow, Report};

/// Steps between two looks at the scaler, for which the host waits. It remembers the last 16 skipped steps,
/// so that no overflow is missed.
const STEPS_PER_LOOK: u64 = 16;

/// Steps after which every size of a run has been seen.
const WARM_UP_STEPS: u64 = 3;

/// Trains as `args` say and tests the result.
pub(crate) fn run(
    args: &TrainArgs,
    digits: &Digits,
    progress: &Progress,
) -> Result<Report, Failure> {
    let (size, count) = (args.batch_size as usize, digits.train.count());
    if size > count {
        let reason = format!("--batch-size {size}: there are {count} images to train with");
        return Err(Failure::Input(reason));
    }
    let mut trainer = Trainer::new(args)?;
    let mut batches = Batches::new(count, size, args.seed);
    let began = Instant::now();
    for step in 1..=args.steps {
        let batch = Batch::upload(&trainer.context, &digits.train, batches.advance())?;
        trainer.step(step, &batch)?;
        if step.is_multiple_of(STEPS_PER_LOOK) {
            trainer.look()?;
        }
        progress.advance(step, || trainer.standing(&batch))?;
    }
    trainer.look()?;
    let seconds = began.elapsed().as_secs_f64();
    let test_accuracy = trainer.accuracy(&digits.test)?;
    trainer.report(seconds, test_accuracy)
}

/// Images and their digits on the device.
struct Batch {
    pixels: Tensor,
    labels: Tensor,
}

impl Batch {
    /// Copies the images at `indices`.
    fn upload(context: &Context, images: &Images, indices: &[usize]) -> kitsune::Result<Self> {
        let _tag = kitsune::memory::tag("batches");
        let mut pixels = Vec::with_capacity(indices.len() * PIXELS);
        for &index in indices {
            pixels.extend_from_slice(&images.pixels[index * PIXELS..][..PIXELS]);
        }
        let labels: Vec<u32> = indices.iter().map(|&index| images.labels[index]).collect();
        Ok(Self {
            pixels: Tensor::from_slice(context, [indices.len(), PIXELS], &pixels)?,
            labels: Tensor::from_slice(context, [indices.len()], &labels)?,
        })
    }
}

/// Everything that lives from step to step.
struct Trainer<'a> {
    args: &'a TrainArgs,
    context: Context,
    network: Network,
    optimizer: AdamW,
    scaler: GradScaler,
    /// Loss and logits of the last step.
    last: Option<(Loss, Tensor)>,
    overflows: Vec<OverflowReport>,
    /// Driver allocations when the warm-up ended.
    warm_up_allocs: u64,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a TrainArgs) -> Result<Self, Failure> {
        let device = match args.device {
            DeviceChoice::Auto => Device::auto()?,
            DeviceChoice::Host => Device::host(HostConfig::default())?,
            DeviceChoice::Cuda => Device::cuda(0)?,
        };
        let config = PoolConfig {
            limit: args.limit,
            ..PoolConfig::default()
        };
        let context = Context::with_pool(&Pool::new(&device, config)?)?;
        let network = Network::new(&context, args.seed)?;
        let config = AdamWConfig {
            weight_decay: 0.1,
            ..AdamWConfig::default()
        };
        let optimizer = AdamW::new(network.parameters(), config)?;
        let scaler = GradScaler::new(&context, scaler_config(args.dtype))?;
        if args.metrics.is_some() {
            telemetry::describe();
        }
        Ok(Self {
            args,
            context,
            network,
            optimizer,
            scaler,
            last: None,
            overflows: Vec::new(),
            warm_up_allocs: 0,
        })
    }

    /// Enqueues one step.
    fn step(&mut self, step: u64, batch: &Batch) -> kitsune::Result<()> {
        let _tag = kitsune::memory::tag("activations");
        let scope = autocast(self.args.dtype.is_half(), self.args.dtype);
        let forward = self.network.forward(&batch.pixels)?;
        let loss = ops::softmax_cross_entropy(forward.logits(), &batch.labels)?;
        drop(scope);

        let scaled = self.scaler.scale(&loss)?;
        self.network.backward(&forward, scaled.backward()?)?;
        if self.args.inject_overflow == Some(step) {
            poison(&self.optimizer.parameters()[0])?;
        }
        self.optimizer.set_learning_rate(self.learning_rate(step))?;
        // The outcome is not asked for here, which would wait for the device: `look` reads the overflows.
        let _ = self.scaler.step(&mut self.optimizer)?;
        self.scaler.update()?;
        self.optimizer.zero_grad();

        self.last = Some((loss, forward.logits().clone()));
        if step == WARM_UP_STEPS.min(self.args.steps) {
            self.warm_up_allocs = self.context.pool().stats().num_device_alloc;
        }
        Ok(())
    }

    /// The step width falls evenly, from the one asked for towards zero.
    fn learning_rate(&self, step: u64) -> f64 {
        let done = (step - 1) as f64 / self.args.steps as f64;
        f64::from(self.args.learning_rate) * (1.0 - done)
    }

    /// Waits for the device, notes the steps that were skipped since the last look, publishes metrics.
    fn look(&mut self) -> kitsune::Result<()> {
        let known = self.overflows.last().map_or(0, |report| report.step);
        let news = self
            .scaler
            .stats()?
            .overflows
            .into_iter()
            .filter(|report| report.step > known);
        self.overflows.extend(news);
        if self.args.metrics.is_some() {
            telemetry::publish(self.context.pool());
            telemetry::publish_scaler(&self.scaler)?;
        }
        Ok(())
    }

    /// How the run stands after the last step, which was with `batch`. Waits for the device.
    fn standing(&self, batch: &Batch) -> kitsune::Result<Standing> {
        let Some((loss, logits)) = &self.last else {
            return Ok(Standing::default());
        };
        let (pool, amp) = (self.context.pool().stats(), self.scaler.stats()?);
        Ok(Standing {
            loss: loss.value().item()?,
            accuracy: ops::accuracy(logits, &batch.labels)?,
            scale: amp.scale,
            overflow_steps: amp.skipped,
            pool_hits: pool.cache_hits as f64 / pool.allocation.allocated.max(1) as f64,
            driver_allocs: pool.num_device_alloc,
        })
    }

    /// Share of `images` that the network reads correctly.
    fn accuracy(&self, images: &Images) -> kitsune::Result<f64> {
        let scope = autocast(self.args.dtype.is_half(), self.args.dtype);
        let indices: Vec<_> = (0..images.count()).collect();
        let mut right = 0.0;
        // In batches of the size that training used, for which the pool has memory.
        for indices in indices.chunks(self.args.batch_size as usize) {
            let batch = Batch::upload(&self.context, images, indices)?;
            let forward = self.network.forward(&batch.pixels)?;
            right += ops::accuracy(forward.logits(), &batch.labels)? * indices.len() as f64;
        }
        drop(scope);
        // Each share came from a whole number of images, which rounding gives back.
        Ok(right.round() / images.count() as f64)
    }

    fn report(&self, seconds: f64, test_accuracy: f64) -> Result<Report, Failure> {
        let (pool, amp) = (self.context.pool().stats(), self.scaler.stats()?);
        let final_loss = match &self.last {
            Some((loss, _)) => loss.value().item()?,
            None => f32::NAN,
        };
        Ok(Report {
            device: self.context.device().properties().name.clone(),
            dtype: self.args.dtype,
            model: Network::shape(),
            steps: self.args.steps,
            seed: self.args.seed,
            seconds,
            final_loss,
            test_accuracy,
            scale: amp.scale,
            overflow_steps: amp.skipped,
            overflows: self.overflows.iter().flat_map(by_tensor).collect(),
            driver_allocs: pool.num_device_alloc,
            driver_allocs_after_step_3: pool.num_device_alloc - self.warm_up_allocs,
            peak_requested_bytes: pool.requested_bytes.peak,
            peak_allocated_bytes: pool.allocated_bytes.peak,
            peak_reserved_bytes: pool.reserved_bytes.peak,
        })
    }
}

/// Loss scaling for `dtype`. Where the range is that of f32 there is nothing to scale, but steps with
/// infinite or NaN gradients are skipped all the same.
fn scaler_config(dtype: DType) -> AmpConfig {
    if dtype == DType::F16 {
        return AmpConfig::default();
    }
    AmpConfig {
        init_scale: 1.0,
        min_scale: 1.0,
        max_scale: 1.0,
        ..AmpConfig::default()
    }
}

/// Puts an infinity into the gradient of `parameter`.
fn poison(parameter: &Parameter) -> kitsune::Result<()> {
    match parameter.grad() {
        Some(grad) => grad
            .reshape([grad.len()])?
            .narrow(0, 0, 1)?
            .fill(f64::INFINITY),
        None => Ok(()),
    }
}

/// One entry for each gradient of a skipped step that was not finite.
fn by_tensor(report: &OverflowReport) -> impl Iterator<Item = Overflow> {
    report.tensors.iter().map(|tensor| Overflow {
        step: report.step,
        tensor: tensor.name.clone(),
        kind: tensor.kind(),
    })
}
