//! One transformer block: attention and a feed-forward layer, each after a normalization and with a residual
//! connection.

use kitsune::ops::{self, Attention, LayerNorm, Linear};
use kitsune::optim::Parameter;
use kitsune::{Context, Result, Tensor};

use crate::random::Random;

/// Width of the feed-forward layer, in multiples of the block's width.
const EXPANSION: usize = 4;

/// A linear layer.
#[derive(Debug)]
struct Dense {
    weight: Parameter,
    bias: Parameter,
}

/// A normalization.
#[derive(Debug)]
pub(super) struct Norm {
    weight: Parameter,
    bias: Parameter,
}

/// Weights of one block.
#[derive(Debug)]
pub(super) struct Block {
    heads: usize,
    before_attention: Norm,
    attend: Dense,
    project: Dense,
    before_neurons: Norm,
    expand: Dense,
    contract: Dense,
}

/// What the forward pass of a block keeps for the backward pass.
#[derive(Debug)]
pub(super) struct BlockForward {
    before_attention: LayerNorm,
    attend: Linear,
    attention: Attention,
    project: Linear,
    before_neurons: LayerNorm,
    expand: Linear,
    contract: Linear,
}

/// Weights drawn uniformly within `bound`.
pub(super) fn evenly(
    context: &Context,
    shape: [usize; 2],
    bound: f32,
    random: &mut Random,
) -> Result<Tensor> {
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|_| random.within(bound))
        .collect();
    Tensor::from_slice(context, shape, &values)
}

impl Dense {
    fn new(
        context: &Context,
        name: &str,
        [inputs, outputs]: [usize; 2],
        random: &mut Random,
    ) -> Result<Self> {
        let bound = 1.0 / (inputs as f32).sqrt();
        let weight = evenly(context, [outputs, inputs], bound, random)?;
        let bias = Tensor::zeros(context, [outputs], weight.dtype())?;
        Ok(Self {
            weight: Parameter::new(format!("{name}.weight"), weight)?,
            bias: Parameter::new(format!("{name}.bias"), bias)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Linear> {
        ops::linear(x, self.weight.value(), Some(self.bias.value()))
    }

    /// Adds to the gradients, and returns the gradient of the input.
    fn backward(&self, forward: &Linear, grad: &Tensor) -> Result<Tensor> {
        let gradients = forward.backward(grad)?;
        self.weight.accumulate_grad(gradients.weight)?;
        if let Some(bias) = gradients.bias {
            self.bias.accumulate_grad(bias)?;
        }
        Ok(gradients.input)
    }
}

impl Norm {
    pub(super) fn new(context: &Context, name: &str, width: usize) -> Result<Self> {
        let full = |value| Tensor::full(context, [width], kitsune::DType::F32, value);
        Ok(Self {
            weight: Parameter::new(format!("{name}.weight"), full(1.0)?)?,
            bias: Parameter::new(format!("{name}.bias"), full(0.0)?)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<LayerNorm> {
        ops::layer_norm(x, self.weight.value(), self.bias.value())
    }

    /// Adds to the gradients, and returns the gradient of the input.
    pub(super) fn backward(&self, forward: &LayerNorm, grad: &Tensor) -> Result<Tensor> {
        let gradients = forward.backward(grad)?;
        self.weight.accumulate_grad(gradients.weight)?;
        self.bias.accumulate_grad(gradients.bias)?;
        Ok(gradients.input)
    }

    pub(super) fn parameters(&self) -> [&Parameter; 2] {
        [&self.weight, &self.bias]
    }
}

impl Block {
    pub(super) fn new(
        context: &Context,
        name: &str,
        width: usize,
        heads: usize,
        random: &mut Random,
    ) -> Result<Self> {
        let mut dense =
            |part: &str, widths| Dense::new(context, &format!("{name}.{part}"), widths, random);
        let norm = |part: &str| Norm::new(context, &format!("{name}.{part}"), width);
        Ok(Self {
            heads,
            before_attention: norm("norm1")?,
            attend: dense("attend", [width, 3 * width])?,
            project: dense("project", [width, width])?,
            before_neurons: norm("norm2")?,
            expand: dense("expand", [width, EXPANSION * width])?,
            contract: dense("contract", [EXPANSION * width, width])?,
        })
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let dense = [&self.attend, &self.project, &self.expand, &self.contract];
        let norms = [&self.before_attention, &self.before_neurons];
        let norms = norms.into_iter().flat_map(Norm::parameters);
        let dense = dense
            .into_iter()
            .flat_map(|dense| [&dense.weight, &dense.bias]);
        norms.chain(dense).cloned().collect()
    }

    /// Enqueues the block over `x[n, width]`, which are sequences of `length` rows, and returns its output.
    pub(super) fn forward(&self, x: &Tensor, length: usize) -> Result<(Tensor, BlockForward)> {
        let before_attention = self.before_attention.forward(x)?;
        let attend = self.attend.forward(before_attention.output())?;
        let attention = ops::causal_attention(attend.output(), self.heads, length)?;
        let project = self.project.forward(attention.output())?;
        let x = ops::add(x, project.output())?;
        let before_neurons = self.before_neurons.forward(&x)?;
        let expand = self.expand.forward(before_neurons.output())?;
        let contract = self.contract.forward(&ops::gelu(expand.output())?)?;
        let x = ops::add(&x, contract.output())?;
        let forward = BlockForward {
            before_attention,
            attend,
            attention,
            project,
            before_neurons,
            expand,
            contract,
        };
        Ok((x, forward))
    }

    /// Enqueues the backward pass, adds to the gradients, and returns the gradient of the input.
    pub(super) fn backward(&self, forward: &BlockForward, grad: &Tensor) -> Result<Tensor> {
        let neurons = self.contract.backward(&forward.contract, grad)?;
        let neurons = ops::gelu_backward(forward.expand.output(), &neurons)?;
        let neurons = self.expand.backward(&forward.expand, &neurons)?;
        let neurons = self
            .before_neurons
            .backward(&forward.before_neurons, &neurons)?;
        let grad = ops::add(grad, &neurons)?;
        let attended = self.project.backward(&forward.project, &grad)?;
        let attended = forward.attention.backward(&attended)?;
        let attended = self.attend.backward(&forward.attend, &attended)?;
        let attended = self
            .before_attention
            .backward(&forward.before_attention, &attended)?;
        ops::add(&grad, &attended)
    }
}
