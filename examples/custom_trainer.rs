//! A custom trainer: two linear layers on handwritten digits, in f16, with loss scaling.
//!
//! `cargo run --release --example custom_trainer`
#![allow(clippy::print_stdout, reason = "an example prints its results")]

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, DType, Device, Result, Tensor, ops};

const STEPS: usize = 400;
const BATCH: usize = 64;

/// Reads the images, one per line: pixels from 0 to 1, and the digit they show.
fn digits() -> (Vec<f32>, Vec<u32>) {
    let number = |text: &str| text.parse::<u32>().expect("the file holds whole numbers");
    let mut data = (Vec::new(), Vec::new());
    for line in include_str!("../crates/kitsune-cli/data/digits.csv").lines() {
        let (pixels, digit) = line.rsplit_once(',').expect("pixels, then the digit");
        let pixels = pixels.split(',').map(|pixel| number(pixel) as f32);
        data.0.extend(pixels.map(|pixel| pixel / 16.0));
        data.1.push(number(digit));
    }
    data
}

/// A weight matrix of `outputs` rows. Its entries are multiples of the golden ratio modulo 1, scaled to the usual bound
/// for `inputs` inputs.
fn weight(context: &Context, name: &str, outputs: usize, inputs: usize) -> Result<Parameter> {
    let bound = (6.0 / inputs as f64).sqrt();
    let value = |index: usize| (index as f64 * 0.618_033_988_749_895).fract() * 2.0 - 1.0;
    let values: Vec<f64> = (0..outputs * inputs)
        .map(|index| value(index) * bound)
        .collect();
    let values = Tensor::from_slice(context, [outputs, inputs], &values)?;
    Parameter::new(name, values.cast(DType::F32)?)
}

fn main() -> Result<()> {
    let context = Context::new(&Device::auto()?)?;
    let hidden = weight(&context, "hidden", 128, 64)?;
    let output = weight(&context, "output", 10, 128)?;
    let mut optimizer = AdamW::new(vec![hidden.clone(), output.clone()], AdamWConfig::default())?;
    let config = AmpConfig::default();
    let mut scaler = GradScaler::new(&context, config.clone())?;

    let (pixels, labels) = digits();
    for step in 0..STEPS {
        let first = step * BATCH % (labels.len() - BATCH);
        let images = &pixels[first * 64..(first + BATCH) * 64];
        let images = Tensor::from_slice(&context, [BATCH, 64], images)?;
        let digits = Tensor::from_slice(&context, [BATCH], &labels[first..first + BATCH])?;

        let scope = config.autocast();
        let below = ops::linear(&images, hidden.value(), None)?;
        let active = ops::relu(below.output())?;
        let above = ops::linear(&active, output.value(), None)?;
        let loss = ops::softmax_cross_entropy(above.output(), &digits)?;
        drop(scope);

        let above = above.backward(&scaler.scale(&loss)?.backward()?)?;
        let below = below.backward(&ops::relu_backward(below.output(), &above.input)?)?;
        output.set_grad(above.weight)?;
        hidden.set_grad(below.weight)?;

        scaler.clip_grad_norm(&optimizer, 1.0)?;
        let outcome = scaler.step(&mut optimizer)?;
        scaler.update()?;
        optimizer.zero_grad();
        // Reading results waits for the device, so do not do it at every step.
        if step % 100 == 99 {
            let (loss, applied) = (loss.value().item::<f32>()?, outcome.is_applied()?);
            println!("step {:3}  loss {loss:.4}  applied {applied}", step + 1);
        }
    }
    println!("{}", scaler.stats()?);
    let reserved = context.pool().stats().reserved_bytes;
    println!("peak reserved: {} bytes", reserved.peak);
    Ok(())
}
