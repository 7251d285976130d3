//! An optimizer with its scaler, and what moves on applied steps only: schedules and averages.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;

use crate::support::amp::{context, ones, parameter, scaler, set_grad, sgd, tensor, value};
use crate::support::device::device;
use kitsune::amp::{AmpConfig, AmpOptimizer, AppliedSteps, GradScaler, ScalingMode};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{
    AdamW, AdamWConfig, Decay, Ema, MasterWeights, Optimizer, OptimizerId, Parameter, Schedule,
    Sgd, SgdConfig, StepInputs,
};
use kitsune::{Context, DType, Device, Element, Error, HostConfig, Result, Tensor, bf16, f16};

const INF: f32 = f32::INFINITY;

fn bits(tensor: &Tensor) -> Vec<u8> {
    tensor.to_host().unwrap().bytes().to_vec()
}

/// Sets a gradient that is scaled as the scaler's losses are.
fn scaled_grad(scaler: &GradScaler, weight: &Parameter, grad: &[f32]) {
    let grad = Tensor::from_slice(weight.value().context(), weight.value().shape(), grad).unwrap();
    let grad = scaler.scale(&grad).unwrap();
    weight.set_scaled_grad(grad, scaler.tag()).unwrap();
}

#[test]
fn a_step_is_what_its_parts_are_in_order() {
    let gradients = [
        [3.0, 4.0],
        [INF, 0.0],
        [0.3, 0.4],
        [0.1, f32::NAN],
        [-6.0, 8.0],
    ];
    let decay = Decay::Cosine {
        steps: 20,
        floor: 0.1,
    };
    let schedule = Schedule { warmup: 2, decay };
    let context = context();
    let new = || {
        let weight = ones::<f32>(&context, "w", &[0.0; 2]);
        let adamw = AdamW::new(vec![weight.clone()], AdamWConfig::default()).unwrap();
        (weight, adamw)
    };

    let (weight, adamw) = new();
    let mut joined = AmpOptimizer::new(adamw, AmpConfig::default())
        .and_then(|joined| joined.with_clip(1.0))
        .and_then(|joined| joined.with_schedule(schedule))
        .and_then(|joined| joined.with_ema(0.9))
        .unwrap();
    let mut applied = Vec::new();
    for gradient in gradients {
        scaled_grad(joined.scaler(), &weight, &gradient);
        applied.push(joined.step().unwrap());
        joined.zero_grad();
        assert!(weight.grad().is_none());
    }
    let applied: Vec<_> = applied
        .iter()
        .map(|step| step.is_applied().unwrap())
        .collect();
    assert_eq!(applied, [true, false, true, false, true]);

    let (other, mut adamw) = new();
    let mut scaler = GradScaler::new(&context, AmpConfig::default()).unwrap();
    let mut ema = Ema::new(std::slice::from_ref(&other), 0.9).unwrap();
    for (step, gradient) in (0..).zip(gradients) {
        scaled_grad(&scaler, &other, &gradient);
        let rate = AdamWConfig::default().learning_rate * schedule.factor(step);
        adamw.set_learning_rate(rate).unwrap();
        scaler.clip_grad_norm(&adamw, 1.0).unwrap();
        let _ = scaler.step(&mut adamw).unwrap();
        ema.update(scaler.found_inf(&adamw)).unwrap();
        scaler.update().unwrap();
    }
    assert_eq!(bits(weight.value()), bits(other.value()));
    let average = joined.ema().unwrap().average(0).unwrap();
    assert_eq!(bits(average), bits(ema.average(0).unwrap()));
    let (got, expected) = (joined.state_dict().unwrap(), adamw.state_dict().unwrap());
    assert_eq!(got.optimizer, expected);
    assert_eq!(got.scaler, scaler.state_dict().unwrap());
    let applied = joined.applied_steps().unwrap();
    assert_eq!(applied.exact().unwrap(), 3);
}

