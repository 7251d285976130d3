//! Conversion between floating-point types.
//!
//! `dst[i] = src[i]`, for operands of equal length and any two float types. Rounds once, to nearest, ties to even.
//! Values that are too large become infinity; NaN stays NaN. Between equal types (including u32) this is a copy.

use super::Span;
use super::compute::{
    Compute, check_convertible, check_streams, entry_name, for_chunks, map, with_compute,
    with_element,
};
use super::device::push_spans;
use crate::driver::{Arguments, Kernel, Stream, Traffic};
use crate::dtype::{DType, Element, Overflow};
use crate::error::{Error, Result};

/// Enqueues `dst[i] = src[i]`, rounded once. `dst` may be `src` if their elements have one size.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for operands of different lengths, of another
/// stream, or that overlap; [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for a conversion
/// from or to u32.
pub fn cast(stream: &Stream, src: &Span, dst: &Span) -> Result<()> {
    enqueue_cast("cast", stream, [src, dst], f64::INFINITY)
}

/// Like [`cast`], to an 8-bit type. `overflow` selects the result for values that are too large.
///
/// # Errors
/// As [`cast`]; [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for a wider `dst`.
pub fn cast_with(stream: &Stream, src: &Span, dst: &Span, overflow: Overflow) -> Result<()> {
    const OP: &str = "cast_with";
    if !dst.dtype().is_f8() {
        return Err(Error::UnsupportedDtype {
            op: OP,
            dtype: dst.dtype(),
        });
    }
    let limit = match overflow {
        Overflow::Infinity => f64::INFINITY,
        Overflow::Saturate => dst.dtype().largest(),
    };
    enqueue_cast(OP, stream, [src, dst], limit)
}

fn enqueue_cast(
    op: &'static str,
    stream: &Stream,
    [src, dst]: [&Span; 2],
    limit: f64,
) -> Result<()> {
    check_streams(op, stream, &[src, dst])?;
    if src.dtype() != dst.dtype() {
        check_convertible(op, &[src, dst])?;
    }
    dst.check_len(op, src.len())?;
    dst.check_in_place_or_disjoint(op, src)?;
    if src.is_empty() || src == dst {
        return Ok(());
    }
    super::enqueue(
        stream,
        Cast {
            src: *src,
            dst: *dst,
            limit,
        },
    )
}

#[derive(Debug)]
struct Cast {
    src: Span,
    dst: Span,
    /// Values are clamped to this magnitude before they are converted to an 8-bit type.
    limit: f64,
}

impl Kernel for Cast {
    fn entry(&self) -> &'static str {
        match self.src.dtype() {
            DType::F16 => entry_name!("cast_f16", self.dst.dtype()),
            DType::Bf16 => entry_name!("cast_bf16", self.dst.dtype()),
            DType::F32 => entry_name!("cast_f32", self.dst.dtype()),
            DType::F64 => entry_name!("cast_f64", self.dst.dtype()),
            DType::U32 => entry_name!("cast_u32", self.dst.dtype()),
            DType::F8E4M3 => entry_name!("cast_f8e4m3", self.dst.dtype()),
            DType::F8E5M2 => entry_name!("cast_f8e5m2", self.dst.dtype()),
        }
    }

    fn elements(&self) -> u64 {
        self.src.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.src, &self.dst]);
        into.u64(self.elements());
        into.f64(self.limit);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic {
            read: self.src.bytes(),
            written: self.dst.bytes(),
        })
    }

    unsafe fn run(&self) {
        let (src, dst) = (&self.src, &self.dst);
        if src.dtype() == dst.dtype() {
            with_element!(src.dtype(), T => for_chunks(src.len(), |start, len| {
                // SAFETY: the caller promises that nothing writes `src`, and it is disjoint from `dst`.
                let from = unsafe { src.sub(start, len).slice::<T>() };
                // SAFETY: chunks are disjoint, so only this thread touches this part of `dst`.
                let to = unsafe { dst.sub(start, len).slice_mut::<T>() };
                to.copy_from_slice(from);
            }));
            return;
        }
        // The compute type represents all values of both types, so only the store rounds.
        with_compute!([src, dst], C => {
            let limit = <C as Element>::from_f64(self.limit);
            // SAFETY: the caller promises what `map` needs of both spans.
            unsafe { map::<C>(src, dst, |value| bounded(value, limit)) };
        });
    }
}

