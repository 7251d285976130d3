//! Classifies handwritten digits with a network of linear layers.

use kitsune::amp::{GradScaler, autocast};
use kitsune::optim::Parameter;
use kitsune::{Context, DType, Tensor, ops};
use serde_json::Value;

use super::mlp::Network;
use super::task::{Pass, Task, seed};
use crate::batches::Batches;
use crate::digits::{Digits, Images, PIXELS};
use crate::failure::Failure;
use crate::fingerprint::Fingerprint;

/// Images per batch by default.
const BATCH_SIZE: usize = 64;

/// The digits, the network, and the order of the batches.
#[derive(Debug)]
pub(super) struct DigitsTask {
    context: Context,
    dtype: DType,
    digits: Digits,
    network: Network,
    batches: Batches,
    size: usize,
}

/// Images and their digits on the device.
struct Batch {
    pixels: Tensor,
    labels: Tensor,
}

impl Batch {
    /// Copies the images at `indices`.
    fn upload(context: &Context, images: &Images, indices: &[usize]) -> kitsune::Result<Self> {
        let _tag = kitsune::memory::tag("batches");
        let mut pixels = Vec::with_capacity(indices.len() * PIXELS);
        for &index in indices {
            pixels.extend_from_slice(&images.pixels[index * PIXELS..][..PIXELS]);
        }
        let labels: Vec<u32> = indices.iter().map(|&index| images.labels[index]).collect();
        Ok(Self {
            pixels: Tensor::from_slice(context, [indices.len(), PIXELS], &pixels)?,
            labels: Tensor::from_slice(context, [indices.len()], &labels)?,
        })
    }
}

impl DigitsTask {
    /// A new network for `digits`, with batches of `size` images.
    pub(super) fn new(
        context: &Context,
        dtype: DType,
        digits: Digits,
        size: Option<u32>,
        seed: u64,
    ) -> Result<Self, Failure> {
        let (size, count) = (
            size.map_or(BATCH_SIZE, |size| size as usize),
            digits.train.count(),
        );
        if size > count {
            let reason = format!("--batch-size {size}: there are {count} images to train with");
            return Err(Failure::Input(reason));
        }
        Ok(Self {
            network: Network::new(context, seed)?,
            batches: Batches::new(count, size, seed),
            context: context.clone(),
            dtype,
            digits,
            size,
        })
    }
}

impl Task for DigitsTask {
    fn model(&self) -> String {
        Network::shape()
    }

    fn parameters(&self) -> Vec<Parameter> {
        self.network.parameters()
    }

    fn pass(&mut self, scaler: &GradScaler, share: Option<&Tensor>) -> kitsune::Result<Pass> {
        let batch = Batch::upload(&self.context, &self.digits.train, self.batches.advance())?;
        let scope = autocast(self.dtype.is_half(), self.dtype);
        let forward = self.network.forward(&batch.pixels)?;
        let loss = ops::softmax_cross_entropy(forward.logits(), &batch.labels)?;
        drop(scope);
        self.network
            .backward(&forward, seed(&loss, scaler, share)?)?;
        Ok(Pass {
            logits: forward.logits().clone(),
            labels: batch.labels,
            loss,
        })
    }

    fn place(&self) -> Value {
        serde_json::to_value(&self.batches).expect("numbers are always JSON")
    }

    fn go_to(&mut self, place: Value) -> Result<bool, String> {
        let saved = serde_json::from_value(place).map_err(|error| error.to_string())?;
        self.batches.go_on_from(saved)
    }

    fn fingerprint(&self) -> Fingerprint {
        self.digits.fingerprint()
    }

    fn test(&mut self) -> kitsune::Result<f64> {
        let _scope = autocast(self.dtype.is_half(), self.dtype);
        let images = &self.digits.test;
        let indices: Vec<_> = (0..images.count()).collect();
        let mut right = 0.0;
        // In batches of the training size, for which the pool already has memory.
        for indices in indices.chunks(self.size) {
            let batch = Batch::upload(&self.context, images, indices)?;
            let forward = self.network.forward(&batch.pixels)?;
            right += ops::accuracy(forward.logits(), &batch.labels)? * indices.len() as f64;
        }
        // Each share came from a whole number of images, which rounding restores.
        Ok(right.round() / images.count() as f64)
    }
}
