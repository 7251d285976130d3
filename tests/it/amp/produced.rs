//! Gradients that a scaler checked where they were made: what it finds is what a check that reads them finds, to the
//! bit, and the check that reads them is not launched.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "drivers work on plain addresses, and a test fails by panicking"
)]

use crate::support;
use std::sync::Arc;

use crate::support::amp::{scaler, scaler_with, sgd};
use crate::support::device::{counted, device};
use kitsune::amp::{AmpConfig, GradScaler, NormKind, Outcome, ScalerStats};
use kitsune::driver::fault::FaultDriver;
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, Error, HostConfig, Tensor};

/// Lengths around packs, blocks and chunks; the last is misaligned in its memory.
const LENGTHS: [usize; 7] = [0, 1, 7, 1023, 65_536, 65_537, 140_003];

/// Numbers in (-1, 1), the same on every run.
fn numbers(seed: usize, len: usize) -> Vec<f64> {
    let mut random = fastrand::Rng::with_seed(seed as u64);
    (0..len).map(|_| 2.0 * random.f64() - 1.0).collect()
}

/// A tensor of this type; every second one does not begin at an aligned address.
fn tensor(context: &Context, dtype: DType, seed: usize, values: &[f64]) -> Tensor {
    let mut padded = vec![0.0; seed % 2];
    padded.extend(values);
    let all = Tensor::from_slice(context, [padded.len()], &padded).unwrap();
    let all = all.cast(dtype).unwrap();
    all.narrow(0, seed % 2, values.len()).unwrap()
}

/// Where a run's gradients become bad: parameter, element, and what is put there.
type Bad = Option<(usize, usize, f64)>;

struct Run {
    log: Arc<counted::Log>,
    context: Context,
    parameters: Vec<Parameter>,
    scaler: GradScaler,
    optimizer: AdamW,
}

impl Run {
    /// Of weights of this type, whose gradients are added up in buffers of f32 if `wide`.
    fn new(weights: DType, scale: f64, wide: bool) -> Self {
        let log = Arc::default();
        let device = counted::device(&device(HostConfig::default()), &log);
        let context = Context::new(&device).unwrap();
        let parameter = |(number, len): (usize, &usize)| {
            let value = tensor(&context, weights, 0, &numbers(number, *len));
            let parameter = Parameter::new(format!("p{number}"), value).unwrap();
            if wide {
                parameter.accumulate_in_f32().unwrap();
            }
            parameter
        };
        let parameters: Vec<_> = LENGTHS.iter().enumerate().map(parameter).collect();
        Self {
            optimizer: AdamW::new(parameters.clone(), AdamWConfig::default()).unwrap(),
            scaler: scaler(&context, scale),
            parameters,
            context,
            log,
        }
    }

    /// Two terms for each parameter, the first of type `sum`, the second of type `term`.
    fn accumulate(&self, produce: bool, [sum, term]: [DType; 2], round: usize, bad: Bad) {
        for (number, parameter) in self.parameters.iter().enumerate() {
            for (which, dtype) in [sum, term].into_iter().enumerate() {
                let seed = 100 * round + 10 * number + which;
                let mut values = numbers(seed, LENGTHS[number]);
                if let Some((_, at, value)) = bad.filter(|bad| bad.0 == number && which == 1) {
                    values[at] = value;
                }
                let grad = tensor(&self.context, dtype, seed, &values);
                if produce {
                    self.scaler.accumulate(parameter, grad).unwrap();
                } else {
                    parameter
                        .accumulate_scaled_grad(grad, self.scaler.tag())
                        .unwrap();
                }
            }
        }
    }

    /// Everything that a step with these gradients leaves, in bits.
    fn step(&mut self, clip: bool) -> Seen {
        self.log.lock().clear();
        let norm = clip.then(|| self.scaler.clip_grad_norm(&self.optimizer, 0.5).unwrap());
        let outcome = self.scaler.step(&mut self.optimizer).unwrap();
        self.scaler.update().unwrap();
        let launches = counted::names(&self.log);
        let read = |tensor: &Tensor| {
            let values = tensor.cast(DType::F64).unwrap().to_vec::<f64>().unwrap();
            values.into_iter().map(f64::to_bits).collect::<Vec<_>>()
        };
        let seen = Seen {
            norm: norm.as_ref().map(&read),
            outcome: outcome.wait().unwrap(),
            stats: self.scaler.stats().unwrap(),
            gradients: self
                .parameters
                .iter()
                .map(|one| read(&one.grad().unwrap()))
                .collect(),
            weights: self
                .parameters
                .iter()
                .map(|one| read(one.value()))
                .collect(),
            launches,
        };
        self.optimizer.zero_grad();
        seen
    }
}

