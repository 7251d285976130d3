//! Cases 66 and 67: masters cut in two, and moments rounded by chance.

use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, MasterWeights, Moments, Optimizer, Parameter, Sgd,
    SgdConfig,
};
use kitsune::{Context, DType, Tensor, bf16};

use crate::support::amp::{context, parameter, scaler, set_grad, tensor, value};

/// `len` numbers of many magnitudes.
fn random(seed: u64, len: usize, range: f32) -> Vec<bf16> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut number = || (random.f32() - 0.5) * range * 2f32.powi(random.i32(-6..3));
    (0..len).map(|_| bf16::from_f32(number())).collect()
}

/// The masters of which `high` are the upper halves, rounded, and `low` the lower, two a word.
fn joined(high: &[bf16], low: &Tensor) -> Vec<u32> {
    let words = low.to_vec::<u32>().unwrap();
    let halves = words.iter().flat_map(|word| [word & 0xffff, word >> 16]);
    let join = |(high, low): (&bf16, u32)| {
        let upper = u32::from(high.to_bits()).wrapping_sub(low >> 15) & 0xffff;
        upper << 16 | low
    };
    high.iter().zip(halves).map(join).collect()
}

/// Six optimizers, by number.
fn make(kind: usize, weights: Vec<Parameter>, master_weights: MasterWeights) -> Box<dyn Optimizer> {
    let adam = AdamConfig {
        learning_rate: 0.01,
        master_weights,
        amsgrad: kind == 1,
        weight_decay: [0.0, 0.1][kind % 2],
        ..AdamConfig::default()
    };
    let adamw = AdamWConfig {
        learning_rate: 0.01,
        master_weights,
        moments: [Moments::Full, Moments::Bf16][kind % 2],
        ..AdamWConfig::default()
    };
    let sgd = SgdConfig {
        learning_rate: 0.03,
        momentum: [0.0, 0.9][kind % 2],
        master_weights,
        ..SgdConfig::default()
    };
    match kind {
        0 | 1 => Box::new(Adam::new(weights, adam).unwrap()),
        2 | 3 => Box::new(AdamW::new(weights, adamw).unwrap()),
        _ => Box::new(Sgd::new(weights, sgd).unwrap()),
    }
}

#[test]
fn case_66_split_master() {
    // TransformerEngine's test holds master weights to be equal to the bit, and rounds ties away from zero too.
    const LEN: usize = 3001;
    for kind in 0..6 {
        let context = context();
        let weights = [0, 1].map(|_| parameter(&context, "w", &random(1, LEN, 1.0)));
        let masters = [MasterWeights::F32, MasterWeights::Split];
        let mut optimizers: Vec<_> = weights
            .iter()
            .zip(masters)
            .map(|(weight, masters)| make(kind, vec![weight.clone()], masters))
            .collect();
        let mut lower_in_use = 0;
        for step in 0..20u64 {
            let mut gradient = random(100 + step, LEN, 2.0);
            let overflows = step % 7 == 3;
            if overflows {
                gradient[LEN / 2] = bf16::INFINITY;
            }
            for (weight, optimizer) in weights.iter().zip(&mut optimizers) {
                set_grad(weight, &gradient);
                let mut scaler = scaler(&context, 1.0);
                let outcome = scaler.step(&mut **optimizer).unwrap();
                assert_eq!(outcome.is_applied().unwrap(), !overflows);
            }
            let [whole, split] = [0, 1].map(|which| value::<bf16>(&weights[which]));
            let states = [optimizers[0].state(0), optimizers[1].state(0)];
            let names = [states[0][0].0, states[1][0].0];
            assert_eq!(names, ["master_weight", "master_remainder"]);
            let expected = bits(&states[0][0].1);
            let got = joined(&split, &states[1][0].1);
            assert_eq!(got, expected, "{kind}, step {step}");
            // The parameters are the same but for ties.
            for ((whole, split), bits) in whole.iter().zip(&split).zip(&expected) {
                assert!(whole == split || bits & 0xffff == 0x8000, "{whole} {split}");
            }
            lower_in_use += got.iter().filter(|bits| *bits & 0xffff != 0).count();
            for ((name, whole), (same, split)) in states[0].iter().zip(&states[1]).skip(1) {
                assert_eq!(name, same);
                assert_eq!(bits(whole), bits(split), "{kind}, step {step}: {name}");
            }
        }
        assert!(lower_in_use > LEN);
    }
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    match tensor.dtype() {
        DType::U32 => tensor.to_vec::<u32>().unwrap(),
        DType::Bf16 => {
            let values = tensor.to_vec::<bf16>().unwrap();
            values
                .iter()
                .map(|value| u32::from(value.to_bits()))
                .collect()
        }
        _ => {
            let values = tensor.to_vec::<f32>().unwrap();
            values.iter().map(|value| value.to_bits()).collect()
        }
    }
}

