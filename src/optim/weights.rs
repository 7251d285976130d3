//! Counts weights that steps made infinite or NaN.
//!
//! An optimizer's kernels count them as they write weights, in device memory that a scaler reads and clears when it
//! records the step. Without a scaler, ask the optimizer.

use std::fmt;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::update_pass::{FOUND_HEAD, FOUND_WORDS};
use crate::memory;
use crate::optim::Parameter;
use crate::storage::{Context, Tensor};

/// The elements of one weight that became infinite or NaN.
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

/// Allocates the memory in which kernels count the elements of `tensors` weights that become infinite or NaN.
pub(super) fn counts(context: &Context, tensors: usize) -> Result<Tensor> {
    let _tag = memory::tag("optimizer");
    Tensor::zeros(context, [FOUND_HEAD + FOUND_WORDS * tensors], DType::F64)
}

/// Reads and clears `counts`, those of `parameters`. Waits for the device.
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
