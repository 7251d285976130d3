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
//! With the sign in the first bit. Magnitudes above 464 (61440 and up in e5m2, where the tie is infinity's) are
//! too large; [`Overflow`] says what becomes of them. Conversions are plain arithmetic on bits without branches,
//! so that loops over them become vectors; `kernels/dtype.cuh` has the same.

use std::cmp::Ordering;
use std::fmt;

use bytemuck::{Pod, Zeroable};

use super::round::to_odd_f32;

/// What becomes of numbers that are too large for an 8-bit type. NaN stays NaN either way.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// Infinity, as in wider types; NaN in e4m3, which has none. What was too large can be seen afterwards.
    #[default]
    Infinity,
    /// The largest number of their sign. Infinities become it, too, so that an overflow cannot be seen
    /// afterwards: count it before.
    Saturate,
}

/// What a format has of its own.
struct Format {
    fraction_bits: u32,
    bias: u32,
    /// Bits of the smallest f32 that is too large.
    too_large: u32,
    /// Code of what is too large.
    overflow: u8,
}

const E4M3: Format = Format {
    fraction_bits: 3,
    bias: 7,
    // 448 is even, so the tie with what would be 480 stays.
    too_large: 464f32.to_bits() + 1,
    overflow: NAN_CODE,
};

const E5M2: Format = Format {
    fraction_bits: 2,
    bias: 15,
    // 57344 is odd, so the tie with what would be 65536 does not.
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
        // Half a unit in the last place, less one bit for an even result; a carry moves the exponent.
        let half = (1 << (dropped - 1)) - 1;
        let rounded = magnitude.wrapping_add(half + ((magnitude >> dropped) & 1));
        let normal =
            (rounded >> dropped).wrapping_sub((F32_BIAS - self.bias) << self.fraction_bits);
        // Adding a power of two whose f32 unit is the smallest number here aligns and rounds.
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
            /// The largest number.
            pub const MAX: Self = Self($largest);
            /// The smallest number above 0, a subnormal one.
            pub const MIN_POSITIVE_SUBNORMAL: Self = Self(1);
            /// One.
            pub const ONE: Self = Self::from_f32(1.0);
            /// The NaN that conversions give.
            pub const NAN: Self = Self(NAN_CODE);

            /// The number with these bits.
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

            /// `value` rounded to nearest, ties to even. What is too large overflows to
            /// [infinity](Overflow::Infinity).
            #[inline]
            #[must_use]
            pub const fn from_f32(value: f32) -> Self {
                Self($format.narrow(value))
            }

            /// As [`from_f32`](Self::from_f32), with one rounding.
            #[inline]
            #[must_use]
            pub fn from_f64(value: f64) -> Self {
                Self::from_f32(to_odd_f32(value))
            }

            /// `value` rounded to nearest, ties to even. What is too large [saturates](Overflow::Saturate).
            #[inline]
            #[must_use]
            pub const fn saturating_from_f32(value: f32) -> Self {
                let largest = Self::MAX.to_f32();
                // Neither holds for NaN.
                if value > largest {
                    return Self::MAX;
                }
                if value < -largest {
                    return Self($largest | 0x80);
                }
                Self::from_f32(value)
            }

            /// As [`saturating_from_f32`](Self::saturating_from_f32), with one rounding.
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

            /// Whether it is no number.
            #[inline]
            #[must_use]
            pub const fn is_nan(self) -> bool {
                self.to_f32().is_nan()
            }

            /// Whether it is a number, and no infinity.
            #[inline]
            #[must_use]
            pub const fn is_finite(self) -> bool {
                self.0 & 0x7f <= $largest
            }
        }

        /// As of numbers: NaN is not equal to itself, and both zeros are equal.
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
