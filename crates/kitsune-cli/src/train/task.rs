//! What a trainer trains: a network with its data, and what one pass over a batch gives.

use kitsune::Tensor;
use kitsune::amp::GradScaler;
use kitsune::ops::Loss;
use kitsune::optim::Parameter;
use serde_json::Value;

use crate::fingerprint::Fingerprint;

/// What one batch gave.
#[derive(Debug)]
pub(super) struct Pass {
    /// Before scaling.
    pub(super) loss: Loss,
    /// A row of scores for each label.
    pub(super) logits: Tensor,
    pub(super) labels: Tensor,
}

/// A network and its data. Both are fixed by the seed: the same calls give the same bits.
pub(super) trait Task {
    /// The network, for people.
    fn model(&self) -> String;

    /// All parameters, in an order that never changes.
    fn parameters(&self) -> Vec<Parameter>;

    /// Enqueues the forward and the backward pass over the next batch, and adds to the gradients. The loss is
    /// multiplied by `share` and by the scaler's scale before the backward pass.
    fn pass(&mut self, scaler: &GradScaler, share: Option<&Tensor>) -> kitsune::Result<Pass>;

    /// Where the training is in its data.
    fn place(&self) -> Value;

    /// Goes on from a place in the data. Whether the place can be one in this data; if not, goes on as near to it as
    /// there is.
    ///
    /// # Errors
    /// Tells what cannot be.
    fn go_to(&mut self, place: Value) -> Result<bool, String>;

    /// The fingerprint of the data.
    fn fingerprint(&self) -> Fingerprint;

    /// Share of the test set that is predicted right, in the present weights.
    fn test(&mut self) -> kitsune::Result<f64>;
}

/// The gradient that the backward pass of `loss` begins with.
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
