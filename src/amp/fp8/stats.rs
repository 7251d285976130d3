//! Statistics of a scaler of 8-bit tensors.

use std::fmt;

use crate::dtype::DType;
use crate::launch::quantize::{
    ELEMENTS, LAST_AMAX, NAN, NOT_FINITE, OVERFLOWED, UPDATES, VANISHED,
};

/// Statistics of an [`Fp8Scaler`](super::Fp8Scaler), since it was made.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Fp8Stats {
    /// The tensors, in the order given to the scaler.
    pub tensors: Vec<Fp8TensorStats>,
}

/// Statistics of one tensor.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fp8TensorStats {
    /// Its name.
    pub name: String,
    /// Its 8-bit type.
    pub dtype: DType,
    /// Its current scale.
    pub scale: f32,
    /// The largest magnitude at the last update that had one; 0 before that.
    pub amax: f32,
    /// Elements converted.
    pub elements: u64,
    /// Of these, the ones too large after scaling, infinities included. They saturated or became infinite or NaN,
    /// depending on [`Fp8Config::overflow`](super::Fp8Config::overflow).
    pub overflowed: u64,
    /// Of these, nonzero ones that became 0.
    pub vanished: u64,
    /// Of these, NaN.
    pub nan: u64,
    /// Updates of the scale, whether or not it moved.
    pub updates: u64,
    /// Updates that saw an infinity or NaN and left the scale unchanged (current scaling: set it to 1).
    pub not_finite: u64,
}

impl Fp8TensorStats {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "whole numbers, and a number that was f32"
    )]
    pub(super) fn read(name: &str, dtype: DType, scale: f32, counts: &[f64]) -> Self {
        let count = |word: usize| counts[word] as u64;
        Self {
            name: name.to_owned(),
            dtype,
            scale,
            amax: counts[LAST_AMAX] as f32,
            elements: count(ELEMENTS),
            overflowed: count(OVERFLOWED),
            vanished: count(VANISHED),
            nan: count(NAN),
            updates: count(UPDATES),
            not_finite: count(NOT_FINITE),
        }
    }
}

impl fmt::Display for Fp8TensorStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} at scale {}, amax {}; of {} elements {} overflowed, {} vanished, {} are NaN; {} of {} updates \
             saw inf or NaN",
            self.name,
            self.dtype,
            self.scale,
            self.amax,
            self.elements,
            self.overflowed,
            self.vanished,
            self.nan,
            self.not_finite,
            self.updates,
        )
    }
}

impl fmt::Display for Fp8Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, tensor) in self.tensors.iter().enumerate() {
            let end = if place == 0 { "" } else { "\n" };
            write!(f, "{end}{tensor}")?;
        }
        Ok(())
    }
}