/// `value` clamped to `-limit..=limit`. NaN stays NaN.
#[inline]
fn bounded<C: Compute>(value: C, limit: C) -> C {
    if value > limit {
        limit
    } else if value < -limit {
        -limit
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
    use crate::launch::tolerance::assert_same;

    fn floats() -> impl Iterator<Item = DType> {
        DType::ALL.into_iter().filter(|dtype| dtype.is_float())
    }

    fn plain(src: &Array, dst: &Array) -> Cast {
        Cast {
            src: src.span(),
            dst: dst.span(),
            limit: f64::INFINITY,
        }
    }

    #[test]
    fn every_pair_of_floats_rounds_once() {
        for from in floats() {
            for to in floats() {
                for len in LENGTHS {
                    let values = rounded(from, &numbers(1, len, 70_000.0));
                    let (src, dst) = (Array::new(from, &values), Array::filled(to, len));
                    run(&plain(&src, &dst));
                    assert_same(
                        &format!("{from} to {to}"),
                        &dst.values(),
                        &rounded(to, &values),
                    );
                }
            }
        }
    }

    #[test]
    fn special_values_and_ties() {
        let tie = 1.0 + 2f64.powi(-11);
        let values = [
            0.0,
            f64::INFINITY,
            f64::NEG_INFINITY,
            65519.0,
            65520.0,
            tie,
            -3e38,
            1e-8,
        ];
        for from in floats() {
            for to in floats() {
                let inputs = rounded(from, &values);
                let (src, dst) = (Array::new(from, &inputs), Array::filled(to, values.len()));
                run(&plain(&src, &dst));
                assert_same(
                    &format!("{from} to {to}"),
                    &dst.values(),
                    &rounded(to, &inputs),
                );
                // NaN of both signs: rounding must not turn it into another value.
                let nan = Array::new(from, &[f64::NAN, -f64::NAN]);
                let dst = Array::filled(to, 2);
                run(&plain(&nan, &dst));
                assert!(
                    dst.values().iter().all(|value| value.is_nan()),
                    "{from} to {to}"
                );
            }
        }
    }

    #[test]
    fn a_nan_with_all_bits_set_stays_nan_in_bf16() {
        let src = Array::new(DType::F32, &[0.0]);
        // SAFETY: the array lives, and no other slice of it exists.
        let elements = unsafe { src.span().slice_mut::<f32>() };
        elements[0] = f32::from_bits(u32::MAX);
        let dst = Array::filled(DType::Bf16, 1);
        run(&plain(&src, &dst));
        assert!(dst.values()[0].is_nan());
    }

    #[test]
    fn in_place_between_types_of_one_size() {
        let values = rounded(DType::F16, &numbers(2, 5000, 10.0));
        let array = Array::new(DType::F16, &values);
        let src = array.span();
        // SAFETY: bf16 has the size and alignment of f16.
        let dst =
            unsafe { Span::new(src.ptr(), src.len(), DType::Bf16, crate::units::StreamId(0)) };
        run(&Cast {
            src,
            dst,
            limit: f64::INFINITY,
        });
        // SAFETY: the twin has ended.
        let got: Vec<f64> = unsafe { dst.slice::<half::bf16>() }
            .iter()
            .map(|v| v.to_f64())
            .collect();
        assert_eq!(got, rounded(DType::Bf16, &values));
    }

    #[test]
    fn what_is_too_large_saturates_if_told_to() {
        let mut values = vec![f64::INFINITY, f64::NEG_INFINITY, 3e38, -449.0, 1.0, -0.0];
        values.extend(numbers(3, 3000, 70_000.0));
        for from in floats() {
            let inputs = rounded(from, &values);
            for to in DType::F8 {
                let (src, dst) = (Array::new(from, &inputs), Array::filled(to, inputs.len()));
                let limit = to.largest();
                run(&Cast {
                    limit,
                    ..plain(&src, &dst)
                });
                // A copy between equal types keeps infinities.
                let bound = if from == to { f64::INFINITY } else { limit };
                let expected: Vec<_> = inputs
                    .iter()
                    .map(|v| {
                        if v.is_nan() {
                            *v
                        } else {
                            v.clamp(-bound, bound)
                        }
                    })
                    .collect();
                assert_same(
                    &format!("{from} to {to}"),
                    &dst.values(),
                    &rounded(to, &expected),
                );
            }
        }
    }

    #[test]
    fn labels_are_copied() {
        let src = Array::new(DType::U32, &[1.0, 4e9, 7.0]);
        let dst = Array::filled(DType::U32, 3);
        run(&plain(&src, &dst));
        assert_eq!(dst.values(), [1.0, 4e9, 7.0]);
    }
}