#[derive(Debug)]
struct Seen {
    norm: Option<Vec<u64>>,
    outcome: Outcome,
    stats: ScalerStats,
    gradients: Vec<Vec<u64>>,
    weights: Vec<Vec<u64>>,
    launches: Vec<&'static str>,
}

impl Seen {
    #[track_caller]
    fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.norm, other.norm, "{what}");
        assert_eq!(self.outcome, other.outcome, "{what}");
        let [mine, others] = [self, other].map(|seen| {
            let mut stats = seen.stats.clone();
            (stats.scratch_bytes, stats.scratch_peak_bytes) = (0, 0);
            stats
        });
        assert_eq!(format!("{mine:?}"), format!("{others:?}"), "{what}");
        assert!(self.gradients == other.gradients, "{what}: gradients");
        assert!(self.weights == other.weights, "{what}: weights");
    }

    fn launches(&self, entry: &str) -> usize {
        self.launches.iter().filter(|name| **name == entry).count()
    }
}

/// Sums of each type that a kernel checks, with terms of each type that it takes.
const TYPES: [(DType, [DType; 2]); 6] = [
    (DType::F32, [DType::F32, DType::F32]),
    (DType::F32, [DType::F32, DType::F16]),
    (DType::F32, [DType::F32, DType::Bf16]),
    (DType::F16, [DType::F16, DType::F16]),
    (DType::Bf16, [DType::Bf16, DType::Bf16]),
    (DType::F64, [DType::F64, DType::F64]),
];

/// Gradients that become bad in turn, checked in a pass of their own and where they are made.
fn assert_found_the_same(weights: DType, types: [DType; 2], wide: bool) {
    let (inf, nan) = (f64::INFINITY, f64::NAN);
    // 3 is no power of two: multiplying by its inverse rounds.
    let [mut plain, mut produced] = [(); 2].map(|()| Run::new(weights, 3.0, wide));
    let bads = [
        None,
        Some((6, 140_002, inf)),
        None,
        Some((1, 0, nan)),
        Some((5, 65_536, -inf)),
        Some((3, 511, nan)),
        None,
    ];
    for (round, bad) in bads.into_iter().enumerate() {
        let clip = round % 2 == 0;
        plain.accumulate(false, types, round, bad);
        produced.accumulate(true, types, round, bad);
        for parameter in produced.parameters.iter().filter(|_| wide) {
            assert_eq!(parameter.grad().unwrap().dtype(), DType::F32);
        }
        let (plain, produced) = (plain.step(clip), produced.step(clip));
        let what = format!("{weights} {types:?} {wide}, round {round}");
        produced.assert_same(&plain, &what);
        assert_eq!(
            matches!(plain.outcome, Outcome::Applied),
            bad.is_none(),
            "{what}"
        );
        assert_eq!(plain.launches("gradient_check"), 1, "{what}");
        assert_eq!(produced.launches("gradient_check"), 0, "{what}");
        assert_eq!(produced.launches("gradient_gather"), 1, "{what}");
    }
}

#[test]
fn what_is_found_is_the_same_to_the_bit() {
    for (weights, types) in TYPES {
        assert_found_the_same(weights, types, false);
    }
}

/// Whatever the types of the terms, the sum is in f32, and it is what is checked.
#[test]
fn so_it_is_of_sums_in_f32() {
    use DType::{Bf16, F16, F32};
    for (weights, types) in [
        (F16, [F16, F16]),
        (Bf16, [Bf16, Bf16]),
        (Bf16, [F32, Bf16]),
        (F16, [Bf16, F16]),
        (F16, [F16, F32]),
        (F32, [F32, F32]),
    ] {
        assert_found_the_same(weights, types, true);
    }
}

/// Terms that 16 bits would lose count, also for the check; and the sums of the next window begin anew.
#[test]
fn sums_in_f32_overflow_by_what_they_are() {
    let (log, context) = noting();
    let mut scaler = scaler(&context, 1.0);
    let weight = Parameter::new("w", Tensor::zeros(&context, [4], DType::F16).unwrap()).unwrap();
    weight.accumulate_in_f32().unwrap();
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut addresses = Vec::new();
    // The largest f16 twice is infinite in f16 and finite in f32.
    for (term, applied) in [(65_504.0, true), (f64::INFINITY, false), (1.0, true)] {
        for _ in 0..2 {
            let term = Tensor::full(&context, [4], DType::F16, term).unwrap();
            scaler.accumulate(&weight, term).unwrap();
        }
        addresses.push(weight.grad().unwrap().ptr());
        log.lock().clear();
        let outcome = scaler.step(&mut optimizer).unwrap();
        assert!(!counted::names(&log).contains(&"gradient_check"));
        assert_eq!(outcome.is_applied().unwrap(), applied, "{term}");
        scaler.update().unwrap();
        optimizer.zero_grad();
    }
    assert!(addresses.iter().all(|address| *address == addresses[0]));
}

