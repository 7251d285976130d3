//! Multi-tensor kernels and the scaler's: the same optimizer steps on both devices, bit for bit where sums
//! are not reordered.

use kitsune::amp::{AmpConfig, GradScaler, NormKind};
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Ema, MasterWeights, Moments, Optimizer, ParamGroup,
    Parameter, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Device, Element, HostConfig, Tensor, bf16, f16};

use super::support::numbers;
use crate::support::device::{on_gpu, with_kernels};

/// Sizes of parameters: none, one, odd, around a chunk of 65536, several chunks.
const SIZES: [usize; 7] = [0, 1, 33, 257, 65_536, 65_537, 150_001];

/// Numbers that both devices must agree on, and how far they lie apart in their type.
#[derive(Clone)]
pub(super) struct Seen {
    epsilon: f64,
    values: Vec<f64>,
}

impl Seen {
    pub(super) fn of(tensor: &Tensor) -> Self {
        if tensor.dtype() == DType::U32 {
            let words = tensor.to_vec::<u32>().unwrap();
            return Self::exactly(&words.into_iter().map(f64::from).collect::<Vec<_>>());
        }
        Self {
            epsilon: tensor.dtype().epsilon(),
            values: tensor.cast(DType::F64).unwrap().to_vec().unwrap(),
        }
    }

    /// Numbers that must be the same.
    pub(super) fn exactly(values: &[f64]) -> Self {
        Self {
            epsilon: 0.0,
            values: values.to_vec(),
        }
    }
}

pub(super) fn on_both(test: impl Fn(&Context) -> Vec<Seen>) -> [Vec<Seen>; 2] {
    let host = Device::host(HostConfig::default()).unwrap();
    [host.clone(), with_kernels(&host)].map(|device| test(&Context::new(&device).unwrap()))
}

/// Asserts that numbers differ by `relative` at most, or by `ulps` of their type, of magnitudes up to 1.
#[track_caller]
pub(super) fn assert_same(what: &str, [twin, kernel]: &[Vec<Seen>; 2], relative: f64, ulps: f64) {
    assert_eq!(twin.len(), kernel.len());
    for (number, (twin, kernel)) in twin.iter().zip(kernel).enumerate() {
        assert_eq!(twin.values.len(), kernel.values.len());
        for (at, (x, y)) in twin.values.iter().zip(&kernel.values).enumerate() {
            let bound = relative * x.abs() + ulps * twin.epsilon * x.abs().max(1.0);
            let same = x.to_bits() == y.to_bits() || x.is_nan() && y.is_nan();
            assert!(
                same || (x - y).abs() <= bound,
                "{what}, {number}: element {at} is {x:e}, {y:e} from the kernel"
            );
        }
    }
}

/// [`assert_same`] after steps that may have clipped. A norm is a sum, which the kernel takes in another order, and f64
/// gradients are multiplied by its quotient in f64; in narrower types the quotient is rounded to the same number.
#[track_caller]
fn assert_same_steps(what: &str, both: &[Vec<Seen>; 2], ulps: f64) {
    const ULPS_OF_CLIPPED_F64: f64 = 4.0;
    let is_f64 = |seen: &Seen| seen.epsilon == DType::F64.epsilon();
    let part = |wanted: bool| {
        let of = |seen: &Vec<Seen>| {
            let seen = seen.iter().filter(|seen| is_f64(seen) == wanted);
            seen.cloned().collect()
        };
        [of(&both[0]), of(&both[1])]
    };
    assert_same(what, &part(false), 0.0, ulps);
    assert_same(what, &part(true), 0.0, ulps.max(ULPS_OF_CLIPPED_F64));
}

pub(super) fn tensor(context: &Context, dtype: DType, values: &[f64]) -> Tensor {
    fn of<T: Element>(context: &Context, values: &[f64]) -> Tensor {
        let values: Vec<T> = values
            .iter()
            .map(|value| <T as Element>::from_f64(*value))
            .collect();
        Tensor::from_slice(context, [values.len()], &values).unwrap()
    }
    match dtype {
        DType::F16 => of::<f16>(context, values),
        DType::Bf16 => of::<bf16>(context, values),
        DType::F32 => of::<f32>(context, values),
        _ => of::<f64>(context, values),
    }
}

/// One parameter of every size and type; the last of each type is a misaligned part of a larger tensor.
fn parameters(context: &Context) -> Vec<Parameter> {
    let mut parameters = Vec::new();
    for dtype in DType::FLOATS {
        for (number, len) in SIZES.into_iter().enumerate() {
            let all = tensor(context, dtype, &numbers(number as u64, len + 5, 1.0));
            let start = if number + 1 == SIZES.len() { 1 } else { 0 };
            let value = all.narrow(0, start, len).unwrap();
            parameters.push(Parameter::new(format!("{dtype}.{len}"), value).unwrap());
        }
    }
    parameters
}

