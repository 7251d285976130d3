//! That kernels move what they say: bytes that device code loads and stores, counted where it does.

use std::collections::BTreeSet;
use std::sync::Arc;

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{
    Adam, AdamConfig, AdamW, AdamWConfig, Ema, MasterWeights, Moments, Optimizer, Parameter, Sgd,
    SgdConfig,
};
use kitsune::{Context, DType, Device, HostConfig, Tensor};

use crate::support::device::{Touched, counted, over_shim_counting};

/// Weights and gradients of each pair of types that optimizers take, of lengths around a chunk, some not aligned.
fn parameters(context: &Context, dtypes: &[(DType, DType)]) -> Vec<Parameter> {
    let mut parameters = Vec::new();
    for (weights, gradients) in dtypes {
        for (len, start) in [(1, 0), (257, 1), (65_537, 0), (70_001, 3)] {
            let part = |dtype, value| {
                let all = Tensor::full(context, [len + 5], dtype, value).unwrap();
                all.narrow(0, start, len).unwrap()
            };
            let name = format!("{weights}.{gradients}.{len}");
            let parameter = Parameter::new(name, part(*weights, 0.5)).unwrap();
            parameter.set_grad(part(*gradients, 0.25)).unwrap();
            parameters.push(parameter);
        }
    }
    parameters
}

/// Steps that check, clip as they read, unscale, and clip in place.
fn steps(context: &Context, optimizer: &mut impl Optimizer) {
    let config = AmpConfig {
        init_scale: 8.0,
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(context, config).unwrap();
    let one = Tensor::full(context, [], DType::F32, 1.0).unwrap();
    scaler.scale(&one).unwrap();
    for (unscale, clip) in [(false, false), (false, true), (true, false), (true, true)] {
        if unscale {
            scaler.unscale(optimizer).unwrap();
        }
        if clip {
            scaler.clip_grad_norm(optimizer, 1.0).unwrap();
        }
        assert!(scaler.step(optimizer).unwrap().is_applied().unwrap());
        scaler.update().unwrap();
    }
}

/// What `work` launches on device kernels: entry points, what they say they move, and what they touch.
fn launches(work: impl Fn(&Context)) -> Vec<(&'static str, [u64; 2], [u64; 2])> {
    let (log, touched): (Arc<counted::Log>, Arc<Touched>) = Default::default();
    let host = Device::host(HostConfig::default()).unwrap();
    let device = counted::device(&over_shim_counting(&host, &touched), &log);
    let context = Context::new(&device).unwrap();
    work(&context);
    context.synchronize().unwrap();
    let (log, touched) = (log.lock(), touched.lock());
    let copies = ["copy", "upload", "download", "fill"];
    let kernels = log.iter().filter(|(name, _)| !copies.contains(name));
    let pairs = kernels.zip(&*touched).map(|((name, said), (ran, did))| {
        assert_eq!(name, ran);
        Some((*name, said.map(|said| [said.read, said.written])?, *did))
    });
    pairs.flatten().collect()
}

/// Adds a term to a gradient, of several types each.
fn sums(context: &Context) {
    use DType::{Bf16, F16, F32, F64};
    for (from, to) in [(F32, F16), (F16, F32), (F32, F32), (Bf16, F64)] {
        let term = Tensor::full(context, [1003], from, 1.0).unwrap();
        let parameter = Tensor::zeros(context, [1003], F64).unwrap();
        let parameter = Parameter::new("sum", parameter).unwrap();
        parameter
            .set_grad(term.cast(to).unwrap().duplicate().unwrap())
            .unwrap();
        parameter.accumulate_grad(term).unwrap();
    }
}

#[test]
fn kernels_move_what_they_say() {
    use DType::{Bf16, F16, F32, F64};
    let pairs = [
        (F32, F32),
        (F16, F16),
        (Bf16, Bf16),
        (F64, F64),
        (F32, F16),
        (F32, Bf16),
        (F16, F32),
        (F64, F32),
    ];
    let moved = launches(|context| {
        let adamw = AdamWConfig::default();
        let plain = AdamWConfig {
            master_weights: MasterWeights::Off,
            ..adamw
        };
        let narrow = AdamWConfig {
            master_weights: MasterWeights::Split,
            moments: Moments::Bf16,
            ..adamw
        };
        for config in [adamw, plain, narrow] {
            let parameters = parameters(context, &pairs);
            let mut optimizer = AdamW::new(parameters, config).unwrap();
            steps(context, &mut optimizer);
            Ema::of(&optimizer, 0.5).unwrap().update(None).unwrap();
        }
        let amsgrad = AdamConfig {
            amsgrad: true,
            ..AdamConfig::default()
        };
        let all = parameters(context, &pairs);
        steps(context, &mut Adam::new(all, amsgrad).unwrap());
        for momentum in [0.0, 0.9] {
            let config = SgdConfig {
                momentum,
                master_weights: MasterWeights::Split,
                ..SgdConfig::default()
            };
            let parameters = parameters(context, &pairs);
            steps(context, &mut Sgd::new(parameters, config).unwrap());
        }
        sums(context);
    });
    for (entry, said, did) in &moved {
        assert_eq!(said, did, "{entry} reads and writes");
    }
    let seen: BTreeSet<_> = moved
        .iter()
        .filter(|(_, said, _)| *said != [0, 0])
        .map(|(entry, ..)| *entry)
        .collect();
    for entry in [
        "gradient_check",
        "gradient_unscale",
        "multiply",
        "adam",
        "sgd",
        "ema",
        "cast_f32_f16",
        "cast_f32_f32",
        "add_f32",
    ] {
        assert!(seen.contains(entry), "{entry} is not among {seen:?}");
    }
}
