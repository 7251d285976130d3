//! The interface of a training task: a network with its data.

use kitsune::Tensor;
use kitsune::amp::GradScaler;
use kitsune::ops::Loss;
use kitsune::optim::Parameter;
use serde_json::Value;

use crate::fingerprint::Fingerprint;

/// The result of the forward and backward pass over one batch.
#[derive(Debug)]
pub(super) struct Pass {
    /// Before scaling.
    pub(super) loss: Loss,
    /// One row of scores for each label.
    pub(super) logits: Tensor,
    pub(super) labels: Tensor,
}

/// A network and its data. The seed determines both: the same calls produce the same bits.
pub(super) trait Task {
    /// A description of the network, for display.
    fn model(&self) -> String;

    /// All parameters, in an order that never changes.
    fn parameters(&self) -> Vec<Parameter>;

    /// Enqueues the forward and the backward pass over the next batch, and adds to the gradients. The loss is
    /// multiplied by `share` and by the scaler's scale before the backward pass.
    fn pass(&mut self, scaler: &GradScaler, share: Option<&Tensor>) -> kitsune::Result<Pass>;

    /// The current position in the data.
    fn place(&self) -> Value;

    /// Continues from a saved position in the data. Returns whether the position fits this data; if not, continues from
    /// a substitute for it.
    ///
    /// # Errors
    /// Says what is invalid.
    fn go_to(&mut self, place: Value) -> Result<bool, String>;

    /// The fingerprint of the data.
    fn fingerprint(&self) -> Fingerprint;

    /// Share of the test set that the current weights predict correctly.
    fn test(&mut self) -> kitsune::Result<f64>;
}

/// The gradient that the backward pass of `loss` starts from.
pub(super) fn seed(
    loss: &Loss,
    scaler: &GradScaler,
    share: Option<&Tensor>,
) -> kitsune::Result<Tensor> {
    let scaled = match share {
        Some(share) => scaler.scale(&loss.scaled_by(share)?)?,
        None => scaler.scale(loss)?,
    };
    scaled.backward()
}
