//! A whole training, in mixed precision, on twins and on device kernels.

use kitsune::amp::{AmpConfig, GradScaler, autocast};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Result, Tensor, ops};

use super::support::numbers;
use crate::support::device::with_kernels;

const ROWS: usize = 48;
const WIDTHS: [usize; 3] = [37, 70, 10];
const STEPS: usize = 20;

fn random(context: &Context, seed: u64, rows: usize, columns: usize, range: f64) -> Result<Tensor> {
    #[expect(clippy::cast_possible_truncation, reason = "random numbers")]
    let values: Vec<f32> = numbers(seed, rows * columns, range)
        .into_iter()
        .map(|value| value as f32)
        .collect();
    Tensor::from_slice(context, [rows, columns], &values)
}

/// The losses of 20 steps and the scales after them.
fn train(context: &Context, dtype: DType) -> Result<Vec<(f32, f64)>> {
    let parameter = |name: &str, value| Parameter::new(name, value);
    let [inputs, hidden, classes] = WIDTHS;
    let weights = [
        parameter("w1", random(context, 1, hidden, inputs, 0.3)?)?,
        parameter("b1", Tensor::zeros(context, [hidden], DType::F32)?)?,
        parameter("w2", random(context, 2, classes, hidden, 0.3)?)?,
        parameter("b2", Tensor::zeros(context, [classes], DType::F32)?)?,
    ];
    let mut optimizer = AdamW::new(weights.to_vec(), AdamWConfig::default())?;
    optimizer.set_learning_rate(0.01)?;
    let mut scaler = GradScaler::new(context, AmpConfig::default())?;
    let x = random(context, 3, ROWS, inputs, 1.0)?;
    let labels: Vec<u32> = (0..10).cycle().take(ROWS).collect();
    let labels = Tensor::from_slice(context, [ROWS], &labels)?;
    let mut seen = Vec::new();
    for _ in 0..STEPS {
        let scope = autocast(dtype.is_half(), dtype);
        let first = ops::linear(&x, weights[0].value(), Some(weights[1].value()))?;
        let active = ops::relu(first.output())?;
        let second = ops::linear(&active, weights[2].value(), Some(weights[3].value()))?;
        let loss = ops::softmax_cross_entropy(second.output(), &labels)?;
        drop(scope);
        let gradients = second.backward(&scaler.scale(&loss)?.backward()?)?;
        let inner = ops::relu_backward(first.output(), &gradients.input)?;
        let inner = first.backward(&inner)?;
        let all = [
            Some(inner.weight),
            inner.bias,
            Some(gradients.weight),
            gradients.bias,
        ];
        for (parameter, gradient) in weights.iter().zip(all) {
            parameter.set_grad(gradient.expect("each layer has a bias"))?;
        }
        scaler.clip_grad_norm(&optimizer, 1.0)?;
        let _ = scaler.step(&mut optimizer)?;
        scaler.update()?;
        optimizer.zero_grad();
        seen.push((loss.value().item()?, scaler.scale_factor()?));
    }
    Ok(seen)
}

#[test]
fn losses_agree_over_twenty_steps() {
    let host = Device::host(HostConfig::default()).unwrap();
    // Products are summed in another order: some gradients differ by a unit in the last place, and the
    // weights drift apart by as much a step.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::Bf16, 2e-2)] {
        let [twins, kernels] = [host.clone(), with_kernels(&host)]
            .map(|device| train(&Context::new(&device).unwrap(), dtype).unwrap());
        for (step, ((loss, scale), (other, other_scale))) in twins.iter().zip(&kernels).enumerate()
        {
            assert_eq!(scale, other_scale, "{dtype} step {step}");
            let error = (loss - other).abs();
            assert!(
                error <= tolerance * loss.abs(),
                "{dtype} step {step}: {loss} and {other}"
            );
        }
        // It learns, so that the losses say something.
        assert!(
            kernels[STEPS - 1].0 < 0.7 * kernels[0].0,
            "{dtype}: {kernels:?}"
        );
    }
}
