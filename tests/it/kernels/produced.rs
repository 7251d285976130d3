//! Gradients that are checked where they are summed up, and the time of steps: kernels that only a scaler launches.

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{Optimizer, Parameter, Sgd, SgdConfig};
use kitsune::{Context, DType, Device, HostConfig, Tensor};

use super::support::{LEADS, lengths, numbers, with_specials};
use super::tables::{Seen, assert_same, on_both, tensor};
use crate::support::device::with_kernels;

/// Types of sums and of terms for which there is a kernel.
const TYPES: [(DType, DType); 6] = [
    (DType::F32, DType::F32),
    (DType::F32, DType::F16),
    (DType::F32, DType::Bf16),
    (DType::F16, DType::F16),
    (DType::Bf16, DType::Bf16),
    (DType::F64, DType::F64),
];

/// `values`, `lead` elements past an aligned address.
fn part(context: &Context, dtype: DType, lead: usize, values: &[f64]) -> Tensor {
    let all = tensor(context, dtype, &[&vec![0.5; lead][..], values].concat());
    all.narrow(0, lead, values.len()).unwrap()
}

/// A sum of three terms in a tensor of each length and alignment, the third with what is not finite if `special`.
fn sums(context: &Context, (sum, term): (DType, DType), special: bool) -> Vec<Seen> {
    // The inverse is no power of two: products are rounded.
    let config = AmpConfig {
        init_scale: 3.0,
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(context, config).unwrap();
    scaler
        .scale(&Tensor::full(context, [], DType::F32, 1.0).unwrap())
        .unwrap();
    let mut parameters = Vec::new();
    for (number, len) in lengths().into_iter().chain([65_537, 200_003]).enumerate() {
        let value = Tensor::zeros(context, [len], sum).unwrap();
        let parameter = Parameter::new(format!("{len}"), value).unwrap();
        let lead = LEADS[number % LEADS.len()];
        let first = part(context, sum, lead, &numbers(1, len, 9.0));
        scaler.accumulate(&parameter, first).unwrap();
        for (seed, lead) in [(2, lead), (3, lead + 1)] {
            let values = match special && seed == 3 && number % 2 == 0 {
                true => with_specials(seed, len, 9.0),
                false => numbers(seed, len, 9.0),
            };
            let next = part(context, term, lead % 8, &values);
            scaler.accumulate(&parameter, next).unwrap();
        }
        parameters.push(parameter);
    }
    let mut sgd = Sgd::new(parameters.clone(), SgdConfig::default()).unwrap();
    let mut seen = vec![Seen::of(&scaler.clip_grad_norm(&sgd, 1.0).unwrap())];
    let outcome = scaler.step(&mut sgd).unwrap();
    assert_eq!(outcome.is_applied().unwrap(), !special);
    scaler.update().unwrap();
    for report in scaler.stats().unwrap().overflows {
        seen.push(Seen::exactly(&[report.tensor_count as f64]));
        for tensor in &report.tensors {
            let counts = [tensor.inf_count, tensor.nan_count, tensor.first_index];
            seen.push(Seen::exactly(&counts.map(|count| count as f64)));
        }
    }
    for parameter in &parameters {
        seen.extend([
            Seen::of(&parameter.grad().unwrap()),
            Seen::of(parameter.value()),
        ]);
    }
    seen
}

#[test]
fn sums_that_are_checked_where_they_are_made() {
    for types in TYPES {
        for special in [false, true] {
            let mut both = on_both(|context| sums(context, types, special));
            let what = format!("{types:?} {special}");
            // Norms, and what they clip, come of sums in another order.
            let norms = both.each_mut().map(|side| vec![side.remove(0)]);
            assert_same(&what, &norms, 1e-13, 0.0);
            assert_same(&what, &both, 0.0, 1.0);
        }
    }
}

#[test]
fn steps_are_timed() {
    let host = Device::host(HostConfig::default()).unwrap();
    for device in [host.clone(), with_kernels(&host)] {
        let context = Context::new(&device).unwrap();
        let config = AmpConfig {
            timing: true,
            ..AmpConfig::bf16()
        };
        let mut scaler = GradScaler::new(&context, config).unwrap();
        let weight = Tensor::zeros(&context, [1 << 20], DType::F32).unwrap();
        let weight = Parameter::new("w", weight).unwrap();
        let mut sgd = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        let mut last = [std::time::Duration::ZERO; 3];
        for _ in 0..3 {
            weight
                .set_grad(weight.value().duplicate().unwrap())
                .unwrap();
            scaler.clip_grad_norm(&sgd, 1.0).unwrap();
            let _ = scaler.step(&mut sgd).unwrap();
            scaler.update().unwrap();
            let times = scaler.stats().unwrap().times.unwrap();
            let now = [times.check, times.clip, times.step];
            // How long is the machine's to say, but not nothing for a million weights.
            assert!(
                now[0] > last[0] && now[1] >= last[1] && now[2] > last[2],
                "{now:?}"
            );
            last = now;
        }
        sgd.zero_grad();
    }
}
