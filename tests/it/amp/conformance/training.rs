//! Cases 31 to 36: a training under the scaler equals one without it that leaves the bad batch out.

use kitsune::amp::{AmpConfig, GradScaler, autocast};
use kitsune::optim::{NormKind, Optimizer, Parameter, Sgd, SgdConfig, clip_grad_norm};
use kitsune::{Context, DType, Result, Tensor, ops};

use super::{config, shaped};
use crate::support::amp::{context, grad, parameter, sgd, tensor, value};

const ROWS: usize = 8;

/// Numbers between -0.5 and 0.5.
fn numbers(seed: usize, len: usize) -> Vec<f32> {
    let number = |at: usize| ((at * 7 + seed * 31 + 3) as f32 * 0.618_034).fract() - 0.5;
    (0..len).map(number).collect()
}

/// Two layers of 8 x 8 and their optimizer.
struct Net {
    weights: [Parameter; 2],
    optimizer: Sgd,
}

impl Net {
    fn new(context: &Context) -> Self {
        Self::with_momentum(context, 0.0)
    }

    fn with_momentum(context: &Context, momentum: f64) -> Self {
        let weight = |name, seed| {
            let value = shaped(context, &[8, 8], &numbers(seed, 64));
            Parameter::new(name, value).unwrap()
        };
        let weights = [weight("0.weight", 1), weight("1.weight", 2)];
        let config = SgdConfig {
            learning_rate: 1.0,
            momentum,
            ..SgdConfig::default()
        };
        let optimizer = Sgd::new(weights.to_vec(), config).unwrap();
        Self { weights, optimizer }
    }

    /// Gradients of the scaled mean squared error of one batch, in the order of the weights.
    fn gradients(
        &self,
        batch: usize,
        dtype: Option<DType>,
        scaler: &GradScaler,
    ) -> Result<[Tensor; 2]> {
        let context = self.weights[0].value().context();
        let x = shaped(context, &[ROWS, 8], &numbers(10 + batch, ROWS * 8));
        let minus_target = shaped(context, &[ROWS, 8], &numbers(20 + batch, ROWS * 8));
        let scope = autocast(dtype.is_some(), dtype.unwrap_or(DType::F16));
        let first = ops::linear(&x, self.weights[0].value(), None)?;
        let second = ops::linear(first.output(), self.weights[1].value(), None)?;
        drop(scope);
        let difference = ops::add(&second.output().cast(DType::F32)?, &minus_target)?;
        let factor = Tensor::full(context, [ROWS, 8], DType::F32, 2.0 / (8 * ROWS) as f64)?;
        let seed = scaler.scale(&ops::mul(&difference, &factor)?)?;
        let above = second.backward(&seed.cast(second.output().dtype())?)?;
        let below = first.backward(&above.input)?;
        Ok([below.weight, above.weight])
    }

    fn set(&self, gradients: [Tensor; 2], bad: bool) {
        if bad {
            let corner = gradients[1]
                .narrow(0, 0, 1)
                .unwrap()
                .narrow(1, 0, 1)
                .unwrap();
            corner.fill(f64::INFINITY).unwrap();
        }
        for (weight, gradient) in self.weights.iter().zip(gradients) {
            weight.set_grad(gradient).unwrap();
        }
    }

    fn values(&self) -> Vec<f32> {
        self.weights.iter().flat_map(value::<f32>).collect()
    }
}

/// What is done between the backward pass and the step; tells whether the scaler is on.
type Before = fn(&mut GradScaler, &mut Net);

/// Weights and scale after four batches, with an infinity in the third if the scaler is on; else that batch
/// is left out.
fn train(
    context: &Context,
    enabled: bool,
    dtype: Option<DType>,
    before: Before,
) -> (Vec<f32>, f64) {
    let (net, _, scale) = train_in(Net::new(context), enabled, dtype, before);
    (net.values(), scale)
}

