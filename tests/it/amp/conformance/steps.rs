//! Cases 48 to 54: what a step changes, and what a skipped one leaves alone.

use std::cell::RefCell;

use kitsune::amp::AmpConfig;
use kitsune::optim::{
    AdamConfig, AdamFamily, AdamFamilyConfig, AdamW, AdamWConfig, MasterWeights, Moments,
    Optimizer, OptimizerId, Parameter, Sgd, SgdConfig, StepInputs,
};
use kitsune::{Context, DType, Result, Tensor, bf16};

use super::scale_and_tracker;
use crate::support::amp::oracle::{assert_same, number, oracle, to_f64};
use crate::support::amp::{context, grad, ones, scaler, set_grad, sgd, tensor, value};

fn adamw(weight: &Parameter, weight_decay: f64) -> AdamW {
    let config = AdamWConfig {
        learning_rate: 0.1,
        weight_decay,
        ..AdamWConfig::default()
    };
    AdamW::new(vec![weight.clone()], config).unwrap()
}

/// Weight, both moments and step count after some steps.
fn state(weight: &Parameter, optimizer: &AdamW) -> (Vec<u32>, Vec<u32>) {
    let moments = [optimizer.first_moment(0), optimizer.second_moment(0)].map(Option::unwrap);
    let tensors = [weight.value(), moments[0], moments[1]];
    let bits = |tensor: &&Tensor| tensor.to_vec::<f32>().unwrap();
    let bits = tensors.iter().flat_map(bits).map(f32::to_bits).collect();
    (bits, optimizer.step_counts().to_vec().unwrap())
}

#[test]
fn case_48_fused_equals_unfused() {
    let all = [
        (MasterWeights::F32, Moments::Full),
        (MasterWeights::Split, Moments::Full),
        (MasterWeights::Off, Moments::Bf16),
        (MasterWeights::Split, Moments::Bf16),
    ];
    for amsgrad in [false, true] {
        for weight_decay in [0.0, 0.01] {
            for (master_weights, moments) in all {
                fused_equals_unfused::<true>(AdamWConfig {
                    learning_rate: 0.1,
                    weight_decay,
                    amsgrad,
                    master_weights,
                    moments,
                    ..AdamWConfig::default()
                });
                fused_equals_unfused::<false>(AdamConfig {
                    learning_rate: 0.1,
                    weight_decay,
                    amsgrad,
                    master_weights,
                    moments,
                    ..AdamConfig::default()
                });
            }
        }
    }
}

/// The optimizer alone, unscaling as it reads, and after gradients were unscaled: the same to the bit.
fn fused_equals_unfused<const DECOUPLED: bool>(config: AdamFamilyConfig<DECOUPLED>) {
    let context = context();
    let gradients = [[0.5f32, -3.0, 1e-3], [0.25, 7.0, -2e-3], [-0.125, 0.3, 0.0]];
    let train = |how: usize| {
        let weights = [
            ones(&context, "f32", &[0f32; 3]),
            ones(&context, "bf16", &[bf16::ZERO; 3]),
        ];
        let mut optimizer = AdamFamily::new(weights.to_vec(), config).unwrap();
        let mut scaler = scaler(&context, 128.0);
        for gradient in gradients {
            let plain = tensor(&context, &gradient);
            let halves = plain.cast(DType::Bf16).unwrap();
            // 16-bit gradients, and gradients of another type than their weight's.
            for (weight, plain) in weights.iter().zip([&plain, &halves]) {
                let scaled = scaler.scale(plain).unwrap();
                match how {
                    0 => weight.set_grad(plain.clone()),
                    _ => weight.set_scaled_grad(scaled, scaler.tag()),
                }
                .unwrap();
            }
            if how == 0 {
                optimizer.step_unscaled().unwrap();
                continue;
            }
            if how == 2 {
                scaler.unscale(&optimizer).unwrap();
                assert_eq!(grad::<f32>(&weights[0]), gradient);
            }
            let _ = scaler.step(&mut optimizer).unwrap();
            scaler.update().unwrap();
        }
        let each = |(index, weight): (usize, &Parameter)| {
            let mut state = optimizer.state(index);
            state.push(("weight", weight.value().clone()));
            state
        };
        let tensors = weights.iter().enumerate().flat_map(each);
        let read = |(name, tensor): (&'static str, Tensor)| {
            let values = match tensor.dtype() {
                DType::U32 => tensor.to_vec::<u32>().unwrap(),
                _ => {
                    let values = tensor.cast(DType::F32).unwrap().to_vec::<f32>().unwrap();
                    values.into_iter().map(f32::to_bits).collect()
                }
            };
            (name, values)
        };
        tensors.map(read).collect::<Vec<_>>()
    };
    let plain = train(0);
    assert!(plain.contains(&("steps", vec![3])));
    assert_eq!(train(1), plain, "unscaled as the step reads: {config:?}");
    assert_eq!(train(2), plain, "unscaled before: {config:?}");
}

