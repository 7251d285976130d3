//! Split masters: an f32 master stored as a bf16 parameter and the 16 bits below it.
//!
//! The parameter is the master rounded to nearest, ties away from zero. If the low bits are half a unit or more, it was
//! rounded away from zero, and the master's upper half is one less. So the two parts restore the master bit for bit,
//! except that a NaN keeps only its sign. Rounding ties to even could not be undone: an even bf16 would stand for
//! 65,537 floats, and 16 bits distinguish only 65,536.
//!
//! Twin of `kernels/split_master.cuh`.

use crate::dtype::bf16;
use crate::launch::compute::Compute;
use crate::launch::vector::vectorized;

vectorized! {
    /// Restores masters from the parameters `high` and the bits below them, `low`.
    pub(super) fn join<C: Compute>(high: &[bf16], low: &[bf16], into: &mut [C]) {
        for ((value, high), low) in into.iter_mut().zip(high).zip(low) {
            let low = u32::from(low.to_bits());
            let upper = u32::from(high.to_bits()).wrapping_sub(low >> 15);
            *value = C::from_f32(f32::from_bits(upper << 16 | low));
        }
    }
}

vectorized! {
    /// Splits `values` into parameters and the bits below them.
    pub(super) fn split<C: Compute>(values: &[C], high: &mut [bf16], low: &mut [bf16]) {
        for ((value, high), low) in values.iter().zip(high).zip(low) {
            let value = value.to_f32();
            let bits = value.to_bits();
            // Rounding a NaN could carry into its sign.
            let (upper, below) = if value.is_nan() {
                ((bits >> 16) | 0x40, 0)
            } else {
                ((bits >> 16) + ((bits >> 15) & 1), bits & 0xffff)
            };
            *high = of_bits(upper);
            *low = of_bits(below);
        }
    }
}

#[inline]
fn of_bits(bits: u32) -> bf16 {
    #[expect(clippy::cast_possible_truncation, reason = "both have 16 bits left")]
    bf16::from_bits(bits as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every upper half, with low halves at both ends, around the tie and in between.
    #[test]
    fn the_two_parts_give_the_value_back() {
        let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1234, 0xcdef];
        let values: Vec<f32> = (0..=0xffffu32)
            .flat_map(|upper| lows.map(|low| f32::from_bits(upper << 16 | low)))
            .collect();
        let mut high = vec![bf16::ZERO; values.len()];
        let mut low = high.clone();
        split(&values, &mut high, &mut low);
        let mut joined = vec![0f32; values.len()];
        join(&high, &low, &mut joined);
        for ((value, joined), high) in values.iter().zip(&joined).zip(&high) {
            if value.is_nan() {
                assert!(joined.is_nan() && high.is_nan(), "{:x}", value.to_bits());
                assert_eq!(joined.is_sign_negative(), value.is_sign_negative());
                continue;
            }
            assert_eq!(joined.to_bits(), value.to_bits());
            // Like rounding to even, except for ties, which round away from zero.
            let is_tie = value.to_bits() & 0xffff == 0x8000;
            let nearest = if is_tie {
                f32::from_bits(value.to_bits() + 0x8000)
            } else {
                bf16::from_f32(*value).to_f32()
            };
            assert_eq!(high.to_f32(), nearest, "{value:e}");
        }
    }
}