/// Both moments after `steps` steps with this gradient in every place.
fn moments(
    context: &Context,
    gradient: &[f32],
    config: AdamWConfig,
    steps: usize,
) -> [Vec<f32>; 2] {
    let weight = parameter(context, "w", &vec![0f32; gradient.len()]);
    let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
    weight.set_grad(tensor(context, gradient)).unwrap();
    (0..steps).for_each(|_| optimizer.step_unscaled().unwrap());
    let tensors = [optimizer.first_moment(0), optimizer.second_moment(0)];
    tensors.map(|moment| moment.unwrap().cast(DType::F32).unwrap().to_vec().unwrap())
}

#[test]
fn case_67_stochastic_round() {
    // torchao's test: the mean over 100,000 roundings of a number is the number, within 3e-5 of it. Ours are the
    // first step's moments, of fewer roundings: within 5 standard deviations, 16 numbers at a time.
    const NUMBERS: usize = 16;
    const EACH: usize = 20_000;
    let context = context();
    let numbers: Vec<f32> = (0..NUMBERS).map(|at| 0.37 + at as f32 * 5.713).collect();
    let gradient: Vec<f32> = (0..EACH * NUMBERS).map(|at| numbers[at / EACH]).collect();
    let config = |moments, seed| AdamWConfig {
        moments,
        seed,
        ..AdamWConfig::default()
    };
    let exact = moments(&context, &numbers, config(Moments::Full, 0), 1);
    let rough = moments(&context, &gradient, config(Moments::Bf16, 7), 1);
    for (exact, rough) in exact.iter().zip(&rough) {
        for (exact, rough) in exact.iter().zip(rough.chunks(EACH)) {
            let mean = rough.iter().map(|one| f64::from(*one)).sum::<f64>() / EACH as f64;
            // Neighbours are 2^-7 of the power of two below apart: a deviation of half that at most.
            let bound = 5.0 * f64::from(*exact) * 2f64.powi(-8) / (EACH as f64).sqrt();
            assert!((mean - f64::from(*exact)).abs() < bound, "{mean} {exact}");
            let spacing = exact * 2f32.powi(-7);
            assert!(rough.iter().all(|one| (one - exact).abs() < spacing));
        }
    }
    // A seed gives the same bits again, another one others.
    let again = moments(&context, &gradient, config(Moments::Bf16, 7), 1);
    assert_eq!(again, rough);
    assert_ne!(
        moments(&context, &gradient, config(Moments::Bf16, 8), 1),
        rough
    );

    // Terms below half a unit in the last place add up, which nearest rounding would lose: after 1,000 steps with the
    // second moment near its limit, a thousandth of the distance is far less than that.
    let steps = 1000;
    let full = moments(&context, &[1.0; 64], config(Moments::Full, 0), steps);
    let rough = moments(&context, &[1.0; 4096], config(Moments::Bf16, 9), steps);
    let mean = rough[1].iter().sum::<f32>() / 4096.0;
    assert!(
        (mean - full[1][0]).abs() < 0.002 * full[1][0],
        "{mean} {}",
        full[1][0]
    );
}

#[test]
fn a_skipped_step_does_not_move_the_random_numbers() {
    let run = |skips: bool| {
        let context = context();
        let weight = parameter(&context, "w", &random(1, 500, 1.0));
        let config = AdamWConfig {
            moments: Moments::Bf16,
            master_weights: MasterWeights::Split,
            ..AdamWConfig::default()
        };
        let mut optimizer = AdamW::new(vec![weight.clone()], config).unwrap();
        let mut scaler = scaler(&context, 1.0);
        for step in 0..6 {
            let overflows: &[bool] = if skips { &[true, false] } else { &[false] };
            for overflow in overflows {
                let mut gradient = random(10 + step, 500, 1.0);
                if *overflow {
                    gradient[3] = bf16::NAN;
                }
                set_grad(&weight, &gradient);
                assert_eq!(
                    scaler.step(&mut optimizer).unwrap().is_applied().unwrap(),
                    !overflow
                );
                scaler.update_to(1.0).unwrap();
            }
        }
        let state = optimizer.state(0);
        let state = state.iter().map(|(name, tensor)| (*name, bits(tensor)));
        (value::<bf16>(&weight), state.collect::<Vec<_>>())
    };
    assert_eq!(run(true), run(false));
}
