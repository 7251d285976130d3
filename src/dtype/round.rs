//! Narrowing from `f64` with a single rounding.
//!
//! Going through `f32` with its usual rounding would round twice: 1 + 2⁻¹¹ + 2⁻⁴⁰ would become the tie
//! 1 + 2⁻¹¹ and then 1, not the nearest f16, 1 + 2⁻¹⁰. Rounding *to odd* first records the lost bits in a
//! sticky last bit, so that the second rounding is correct. This works because the wider format has at least two bits
//! more than the narrower (Boldo and Melquiond, "When double rounding is odd", 2005).

use half::{bf16, f16};

/// `value` in `f32`, rounded to odd: toward zero, with the last bit set if anything was lost.
pub(super) fn to_odd_f32(value: f64) -> f32 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the rounding is corrected below"
    )]
    let nearest = value as f32;
    let exact = f64::from(nearest) == value || value.is_nan();
    if exact {
        return nearest;
    }
    let bits = nearest.to_bits();
    // Undo rounding away from zero (including to infinity), then set the sticky last bit.
    let away = f64::from(nearest).abs() > value.abs();
    let truncated = if away { bits - 1 } else { bits };
    f32::from_bits(truncated | 1)
}

/// `value` rounded to the nearest f16, ties to even. Magnitudes of 65520 and above become infinity.
#[must_use]
pub fn f16_from_f64(value: f64) -> f16 {
    f16::from_f32(to_odd_f32(value))
}

/// `value` rounded to the nearest bf16, ties to even. Magnitudes that round past the largest become infinity.
#[must_use]
pub fn bf16_from_f64(value: f64) -> bf16 {
    bf16::from_f32(to_odd_f32(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nearest f16 by brute force: ties go to the even code, 65520 and above become infinity.
    fn nearest_f16(value: f64) -> f16 {
        if value.abs() >= 65520.0 {
            return f16::from_bits(0x7c00 | (u16::from(value < 0.0) << 15));
        }
        let magnitude = value.abs();
        let best = (0u16..0x7c00)
            .min_by(|a, b| {
                let distance = |bits: u16| (f16::from_bits(bits).to_f64() - magnitude).abs();
                distance(*a)
                    .total_cmp(&distance(*b))
                    .then((a & 1).cmp(&(b & 1)))
            })
            .expect("the range is not empty");
        f16::from_bits(best | (u16::from(value.is_sign_negative()) << 15))
    }

    #[test]
    fn f16_rounds_once() {
        let tie = 1.0 + 2f64.powi(-11);
        assert_eq!(f16_from_f64(tie).to_f64(), 1.0);
        assert_eq!(
            f16_from_f64(tie + 2f64.powi(-40)).to_f64(),
            1.0 + 2f64.powi(-10)
        );
        assert_eq!(f16_from_f64(tie - 2f64.powi(-40)).to_f64(), 1.0);
        for value in [
            65_519.999_999,
            65520.0,
            -65520.0,
            2f64.powi(-25),
            1.5 * 2f64.powi(-25),
        ] {
            assert_eq!(
                f16_from_f64(value).to_bits(),
                nearest_f16(value).to_bits(),
                "{value}"
            );
        }
    }

    #[test]
    fn f16_is_nearest_around_every_boundary() {
        // Midpoints of adjacent values across the binades, nudged by less than f32 can represent.
        for bits in (0u16..0x7bff).step_by(97) {
            let low = f16::from_bits(bits).to_f64();
            let middle = f64::midpoint(low, f16::from_bits(bits + 1).to_f64());
            for value in [
                middle,
                middle * (1.0 + 1e-13),
                middle * (1.0 - 1e-13),
                -middle,
            ] {
                assert_eq!(
                    f16_from_f64(value).to_bits(),
                    nearest_f16(value).to_bits(),
                    "{value}"
                );
            }
        }
    }

    #[test]
    fn bf16_rounds_once() {
        let tie = 1.0 + 2f64.powi(-8);
        assert_eq!(bf16_from_f64(tie).to_f64(), 1.0);
        assert_eq!(
            bf16_from_f64(tie + 2f64.powi(-40)).to_f64(),
            1.0 + 2f64.powi(-7)
        );
        assert_eq!(bf16_from_f64(3.3961e38), bf16::MAX);
        assert_eq!(bf16_from_f64(1e300), bf16::INFINITY);
        assert_eq!(bf16_from_f64(-1e300), bf16::NEG_INFINITY);
        assert!(bf16_from_f64(f64::NAN).is_nan());
        assert!(f16_from_f64(-0.0).is_sign_negative());
    }
}