/// As [`train`], with the net in its last state, and the last batch's gradients divided by the scale.
fn train_in(
    mut net: Net,
    enabled: bool,
    dtype: Option<DType>,
    before: Before,
) -> (Net, Vec<f32>, f64) {
    let config = AmpConfig {
        enabled,
        ..config(128.0, 1)
    };
    let context = net.weights[0].value().context().clone();
    let mut scaler = GradScaler::new(&context, config).unwrap();
    let mut last = Vec::new();
    for batch in 0..4 {
        if batch == 2 && !enabled {
            continue;
        }
        let gradients = net.gradients(batch, dtype, &scaler).unwrap();
        net.set(gradients, batch == 2);
        let scale = scaler.get_scale().unwrap() as f32;
        let scaled = net.weights.iter().flat_map(grad::<f32>);
        last = scaled.map(|value| value / scale).collect();
        before(&mut scaler, &mut net);
        let outcome = scaler.step(&mut net.optimizer).unwrap();
        scaler.update().unwrap();
        assert_eq!(outcome.is_applied().unwrap(), batch != 2 || !enabled);
        net.optimizer.zero_grad();
    }
    (net, last, scaler.get_scale().unwrap())
}

fn assert_close(got: &[f32], expected: &[f32], relative: f32, absolute: f32) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        let allowed = relative * expected.abs() + absolute;
        assert!((got - expected).abs() <= allowed, "{got} and {expected}");
    }
    assert!(got.iter().any(|value| *value != 0.0));
}

#[test]
fn case_31_training_parity() {
    let context = context();
    for (dtype, relative, absolute) in [
        (None, 1e-5, 1e-7),
        (Some(DType::Bf16), 1e-2, 1e-3),
        (Some(DType::F16), 1e-3, 1e-3),
    ] {
        for momentum in [0.0, 0.5] {
            let run = |enabled| {
                let net = Net::with_momentum(&context, momentum);
                train_in(net, enabled, dtype, |_, _| ())
            };
            let ((control, plain, _), (scaled, divided, scale)) = (run(false), run(true));
            assert_eq!(scale, 128.0 * 8.0 * 0.5);
            // Weights, gradients and state, as without the bad batch.
            assert_close(&scaled.values(), &control.values(), relative, absolute);
            assert_close(&divided, &plain, relative, absolute);
            for index in 0..if momentum > 0.0 { 2 } else { 0 } {
                let buffer = |net: &Net| {
                    let buffer = net.optimizer.momentum_buffer(index).unwrap();
                    buffer.to_vec::<f32>().unwrap()
                };
                assert_close(&buffer(&scaled), &buffer(&control), relative, absolute);
            }
            assert_ne!(scaled.values(), Net::new(&context).values(), "it moves");
        }
    }
}

#[test]
fn case_32_disabled_parity() {
    let context = context();
    let (disabled, scale) = train(&context, false, None, |_, _| ());
    assert_eq!(scale, 1.0);
    // A plain loop, without a scaler's step.
    let mut net = Net::new(&context);
    let off = AmpConfig {
        enabled: false,
        ..AmpConfig::default()
    };
    let off = GradScaler::new(&context, off).unwrap();
    for batch in [0, 1, 3] {
        let gradients = net.gradients(batch, None, &off).unwrap();
        net.set(gradients, false);
        net.optimizer.step_unscaled().unwrap();
    }
    assert_eq!(net.values(), disabled);
}

fn clip(net: &Net, max_norm: f64) {
    let context = net.weights[0].value().context();
    clip_grad_norm(context, net.optimizer.parameters(), max_norm, NormKind::L2).unwrap();
}

#[test]
fn case_33_clip_scaled() {
    let context = context();
    let before: Before = |scaler, net| clip(net, 0.2 * scaler.get_scale().unwrap());
    let (control, _) = train(&context, false, None, before);
    let (scaled, scale) = train(&context, true, None, before);
    assert_eq!(scale, 512.0);
    assert_close(&scaled, &control, 0.0, 1e-5);
    assert_ne!(
        control,
        train(&context, false, None, |_, _| ()).0,
        "the limit bites"
    );
}

