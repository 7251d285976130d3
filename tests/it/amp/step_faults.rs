//! Whichever driver call of a step fails: either nothing of the step was done, and the same call does it, or all of it
//! was. No weight, moment or count moves alone, and what goes on afterwards is, to the bit, what was never disturbed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use crate::support::amp::boxed::Boxed;
use crate::support::device::device;
use kitsune::amp::{AmpConfig, AmpOptimizer, GradScaler, SkipPolicy};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Decay, MasterWeights, Moments, Optimizer, Parameter,
    Schedule, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Device, Error, HostConfig, Result, Tensor};

const ITERATIONS: u64 = 4;

/// The iteration in which a gradient is infinite.
const OVERFLOW: u64 = 3;

/// Each with its optimizer.
type Make = fn(Vec<Parameter>) -> Box<dyn Optimizer>;

const OPTIMIZERS: [(&str, Make); 3] = [
    ("sgd", |parameters| {
        let config = SgdConfig {
            momentum: 0.9,
            ..SgdConfig::default()
        };
        Box::new(Sgd::new(parameters, config).unwrap())
    }),
    ("adamw", |parameters| {
        Box::new(AdamW::new(parameters, AdamWConfig::default()).unwrap())
    }),
    ("narrow adam", |parameters| {
        let config = AdamConfig {
            amsgrad: true,
            master_weights: MasterWeights::Split,
            moments: Moments::Bf16,
            ..AdamConfig::default()
        };
        Box::new(Adam::new(parameters, config).unwrap())
    }),
];

/// A driver whose calls can fail, and weights of several types on it.
struct Bench {
    faults: Arc<FaultDriver>,
    parameters: Vec<Parameter>,
}

impl Bench {
    fn new() -> (Self, Context) {
        let inner = device(HostConfig::default());
        let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
        let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
        let types = [(DType::F32, 5), (DType::Bf16, 300), (DType::F16, 7)];
        let parameter = |(dtype, len): (DType, usize)| {
            let value = Tensor::full(&context, [len], dtype, 1.0).unwrap();
            Parameter::new(format!("{dtype}"), value).unwrap()
        };
        let parameters = types.map(parameter).to_vec();
        (Self { faults, parameters }, context)
    }

    /// Gradients of this iteration, scaled.
    fn set_gradients(&self, scaler: &GradScaler, iteration: u64) {
        for (number, parameter) in (0u64..).zip(&self.parameters) {
            let value = parameter.value();
            let mut random = fastrand::Rng::with_seed(10 * iteration + number);
            let mut gradient: Vec<f64> = (0..value.len()).map(|_| random.f64() - 0.5).collect();
            if iteration == OVERFLOW && number == 1 {
                gradient[100] = f64::INFINITY;
            }
            let gradient =
                Tensor::from_slice(value.context(), [gradient.len()], &gradient).unwrap();
            let gradient = scaler
                .scale(&gradient.cast(value.dtype()).unwrap())
                .unwrap();
            parameter.set_scaled_grad(gradient, scaler.tag()).unwrap();
        }
    }
}

/// All that a step may move, in bits.
fn moved_by(optimizer: &dyn Optimizer) -> Vec<Vec<u8>> {
    let parameters = optimizer.parameters();
    let values = parameters.iter().map(|one| one.value().clone());
    let states = (0..parameters.len()).flat_map(|index| optimizer.state(index));
    let all = values.chain(states.map(|(_, tensor)| tensor));
    all.map(|tensor| tensor.to_host().unwrap().bytes().to_vec())
        .collect()
}

/// A fault: the iteration, and which call of it.
type Fault = Option<(u64, u64)>;

/// What every iteration leaves of weights and state, the averages and the scale in the end.
struct Run {
    moved: Vec<Vec<Vec<u8>>>,
    averages: Vec<Vec<u8>>,
    scale: f64,
    /// Whether the fault came.
    came: bool,
    /// The iteration whose error came when its weights had moved.
    late: Option<u64>,
}

fn config(timing: bool) -> AmpConfig {
    AmpConfig {
        init_scale: 64.0,
        growth_interval: 2,
        timing,
        ..AmpConfig::default()
    }
}

