//! The 8-bit floating-point types of the Open Compute Project (OCP 8-bit Floating Point Specification, 2023).
//!
//! | | [`F8E4M3`] | [`F8E5M2`] |
//! |---|---|---|
//! | exponent, fraction bits | 4, 3 | 5, 2 |
//! | largest | 448 | 57344 |
//! | smallest above 0 | 2⁻⁹ | 2⁻¹⁶ |
//! | infinity | none | `0x7c` |
//! | NaN | `0x7f` | `0x7d` to `0x7f` |
//!
//! The first bit is the sign. Magnitudes above 464 in e4m3, and from 61440 on in e5m2 (where the tie rounds to
//! infinity), are too large; [`Overflow`] selects their result. Conversions are branch-free bit arithmetic, so that
//! loops over them vectorize. `kernels/dtype.cuh` has the same code.

use std::cmp::Ordering;
use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::round::to_odd_f32;

/// How conversions to an 8-bit type handle values that are too large. NaN stays NaN either way.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// Infinity, as in wider types, or NaN in e4m3, which has no infinity. The result shows the overflow.
    #[default]
    Infinity,
    /// The largest finite value of the same sign, for infinities as well. The result does not show the overflow, so
    /// count overflows before converting.
    Saturate,
}

/// The parameters of a format.
struct Format {
    fraction_bits: u32,
    bias: u32,
    /// Bits of the smallest f32 that is too large.
    too_large: u32,
    /// The code for values that are too large.
    overflow: u8,
}

const E4M3: Format = Format {
    fraction_bits: 3,
    bias: 7,
    // The code of 448 is even, so 464, the tie with the next value (480), rounds down to it.
    too_large: 464f32.to_bits() + 1,
    overflow: NAN_CODE,
};

const E5M2: Format = Format {
    fraction_bits: 2,
    bias: 15,
    // The code of 57344 is odd, so 61440, the tie with the next value (65536), rounds up.
    too_large: 61_440f32.to_bits(),
    overflow: 0x7c,
};

const NAN_CODE: u8 = 0x7f;
const F32_FRACTION_BITS: u32 = 23;
const F32_BIAS: u32 = 127;
const F32_INFINITY: u32 = f32::INFINITY.to_bits();

impl Format {
    /// The code of `value`, rounded to nearest, ties to even.
    #[inline(always)]
    const fn narrow(&self, value: f32) -> u8 {
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let dropped = F32_FRACTION_BITS - self.fraction_bits;
        // Half a unit in the last place, minus one so that ties round to even; a carry moves into the exponent.
        let half = (1 << (dropped - 1)) - 1;
        let rounded = magnitude.wrapping_add(half + ((magnitude >> dropped) & 1));
        let normal =
            (rounded >> dropped).wrapping_sub((F32_BIAS - self.bias) << self.fraction_bits);
        // Adding the power of two whose f32 ulp is the smallest subnormal of this format aligns and rounds.
        let aligner = f32::from_bits(
            (F32_FRACTION_BITS - self.fraction_bits + F32_BIAS + 1 - self.bias)
                << F32_FRACTION_BITS,
        );
        let subnormal = (f32::from_bits(magnitude) + aligner)
            .to_bits()
            .wrapping_sub(aligner.to_bits());
        let smallest_normal = (F32_BIAS + 1 - self.bias) << F32_FRACTION_BITS;
        let mut code = if magnitude < smallest_normal {
            subnormal
        } else {
            normal
        };
        if magnitude >= self.too_large {
            code = self.overflow as u32;
        }
        if magnitude > F32_INFINITY {
            code = NAN_CODE as u32;
        }
        #[expect(
            clippy::cast_possible_truncation,
            reason = "codes have seven bits, and the sign is the eighth"
        )]
        let code = (code | ((bits >> 24) & 0x80)) as u8;
        code
    }

    /// The value of `code`, exact.
    #[inline(always)]
    const fn widen(&self, code: u8) -> f32 {
        let magnitude = (code & 0x7f) as u32;
        let fraction = magnitude & ((1 << self.fraction_bits) - 1);
        let dropped = F32_FRACTION_BITS - self.fraction_bits;
        let normal = (magnitude << dropped) + ((F32_BIAS - self.bias) << F32_FRACTION_BITS);
        let unit =
            f32::from_bits((F32_BIAS + 1 - self.bias - self.fraction_bits) << F32_FRACTION_BITS);
        #[expect(
            clippy::cast_precision_loss,
            reason = "a fraction has at most three bits"
        )]
        let subnormal = (fraction as f32 * unit).to_bits();
        let mut bits = if magnitude == fraction {
            subnormal
        } else {
            normal
        };
        if magnitude >= self.overflow as u32 {
            bits = F32_INFINITY;
        }
        if magnitude > self.overflow as u32
            || self.overflow == NAN_CODE && magnitude == NAN_CODE as u32
        {
            bits = f32::NAN.to_bits();
        }
        f32::from_bits(bits | ((code as u32 & 0x80) << 24))
    }
}