/// The type of a parameter's gradient: mostly its own, for some with 16 bits f32, for some the other one.
fn gradient_type(number: usize, dtype: DType) -> DType {
    match number % 4 {
        1 if dtype.is_half() => DType::F32,
        2 if dtype == DType::Bf16 => DType::F16,
        _ => dtype,
    }
}

/// Gradients of several types, `bad` at places that differ from step to step.
fn set_gradients(parameters: &[Parameter], step: u64, bad: Option<f64>) {
    for (number, parameter) in parameters.iter().enumerate() {
        let value = parameter.value();
        let mut gradient = numbers(1000 * step + number as u64, value.len(), 2.0);
        if let Some(bad) = bad {
            for place in [0, value.len() / 2, value.len().saturating_sub(1)] {
                if let Some(element) = gradient.get_mut(place).filter(|_| number % 2 == 0) {
                    *element = bad;
                }
            }
        }
        let dtype = gradient_type(number, value.dtype());
        let gradient = tensor(value.context(), dtype, &gradient);
        parameter.set_grad(gradient).unwrap();
    }
}

/// Steps with and without overflow and clipping: all weights, flags, norms and scales on the way.
pub(super) fn steps<O: Optimizer>(
    context: &Context,
    parameters: &[Parameter],
    mut optimizer: O,
) -> Vec<Seen> {
    let config = AmpConfig {
        init_scale: 8.0,
        growth_interval: 2,
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(context, config).unwrap();
    let one = Tensor::full(context, [], DType::F32, 1.0).unwrap();
    let mut seen = Vec::new();
    let overflows = [
        None,
        None,
        Some(f64::INFINITY),
        None,
        Some(f64::NAN),
        Some(f64::NEG_INFINITY),
        None,
    ];
    for (step, bad) in (0u64..).zip(overflows) {
        scaler.scale(&one).unwrap();
        set_gradients(parameters, step, bad);
        match step % 4 {
            1 => scaler.unscale(&optimizer).unwrap(),
            2 => drop(scaler.clip_grad_norm(&optimizer, 0.5).unwrap()),
            3 => drop(
                scaler
                    .clip_grad_norm_by(&optimizer, 0.5, NormKind::Max)
                    .unwrap(),
            ),
            _ => {}
        }
        let outcome = scaler.step(&mut optimizer).unwrap();
        assert_eq!(outcome.is_applied().unwrap(), bad.is_none(), "step {step}");
        scaler.update().unwrap();
        seen.push(Seen::exactly(&[scaler.scale_factor().unwrap()]));
    }
    for report in scaler.stats().unwrap().overflows {
        seen.push(Seen::exactly(&[report.step as f64]));
        for tensor in &report.tensors {
            let counts = [tensor.inf_count, tensor.nan_count, tensor.first_index];
            seen.push(Seen::exactly(&counts.map(|count| count as f64)));
        }
    }
    for (index, parameter) in parameters.iter().enumerate() {
        seen.push(Seen::of(parameter.value()));
        let state = optimizer.state(index);
        seen.extend(state.iter().map(|(_, tensor)| Seen::of(tensor)));
    }
    seen
}

#[test]
fn sgd_steps() {
    let all = [
        (0.0, false, MasterWeights::F32),
        (0.9, false, MasterWeights::Off),
        (0.9, true, MasterWeights::F32),
        (0.0, false, MasterWeights::Split),
        (0.9, true, MasterWeights::Split),
    ];
    for (momentum, nesterov, master_weights) in all {
        let both = on_both(|context| {
            let parameters = parameters(context);
            let config = SgdConfig {
                learning_rate: 0.1,
                momentum,
                nesterov,
                weight_decay: 0.01,
                master_weights,
            };
            let optimizer = Sgd::new(parameters.clone(), config).unwrap();
            steps(context, &parameters, optimizer)
        });
        assert_same_steps("sgd", &both, 0.0);
    }
}

#[test]
fn adamw_steps() {
    let all = [
        (MasterWeights::F32, Moments::Full, false),
        (MasterWeights::Split, Moments::Full, true),
        (MasterWeights::F32, Moments::Bf16, false),
        (MasterWeights::Split, Moments::Bf16, false),
        (MasterWeights::Off, Moments::Bf16, true),
    ];
    for (master_weights, moments, amsgrad) in all {
        let both = on_both(|context| {
            let parameters = parameters(context);
            let config = AdamWConfig {
                learning_rate: 0.01,
                weight_decay: 0.1,
                master_weights,
                moments,
                amsgrad,
                seed: u64::MAX,
                ..AdamWConfig::default()
            };
            let optimizer = AdamW::new(parameters.clone(), config).unwrap();
            steps(context, &parameters, optimizer)
        });
        let what = format!("{master_weights:?} {moments:?}");
        assert_same_steps(&what, &both, ulps_of_adam());
    }
}

/// Units in the last place by which Adam may differ: on a GPU bias corrections come from another `pow`.
pub(super) fn ulps_of_adam() -> f64 {
    if on_gpu() { 4.0 } else { 0.0 }
}

/// Every parameter with another rate, decay and way of keeping state, in one launch.
#[test]
fn adam_steps_in_groups() {
    let both = on_both(|context| {
        let parameters = parameters(context);
        let groups = parameters.chunks(3).enumerate().map(|(number, part)| {
            let config = AdamConfig {
                learning_rate: 0.01 * (1 + number) as f64,
                weight_decay: [0.0, 0.1, 0.0][number % 3],
                amsgrad: number % 2 == 1,
                moments: [Moments::Full, Moments::Bf16][number / 2 % 2],
                master_weights: [MasterWeights::Split, MasterWeights::F32][number / 3 % 2],
                seed: number as u64,
                ..AdamConfig::default()
            };
            ParamGroup::new(part.to_vec(), config)
        });
        let optimizer = Adam::with_groups(groups.collect()).unwrap();
        steps(context, &parameters, optimizer)
    });
    assert_same_steps("adam in groups", &both, ulps_of_adam());
}

/// Averages of values and of masters, which move, are skipped, and move otherwise.
#[test]
fn averages() {
    for masters in [MasterWeights::Split, MasterWeights::F32, MasterWeights::Off] {
        let both = on_both(|context| {
            let parameters = parameters(context);
            let config = SgdConfig {
                learning_rate: 0.01,
                master_weights: masters,
                ..SgdConfig::default()
            };
            let mut optimizer = Sgd::new(parameters.clone(), config).unwrap();
            set_gradients(&parameters, 1, None);
            optimizer.step_unscaled().unwrap();
            let mut ema = Ema::of(&optimizer, 0.875).unwrap();
            let [clear, set] =
                [0.0, f64::NAN].map(|flag| Tensor::full(context, [], DType::F32, flag).unwrap());
            for (step, flag) in [(2, None), (3, Some(&set)), (4, Some(&clear))] {
                set_gradients(&parameters, step, None);
                optimizer.step_unscaled().unwrap();
                ema.update(flag).unwrap();
            }
            ema.set_decay(0.1).unwrap();
            ema.update(None).unwrap();
            let average = |index| Seen::of(ema.average(index).unwrap());
            (0..parameters.len()).map(average).collect()
        });
        assert_same(&format!("{masters:?}"), &both, 0.0, 0.0);
    }
}

/// More chunks than a warp has lanes, so that a lane adds up several.
#[test]
fn a_tensor_of_many_chunks() {
    const LEN: usize = 40 * 65_536 + 3;
    let both = on_both(|context| {
        let parameter = Parameter::new("w", tensor(context, DType::F16, &vec![1.0; LEN])).unwrap();
        let mut gradient = numbers(1, LEN, 0.01);
        for place in [5, 65_536 + 7, 32 * 65_536, LEN - 1] {
            gradient[place] = f64::NAN;
        }
        gradient[33 * 65_536 + 1] = f64::INFINITY;
        let mut sgd = Sgd::new(vec![parameter.clone()], SgdConfig::default()).unwrap();
        let mut scaler = GradScaler::new(context, AmpConfig::default()).unwrap();
        let one = Tensor::full(context, [], DType::F32, 1.0).unwrap();
        scaler.scale(&one).unwrap();
        parameter
            .set_grad(tensor(context, DType::F16, &gradient))
            .unwrap();
        let _ = scaler.step(&mut sgd).unwrap();
        let overflow = &scaler.stats().unwrap().overflows[0].tensors[0];
        assert_eq!(
            (overflow.inf_count, overflow.nan_count, overflow.first_index),
            (1, 4, 5)
        );
        parameter
            .set_grad(tensor(context, DType::F16, &numbers(1, LEN, 0.01)))
            .unwrap();
        let list = [parameter];
        let norm = kitsune::optim::clip_grad_norm(context, &list, 1.0, NormKind::L2).unwrap();
        vec![Seen::of(&norm)]
    });
    assert_same("many chunks", &both, 1e-13, 0.0);
}

/// Sums of squares, of magnitudes and largest magnitudes, with and without what is not finite.
#[test]
fn norms_and_clipped_gradients() {
    for kind in [NormKind::L1, NormKind::L2, NormKind::Max] {
        for bad in [None, Some(f64::INFINITY), Some(f64::NAN)] {
            let both = on_both(|context| {
                let parameters = parameters(context);
                set_gradients(&parameters, 7, bad);
                let norm = kitsune::optim::clip_grad_norm(context, &parameters, 1.0, kind).unwrap();
                let mut seen = vec![Seen::of(&norm)];
                seen.extend(parameters.iter().map(|one| Seen::of(&one.grad().unwrap())));
                seen
            });
            assert_same(&format!("{kind:?} {bad:?}"), &both, 1e-7, 0.0);
        }
    }
}
