//! Infinities and NaN at every kind of place of a gradient, through passes that write: each spoils its own element alone.

use kitsune::amp::{AmpConfig, GradScaler, NormKind};
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, MasterWeights, Moments, Optimizer, Parameter, Sgd,
    SgdConfig, clip_grad_norm,
};
use kitsune::{DType, Tensor};

use super::places::{
    BAD, LEADS, LEN, PLACES, contexts, misaligned, spoiled, spoiled_at, with_neighbours,
};

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.cast(DType::F64).unwrap().to_vec().unwrap()
}

/// Makes an optimizer of these parameters.
type Make = fn(Vec<Parameter>) -> Box<dyn Optimizer>;

/// An optimizer of each kind that kernels have a path for.
fn optimizers() -> Vec<Make> {
    vec![
        |parameters| {
            let config = SgdConfig {
                momentum: 0.9,
                ..SgdConfig::default()
            };
            Box::new(Sgd::new(parameters, config).unwrap())
        },
        |parameters| {
            let config = SgdConfig {
                master_weights: MasterWeights::Split,
                ..SgdConfig::default()
            };
            Box::new(Sgd::new(parameters, config).unwrap())
        },
        |parameters| Box::new(AdamW::new(parameters, AdamWConfig::default()).unwrap()),
        |parameters| {
            let config = AdamWConfig {
                master_weights: MasterWeights::Split,
                moments: Moments::Bf16,
                amsgrad: true,
                ..AdamWConfig::default()
            };
            Box::new(AdamW::new(parameters, config).unwrap())
        },
        |parameters| {
            let config = AdamConfig {
                master_weights: MasterWeights::Off,
                moments: Moments::Bf16,
                weight_decay: 0.1,
                ..AdamConfig::default()
            };
            Box::new(Adam::new(parameters, config).unwrap())
        },
    ]
}

#[test]
fn a_gradient_that_is_not_finite_spoils_its_own_weight_alone() {
    for context in contexts() {
        for dtype in DType::FLOATS {
            for (turn, lead) in LEADS.into_iter().enumerate() {
                let bad = spoiled(turn);
                for (which, make) in optimizers().into_iter().enumerate() {
                    let gradient = misaligned(&context, dtype, lead, &bad);
                    let parameters = with_neighbours(&context, dtype, gradient);
                    let mut optimizer = make(parameters.clone());
                    optimizer.step_unscaled().unwrap();
                    for (number, parameter) in parameters.iter().enumerate() {
                        let finite = |at: usize| number != 1 || bad[at].is_finite();
                        let after = values(parameter.value());
                        let wrong =
                            (0..after.len()).find(|at| after[*at].is_finite() != finite(*at));
                        let what = format!("{which} {dtype} lead {lead} tensor {number}");
                        assert_eq!(wrong, None, "{what}");
                        for (name, state) in optimizer.state(number) {
                            if ["steps", "master_remainder"].contains(&name) {
                                continue;
                            }
                            let state = values(&state);
                            let spoiled = |at: &usize| !state[*at].is_finite() && finite(*at);
                            assert_eq!((0..state.len()).find(spoiled), None, "{what} {name}");
                        }
                    }
                }
            }
        }
    }
}

/// Unscaling counts and places what it finds as a check does, and leaves it where it was.
#[test]
fn unscaling_finds_one_that_is_not_finite_and_leaves_it_there() {
    for context in contexts() {
        let one = Tensor::full(&context, [], DType::F32, 1.0).unwrap();
        for dtype in DType::FLOATS {
            for (number, place) in PLACES.into_iter().enumerate() {
                let (bad, lead) = (BAD[number % 3], LEADS[number / 3 % 3]);
                let what = format!("{dtype} {bad} at {place}");
                let gradient = misaligned(&context, dtype, lead, &spoiled_at(place, bad));
                let parameters = with_neighbours(&context, dtype, gradient);
                let mut sgd = Sgd::new(parameters.clone(), SgdConfig::default()).unwrap();
                let config = AmpConfig {
                    init_scale: 4.0,
                    ..AmpConfig::default()
                };
                let mut scaler = GradScaler::new(&context, config).unwrap();
                scaler.scale(&one).unwrap();
                scaler.unscale(&sgd).unwrap();
                for (which, parameter) in parameters.iter().enumerate() {
                    for (at, value) in values(&parameter.grad().unwrap()).iter().enumerate() {
                        let expected = if which == 1 && at == place { bad } else { 0.25 };
                        let same = *value == expected || value.is_nan() && expected.is_nan();
                        assert!(same, "{what}: {value} at {at} of {which}");
                    }
                }
                let _ = scaler.step(&mut sgd).unwrap();
                let report = &scaler.stats().unwrap().overflows[0].tensors[0];
                let is_nan = u64::from(bad.is_nan());
                let counts = (report.inf_count, report.nan_count, report.first_index);
                assert_eq!(counts, (1 - is_nan, is_nan, place as u64), "{what}");
            }
        }
    }
}

