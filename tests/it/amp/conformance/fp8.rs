//! Cases 68 to 70: scales of 8-bit tensors, as in NVIDIA's Transformer Engine and in torchao.

use kitsune::amp::fp8::{
    AmaxAlgorithm, AmaxSource, Fp8Config, Fp8Policy, Fp8Scaler, Fp8State, Fp8TensorState,
    next_fp8_scale,
};
use kitsune::{Context, DType, Tensor};

use crate::support::amp::context;

const INF: f32 = f32::INFINITY;
const NAN: f32 = f32::NAN;

fn scaler(context: &Context, config: Fp8Config, dtype: DType) -> Fp8Scaler {
    Fp8Scaler::new(context, config, &[("x", dtype)]).unwrap()
}

fn largest(dtype: DType) -> f32 {
    dtype.largest() as f32
}

/// An iteration whose largest magnitude is `amax`: the scale and the history after it.
fn iterate(scaler: &mut Fp8Scaler, amax: f32) -> (f32, Vec<f32>) {
    let context = scaler.history().context().clone();
    let x = Tensor::from_slice(&context, [3], &[0.0, -amax, 0.0]).unwrap();
    scaler.quantize("x", &x).unwrap();
    scaler.update().unwrap();
    let state = scaler.state_dict().unwrap();
    (state.tensors[0].scale, state.tensors[0].history.clone())
}

#[test]
fn case_68_fp8_scale_cases() {
    let context = context();
    for dtype in DType::F8 {
        for current in [false, true] {
            let config = || match current {
                true => Fp8Config::current(),
                false => Fp8Config::default(),
            };
            let first = |amax| iterate(&mut scaler(&context, config(), dtype), amax).0;
            assert_eq!(first(0.0), 1.0, "{dtype}");
            assert_eq!(first(f32::MIN_POSITIVE), f32::MAX, "{dtype}");
            assert_eq!(first(0.3), largest(dtype) / 0.3, "{dtype}");
            // The old scale, or 1 where there is none to go on with.
            for amax in [0.0, INF, NAN] {
                assert_eq!(first(amax), 1.0, "{dtype} {amax}");
                let mut later = scaler(&context, config(), dtype);
                let old = iterate(&mut later, 2.0).0;
                assert_eq!(old, largest(dtype) / 2.0);
                let expected = if current { 1.0 } else { old };
                assert_eq!(iterate(&mut later, amax).0, expected, "{dtype} {amax}");
            }
        }
    }
    let floored = Fp8Config {
        epsilon: 4.0,
        ..Fp8Config::current()
    };
    let mut scaler = scaler(&context, floored, DType::F8E4M3);
    assert_eq!(
        [2.0, 0.0, 8.0].map(|amax| iterate(&mut scaler, amax).0),
        [112.0, 112.0, 56.0]
    );
}

#[test]
fn case_69_fp8_history_roll() {
    let context = context();
    let mut random = fastrand::Rng::with_seed(69);
    for history_length in [31, 1024] {
        for algorithm in [AmaxAlgorithm::Max, AmaxAlgorithm::MostRecent] {
            for dtype in DType::F8 {
                let config = Fp8Config {
                    history_length,
                    algorithm,
                    margin: 2,
                    ..Fp8Config::default()
                };
                let mut scaler = scaler(&context, config, dtype);
                let mut history: Vec<f32> = (0..history_length).map(|_| random.f32()).collect();
                history[0] = 0.0;
                let saved = Fp8TensorState {
                    name: "x".to_owned(),
                    dtype,
                    scale: 3.0,
                    history: history.clone(),
                };
                let state = Fp8State {
                    version: 1,
                    recipe: None,
                    tensors: vec![saved],
                };
                scaler.load_state_dict(&state).unwrap();
                let mut scale = 3.0;
                for amax in [0.25, 2.0, 0.0, 0.5] {
                    history[0] = amax;
                    // Rolled only where something was seen, and the first place is zeroed.
                    if amax > 0.0 {
                        let of_all = history.iter().copied().fold(0.0, f32::max);
                        let window = match algorithm {
                            AmaxAlgorithm::Max => of_all,
                            AmaxAlgorithm::MostRecent => amax,
                        };
                        scale = largest(dtype) / window / 4.0;
                        history.rotate_left(1);
                    }
                    history[0] = 0.0;
                    let what = format!("{history_length} {algorithm:?} {dtype} {amax}");
                    assert_eq!(
                        iterate(&mut scaler, amax),
                        (scale, history.clone()),
                        "{what}"
                    );
                }
            }
        }
    }
}