#[test]
fn case_49_fused_flag_2() {
    let context = context();
    for vector in oracle()["fused_adam_found_inf_values"].as_array().unwrap() {
        let flag = number(&vector[0]);
        let weight = ones(&context, "w", &[8f32; 3]);
        let mut optimizer = adamw(&weight, 0.0);
        let inputs = StepInputs {
            found_inf: Some(tensor(&context, &[flag as f32])),
            inv_scale: Some(tensor(&context, &[0.25f32])),
            clip: None,
        };
        optimizer.step(&inputs).unwrap();
        let count = optimizer.step_counts().item::<u32>().unwrap();
        if flag == 2.0 {
            assert_eq!(
                (number(&vector[1][0]), number(&vector[3])),
                (0.9, -1.0),
                "PyTorch steps"
            );
        }
        let applied = flag == 0.0;
        assert_eq!(count, u32::from(applied), "{flag}");
        let expected = if applied { 0.9 } else { 1.0 };
        assert!(
            (f64::from(value::<f32>(&weight)[0]) - expected).abs() < 1e-6,
            "{flag}"
        );
    }
}

#[test]
fn case_50_skip_leaves_state() {
    let context = context();
    let weight = ones(&context, "w", &[0.5f32, -0.25]);
    let mut optimizer = adamw(&weight, 0.5);
    let mut scaler = scaler(&context, 8.0);
    let _ = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    let before = state(&weight, &optimizer);
    set_grad(&weight, &[f32::NAN, 1.0]);
    assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    assert_eq!(state(&weight, &optimizer), before);
}

#[test]
fn case_51_fused_skip_grad_state() {
    let (fused, unfused) = (
        "fused_overflow_grads_left_scaled",
        "unfused_overflow_grads_unscaled",
    );
    assert_eq!(
        oracle()[fused],
        "ok:([1.0, 1.0, 1.0], [8.0, inf, 4.0], 2.0, None)"
    );
    assert_eq!(
        oracle()[unfused],
        "ok:([1.0, 1.0, 1.0], [2.0, inf, 1.0], 2.0, None)"
    );
    let context = context();
    let inf = f32::INFINITY;
    for (unscale, expected) in [(false, [8.0, inf, 4.0]), (true, [2.0, inf, 1.0])] {
        let weight = ones(&context, "w", &[8.0, inf, 4.0]);
        let mut optimizer = sgd(&[&weight], 1.0);
        let mut scaler = scaler(&context, 4.0);
        if unscale {
            scaler.unscale(&optimizer).unwrap();
        }
        assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
        scaler.update().unwrap();
        assert_eq!(
            (grad::<f32>(&weight), value::<f32>(&weight)),
            (expected.to_vec(), vec![1.0; 3])
        );
    }
}

#[test]
fn case_51a_first_step_overflow_momentum() {
    // PyTorch's fused kernel reads a momentum that nobody wrote.
    let context = context();
    let weight = ones(&context, "w", &[0f32]);
    let config = SgdConfig {
        learning_rate: 0.1,
        momentum: 0.9,
        ..SgdConfig::default()
    };
    let mut optimizer = Sgd::new(vec![weight.clone()], config).unwrap();
    let mut scaler = scaler(&context, 4.0);
    let mut trace = Vec::new();
    for gradient in [f32::INFINITY, 4.0, 4.0] {
        set_grad(&weight, &[gradient]);
        let scale = scaler.get_scale().unwrap();
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        trace.push((
            scale,
            (f64::from(value::<f32>(&weight)[0]) * 1e6).round() / 1e6,
        ));
    }
    assert_eq!(trace, [(4.0, 1.0), (2.0, 0.8), (2.0, 0.42)]);
}

