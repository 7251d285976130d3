//! The MLP: linear layers with ReLU between them, and their gradients, written with the library's ops.

use kitsune::ops::{self, Linear};
use kitsune::optim::Parameter;
use kitsune::{Context, Result, Tensor};

use crate::digits::{CLASSES, PIXELS};
use crate::random::Random;

/// Widths of the layers, from the pixels to the digits. The smallest network tried that classifies 97.5 % of the test
/// images correctly after a thousand steps, for every seed and type tried.
const WIDTHS: [usize; 4] = [PIXELS, 256, 128, CLASSES];

/// Weights in f32. The autocast scope around the calls decides the type of the products.
#[derive(Debug)]
pub(super) struct Network {
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    weight: Parameter,
    bias: Parameter,
}

/// What the forward pass keeps for the backward pass: the linear part of each layer.
#[derive(Debug)]
pub(super) struct Forward {
    linears: Vec<Linear>,
}

impl Network {
    /// Weights drawn from `seed`, uniformly within the bound that keeps the variance of the activations constant from
    /// layer to layer under ReLU; zero biases.
    pub(super) fn new(context: &Context, seed: u64) -> Result<Self> {
        let _tag = kitsune::memory::tag("weights");
        let mut random = Random::new(seed);
        let layer = |(index, widths): (usize, &[usize])| {
            let (inputs, outputs) = (widths[0], widths[1]);
            let bound = (6.0 / inputs as f32).sqrt();
            let weight: Vec<f32> = (0..inputs * outputs)
                .map(|_| random.within(bound))
                .collect();
            let weight = Tensor::from_slice(context, [outputs, inputs], &weight)?;
            let bias = Tensor::zeros(context, [outputs], weight.dtype())?;
            let name = |part| format!("layer{}.{part}", index + 1);
            Ok(Layer {
                weight: Parameter::new(name("weight"), weight)?,
                bias: Parameter::new(name("bias"), bias)?,
            })
        };
        let layers = WIDTHS
            .windows(2)
            .enumerate()
            .map(layer)
            .collect::<Result<_>>()?;
        Ok(Self { layers })
    }

    /// The widths of the layers, for display: `64-256-128-10`.
    pub(super) fn shape() -> String {
        WIDTHS.map(|width| width.to_string()).join("-")
    }

    /// All weights and biases, from the pixels to the digits.
    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let both = |layer: &Layer| [layer.weight.clone(), layer.bias.clone()];
        self.layers.iter().flat_map(both).collect()
    }

    /// Enqueues the forward pass over `pixels[n, 64]`.
    pub(super) fn forward(&self, pixels: &Tensor) -> Result<Forward> {
        let mut linears: Vec<Linear> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let input = match linears.last() {
                None => pixels.clone(),
                Some(before) => ops::relu(before.output())?,
            };
            linears.push(ops::linear(
                &input,
                layer.weight.value(),
                Some(layer.bias.value()),
            )?);
        }
        Ok(Forward { linears })
    }

    /// Enqueues the backward pass from the gradient of the logits, and adds to the gradient of every parameter.
    pub(super) fn backward(&self, forward: &Forward, grad_logits: Tensor) -> Result<()> {
        let mut grad = grad_logits;
        let mut after = None;
        for (layer, linear) in self.layers.iter().zip(&forward.linears).rev() {
            if let Some(input_grad) = after.take() {
                grad = ops::relu_backward(linear.output(), &input_grad)?;
            }
            let gradients = linear.backward(&grad)?;
            layer.weight.accumulate_grad(gradients.weight)?;
            if let Some(bias) = gradients.bias {
                layer.bias.accumulate_grad(bias)?;
            }
            after = Some(gradients.input);
        }
        Ok(())
    }
}

impl Forward {
    /// The score of each digit for each image, `[n, 10]`.
    pub(super) fn logits(&self) -> &Tensor {
        self.linears.last().expect("a network has layers").output()
    }
}
