//! Special functions for f32 and f64: the exponential and the normal distribution.
//!
//! The f32 versions have no branches and no calls, so that loops over them vectorize. Their error is a few units in the
//! last place, as the tests check. The f64 versions use the standard library's functions where they exist.

use std::f64::consts::SQRT_2;

use super::compute::Compute;

/// Functions that twins need of their compute type.
pub(super) trait Special: Compute {
    /// `e` to this power.
    fn exp(self) -> Self;

    /// The probability that a standard normal variable is at most `self`.
    fn normal_cdf(self) -> Self;
}

impl Special for f32 {
    #[inline]
    fn exp(self) -> Self {
        exp_f32(self)
    }

    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "a constant, rounded once")]
    fn normal_cdf(self) -> Self {
        // Terms from the thirteenth on are below 7e-9, a tenth of the f32 resolution at 1.
        const TERMS: [f32; 12] = {
            let mut terms = [0.0; 12];
            let mut idx = 0;
            while idx < terms.len() {
                terms[idx] = ERFC_TERMS[idx] as f32;
                idx += 1;
            }
            terms
        };
        normal_cdf(self, self.abs() / (SQRT_2 as f32), &TERMS)
    }
}

impl Special for f64 {
    #[inline]
    fn exp(self) -> Self {
        Self::exp(self)
    }

    #[inline]
    fn normal_cdf(self) -> Self {
        normal_cdf(self, self.abs() / SQRT_2, &ERFC_TERMS)
    }
}