/// Iterations of all that belongs to a step, in one call each. A call that fails and moved nothing is made again.
fn joined(make: Make, timing: bool, fault: Fault) -> Run {
    let (bench, _context) = Bench::new();
    let schedule = Schedule {
        warmup: 2,
        decay: Decay::Constant,
    };
    let optimizer = Boxed(make(bench.parameters.clone()));
    let mut joined = AmpOptimizer::new(optimizer, config(timing))
        .and_then(|joined| joined.with_clip(1.0))
        .and_then(|joined| joined.with_schedule(schedule))
        .and_then(|joined| joined.with_ema(0.5))
        .unwrap();
    let (mut moved, mut came, mut late) = (Vec::new(), false, None);
    for iteration in 1..=ITERATIONS {
        bench.set_gradients(joined.scaler(), iteration);
        let before = moved_by(joined.optimizer());
        let nth = fault.filter(|fault| fault.0 == iteration);
        if let Some((_, nth)) = nth {
            bench.faults.fail_nth(None, nth);
        }
        let outcome = joined.step();
        if nth.is_some() {
            came = bench.faults.disarm() == 0;
        }
        if let Err(error) = outcome {
            assert!(came, "{error}");
            if moved_by(joined.optimizer()) == before {
                let _ = joined.step().unwrap();
            } else {
                late = Some(iteration);
                // Due only if it was the update that failed.
                if joined.scaler().state_dict().is_err() {
                    joined.scaler_mut().update().unwrap();
                }
            }
        }
        joined.zero_grad();
        moved.push(moved_by(joined.optimizer()));
    }
    let averages = (0..bench.parameters.len()).map(|index| {
        let average = joined.ema().unwrap().average(index).unwrap();
        average.to_host().unwrap().bytes().to_vec()
    });
    Run {
        moved,
        averages: averages.collect(),
        scale: joined.scaler().scale_factor().unwrap(),
        came,
        late,
    }
}

