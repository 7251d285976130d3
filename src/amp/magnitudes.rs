//! A histogram of the magnitudes of a tensor's elements.

use std::collections::BTreeMap;
use std::fmt;

use crate::dtype::DType;
use crate::error::Result;
use crate::storage::Tensor;

/// Counts a tensor's elements by power of two. Shows whether gradients would overflow or vanish in a type, and how
/// far a scale would have to move them.
///
/// # Examples
/// ```
/// use kitsune::amp::Magnitudes;
/// use kitsune::{Context, DType, Device, Tensor};
///
/// let context = Context::new(&Device::auto()?)?;
/// let gradient = Tensor::from_slice(&context, [4], &[0.0f32, 3.0, -2.0, 1e-9])?;
/// let magnitudes = Magnitudes::of(&gradient)?;
/// assert_eq!((magnitudes.zeros, magnitudes.by_exponent[&1]), (1, 2));
/// // One of the three that are not zero is too small for f16.
/// assert_eq!(magnitudes.vanishing(DType::F16), 1);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Magnitudes {
    /// Elements that are 0.
    pub zeros: u64,
    /// Elements that are infinite.
    pub infs: u64,
    /// Elements that are NaN.
    pub nans: u64,
    /// All other elements: the number with a magnitude from 2ᵉ to below 2ᵉ⁺¹, by e.
    pub by_exponent: BTreeMap<i32, u64>,
}

impl Magnitudes {
    /// The magnitudes of `tensor`, of any float type. Waits for the device and copies the tensor to the host: meant
    /// for inspecting a gradient that a report named, not for every step.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for integers;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::Driver`](crate::Error::Driver) if work of
    /// the stream failed.
    pub fn of(tensor: &Tensor) -> Result<Self> {
        if !tensor.dtype().is_float() {
            return Err(crate::Error::UnsupportedDtype {
                op: "Magnitudes::of",
                dtype: tensor.dtype(),
            });
        }
        let mut magnitudes = Self::default();
        for value in tensor.cast(DType::F64)?.to_vec::<f64>()? {
            magnitudes.add(value);
        }
        Ok(magnitudes)
    }

    fn add(&mut self, value: f64) {
        if value == 0.0 {
            self.zeros += 1;
        } else if value.is_nan() {
            self.nans += 1;
        } else if value.is_infinite() {
            self.infs += 1;
        } else {
            *self.by_exponent.entry(exponent(value)).or_default() += 1;
        }
    }

    /// Nonzero elements that would become 0 in `dtype`: those below half of its smallest number. 0 for integers.
    #[must_use]
    pub fn vanishing(&self, dtype: DType) -> u64 {
        let Some((least, _)) = exponents(dtype) else {
            return 0;
        };
        self.by_exponent
            .range(..least - 1)
            .map(|(_, count)| count)
            .sum()
    }

    /// Finite elements of magnitude 2ᵉ or more, where 2ᵉ is the first power of two that `dtype` cannot hold. 0 for
    /// integers.
    #[must_use]
    pub fn overflowing(&self, dtype: DType) -> u64 {
        let Some((_, most)) = exponents(dtype) else {
            return 0;
        };
        self.by_exponent
            .range(most + 1..)
            .map(|(_, count)| count)
            .sum()
    }
}

/// The exponent e of a finite nonzero number with a magnitude from 2ᵉ to below 2ᵉ⁺¹.
fn exponent(value: f64) -> i32 {
    const FRACTION_BITS: u32 = f64::MANTISSA_DIGITS - 1;
    let bits = value.abs().to_bits();
    let field = i32::try_from(bits >> FRACTION_BITS).expect("a field of 11 bits");
    if field > 0 {
        return field - 1023;
    }
    // Subnormal: the exponent follows from the highest bit set in the fraction.
    let highest = i32::try_from(bits.ilog2()).expect("below 64");
    highest - 1074
}

/// Exponents of the smallest and the largest positive number of a type.
fn exponents(dtype: DType) -> Option<(i32, i32)> {
    match dtype {
        DType::F16 => Some((-24, 15)),
        DType::Bf16 => Some((-133, 127)),
        DType::F32 => Some((-149, 127)),
        DType::F64 => Some((-1074, 1023)),
        DType::F8E4M3 => Some((-9, 8)),
        DType::F8E5M2 => Some((-16, 15)),
        DType::U32 => None,
    }
}

impl fmt::Display for Magnitudes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} zero, {} inf, {} nan",
            self.zeros, self.infs, self.nans
        )?;
        let most = self.by_exponent.values().max().copied().unwrap_or(1);
        for (exponent, count) in &self.by_exponent {
            let bar = "#".repeat(usize::try_from((count * 40).div_ceil(most)).unwrap_or(40));
            write!(f, "\n2^{exponent:<5} {count:>10} {bar}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_find_their_power_of_two() {
        for (value, expected) in [
            (1.0, 0),
            (-1.99, 0),
            (2.0, 1),
            (65504.0, 15),
            (2f64.powi(-24), -24),
            (f64::MIN_POSITIVE, -1022),
            (f64::MIN_POSITIVE / 4.0, -1024),
            (f64::from_bits(1), -1074),
            (f64::MAX, 1023),
        ] {
            assert_eq!(exponent(value), expected, "{value:e}");
        }
    }

    #[test]
    fn what_a_type_loses_is_counted() {
        let mut magnitudes = Magnitudes::default();
        for value in [
            0.0,
            -0.0,
            f64::NAN,
            f64::NEG_INFINITY,
            65504.0,
            65536.0,
            -1e6,
        ] {
            magnitudes.add(value);
        }
        // The smallest f16 is 2^-24. Its half is on the edge and is not counted; anything smaller vanishes.
        for exponent in [-24, -25, -26, -30] {
            magnitudes.add(2f64.powi(exponent));
        }
        assert_eq!(
            (magnitudes.zeros, magnitudes.infs, magnitudes.nans),
            (2, 1, 1)
        );
        assert_eq!(magnitudes.vanishing(DType::F16), 2);
        assert_eq!(magnitudes.overflowing(DType::F16), 2);
        assert_eq!(magnitudes.overflowing(DType::Bf16), 0);
        assert!(
            magnitudes
                .to_string()
                .starts_with("2 zero, 1 inf, 1 nan\n2^-30            1 #")
        );
    }
}