#[test]
fn a_step_moves_28_bytes_for_each_parameter() {
    let bytes = [200_001, 300_001].map(|len| {
        let log = Arc::default();
        let device = counted::device(&device(HostConfig::default()), &log);
        let context = Context::new(&device).unwrap();
        let weight = Tensor::full(&context, [len], DType::F32, 0.5).unwrap();
        let weight = Parameter::new("w", weight).unwrap();
        let mut optimizer = AdamW::new(vec![weight.clone()], AdamWConfig::default()).unwrap();
        let mut scaler = scaler(&context, 2.0);
        let mut step = || {
            for _ in 0..2 {
                let term = Tensor::full(&context, [len], DType::F32, 0.25).unwrap();
                scaler.accumulate(&weight, term).unwrap();
            }
            log.lock().clear();
            let norm = scaler.clip_grad_norm(&optimizer, 1.0).unwrap();
            drop((norm, scaler.step(&mut optimizer).unwrap()));
            scaler.update().unwrap();
            optimizer.zero_grad();
        };
        // The first makes tables.
        step();
        step();
        counted::bytes(&log)
    });
    assert_eq!(bytes[1] - bytes[0], 28 * 100_000);
}

/// One weight of four elements whose gradient is a sum of two terms, 2 in all, produced by `scaler`.
fn produced(context: &Context, scaler: &GradScaler) -> Parameter {
    let weight = Tensor::zeros(context, [4], DType::F32).unwrap();
    let weight = Parameter::new("w", weight).unwrap();
    for _ in 0..2 {
        let term = Tensor::full(context, [4], DType::F32, 1.0).unwrap();
        scaler.accumulate(&weight, term).unwrap();
    }
    weight
}

/// A device that notes what it is given.
fn noting() -> (Arc<counted::Log>, Context) {
    let log = Arc::default();
    let device = counted::device(&device(HostConfig::default()), &log);
    let context = Context::new(&device).unwrap();
    (log, context)
}

/// A way to write a gradient: given its parameter, and one of its elements.
type Write = fn(&Parameter, Tensor);

#[test]
fn a_gradient_that_was_written_since_is_read() {
    let bad = |weight: &Parameter| weight.grad().unwrap().narrow(0, 2, 1).unwrap();
    let writes: [(&str, Write); 5] = [
        ("fill", |_, element| element.fill(f64::INFINITY).unwrap()),
        ("copy", |_, element| {
            let whole = Tensor::full(element.context(), [1], DType::F32, f64::NAN).unwrap();
            element.copy_from(&whole).unwrap();
        }),
        ("set", |weight, element| {
            let other = Tensor::full(element.context(), [4], DType::F32, f64::NAN).unwrap();
            weight.set_grad(other).unwrap();
        }),
        ("add", |weight, element| {
            let term = Tensor::full(element.context(), [4], DType::F32, f64::INFINITY).unwrap();
            weight.accumulate_grad(term).unwrap();
        }),
        // What a kernel of the caller's wrote is told afterwards.
        ("say so", |weight, _| weight.grad().unwrap().mark_written()),
    ];
    for (how, write) in writes {
        let (log, context) = noting();
        // Without a scale, gradients have no tag, and `accumulate_grad` may add to them.
        let mut scaler = scaler_with(&context, AmpConfig::bf16());
        let weight = produced(&context, &scaler);
        let mut optimizer = sgd(&[&weight], 1.0);
        write(&weight, bad(&weight));
        log.lock().clear();
        let outcome = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        let names = counted::names(&log);
        assert!(names.contains(&"gradient_check"), "{how}: {names:?}");
        assert_eq!(outcome.is_applied().unwrap(), how == "say so", "{how}");
    }
}

