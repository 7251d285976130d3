//! The allocations of a transformer's training steps.
//!
//! Weights, master weights and moments live for the whole run. The forward pass keeps what the backward pass needs. The
//! backward pass frees it in reverse order, between temporaries, and leaves gradients, which are freed after the
//! optimizer's pass. Sizes follow from the model below and the number of tokens in the step.

use kitsune::telemetry::trace::Event;
use kitsune::units::MIB;

use crate::replay::program::{Builder, Program};

const BATCH: u64 = 8;
const LAYERS: u64 = 12;
const HIDDEN: u64 = 1024;
const FEED_FORWARD: u64 = 4 * HIDDEN;
const VOCABULARY: u64 = 32_000;
const HALF: u64 = 2;
const SINGLE: u64 = 4;
const ATTENTION_WORKSPACE: u64 = 8 * MIB;

/// Elements of the weights of one layer: attention in and out, feed-forward up and down, two norms.
const LAYER_WEIGHTS: [u64; 6] = [
    3 * HIDDEN * HIDDEN,
    HIDDEN * HIDDEN,
    HIDDEN * FEED_FORWARD,
    FEED_FORWARD * HIDDEN,
    2 * HIDDEN,
    2 * HIDDEN,
];

/// Builds a program of whole training steps on one stream.
pub(super) struct Training {
    builder: Builder,
    stream: u32,
    next: u64,
}

/// The blocks that the forward pass keeps for one layer, in order of allocation.
type Saved = Vec<u64>;

impl Training {
    pub(super) fn new(stream: u32) -> Self {
        Self {
            builder: Builder::default(),
            stream,
            next: 0,
        }
    }

    /// A program of steps, each with the sequence length that `length` returns, with at least `allocations`
    /// allocations.
    pub(super) fn steps(mut self, allocations: u64, mut length: impl FnMut() -> u64) -> Program {
        for weight in weights() {
            // The weight in half precision; master and two moments in single precision.
            self.allocate(weight * HALF);
            for _ in 0..3 {
                self.allocate(weight * SINGLE);
            }
        }
        while self.next < allocations {
            self.step(BATCH * length());
        }
        self.builder.finish()
    }

    fn allocate(&mut self, bytes: u64) -> u64 {
        let id = self.next;
        self.next += 1;
        self.builder.push(
            &Event::Allocate {
                id,
                bytes,
                stream: self.stream,
            },
            0,
        );
        id
    }

    fn free(&mut self, id: u64) {
        self.builder.push(&Event::Free { id, stream: None }, 0);
    }

    fn step(&mut self, tokens: u64) {
        let activation = tokens * HIDDEN * HALF;
        let embedded = self.allocate(activation);
        let layers: Vec<Saved> = (0..LAYERS).map(|_| self.forward(tokens)).collect();
        let loss = self.head(tokens);
        let mut gradient = self.allocate(activation);
        let mut gradients = vec![self.allocate(VOCABULARY * HIDDEN * HALF)];
        self.free(loss);
        for saved in layers.into_iter().rev() {
            let incoming = gradient;
            gradient = self.backward(tokens, saved, &mut gradients);
            self.free(incoming);
        }
        self.free(gradient);
        self.free(embedded);
        for weight in weights() {
            let update = self.allocate(weight * SINGLE);
            self.free(update);
        }
        gradients
            .into_iter()
            .for_each(|gradient| self.free(gradient));
    }

    fn forward(&mut self, tokens: u64) -> Saved {
        let activation = tokens * HIDDEN * HALF;
        let mut saved = vec![
            self.allocate(activation),
            self.allocate(2 * tokens * SINGLE),
        ];
        let joined = self.allocate(3 * activation);
        saved.extend([(); 3].map(|()| self.allocate(activation)));
        self.free(joined);
        let workspace = self.allocate(ATTENTION_WORKSPACE);
        saved.push(self.allocate(activation));
        self.free(workspace);
        let projected = self.allocate(activation);
        saved.push(self.allocate(activation));
        self.free(projected);
        saved.extend([
            self.allocate(activation),
            self.allocate(2 * tokens * SINGLE),
        ]);
        saved.extend([(); 2].map(|()| self.allocate(tokens * FEED_FORWARD * HALF)));
        let down = self.allocate(activation);
        saved.push(self.allocate(activation));
        self.free(down);
        saved
    }

    /// Logits and loss. Keeps only the gradient of the logits.
    fn head(&mut self, tokens: u64) -> u64 {
        let logits = self.allocate(tokens * VOCABULARY * HALF);
        let wide = self.allocate(tokens * VOCABULARY * SINGLE);
        self.free(logits);
        let probabilities = self.allocate(tokens * VOCABULARY * SINGLE);
        self.free(wide);
        let gradient = self.allocate(tokens * VOCABULARY * HALF);
        self.free(probabilities);
        gradient
    }

    /// The backward pass through a layer. Returns the gradient of its input.
    fn backward(&mut self, tokens: u64, saved: Saved, gradients: &mut Vec<u64>) -> u64 {
        let activation = tokens * HIDDEN * HALF;
        let mut weights = LAYER_WEIGHTS.into_iter().rev();
        for (number, kept) in saved.into_iter().enumerate().rev() {
            let temporary = self.allocate(activation);
            // Every other kept block leads to a weight gradient.
            if let (true, Some(weight)) = (number % 2 == 0, weights.next()) {
                gradients.push(self.allocate(weight * HALF));
            }
            self.free(kept);
            self.free(temporary);
        }
        self.allocate(activation)
    }
}

/// Elements of every weight of the model.
fn weights() -> impl Iterator<Item = u64> {
    let layers = (0..LAYERS).flat_map(|_| LAYER_WEIGHTS);
    std::iter::once(VOCABULARY * HIDDEN).chain(layers)
}