/// Makes a call until it succeeds.
fn until_done<R>(mut call: impl FnMut() -> Result<R>) -> R {
    loop {
        match call() {
            Ok(result) => return result,
            Err(Error::Driver { .. } | Error::OutOfMemory(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Iterations that unscale, clip in place and step in calls of their own, each made again if it fails.
fn in_calls(make: Make, timing: bool, fault: Fault) -> Run {
    let (bench, context) = Bench::new();
    let mut optimizer = make(bench.parameters.clone());
    let mut scaler = GradScaler::new(&context, config(timing)).unwrap();
    let (mut moved, mut came, mut late) = (Vec::new(), false, None);
    for iteration in 1..=ITERATIONS {
        bench.set_gradients(&scaler, iteration);
        let nth = fault.filter(|fault| fault.0 == iteration);
        if let Some((_, nth)) = nth {
            bench.faults.fail_nth(None, nth);
        }
        until_done(|| scaler.unscale(&*optimizer));
        until_done(|| scaler.clip_grad_norm(&*optimizer, 1.0));
        until_done(|| match scaler.step(&mut *optimizer) {
            Err(error) if error.to_string().contains("only its record is missing") => {
                late = Some(iteration);
                Ok(())
            }
            outcome => outcome.map(drop),
        });
        until_done(|| scaler.update());
        if nth.is_some() {
            came = bench.faults.disarm() == 0;
        }
        optimizer.zero_grad();
        moved.push(moved_by(&*optimizer));
    }
    Run {
        moved,
        averages: Vec::new(),
        scale: scaler.scale_factor().unwrap(),
        came,
        late,
    }
}

/// Iterations that step an optimizer for each weight in one call, all or none. After a failure it is made again for those
/// that are left, which are those that did not move.
fn all_at_once(make: Make, timing: bool, fault: Fault) -> Run {
    let (bench, context) = Bench::new();
    let optimizer = |parameter: &Parameter| make(vec![parameter.clone()]);
    let mut optimizers: Vec<_> = bench.parameters.iter().map(optimizer).collect();
    let config = AmpConfig {
        skip_policy: SkipPolicy::AllOrNone,
        ..config(timing)
    };
    let mut scaler = GradScaler::new(&context, config).unwrap();
    let all = |optimizers: &[Box<dyn Optimizer>]| -> Vec<_> {
        optimizers.iter().map(|one| moved_by(&**one)).collect()
    };
    let (mut moved, mut came, mut late) = (Vec::new(), false, None);
    for iteration in 1..=ITERATIONS {
        bench.set_gradients(&scaler, iteration);
        let before = all(&optimizers);
        let nth = fault.filter(|fault| fault.0 == iteration);
        if let Some((_, nth)) = nth {
            bench.faults.fail_nth(None, nth);
        }
        let (mut outcomes, mut done) = (Vec::new(), 0);
        while done < optimizers.len() {
            let rest = optimizers[done..].iter_mut().map(|one| &mut **one);
            let mut rest: Vec<&mut dyn Optimizer> = rest.map(|one| one as _).collect();
            match scaler.step_all(&mut rest) {
                Ok(stepped) => {
                    done += stepped.len();
                    outcomes.extend(stepped);
                }
                Err(failed) => {
                    done += failed.stepped.len();
                    outcomes.extend(failed.stepped);
                    if failed
                        .error
                        .to_string()
                        .contains("only its record is missing")
                    {
                        done += 1;
                        late = Some(iteration);
                    }
                    for (index, (now, before)) in all(&optimizers).iter().zip(&before).enumerate() {
                        assert_eq!(now != before, index < done, "optimizer {index} of {done}");
                    }
                }
            }
        }
        until_done(|| scaler.update());
        if nth.is_some() {
            came = bench.faults.disarm() == 0;
        }
        let missing = usize::from(late == Some(iteration));
        assert_eq!(outcomes.len(), optimizers.len() - missing);
        for outcome in outcomes {
            assert_eq!(outcome.is_applied().unwrap(), iteration != OVERFLOW);
        }
        optimizers.iter_mut().for_each(|one| one.zero_grad());
        moved.push(all(&optimizers).concat());
    }
    Run {
        moved,
        averages: Vec::new(),
        scale: scaler.scale_factor().unwrap(),
        came,
        late,
    }
}

/// Lets every call of an iteration fail, in the first one, which allocates, and in the last one.
fn every_call_fails(run: fn(Make, bool, Fault) -> Run) -> u64 {
    let mut late = 0;
    for (name, make) in OPTIMIZERS {
        for timing in [false, true] {
            let undisturbed = run(make, timing, None);
            assert!(undisturbed.moved[1] != undisturbed.moved[0], "{name}");
            let skipped = usize::try_from(OVERFLOW).unwrap() - 1;
            assert!(
                undisturbed.moved[skipped] == undisturbed.moved[skipped - 1],
                "{name}"
            );
            for iteration in [1, ITERATIONS] {
                let mut nth = 0;
                loop {
                    nth += 1;
                    let what =
                        format!("{name}, timing {timing}, call {nth} of iteration {iteration}");
                    let run = run(make, timing, Some((iteration, nth)));
                    if !run.came {
                        break;
                    }
                    assert_eq!(run.scale, undisturbed.scale, "{what}");
                    // What the schedule or the averages missed of one iteration, later ones show.
                    let until = usize::try_from(run.late.unwrap_or(ITERATIONS)).unwrap();
                    assert!(run.moved[..until] == undisturbed.moved[..until], "{what}");
                    match run.late {
                        None => assert!(run.averages == undisturbed.averages, "{what}"),
                        Some(_) => late += 1,
                    }
                }
                assert!(nth > 4, "{name}: {nth} calls");
            }
        }
    }
    late
}

#[test]
fn whichever_call_of_a_joined_step_fails_nothing_is_half_done() {
    // The record, the averages, the count, the update.
    assert!(every_call_fails(joined) >= 4 * 12);
}

#[test]
fn whichever_call_of_single_steps_fails_it_can_be_made_again() {
    assert_eq!(every_call_fails(in_calls), 12, "the record");
}

#[test]
fn whichever_call_of_steps_made_at_once_fails_it_tells_which_were_made() {
    assert_eq!(every_call_fails(all_at_once), 3 * 12, "the records");
}

/// A scaler that is off knows no optimizer, but its caller does.
#[test]
fn without_a_scale_it_is_told_as_well_which_steps_were_made() {
    let (bench, context) = Bench::new();
    let mut scaler = GradScaler::new(
        &context,
        AmpConfig {
            enabled: false,
            ..AmpConfig::default()
        },
    )
    .unwrap();
    bench.set_gradients(&scaler, 1);
    let optimizer = |parameter: &Parameter| OPTIMIZERS[0].1(vec![parameter.clone()]);
    let mut optimizers: Vec<_> = bench.parameters.iter().map(optimizer).collect();
    let before: Vec<_> = optimizers.iter().map(|one| moved_by(&**one)).collect();
    let mut all: Vec<&mut dyn Optimizer> =
        optimizers.iter_mut().map(|one| &mut **one as _).collect();
    bench.faults.fail_nth(Some("launch"), 2);
    let failed = scaler.step_all(&mut all).unwrap_err();
    bench.faults.disarm();
    let told = failed.to_string();
    assert!(told.ends_with("; the step before is enqueued"), "{told}");
    assert_eq!(failed.stepped.len(), 1);
    assert!(failed.stepped[0].is_applied().unwrap());
    assert!(matches!(
        Error::from(failed),
        Error::Driver { call: "launch", .. }
    ));
    let moved: Vec<_> = all.iter().map(|one| moved_by(&**one)).collect();
    assert_eq!(
        [0, 1, 2].map(|index| moved[index] != before[index]),
        [true, false, false]
    );
    let outcomes = scaler.step_all(&mut all[1..]).unwrap();
    assert_eq!(outcomes.len(), 2);
    assert!(moved_by(all[2]) != before[2]);
}
