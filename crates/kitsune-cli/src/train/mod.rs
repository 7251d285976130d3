//! A training run. Uses only the library's public API, as an example of a trainer.
//!
//! Every step enqueues all its work on one stream and does not wait; the host waits only to read numbers.

mod digits;
mod gpt;
mod mlp;
mod saving;
mod task;

use std::time::Instant;

use kitsune::amp::{AmpConfig, AmpOptimizer, OverflowReport, ScalingMode};
use kitsune::ops;
use kitsune::optim::{AdamW, AdamWConfig, Decay, Optimizer, Parameter, Schedule};
use kitsune::{Context, DType, HostConfig, Pool, PoolConfig, Tensor, telemetry};

use self::digits::DigitsTask;
use self::gpt::GptTask;
use self::task::{Pass, Task};
use crate::args::{Model, TrainArgs};
use crate::digits::Digits;
use crate::failure::Failure;
use crate::progress::{Progress, Standing};
use crate::report::{Overflow, Report};
use crate::text::Text;

/// Steps between two looks at the scaler and the losses, for which the host waits. The scaler keeps the last 16 skipped
/// steps, so no overflow is missed.
const STEPS_PER_LOOK: u64 = 16;

/// Steps after which every block size of an mlp run has occurred.
const WARM_UP_STEPS: u64 = 3;

/// The training data.
#[derive(Debug)]
pub(crate) enum Data {
    Digits(Digits),
    Text(Text),
}

impl Data {
    /// Loads the data that `args` select.
    pub(crate) fn load(args: &TrainArgs) -> Result<Self, Failure> {
        let path = args.data.as_deref();
        Ok(match args.model {
            Model::Mlp => Self::Digits(Digits::load(path)?),
            Model::Gpt => Self::Text(Text::load(path)?),
        })
    }
}

/// Trains as `args` say and tests the result.
pub(crate) fn run(args: &TrainArgs, data: Data, progress: &Progress) -> Result<Report, Failure> {
    if let Some(path) = &args.save {
        saving::check_place(path, args.steps)?;
    }
    let mut trainer = Trainer::new(args, data)?;
    let began = Instant::now();
    for step in trainer.done + 1..=args.steps {
        trainer.step(step)?;
        if step.is_multiple_of(STEPS_PER_LOOK) {
            trainer.look()?;
        }
        trainer.save(step)?;
        progress.advance(step, || trainer.standing())?;
    }
    trainer.look()?;
    let seconds = began.elapsed().as_secs_f64();
    let test_accuracy = trainer.task.test()?;
    trainer.report(seconds, test_accuracy)
}

/// The state of a run.
struct Trainer<'a> {
    args: &'a TrainArgs,
    context: Context,
    task: Box<dyn Task>,
    optimizer: AmpOptimizer<AdamW>,
    /// Steps done by the resumed run, or 0.
    done: u64,
    /// For a resumed run, whether its data was different, if that is known.
    data_changed: Option<Option<bool>>,
    /// The weight of each accumulated batch, an f32 on the device; `None` without accumulation.
    share: Option<Tensor>,
    last: Option<Pass>,
    /// Losses since the last look, and the means of earlier losses.
    losses: Vec<Tensor>,
    loss_curve: Vec<f32>,
    overflows: Vec<OverflowReport>,
    /// Driver allocations when the warm-up ended.
    warm_up_allocs: u64,
}

impl<'a> Trainer<'a> {
    fn new(args: &'a TrainArgs, data: Data) -> Result<Self, Failure> {
        let device = args.device.open(HostConfig::default())?;
        let config = PoolConfig {
            limit: args.limit,
            ..PoolConfig::default()
        };
        let context = Context::with_pool(&Pool::new(&device, config)?)?;
        let prepared = Prepared::new(args, &context, data)?;
        let mut optimizer = new_optimizer(args, &prepared)?;
        let mut task = prepared.task;
        let resumed = match &args.resume {
            Some(path) => Some(saving::resume(path, args, &mut *task, &mut optimizer)?),
            None => None,
        };
        let share = (args.accumulate > 1)
            .then(|| Tensor::full(&context, [], DType::F32, 1.0 / f64::from(args.accumulate)))
            .transpose()?;
        if args.metrics.is_some() {
            telemetry::describe();
        }
        Ok(Self {
            args,
            context,
            task,
            optimizer,
            done: resumed.map_or(0, |resumed| resumed.steps),
            data_changed: resumed.map(|resumed| resumed.data_changed),
            share,
            last: None,
            losses: Vec::new(),
            loss_curve: Vec::new(),
            overflows: Vec::new(),
            warm_up_allocs: 0,
        })
    }

    /// Enqueues one step.
    fn step(&mut self, step: u64) -> kitsune::Result<()> {
        let tag = kitsune::memory::tag("activations");
        for _ in 0..self.args.accumulate {
            let pass = self
                .task
                .pass(self.optimizer.scaler(), self.share.as_ref())?;
            self.losses.push(pass.loss.value().clone());
            self.last = Some(pass);
        }
        drop(tag);
        if self.args.inject_overflow == Some(step) {
            poison(&self.optimizer.optimizer().parameters()[0])?;
        }
        // Querying the outcome would wait for the device; `look` reads the overflows instead.
        let _ = self.optimizer.step()?;
        self.optimizer.zero_grad();
        let (here, planned) = (step - self.done, self.args.steps - self.done);
        if here == WARM_UP_STEPS.min(planned) {
            self.warm_up_allocs = self.context.pool().stats().num_device_alloc;
        }
        Ok(())
    }

