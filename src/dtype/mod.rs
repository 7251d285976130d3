//! Element types: their bit layouts, their sizes, and conversions that round once.
//!
//! [`DType`] names a type at run time; [`Element`] ties it to a Rust type at compile time.
//! Every narrowing conversion rounds once, to nearest, ties to even. Overflow becomes infinity in types that have
//! one; conversions to the 8-bit types can also saturate, see [`Overflow`]. The 8-bit types are storage formats: no
//! operation computes with them. This module allocates nothing and knows nothing of devices.

mod element;
mod f8;
mod round;

use std::fmt;
use std::str::FromStr;

pub use element::Element;
pub use f8::{F8E4M3, F8E5M2, Overflow};
pub use half::{bf16, f16};
pub use round::{bf16_from_f64, f16_from_f64};

use crate::error::Error;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary16: 5 exponent bits, 10 fraction bits, largest value 65504.
    F16,
    /// bfloat16: 8 exponent bits, 7 fraction bits, the range of f32.
    Bf16,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary64.
    F64,
    /// Unsigned 32-bit integer: class labels, counters, flags. Not for arithmetic.
    U32,
    /// OCP e4m3 ([`F8E4M3`](struct@F8E4M3)): largest value 448, no infinity. For storage.
    F8E4M3,
    /// OCP e5m2 ([`F8E5M2`](struct@F8E5M2)): largest value 57344. For storage.
    F8E5M2,
}

impl DType {
    /// Every element type.
    pub const ALL: [Self; 7] = [
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::F64,
        Self::U32,
        Self::F8E4M3,
        Self::F8E5M2,
    ];
    /// The 8-bit floating-point element types. Tensors of these types can be made, filled, converted, copied and
    /// viewed; no operation computes with them.
    pub const F8: [Self; 2] = [Self::F8E4M3, Self::F8E5M2];
    /// The floating-point element types that operations compute with: all but the 8-bit ones.
    pub const FLOATS: [Self; 4] = [Self::F16, Self::Bf16, Self::F32, Self::F64];

    /// Bits of one element.
    #[must_use]
    pub const fn bits(self) -> u64 {
        match self {
            Self::F8E4M3 | Self::F8E5M2 => 8,
            Self::F16 | Self::Bf16 => 16,
            Self::F32 | Self::U32 => 32,
            Self::F64 => 64,
        }
    }

    /// Bytes that `elements` elements take; `None` if that does not fit in 64 bits.
    #[must_use]
    pub const fn bytes_for(self, elements: u64) -> Option<u64> {
        elements.checked_mul(self.bits() / 8)
    }

    /// Whether elements are floating-point numbers.
    #[must_use]
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::U32)
    }

    /// Whether elements are 8-bit floating-point numbers, as in [`F8`](Self::F8).
    #[must_use]
    pub const fn is_f8(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F8E5M2)
    }

    /// Whether operations compute with elements of this type, that is, whether it is in [`FLOATS`](Self::FLOATS).
    #[must_use]
    pub const fn is_computed(self) -> bool {
        self.is_float() && !self.is_f8()
    }

    /// Whether elements are 16-bit floating-point numbers.
    #[must_use]
    pub const fn is_half(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16)
    }

    /// The name used in configuration, metrics and `Display`: `f16`, `bf16`, `f32`, `f64`, `u32`, `f8e4m3`,
    /// `f8e5m2`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::U32 => "u32",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
        }
    }

    /// Distance from 1.0 to the next larger value; 0 for integers.
    #[must_use]
    pub const fn epsilon(self) -> f64 {
        match self {
            Self::F16 => 9.765625e-4,
            Self::Bf16 => 7.8125e-3,
            Self::F32 => f32::EPSILON as f64,
            Self::F64 => f64::EPSILON,
            Self::U32 => 0.0,
            Self::F8E4M3 => 0.125,
            Self::F8E5M2 => 0.25,
        }
    }

    /// The largest finite value.
    #[must_use]
    pub const fn largest(self) -> f64 {
        match self {
            Self::F16 => 65504.0,
            Self::Bf16 => bf16::MAX.to_f32_const() as f64,
            Self::F32 => f32::MAX as f64,
            Self::F64 => f64::MAX,
            Self::U32 => u32::MAX as f64,
            Self::F8E4M3 => 448.0,
            Self::F8E5M2 => 57344.0,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|dtype| dtype.name() == name)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(|dtype| dtype.name()).collect();
                Error::config(
                    "dtype",
                    format!("unknown `{name}`; known are {}", known.join(", ")),
                )
            })
    }
}