#[test]
fn terms_that_no_sum_made_and_other_norms_are_read() {
    let (log, context) = noting();
    let mut scaler = scaler(&context, 4.0);
    let checks = |scaler: &mut GradScaler, optimizer: &dyn Optimizer, kind| {
        log.lock().clear();
        let norm = scaler.clip_grad_norm_by(optimizer, 1e9, kind).unwrap();
        let names = counted::names(&log);
        let count = |entry| names.iter().filter(|name| **name == entry).count();
        let counts = (count("gradient_check"), count("gradient_gather"));
        scaler.update().unwrap();
        (norm.item::<f64>().unwrap(), counts)
    };
    // Produced: 4 elements of 2 / 4. Beside it a gradient that is read: 3 elements of 4 / 4.
    let sum = produced(&context, &scaler);
    let other = support::amp::ones(&context, "other", &[4f32; 3]);
    let both = sgd(&[&other, &sum], 1.0);
    let l2 = checks(&mut scaler, &both, NormKind::L2);
    assert_eq!(l2, (2.0, (1, 1)));
    // The same gradient in the next iteration: its scale may be another.
    sum.set_grad(sum.grad().unwrap()).unwrap();
    assert_eq!(checks(&mut scaler, &both, NormKind::L2), (2.0, (1, 0)));
    let sum = produced(&context, &scaler);
    let alone = sgd(&[&sum], 1.0);
    assert_eq!(checks(&mut scaler, &alone, NormKind::L1), (2.0, (1, 0)));
    let sum = produced(&context, &scaler);
    let alone = sgd(&[&sum], 1.0);
    assert_eq!(checks(&mut scaler, &alone, NormKind::L2), (1.0, (0, 1)));
    // A first term has no pass of its own that a check could ride on.
    sum.zero_grad();
    let term = Tensor::full(&context, [4], DType::F32, 2.0).unwrap();
    scaler.accumulate(&sum, term).unwrap();
    assert_eq!(checks(&mut scaler, &alone, NormKind::L2), (1.0, (1, 0)));
}

#[test]
fn another_scale_than_the_one_it_was_checked_with_reads_again() {
    let (log, context) = noting();
    // Only checking there is no tag that would refuse the gradient; the iteration is another all the same.
    let mut scaler = scaler_with(&context, AmpConfig::bf16());
    let weight = produced(&context, &scaler);
    let mut optimizer = sgd(&[&weight], 1.0);
    for expected in ["gradient_gather", "gradient_check"] {
        log.lock().clear();
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        assert!(counted::names(&log).contains(&expected), "{expected}");
    }
    // Nor does it hold for another scaler.
    let weight = produced(&context, &scaler);
    let mut second = scaler_with(&context, AmpConfig::bf16());
    let mut optimizer = sgd(&[&weight], 1.0);
    log.lock().clear();
    let _ = second.step(&mut optimizer).unwrap();
    assert!(counted::names(&log).contains(&"gradient_check"));
}

#[test]
fn unscaling_and_clipping_in_place_make_what_was_found_void() {
    let (log, context) = noting();
    let mut scaler = scaler(&context, 4.0);
    let weight = produced(&context, &scaler);
    let mut optimizer = sgd(&[&weight], 1.0);
    scaler.unscale(&optimizer).unwrap();
    let norm = scaler.clip_grad_norm(&optimizer, 0.25).unwrap();
    assert_eq!(norm.item::<f64>().unwrap(), 1.0);
    log.lock().clear();
    assert!(scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert!(!counted::names(&log).contains(&"gradient_gather"));
    let moved: f32 = weight.value().to_vec::<f32>().unwrap()[0];
    assert!((moved + 0.125).abs() < 1e-6, "{moved}");
}

#[test]
fn refusals_add_nothing() {
    let context = Context::new(&device(HostConfig::default())).unwrap();
    let elsewhere = Context::new(context.device()).unwrap();
    let scaler = scaler(&context, 4.0);
    let weight = produced(&elsewhere, &support::amp::scaler(&elsewhere, 4.0));
    let term = Tensor::full(&elsewhere, [4], DType::F32, 1.0).unwrap();
    match scaler.accumulate(&weight, term) {
        Err(Error::InvalidArgument { op, reason }) => {
            assert_eq!(op, "accumulate");
            assert!(reason.contains("`w` is on another stream"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    let weight = produced(&context, &scaler);
    let short = Tensor::full(&context, [3], DType::F32, 1.0).unwrap();
    assert!(scaler.accumulate(&weight, short).is_err());
    // A gradient cannot be added to itself: its memory would be read and written at once.
    assert!(scaler.accumulate(&weight, weight.grad().unwrap()).is_err());
    assert_eq!(support::amp::grad::<f32>(&weight), [2.0; 4]);
}

/// Whichever launch of a check of both kinds fails, no flag is left that would skip a later step.
#[test]
fn half_a_check_leaves_no_flag_behind() {
    let inner = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
    // The check, the gathering, the step.
    for nth in 1..4 {
        let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
        let mut scaler = scaler(&context, 4.0);
        let sum = produced(&context, &scaler);
        let read = support::amp::ones(&context, "read", &[f32::INFINITY]);
        let mut optimizer = sgd(&[&read, &sum], 1.0);
        faults.fail_nth(Some("launch"), nth);
        assert!(scaler.step(&mut optimizer).is_err(), "launch {nth}");
        faults.disarm();
        let _ = scaler.update();
        support::amp::set_grad(&read, &[0f32]);
        support::amp::set_grad(&sum, &[0f32; 4]);
        let outcome = scaler.step(&mut optimizer).unwrap();
        assert!(outcome.is_applied().unwrap(), "launch {nth}");
    }
}