/// `e^x = 2^n · e^r` with `n` the nearest integer to `x / ln 2`, so that `|r| <= ln 2 / 2`, where eight
/// terms of the power series leave a relative error of 5e-9.
#[inline]
fn exp_f32(x: f32) -> f32 {
    // Below and above these bounds, the result is 0 and infinity. `clamp` preserves NaN.
    let x = x.clamp(-105.0, 89.0);
    // Adding 1.5·2²³ leaves no fraction bits: the addition itself rounds to the nearest integer.
    const TO_INTEGER: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + TO_INTEGER;
    let n = shifted - TO_INTEGER;
    // ln 2 in two parts. The first has 9 bits, so its product with `n` is exact.
    let r = x - n * (355.0 / 512.0) - n * -2.121_944_4e-4;
    let series = [
        1.0 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let power = series.iter().fold(0.0f32, |sum, term| sum * r + term);
    // `n` exceeds the exponent range of f32 at both ends, so scale in two steps of half the exponent.
    let n = shifted
        .to_bits()
        .wrapping_sub(TO_INTEGER.to_bits())
        .cast_signed();
    let half = n >> 1;
    let power_of_two = |n: i32| f32::from_bits((n.wrapping_add(127) << 23).cast_unsigned());
    power * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// Chebyshev coefficients of `ln(erfc(z)·e^(z²) / t)` on `t = 2 / (2 + z)` in (0, 1], the first halved.
///
/// Substituting `t` maps the half line to an interval on which the function is smooth, and the factor `e^(z²)` keeps
/// the *relative* error of `erfc` small in the whole tail. The coefficients are cosine sums over 60 Chebyshev nodes,
/// computed with 50 digits; the first omitted coefficient is below 3e-18.
const ERFC_TERMS: [f64; 29] = [
    -0.651_326_859_890_854_7,
    0.641_969_792_356_490_2,
    0.019_476_473_204_185_836,
    -0.009_561_514_786_808_632,
    -0.000_946_595_344_482_036_9,
    0.000_366_839_497_852_761_45,
    4.252_332_480_690_777e-5,
    -2.027_857_811_253_424_3e-5,
    -1.624_290_004_647_025_5e-6,
    1.303_655_835_580_523_2e-6,
    1.562_644_172_206_614_3e-8,
    -8.523_809_591_492_654e-8,
    6.529_054_439_098_85e-9,
    5.059_343_495_551_469e-9,
    -9.913_641_564_930_33e-10,
    -2.273_651_222_931_836e-10,
    9.646_791_102_015_527e-11,
    2.394_038_083_039_114_7e-12,
    -6.886_027_526_497_553e-12,
    8.944_879_273_090_726e-13,
    3.130_921_399_342_958e-13,
    -1.127_082_236_125_236_7e-13,
    3.810_905_255_189_232e-16,
    7.106_097_613_609_237e-15,
    -1.523_028_201_457_104_3e-15,
    -9.457_494_571_291_234e-17,
    1.210_237_189_224_279e-16,
    -2.816_633_087_747_177e-17,
    5.003_005_555_944_59e-20,
];

/// `Φ(x) = erfc(-x/√2) / 2`, given `z = |x|/√2`. Computes the smaller of the two tails; the larger is 1 minus it.
#[inline]
fn normal_cdf<C: Special, const TERMS: usize>(x: C, z: C, terms: &[C; TERMS]) -> C {
    let (zero, one, two) = (C::default(), C::from_f64(1.0), C::from_f64(2.0));
    let t = two / (two + z);
    let y = two * t - one;
    // Clenshaw's recurrence.
    let (mut b1, mut b2) = (zero, zero);
    for term in terms[1..].iter().rev() {
        // Parenthesized so that the dependency chain of each step is one product and one sum.
        (b1, b2) = (two * y * b1 + (*term - b2), b1);
    }
    let polynomial = y * b1 - b2 + terms[0];
    let tail = t * (polynomial - z * z).exp() / two;
    if x > zero { one - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        let mut worst = 0.0f64;
        for step in -8_700_000..8_850_000 {
            if step % 37 != 0 {
                continue;
            }
            #[expect(clippy::cast_precision_loss, reason = "any value will do")]
            let x = step as f32 * 1e-5;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp_f32(x)) - exact).abs() / exact);
        }
        assert!(worst < 2.0 * f64::from(f32::EPSILON), "{worst:e}");
    }

    #[test]
    fn exp_at_the_ends_of_the_range() {
        assert_eq!(exp_f32(0.0), 1.0);
        assert_eq!(exp_f32(89.0), f32::INFINITY);
        assert_eq!(exp_f32(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp_f32(f32::NEG_INFINITY), 0.0);
        assert!(exp_f32(f32::NAN).is_nan());
        assert!(exp_f32(-f32::NAN).is_nan());
        // Subnormal results are kept.
        let tiny = f64::from(exp_f32(-100.0));
        assert!((tiny / (-100f64).exp() - 1.0).abs() < 0.03, "{tiny:e}");
    }

    /// `Φ` to 20 digits, from a multiple-precision evaluation of `erfc`.
    const NORMAL: [(f64, f64); 8] = [
        (-8.0, 6.220_960_574_271_784e-16),
        (-5.0, 2.866_515_718_791_939e-7),
        (-1.5, 0.066_807_201_268_858_06),
        (-0.1, 0.460_172_162_722_971),
        (0.0, 0.5),
        (0.7, 0.758_036_347_776_927),
        (2.25, 0.987_775_527_344_955_3),
        (6.0, 0.999_999_999_013_412_3),
    ];

    #[test]
    fn normal_distribution_against_known_values() {
        for (x, exact) in NORMAL {
            let wide = Special::normal_cdf(x);
            // The argument of the exponential, up to 32 here, is rounded in its sixteenth digit.
            assert!(
                (wide - exact).abs() <= 1e-14 * exact,
                "{x}: {wide} not {exact}"
            );
            #[expect(clippy::cast_possible_truncation, reason = "the values are short")]
            let narrow = f64::from(Special::normal_cdf(x as f32));
            assert!(
                (narrow - exact).abs() <= 1e-7 * exact.max(0.2),
                "{x}: {narrow} not {exact}"
            );
        }
        assert_eq!(Special::normal_cdf(f64::NEG_INFINITY), 0.0);
        assert_eq!(Special::normal_cdf(f32::INFINITY), 1.0);
        assert!(Special::normal_cdf(f32::NAN).is_nan());
    }
}