/// Remembers with what it was stepped.
struct Recorder {
    inner: Sgd,
    seen: RefCell<Vec<[Option<f32>; 3]>>,
}

impl Optimizer for Recorder {
    fn id(&self) -> &OptimizerId {
        self.inner.id()
    }
    fn parameters(&self) -> &[Parameter] {
        self.inner.parameters()
    }
    fn step(&mut self, inputs: &StepInputs) -> Result<()> {
        let read = |tensor: &Option<Tensor>| tensor.as_ref().map(|one| one.item().unwrap());
        let inputs_read = [&inputs.found_inf, &inputs.inv_scale, &inputs.clip].map(read);
        self.seen.borrow_mut().push(inputs_read);
        self.inner.step(inputs)
    }
}

#[test]
fn case_52_optimizer_protocol() {
    // PyTorch hands some optimizers the scaler, others attributes that it clears. Here all get the device
    // numbers as arguments of the step, and keep nothing.
    let context = context();
    let weight = ones(&context, "w", &[8f32]);
    let mut optimizer = Recorder {
        inner: sgd(&[&weight], 1.0),
        seen: RefCell::default(),
    };
    let mut scaler = scaler(&context, 4.0);
    let mut run = |prepare: fn(&mut kitsune::amp::GradScaler, &Recorder)| {
        set_grad(&weight, &[8f32]);
        prepare(&mut scaler, &optimizer);
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
        optimizer.seen.take().pop().unwrap()
    };
    assert_eq!(run(|_, _| ()), [Some(0.0), Some(0.25), None]);
    let unscaled = run(|scaler, optimizer| scaler.unscale(optimizer).unwrap());
    assert_eq!(unscaled, [Some(0.0), None, None]);
    let clipped = run(|scaler, optimizer| drop(scaler.clip_grad_norm(optimizer, 1.0).unwrap()));
    assert_eq!(
        (clipped[1], clipped[2].map(|clip| (clip * 100.0).round())),
        (Some(0.25), Some(50.0))
    );
    assert_eq!(
        run(|_, _| ()),
        [Some(0.0), Some(0.25), None],
        "the clip is not kept"
    );
}

/// A scaler of 4 after three clean steps, and what it drives.
fn three_clean(context: &Context) -> (kitsune::amp::GradScaler, Sgd, Parameter) {
    let weight = ones(context, "w", &[0f32; 3]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(context, 4.0);
    for _ in 0..3 {
        let _ = scaler.step(&mut optimizer).unwrap();
        scaler.update().unwrap();
    }
    (scaler, optimizer, weight)
}

#[test]
fn case_53_new_scale() {
    let third = 0.033_333_335_071_802_14;
    assert!(
        oracle()["new_scale"]
            .as_str()
            .unwrap()
            .starts_with("ok:(3, (7.5, 3), [0.0333333350718")
    );
    let context = context();
    let (mut scaler, optimizer, weight) = three_clean(&context);
    set_grad(&weight, &[1f32; 3]);
    scaler.unscale(&optimizer).unwrap();
    scaler.update_to(7.5).unwrap();
    assert_eq!(scale_and_tracker(&scaler), (7.5, 3));
    scaler.unscale(&optimizer).unwrap();
    assert_same(&to_f64(&grad::<f32>(&weight)), &[third; 3], "1 / 4 / 7.5");
}

#[test]
fn case_54_new_scale_copied() {
    assert_eq!(oracle()["new_scale_tensor_is_copied"], "ok:16.0");
    let context = context();
    let (mut scaler, _, _) = three_clean(&context);
    let source = tensor(&context, &[16f32]);
    scaler
        .update_to(f64::from(source.item::<f32>().unwrap()))
        .unwrap();
    source.fill(2.0).unwrap();
    assert_eq!(scaler.get_scale().unwrap(), 16.0);
    // What cannot be a scale is refused, and the old one stays.
    let cap = AmpConfig::default().max_scale;
    for scale in [0.0, -1.0, f64::NAN, cap * 2.0] {
        assert!(scaler.update_to(scale).is_err());
    }
    assert_eq!(scaler.get_scale().unwrap(), 16.0);
}