/// Whatever the norm, one element that is not finite makes it so.
#[test]
fn one_element_that_is_not_finite_shows_in_a_norm() {
    for context in contexts() {
        for kind in [NormKind::L1, NormKind::L2, NormKind::Max] {
            for (number, place) in PLACES.into_iter().enumerate() {
                let (bad, lead) = (BAD[number % 3], LEADS[number / 3 % 3]);
                let dtype = DType::FLOATS[number % 4];
                let gradient = misaligned(&context, dtype, lead, &spoiled_at(place, bad));
                let parameters = with_neighbours(&context, dtype, gradient);
                let norm = clip_grad_norm(&context, &parameters, 1.0, kind).unwrap();
                let norm = norm.item::<f64>().unwrap();
                let same = norm.is_nan() == bad.is_nan() && !norm.is_finite();
                assert!(same, "{kind:?} {dtype} {bad} at {place}: {norm}");
            }
        }
    }
}

/// A sum that is checked where it is made: what is not finite is found in either operand, counted and placed.
#[test]
fn one_element_that_is_not_finite_is_found_where_a_sum_is_made() {
    for context in contexts() {
        let one = Tensor::full(&context, [], DType::F32, 1.0).unwrap();
        for (sum, term) in [
            (DType::F32, DType::F32),
            (DType::F32, DType::F16),
            (DType::F32, DType::Bf16),
            (DType::F16, DType::F16),
            (DType::Bf16, DType::Bf16),
            (DType::F64, DType::F64),
        ] {
            for (number, place) in PLACES.into_iter().enumerate() {
                let (bad, lead) = (BAD[number % 3], LEADS[number / 3 % 3]);
                let what = format!("{sum} {term} {bad} at {place}");
                let spoiled = spoiled_at(place, bad);
                let ones = vec![1.0; LEN];
                let [first, second] = match number % 2 {
                    0 => [&spoiled, &ones],
                    _ => [&ones, &spoiled],
                };
                let mut scaler = GradScaler::new(&context, AmpConfig::bf16()).unwrap();
                scaler.scale(&one).unwrap();
                let first = misaligned(&context, sum, lead, first);
                let parameters = with_neighbours(&context, sum, first);
                let mut sgd = Sgd::new(parameters.clone(), SgdConfig::default()).unwrap();
                let second = misaligned(&context, term, (lead + number) % 4, second);
                scaler.accumulate(&parameters[1], second).unwrap();
                for (at, value) in values(&parameters[1].grad().unwrap()).iter().enumerate() {
                    let expected = if at == place { bad } else { 2.0 };
                    let same = *value == expected || value.is_nan() && expected.is_nan();
                    assert!(same, "{what}: {value} at {at}");
                }
                let outcome = scaler.step(&mut sgd).unwrap();
                assert!(!outcome.is_applied().unwrap(), "{what}");
                let reports = scaler.stats().unwrap().overflows;
                let [tensor] = &reports[0].tensors[..] else {
                    panic!("{what}: {reports:?}");
                };
                let is_nan = u64::from(bad.is_nan());
                let counts = (tensor.inf_count, tensor.nan_count, tensor.first_index);
                assert_eq!(counts, (1 - is_nan, is_nan, place as u64), "{what}");
            }
        }
    }
}