macro_rules! f8 {
    ($(#[$meta:meta])* $name:ident, $format:ident, $largest:literal) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Default, Pod, Zeroable)]
        #[repr(transparent)]
        pub struct $name(u8);

        impl $name {
            /// The largest finite value.
            pub const MAX: Self = Self($largest);
            /// The smallest value above 0, which is subnormal.
            pub const MIN_POSITIVE_SUBNORMAL: Self = Self(1);
            /// One.
            pub const ONE: Self = Self::from_f32(1.0);
            /// The NaN that conversions return.
            pub const NAN: Self = Self(NAN_CODE);

            /// The value with these bits.
            #[inline]
            #[must_use]
            pub const fn from_bits(bits: u8) -> Self {
                Self(bits)
            }

            /// Its bits.
            #[inline]
            #[must_use]
            pub const fn to_bits(self) -> u8 {
                self.0
            }

            /// `value` rounded to nearest, ties to even. Values that are too large
            /// [overflow](Overflow::Infinity).
            #[inline]
            #[must_use]
            pub const fn from_f32(value: f32) -> Self {
                Self($format.narrow(value))
            }

            /// Like [`from_f32`](Self::from_f32), from an `f64` with one rounding.
            #[inline]
            #[must_use]
            pub fn from_f64(value: f64) -> Self {
                Self::from_f32(to_odd_f32(value))
            }

            /// `value` rounded to nearest, ties to even. Values that are too large [saturate](Overflow::Saturate).
            #[inline]
            #[must_use]
            pub const fn saturating_from_f32(value: f32) -> Self {
                let largest = Self::MAX.to_f32();
                // NaN fails both comparisons.
                if value > largest {
                    return Self::MAX;
                }
                if value < -largest {
                    return Self($largest | 0x80);
                }
                Self::from_f32(value)
            }

            /// Like [`saturating_from_f32`](Self::saturating_from_f32), from an `f64` with one rounding.
            #[inline]
            #[must_use]
            pub fn saturating_from_f64(value: f64) -> Self {
                Self::saturating_from_f32(to_odd_f32(value))
            }

            /// The value, exact.
            #[inline]
            #[must_use]
            pub const fn to_f32(self) -> f32 {
                $format.widen(self.0)
            }

            /// The value, exact.
            #[inline]
            #[must_use]
            pub fn to_f64(self) -> f64 {
                f64::from(self.to_f32())
            }

            /// Whether the value is NaN.
            #[inline]
            #[must_use]
            pub const fn is_nan(self) -> bool {
                self.to_f32().is_nan()
            }

            /// Whether the value is neither infinite nor NaN.
            #[inline]
            #[must_use]
            pub const fn is_finite(self) -> bool {
                self.0 & 0x7f <= $largest
            }
        }

        /// Compares as numbers: NaN is not equal to itself, and both zeros are equal.
        impl PartialEq for $name {
            fn eq(&self, other: &Self) -> bool {
                self.to_f32() == other.to_f32()
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                self.to_f32().partial_cmp(&other.to_f32())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.to_f32(), f)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.to_f32(), f)
            }
        }
    };
}

f8!(
    /// A number of 4 exponent and 3 fraction bits, without infinities (`e4m3fn` elsewhere): for weights and
    /// activations.
    F8E4M3,
    E4M3,
    0x7e
);
f8!(
    /// A number of 5 exponent and 2 fraction bits, the range of f16: for gradients.
    F8E5M2,
    E5M2,
    0x7b
);

impl F8E5M2 {
    /// Infinity.
    pub const INFINITY: Self = Self(0x7c);
    /// Negative infinity.
    pub const NEG_INFINITY: Self = Self(0xfc);
}

#[cfg(test)]
mod tests;