    /// Saves a checkpoint if one is due after this step.
    fn save(&self, step: u64) -> kitsune::Result<()> {
        let TrainArgs {
            save, save_every, ..
        } = self.args;
        let is_due = save_every.is_some_and(|every| step.is_multiple_of(every));
        match save {
            Some(path) if is_due || step == self.args.steps => {
                saving::save(path, step, self.args, &*self.task, &self.optimizer)
            }
            _ => Ok(()),
        }
    }

    /// Waits for the device, records the steps skipped and the mean loss since the last look, and publishes metrics.
    fn look(&mut self) -> kitsune::Result<()> {
        let losses = self.losses.drain(..).map(|loss| loss.item::<f32>());
        let losses = losses.collect::<kitsune::Result<Vec<_>>>()?;
        if !losses.is_empty() {
            let mean = losses.iter().sum::<f32>() / losses.len() as f32;
            self.loss_curve.push(mean);
        }
        let known = self.overflows.last().map_or(0, |report| report.step);
        let news = self
            .optimizer
            .scaler()
            .stats()?
            .overflows
            .into_iter()
            .filter(|report| report.step > known);
        self.overflows.extend(news);
        if self.args.metrics.is_some() {
            telemetry::publish(self.context.pool());
            telemetry::publish_scaler(self.optimizer.scaler())?;
        }
        Ok(())
    }

    /// The current numbers of the run. Waits for the device.
    fn standing(&self) -> kitsune::Result<Standing> {
        let Some(last) = &self.last else {
            return Ok(Standing::default());
        };
        let (pool, amp) = (
            self.context.pool().stats(),
            self.optimizer.scaler().stats()?,
        );
        Ok(Standing {
            loss: last.loss.value().item()?,
            accuracy: ops::accuracy(&last.logits, &last.labels)?,
            scale: amp.scale,
            overflow_steps: amp.skipped,
            pool_hits: pool.cache_hits as f64 / pool.allocation.allocated.max(1) as f64,
            driver_allocs: pool.num_device_alloc,
        })
    }

    fn report(&self, seconds: f64, test_accuracy: f64) -> Result<Report, Failure> {
        let (pool, amp) = (
            self.context.pool().stats(),
            self.optimizer.scaler().stats()?,
        );
        let final_loss = match &self.last {
            Some(last) => last.loss.value().item()?,
            None => f32::NAN,
        };
        Ok(Report {
            device: self.context.device().properties().name.clone(),
            dtype: self.args.dtype,
            model: self.task.model(),
            steps: self.args.steps,
            first_step: self.done + 1,
            data_changed: self.data_changed,
            seed: self.args.seed,
            seconds,
            final_loss,
            loss_curve: self.loss_curve.clone(),
            test_accuracy,
            scale: amp.scale,
            overflow_steps: amp.skipped,
            overflows: self
                .overflows
                .iter()
                .flat_map(|report| by_tensor(report, self.done))
                .collect(),
            driver_allocs: pool.num_device_alloc,
            driver_allocs_after_step_3: pool.num_device_alloc - self.warm_up_allocs,
            peak_requested_bytes: pool.requested_bytes.peak,
            peak_allocated_bytes: pool.allocated_bytes.peak,
            peak_reserved_bytes: pool.reserved_bytes.peak,
        })
    }
}

/// A network with its data and its default settings.
struct Prepared {
    task: Box<dyn Task>,
    learning_rate: f32,
    clip: Option<f32>,
}

impl Prepared {
    fn new(args: &TrainArgs, context: &Context, data: Data) -> Result<Self, Failure> {
        let (dtype, size, seed) = (args.dtype, args.batch_size, args.seed);
        Ok(match data {
            Data::Digits(digits) => Self {
                task: Box::new(DigitsTask::new(context, dtype, digits, size, seed)?),
                learning_rate: 1e-2,
                clip: None,
            },
            Data::Text(text) => Self {
                task: Box::new(GptTask::new(context, dtype, text, size, seed)?),
                learning_rate: 3e-3,
                clip: Some(1.0),
            },
        })
    }
}

/// AdamW with a learning rate that decays linearly to zero over the run, and a scaler for the run's type.
fn new_optimizer(args: &TrainArgs, prepared: &Prepared) -> kitsune::Result<AmpOptimizer<AdamW>> {
    let config = AdamWConfig {
        learning_rate: f64::from(args.learning_rate.unwrap_or(prepared.learning_rate)),
        weight_decay: 0.1,
        ..AdamWConfig::default()
    };
    let decay = Decay::Linear {
        steps: args.steps,
        floor: 0.0,
    };
    let adamw = AdamW::new(prepared.task.parameters(), config)?;
    let optimizer = AmpOptimizer::new(adamw, scaler_config(args.dtype))?
        .with_schedule(Schedule { warmup: 0, decay })?;
    match args.clip.or(prepared.clip) {
        Some(norm) => optimizer.with_clip(f64::from(norm)),
        None => Ok(optimizer),
    }
}

/// Loss scaling for `dtype`. Types with the range of f32 need no scaling, but steps with infinite or NaN gradients are
/// still skipped.
fn scaler_config(dtype: DType) -> AmpConfig {
    if dtype == DType::F16 {
        return AmpConfig::default();
    }
    AmpConfig {
        mode: ScalingMode::CheckOnly,
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

/// One entry for each gradient of a skipped step that was not finite. The scaler counts only its own steps; `done`
/// steps came before them.
fn by_tensor(report: &OverflowReport, done: u64) -> impl Iterator<Item = Overflow> {
    report.tensors.iter().map(move |tensor| Overflow {
        step: done + report.step,
        tensor: tensor.name.clone(),
        kind: tensor.kind(),
    })
}