fn averages_follow<T: Element>(tolerance: f64) {
    let context = context();
    let decay = 0.75;
    let weight = parameter(&context, "w", &[T::from_f64(0.0), T::from_f64(1.0)]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    let mut ema = Ema::new(std::slice::from_ref(&weight), decay).unwrap();
    let mut expected = [0.0, 1.0];
    let mut before = bits(ema.average(0).unwrap());
    for gradient in [
        [1.0, 2.0],
        [0.0, f64::INFINITY],
        [-0.5, 1.0],
        [f64::NAN, 0.0],
    ] {
        set_grad(
            &weight,
            &gradient.map(|g| T::from_f64(g * scaler.get_scale().unwrap())),
        );
        let outcome = scaler.step(&mut optimizer).unwrap();
        ema.update(scaler.found_inf(&optimizer)).unwrap();
        scaler.update().unwrap();
        let average = ema.average(0).unwrap();
        if !outcome.is_applied().unwrap() {
            assert_eq!(bits(average), before, "{}", T::DTYPE);
            continue;
        }
        for (expected, weight) in expected.iter_mut().zip(value::<T>(&weight)) {
            *expected += (1.0 - decay) * (weight.to_f64() - *expected);
        }
        let got = match average.dtype() {
            DType::F64 => average.to_vec::<f64>().unwrap(),
            _ => average
                .to_vec::<f32>()
                .unwrap()
                .into_iter()
                .map(f64::from)
                .collect(),
        };
        for (got, expected) in got.iter().zip(expected) {
            assert!(
                (got - expected).abs() <= tolerance,
                "{} {got} {expected}",
                T::DTYPE
            );
        }
        assert_ne!(bits(average), before);
        before = bits(average);
    }
}

/// Steps too small to show in 16 bits: averages of masters follow them, averages of the 16-bit values do not.
#[test]
fn averages_of_masters_follow_steps_that_16_bits_lose() {
    let context = context();
    for (dtype, master_weights) in [
        (DType::Bf16, MasterWeights::F32),
        (DType::Bf16, MasterWeights::Split),
        (DType::F16, MasterWeights::F32),
        (DType::F16, MasterWeights::Split),
        (DType::F32, MasterWeights::F32),
    ] {
        let value = Tensor::full(&context, [3], dtype, 1.0).unwrap();
        let weight = Parameter::new("w", value).unwrap();
        let config = SgdConfig {
            learning_rate: 2f64.powi(-14),
            master_weights,
            ..SgdConfig::default()
        };
        let sgd = Sgd::new(vec![weight.clone()], config).unwrap();
        let mut of_values = Ema::new(std::slice::from_ref(&weight), 0.5).unwrap();
        let mut joined = AmpOptimizer::new(sgd, AmpConfig::bf16())
            .and_then(|joined| joined.with_ema(0.5))
            .unwrap();
        let (mut master, mut expected) = (1f32, 1f32);
        for _ in 0..3 {
            weight
                .set_grad(Tensor::full(&context, [3], dtype, 1.0).unwrap())
                .unwrap();
            let _ = joined.step().unwrap();
            of_values.update(None).unwrap();
            master -= 2f32.powi(-14);
            expected += 0.5 * (master - expected);
        }
        let average = joined.ema().unwrap().average(0).unwrap();
        assert_eq!(average.to_vec::<f32>().unwrap(), [expected; 3], "{dtype}");
        let lost = of_values.average(0).unwrap().to_vec::<f32>().unwrap();
        let shows = dtype == DType::F32;
        assert_eq!(lost, [if shows { expected } else { 1.0 }; 3], "{dtype}");
    }
}

/// Parts of tensors that begin at odd places, of no element, an odd number of them, and more than a chunk.
fn parts(context: &Context) -> Vec<Parameter> {
    let places = [(0, 2), (1, 0), (3, 1), (257, 0), (70_001, 1)];
    let part = |(len, start): (usize, usize)| {
        let mut random = fastrand::Rng::with_seed(len as u64);
        let mut values: Vec<bf16> = (0..len + start)
            .map(|_| bf16::from_f32(random.f32() - 0.5))
            .collect();
        if let Some(first) = values.get_mut(start) {
            *first = bf16::NEG_ZERO;
        }
        let value = Tensor::from_slice(context, [len + start], &values).unwrap();
        let value = value.narrow(0, start, len).unwrap();
        Parameter::new(format!("{len}"), value).unwrap()
    };
    places.map(part).to_vec()
}

/// Averages of masters kept like this, which begin in the middle of a training: at first and after each step; and the
/// same of the 16-bit values.
fn averages_of(masters: MasterWeights) -> [Vec<Vec<u8>>; 2] {
    let context = context();
    let parameters = parts(&context);
    let config = SgdConfig {
        learning_rate: 2f64.powi(-13),
        momentum: 0.5,
        master_weights: masters,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(parameters.clone(), config).unwrap();
    let mut scaler = scaler(&context, 4.0);
    let mut emas: Vec<Ema> = Vec::new();
    let mut seen = [Vec::new(), Vec::new()];
    for step in 0..7 {
        for parameter in &parameters {
            let value = parameter.value();
            let mut random = fastrand::Rng::with_seed(step);
            let mut gradient: Vec<f32> = (0..value.len()).map(|_| random.f32() - 0.5).collect();
            if let Some(last) = gradient.last_mut().filter(|_| step == 4) {
                *last = INF;
            }
            scaled_grad(&scaler, parameter, &gradient);
        }
        let outcome = scaler.step(&mut optimizer).unwrap();
        for ema in &mut emas {
            ema.update(scaler.found_inf(&optimizer)).unwrap();
        }
        scaler.update().unwrap();
        assert_eq!(outcome.is_applied().unwrap(), step != 4);
        match step {
            1 => {
                emas.push(Ema::of(&optimizer, 0.75).unwrap());
                emas.push(Ema::new(&parameters, 0.75).unwrap());
            }
            5 => emas.iter_mut().for_each(|ema| ema.set_decay(0.5).unwrap()),
            _ => {}
        }
        for (ema, seen) in emas.iter().zip(&mut seen) {
            let averages = (0..parameters.len()).map(|index| bits(ema.average(index).unwrap()));
            seen.push(averages.collect::<Vec<_>>().concat());
        }
    }
    seen
}

#[test]
fn averages_of_split_masters_are_those_of_whole_ones() {
    let [split, of_values] = averages_of(MasterWeights::Split);
    let [whole, _] = averages_of(MasterWeights::F32);
    assert_eq!(split.len(), 6);
    assert!(split == whole);
    assert!(split != of_values);
    let skipped = 4 - 1;
    assert!(split[skipped] == split[skipped - 1]);
    assert!(split.windows(2).filter(|pair| pair[0] == pair[1]).count() == 1);
}

/// An optimizer whose master of its one parameter is what it was given.
struct Odd(Sgd, &'static str, Tensor);

impl Optimizer for Odd {
    fn id(&self) -> &OptimizerId {
        self.0.id()
    }
    fn parameters(&self) -> &[Parameter] {
        self.0.parameters()
    }
    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        self.0.step(inputs)
    }
    fn state(&self, _: usize) -> Vec<(&'static str, Tensor)> {
        vec![(self.1, self.2.clone())]
    }
}

#[test]
fn masters_that_do_not_fit_are_refused() {
    let context = context();
    let weight = parameter(&context, "w", &[bf16::ONE; 3]);
    for (name, len, dtype) in [
        ("master_weight", 2, DType::F32),
        ("master_weight", 3, DType::U32),
        ("master_remainder", 1, DType::U32),
        ("master_remainder", 2, DType::F32),
    ] {
        let odd = Tensor::zeros(&context, [len], dtype).unwrap();
        let error = Ema::of(&Odd(sgd(&[&weight], 1.0), name, odd), 0.5).unwrap_err();
        let told = error.to_string();
        assert_eq!(
            told, "Ema: the master of parameter `w` does not fit it",
            "{name}"
        );
    }
}

#[test]
fn averages_have_the_width_of_the_master_and_not_of_the_parameter() {
    let context = context();
    let values: Vec<f64> = (1..=100).map(f64::from).collect();
    for (of_weight, of_master) in [(DType::F64, DType::F32), (DType::F32, DType::F64)] {
        let cast = |dtype| tensor(&context, &values).cast(dtype).unwrap();
        let weight = Parameter::new("w", Tensor::zeros(&context, [100], of_weight).unwrap());
        let weight = weight.unwrap();
        let odd = Odd(sgd(&[&weight], 1.0), "master_weight", cast(of_master));
        let mut ema = Ema::of(&odd, 0.5).unwrap();
        odd.2.fill(0.0).unwrap();
        ema.update(None).unwrap();
        let average = ema.average(0).unwrap();
        assert_eq!(average.dtype(), of_master);
        let halved: Vec<f64> = values.iter().map(|value| value / 2.0).collect();
        let seen = average.cast(DType::F64).unwrap().to_vec::<f64>().unwrap();
        assert_eq!(seen, halved);
        let tried = ema.with_averages(|| weight.value().cast(DType::F64)?.to_vec::<f64>());
        assert_eq!(tried.unwrap(), halved);
    }
}

#[test]
fn averages_move_with_applied_steps_and_by_the_formula() {
    averages_follow::<f16>(1e-6);
    averages_follow::<bf16>(1e-6);
    averages_follow::<f32>(1e-6);
    averages_follow::<f64>(1e-15);
}

#[test]
fn averages_can_be_tried_and_the_weights_come_back() {
    let context = context();
    let weight = parameter(&context, "w", &[f16::from_f32(0.1), f16::NAN]);
    let ema = Ema::new(std::slice::from_ref(&weight), 0.5).unwrap();
    weight.value().fill(3.0).unwrap();
    let before = bits(weight.value());
    let seen = ema
        .with_averages(|| weight.value().to_vec::<f16>())
        .unwrap();
    assert!(
        seen[0] == f16::from_f32(0.1) && seen[1].is_nan(),
        "{seen:?}"
    );
    assert_eq!(bits(weight.value()), before);
    let refused = ema.with_averages(|| weight.value().to_vec::<f32>());
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    assert_eq!(bits(weight.value()), before);
    assert!(Ema::new(&[], 0.5).is_err());
    for decay in [1.0, -0.1, f64::NAN] {
        assert!(Ema::new(std::slice::from_ref(&weight), decay).is_err());
    }
}

/// Counts before each of the steps, of which `skips` are skipped.
fn counts(context: &Context, steps: u64, skips: &[u64]) -> Vec<u64> {
    let weight = parameter(context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 0.0);
    let mut scaler = scaler(context, 1.0);
    let mut applied = AppliedSteps::new();
    let mut counts = Vec::new();
    for step in 0..steps {
        counts.push(applied.count());
        set_grad(&weight, &[if skips.contains(&step) { INF } else { 0.0 }]);
        let _ = scaler.step(&mut optimizer).unwrap();
        applied.record(scaler.found_inf(&optimizer)).unwrap();
        scaler.update().unwrap();
        // The state is what goes on, at any step.
        let state = applied.state_dict().unwrap();
        if step % 3 == 0 {
            applied = AppliedSteps::new();
            applied.load_state_dict(&state).unwrap();
        }
    }
    assert_eq!(applied.exact().unwrap(), steps - skips.len() as u64);
    assert_eq!(applied.steps(), steps);
    counts
}

#[test]
fn skipped_steps_are_known_eight_steps_late_and_always_then() {
    let skips = [0, 1, 4, 11, 12, 13, 14, 15, 16, 17, 18, 19, 29];
    let late = |step: u64| skips.iter().filter(|skipped| **skipped + 9 <= step).count() as u64;
    let expected: Vec<_> = (0..32).map(|step| step - late(step)).collect();
    assert_eq!(counts(&context(), 32, &skips), expected);
}

#[test]
fn counts_that_cannot_be_are_refused() {
    let mut applied = AppliedSteps::new();
    let state = |steps, skipped, recent: usize| kitsune::amp::AppliedStepsState {
        steps,
        skipped,
        recent: vec![true; recent],
    };
    for (state, named) in [
        (state(4, 0, 3), "recent"),
        (state(100, 0, 9), "recent"),
        (state(u64::MAX, u64::MAX, 8), "skipped"),
        (state(8, 1, 8), "skipped"),
    ] {
        match applied.load_state_dict(&state) {
            Err(Error::InvalidState { key, .. }) => assert_eq!(key, named),
            other => panic!("{state:?} gave {other:?}"),
        }
        assert_eq!(applied.steps(), 0);
    }
    applied.load_state_dict(&state(9, 1, 8)).unwrap();
    assert_eq!(applied.count(), 8);
}

#[test]
fn a_disabled_scaler_leaves_the_loop_as_it_is() {
    let context = context();
    let weight = ones::<f32>(&context, "w", &[1.0]);
    let config = AmpConfig {
        mode: ScalingMode::Off,
        ..AmpConfig::bf16()
    };
    let mut joined = AmpOptimizer::new(sgd(&[&weight], 1.0), config)
        .and_then(|joined| joined.with_ema(0.5))
        .unwrap();
    assert!(joined.step().unwrap().is_applied().unwrap());
    assert_eq!(value::<f32>(&weight), [0.0]);
    assert_eq!(
        joined
            .ema()
            .unwrap()
            .average(0)
            .unwrap()
            .item::<f32>()
            .unwrap(),
        0.5
    );
    assert!(joined.applied_steps().is_none());
}

#[test]
fn a_schedule_moves_every_group_and_only_the_learning_rate() {
    let context = context();
    let weight = ones::<f32>(&context, "w", &[0.0]);
    let config = SgdConfig {
        learning_rate: 0.5,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let optimizer = Sgd::new(vec![weight.clone()], config).unwrap();
    let decay = Decay::Linear {
        steps: 4,
        floor: 0.0,
    };
    let config = AmpConfig::bf16();
    let mut joined = AmpOptimizer::new(optimizer, config)
        .and_then(|joined| joined.with_schedule(Schedule { warmup: 0, decay }))
        .unwrap();
    let mut rates = Vec::new();
    for _ in 0..5 {
        scaled_grad(joined.scaler(), &weight, &[0.0]);
        let _ = joined.step().unwrap();
        rates.push(joined.optimizer().config().learning_rate);
    }
    assert_eq!(rates, [0.5, 0.375, 0.25, 0.125, 0.0]);
    assert_eq!(joined.optimizer().config().momentum, 0.9);
    assert_eq!(joined.schedule_factor(), 0.0);
}

#[test]
fn a_step_waits_for_nothing() {
    let inner = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let weight = ones::<f32>(&context, "w", &[0.0; 3]);
    let mut joined = AmpOptimizer::new(sgd(&[&weight], 0.1), AmpConfig::default())
        .and_then(|joined| joined.with_clip(1.0))
        .and_then(|joined| joined.with_schedule(Schedule::default()))
        .and_then(|joined| joined.with_ema(0.9))
        .unwrap();
    // Events are waited for, but only those that have passed: the device is never more than eight steps behind.
    let waits = || faults.calls("synchronize_stream") + faults.calls("copy_to_host");
    for step in 0..60 {
        scaled_grad(
            joined.scaler(),
            &weight,
            &[if step % 5 == 0 { INF } else { 0.1 }; 3],
        );
        let before = waits();
        let _ = joined.step().unwrap();
        assert_eq!(waits(), before, "step {step}");
        joined.zero_grad();
        if step % 8 == 7 {
            context.synchronize().unwrap();
        }
    }
    assert_eq!(joined.applied_steps().unwrap().exact().unwrap(), 48);
}
