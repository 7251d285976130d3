//! A character-level language model: a small transformer.

mod block;
mod network;

use kitsune::amp::{GradScaler, autocast};
use kitsune::optim::Parameter;
use kitsune::{Context, DType, Tensor, ops};
use serde_json::Value;

use self::network::Network;
use super::task::{Pass, Task, seed};
use crate::failure::Failure;
use crate::fingerprint::Fingerprint;
use crate::random::Random;
use crate::text::{Sequences, Text};

/// Sequences per batch by default.
const BATCH_SIZE: usize = 8;

/// The most sequences per batch: a quarter of a million characters, for which the pool takes 3 GiB.
const BATCH_SIZE_MAX: usize = 4096;

/// The text, the network, and the random numbers that select the next sequences.
#[derive(Debug)]
pub(super) struct GptTask {
    context: Context,
    dtype: DType,
    text: Text,
    network: Network,
    random: Random,
    size: usize,
}

/// Sequences on the device.
struct Batch {
    length: usize,
    characters: Tensor,
    next: Tensor,
}

impl Batch {
    fn upload(context: &Context, sequences: &Sequences) -> kitsune::Result<Self> {
        let _tag = kitsune::memory::tag("batches");
        let upload = |numbers: &[u32]| Tensor::from_slice(context, [numbers.len()], numbers);
        Ok(Self {
            length: sequences.length,
            characters: upload(&sequences.characters)?,
            next: upload(&sequences.next)?,
        })
    }
}

impl GptTask {
    /// A new network for `text`, with batches of `size` sequences.
    pub(super) fn new(
        context: &Context,
        dtype: DType,
        text: Text,
        size: Option<u32>,
        seed: u64,
    ) -> Result<Self, Failure> {
        let size = size.map_or(BATCH_SIZE, |size| size as usize);
        if size > BATCH_SIZE_MAX {
            let reason = format!("--batch-size {size}: at most {BATCH_SIZE_MAX} sequences");
            return Err(Failure::Input(reason));
        }
        Ok(Self {
            network: Network::new(context, text.vocabulary, seed)?,
            random: Random::new(seed),
            size,
            context: context.clone(),
            dtype,
            text,
        })
    }
}

impl Task for GptTask {
    fn model(&self) -> String {
        self.network.shape()
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.network.parameters()
    }

    fn pass(&mut self, scaler: &GradScaler, share: Option<&Tensor>) -> kitsune::Result<Pass> {
        let sequences = self.text.draw(self.size, &mut self.random);
        let batch = Batch::upload(&self.context, &sequences)?;
        let scope = autocast(self.dtype.is_half(), self.dtype);
        let forward = self.network.forward(&batch.characters, batch.length)?;
        let loss = ops::softmax_cross_entropy(forward.logits(), &batch.next)?;
        drop(scope);
        let grad_logits = seed(&loss, scaler, share)?;
        self.network.backward(&forward, &grad_logits)?;
        Ok(Pass {
            logits: forward.logits().clone(),
            labels: batch.next,
            loss,
        })
    }

    fn place(&self) -> Value {
        serde_json::to_value(&self.random).expect("a number is always JSON")
    }

    fn go_to(&mut self, place: Value) -> Result<bool, String> {
        // The state is valid for every text: batches are cut at positions that depend only on it.
        self.random = serde_json::from_value(place).map_err(|error| error.to_string())?;
        Ok(true)
    }

    fn fingerprint(&self) -> Fingerprint {
        self.text.fingerprint
    }

    fn test(&mut self) -> kitsune::Result<f64> {
        let _scope = autocast(self.dtype.is_half(), self.dtype);
        let (mut right, mut count) = (0.0, 0);
        for sequences in self.text.tests(self.size) {
            let batch = Batch::upload(&self.context, &sequences)?;
            let forward = self.network.forward(&batch.characters, batch.length)?;
            let characters = sequences.next.len();
            right += ops::accuracy(forward.logits(), &batch.next)? * characters as f64;
            count += characters;
        }
        // Each share came from a whole number of characters, which rounding restores.
        Ok(right.round() / f64::from(u32::try_from(count).unwrap_or(u32::MAX)))
    }
}

#[cfg(test)]
mod tests;