#[test]
fn case_34_clip_separate_unscale() {
    let context = context();
    let (control, _) = train(&context, false, None, |_, net| clip(net, 0.2));
    let separately: [Before; 3] = [
        |scaler, net| {
            scaler.unscale(&net.optimizer).unwrap();
            clip(net, 0.2);
        },
        |scaler, net| {
            scaler.unscale(&net.optimizer).unwrap();
            scaler.clip_grad_norm(&net.optimizer, 0.2).unwrap();
        },
        |scaler, net| drop(scaler.clip_grad_norm(&net.optimizer, 0.2).unwrap()),
    ];
    for before in separately {
        let (scaled, scale) = train(&context, true, None, before);
        assert_eq!(scale, 512.0);
        assert_close(&scaled, &control, 1e-5, 1e-6);
    }
}

#[test]
fn case_35_penalty() {
    // Loss w² / 2 for each of three weights, and the norm of its gradient w as a penalty: w + w / |w|.
    let context = context();
    let train = |enabled: bool| {
        let weight = parameter(&context, "w", &[3f32, -4.0, 12.0]);
        let mut optimizer = sgd(&[&weight], 0.25);
        let config = AmpConfig {
            enabled,
            ..config(128.0, 1)
        };
        let mut scaler = GradScaler::new(&context, config).unwrap();
        for batch in 0..4 {
            if batch == 2 && !enabled {
                continue;
            }
            let of_loss = weight.value().duplicate().unwrap();
            let scaled = scaler.scale(&of_loss).unwrap();
            // The scaled gradient, unscaled by hand, is what the penalty is made of.
            let inverse =
                Tensor::full(&context, [3], DType::F32, 1.0 / scaler.get_scale().unwrap());
            let unscaled = ops::mul(&scaled, &inverse.unwrap())
                .unwrap()
                .to_vec::<f32>()
                .unwrap();
            assert_eq!(unscaled, of_loss.to_vec::<f32>().unwrap());
            let norm = unscaled
                .iter()
                .map(|value| value * value)
                .sum::<f32>()
                .sqrt();
            let total: Vec<f32> = unscaled.iter().map(|value| value + value / norm).collect();
            let gradient = scaler.scale(&tensor(&context, &total)).unwrap();
            if batch == 2 {
                gradient
                    .narrow(0, 1, 1)
                    .unwrap()
                    .fill(f64::INFINITY)
                    .unwrap();
            }
            weight.set_scaled_grad(gradient, scaler.tag()).unwrap();
            let _ = scaler.step(&mut optimizer).unwrap();
            scaler.update().unwrap();
        }
        (value::<f32>(&weight), scaler.get_scale().unwrap())
    };
    let ((control, _), (scaled, scale)) = (train(false), train(true));
    assert_eq!(scale, 512.0);
    assert_close(&scaled, &control, 1e-5, 1e-7);
}

#[test]
fn case_36_accumulation() {
    let context = context();
    let train = |enabled: bool| {
        let mut net = Net::new(&context);
        let config = AmpConfig {
            enabled,
            ..config(128.0, 1)
        };
        let mut scaler = GradScaler::new(&context, config).unwrap();
        for batch in 0..4 {
            let gradients = net.gradients(batch, None, &scaler).unwrap();
            for (weight, gradient) in net.weights.iter().zip(gradients) {
                weight
                    .accumulate_scaled_grad(gradient, scaler.tag())
                    .unwrap();
            }
            if batch % 2 == 1 {
                let _ = scaler.step(&mut net.optimizer).unwrap();
                scaler.update().unwrap();
                net.optimizer.zero_grad();
            }
        }
        (net.values(), scaler.get_scale().unwrap())
    };
    let ((control, _), (scaled, scale)) = (train(false), train(true));
    assert_eq!(scale, 128.0 * 4.0);
    assert_close(&scaled, &control, 1e-5, 1e-7);
}
