//! The transformer: embeddings of characters and positions, blocks, and a head whose weights are tied to the character
//! embedding.
//!
//! The residual stream stays in f32. The autocast scope around the forward pass decides the type of the products.

use kitsune::ops::{self, LayerNorm, Linear};
use kitsune::optim::Parameter;
use kitsune::{Context, Result, Tensor};

use super::block::{Block, BlockForward, Norm, evenly};
use crate::random::Random;
use crate::text::CONTEXT;

const WIDTH: usize = 64;
const HEADS: usize = 4;
const BLOCKS: usize = 2;

/// Bound on the initial entries of the embeddings. As head weights, they produce scores near zero.
const TABLE_BOUND: f32 = 0.05;

/// Weights in f32.
#[derive(Debug)]
pub(super) struct Network {
    characters: Parameter,
    places: Parameter,
    blocks: Vec<Block>,
    norm: Norm,
}

/// What the forward pass keeps for the backward pass.
#[derive(Debug)]
pub(super) struct Forward {
    ids: Tensor,
    places: Tensor,
    blocks: Vec<BlockForward>,
    norm: LayerNorm,
    head: Linear,
}

impl Network {
    /// Weights drawn from `seed`.
    pub(super) fn new(context: &Context, vocabulary: usize, seed: u64) -> Result<Self> {
        let _tag = kitsune::memory::tag("weights");
        // A different sequence from the one that selects the text.
        let mut random = Random::new(!seed);
        let mut table = |name: &str, rows| {
            let table = evenly(context, [rows, WIDTH], TABLE_BOUND, &mut random)?;
            Parameter::new(name, table)
        };
        let (characters, places) = (table("characters", vocabulary)?, table("places", CONTEXT)?);
        let block =
            |index| Block::new(context, &format!("block{index}"), WIDTH, HEADS, &mut random);
        Ok(Self {
            characters,
            places,
            blocks: (1..=BLOCKS).map(block).collect::<Result<_>>()?,
            norm: Norm::new(context, "norm", WIDTH)?,
        })
    }

    /// The sizes, for display.
    pub(super) fn shape(&self) -> String {
        let vocabulary = self.characters.value().shape()[0];
        format!("gpt {BLOCKS}x{WIDTH}, {HEADS} heads, {vocabulary} characters")
    }

    /// All parameters, from the embeddings to the last normalization.
    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let mut parameters = vec![self.characters.clone(), self.places.clone()];
        parameters.extend(self.blocks.iter().flat_map(Block::parameters));
        parameters.extend(self.norm.parameters().map(Clone::clone));
        parameters
    }

    /// Enqueues the forward pass over `ids[n]`, which are sequences of `length` characters.
    pub(super) fn forward(&self, ids: &Tensor, length: usize) -> Result<Forward> {
        let places: Vec<u32> = (0..ids.len())
            .map(|row| u32::try_from(row % length).expect("sequences are short"))
            .collect();
        let places = Tensor::from_slice(ids.context(), [ids.len()], &places)?;
        let mut x = ops::add(
            &ops::embedding(self.characters.value(), ids)?,
            &ops::embedding(self.places.value(), &places)?,
        )?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (next, forward) = block.forward(&x, length)?;
            x = next;
            blocks.push(forward);
        }
        let norm = self.norm.forward(&x)?;
        let head = ops::linear(norm.output(), self.characters.value(), None)?;
        Ok(Forward {
            ids: ids.clone(),
            places,
            blocks,
            norm,
            head,
        })
    }

    /// Enqueues the backward pass from the gradient of the logits, and adds to every gradient.
    pub(super) fn backward(&self, forward: &Forward, grad_logits: &Tensor) -> Result<()> {
        let gradients = forward.head.backward(grad_logits)?;
        self.characters.accumulate_grad(gradients.weight)?;
        let mut grad = self.norm.backward(&forward.norm, &gradients.input)?;
        for (block, forward) in self.blocks.iter().zip(&forward.blocks).rev() {
            grad = block.backward(forward, &grad)?;
        }
        for (table, ids) in [
            (&self.characters, &forward.ids),
            (&self.places, &forward.places),
        ] {
            table.accumulate_grad(ops::embedding_backward(table.value(), ids, &grad)?)?;
        }
        Ok(())
    }
}

impl Forward {
    /// The score of each character at each position, `[n, vocabulary]`.
    pub(super) fn logits(&self) -> &Tensor {
        self.head.output()
    }
}
