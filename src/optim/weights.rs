//! Weights that steps made infinite or NaN.
//!
//! The kernels of an optimizer count them where they write weights, in device memory that a scaler's record of the step
//! reads and clears. Without a scaler, whoever steps may ask the optimizer.

use std::fmt;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::update_pass::{FOUND_HEAD, FOUND_WORDS};
use crate::memory;
use crate::optim::Parameter;
use crate::storage::{Context, Tensor};

/// What became infinite or NaN in one weight.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct WeightOverflow {
    /// The parameter's name.
    pub name: String,
    /// Elements that became infinite.
    pub inf_count: u64,
    /// Elements that became NaN.
    pub nan_count: u64,
    /// Index of the first such element.
    pub first_index: u64,
}

impl fmt::Display for WeightOverflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` got ", self.name)?;
        match (self.inf_count, self.nan_count) {
            (inf, 0) => write!(f, "{inf} inf")?,
            (0, nan) => write!(f, "{nan} nan")?,
            (inf, nan) => write!(f, "{inf} inf and {nan} nan")?,
        }
        write!(f, ", the first at {}", self.first_index)
    }
}

/// Memory in which kernels count the elements of `tensors` weights that become infinite or NaN.
pub(super) fn counts(context: &Context, tensors: usize) -> Result<Tensor> {
    let _tag = memory::tag("optimizer");
    Tensor::zeros(context, [FOUND_HEAD + FOUND_WORDS * tensors], DType::F64)
}

/// What `counts` say about `parameters`; clears them. Waits for the device.
pub(super) fn take(counts: &Tensor, parameters: &[Parameter]) -> Result<Vec<WeightOverflow>> {
    let words = counts.to_vec::<f64>()?;
    let words: &[u64] = bytemuck::cast_slice(&words);
    if words[0] == 0 {
        return Ok(Vec::new());
    }
    counts.fill(0.0)?;
    let tensors = words[FOUND_HEAD..].chunks_exact(FOUND_WORDS);
    let pairs = parameters.iter().zip(tensors);
    let lost = pairs.filter(|(_, words)| words[0] + words[1] > 0);
    let tell = |(parameter, words): (&Parameter, &[u64])| WeightOverflow {
        name: parameter.name().to_owned(),
        inf_count: words[0],
        nan_count: words[1],
        first_index: !words[2],
    };
    Ok(lost.map(tell).collect())
}
