//! Loops compiled twice: for the baseline of the architecture, and for CPUs with wider vectors.
//!
//! [`vectorized!`] makes two copies of a function whose body is plain loops, and a dispatcher that picks one at each
//! call: on x86-64 the copy with 256-bit vectors (AVX2, and F16C for conversions) if the CPU supports them. The
//! compiler vectorizes both and contracts no product and sum into a fused multiply-add in either, so both produce the
//! same bits. Wider vectors would gain nothing, because these loops are memory-bound.
//!
//! Call such a function with a block of elements, not with a single one: the dispatch costs a load and a branch.

/// Whether the CPU has the features that the second copy is compiled for.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn has_wide_vectors() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("f16c")
}

/// Defines a function as two copies of its body and a dispatcher. Each bound is a single path.
macro_rules! vectorized {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident$(<$($generic:ident: $bound:path),+>)?($($arg:ident: $type:ty),+ $(,)?)
        $(-> $output:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name$(<$($generic: $bound),+>)?($($arg: $type),+) $(-> $output)? {
            #[inline(always)]
            fn plain$(<$($generic: $bound),+>)?($($arg: $type),+) $(-> $output)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,f16c")]
            fn wide$(<$($generic: $bound),+>)?($($arg: $type),+) $(-> $output)? {
                plain($($arg),+)
            }

            #[cfg(target_arch = "x86_64")]
            if $crate::launch::vector::has_wide_vectors() {
                // SAFETY: the CPU has the features that this copy is compiled for.
                return unsafe { wide($($arg),+) };
            }
            plain($($arg),+)
        }
    };
}

pub(super) use vectorized;

#[cfg(test)]
mod tests {
    use crate::launch::compute::Compute;

    vectorized! {
        fn blend<C: Compute>(values: &mut [C], factor: C) -> C {
            let mut sum = C::default();
            for value in values {
                *value = *value * factor + factor / *value;
                sum = sum + *value;
            }
            sum
        }
    }

    /// The dispatcher passes arguments and result through, and the copy it picks rounds like scalar code.
    #[test]
    fn either_copy_gives_the_bits_of_scalar_code() {
        let mut values: Vec<f32> = crate::launch::testing::numbers(5, 1003, 9.0)
            .into_iter()
            .map(crate::dtype::Element::from_f64)
            .collect();
        let mut expected = values.clone();
        let mut sum = 0.0f32;
        for value in &mut expected {
            *value = std::hint::black_box(*value * 0.3) + 0.3 / *value;
            sum += *value;
        }
        let got = blend(&mut values, 0.3);
        assert_eq!(got.to_bits(), sum.to_bits());
        assert!(
            values
                .iter()
                .zip(&expected)
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }
}