#[test]
fn case_70_pow2_floor() {
    let policy = |power_of_two| Fp8Policy {
        source: AmaxSource::History(AmaxAlgorithm::Max),
        margin: 0,
        power_of_two,
    };
    let mut random = fastrand::Rng::with_seed(70);
    for _ in 0..10_000 {
        let amax = 2f32.powf(random.f32() * 80.0 - 40.0);
        for dtype in DType::F8 {
            let plain = next_fp8_scale(&policy(false), largest(dtype), amax);
            let floored = next_fp8_scale(&policy(true), largest(dtype), amax);
            let expected = 2f64.powf(f64::from(plain).log2().floor());
            assert_eq!(f64::from(floored), expected, "{plain:e}");
        }
    }
    // On the device, where the scale is a power of two itself, just below one, and beyond the largest of them.
    let context = context();
    for current in [false, true] {
        for (amax, expected) in [
            (448.0, 1.0),
            (448f32.next_up(), 0.5),
            (3.0, 128.0),
            (0.3, 1024.0),
            (1e-40, 2f32.powi(127)),
        ] {
            let config = Fp8Config {
                power_of_two: true,
                ..if current {
                    Fp8Config::current()
                } else {
                    Fp8Config::default()
                }
            };
            let mut scaler = scaler(&context, config, DType::F8E4M3);
            assert_eq!(iterate(&mut scaler, amax).0, expected, "{amax}");
        }
    }
}

/// Transformer Engine's rule for the largest of a history: infinities go into it like all others.
fn theirs(scale: &mut f32, history: &mut [f32], amax: f32) {
    history[0] = amax;
    let window = history.iter().copied().fold(0.0, f32::max);
    if window.is_finite() && window > 0.0 {
        *scale = 448.0 / window;
    }
    history.rotate_left(1);
    history[0] = 0.0;
}

/// A difference on purpose: one infinity, and numbers that are a hundred times as large afterwards.
#[test]
fn an_infinity_does_not_freeze_the_scale_for_a_whole_history() {
    let context = context();
    let mut scaler = scaler(&context, Fp8Config::default(), DType::F8E4M3);
    let (mut scale, mut history) = (1.0, vec![0.0; 1024]);
    let (mut saturated_here, mut saturated_there) = (0, 0);
    let amaxes = [1.0, 1.0, INF].into_iter().chain([100.0; 1100]);
    for (step, amax) in amaxes.enumerate() {
        let x = Tensor::from_slice(&context, [2], &[amax, 0.5]).unwrap();
        // What both have for this step, from the steps before.
        if amax.is_finite() {
            let ours = scaler.scale("x").unwrap();
            saturated_here += u32::from(ours * amax > 448.0);
            saturated_there += u32::from(scale * amax > 448.0);
            let expected = match step {
                0 => 1.0,
                1 | 3 => 448.0,
                _ => 4.48,
            };
            assert_eq!(ours, expected, "{step}");
        }
        scaler.quantize("x", &x).unwrap();
        scaler.update().unwrap();
        theirs(&mut scale, &mut history, amax);
    }
    // Theirs stood at 448 until the infinity had left the history.
    assert_eq!((saturated_here, saturated_there), (1, 1024));
    assert_eq!((scaler.scale("x").unwrap(), scale), (4.48, 4.48));
    let stats = &scaler.stats().unwrap().tensors[0];
    // The infinity, and one number of the step after it.
    assert_eq!(
        (stats.overflowed, stats.not_finite, stats.updates),
        (2, 1, 1103)
    );
}
