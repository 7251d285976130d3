//! Conversion between floating-point types.
//!
//! `dst[i] = src[i]`, both of one length, any two float types. One rounding, to nearest, ties to even:
//! what does not fit becomes infinity, NaN stays NaN. Between equal types (u32 included) this copies.

use super::Span;
use super::compute::{
    check_floats, check_streams, entry_name, for_chunks, map, with_compute, with_element,
};
use super::device::push_spans;
use crate::driver::{Arguments, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;

/// Enqueues `dst[i] = src[i]`, rounded once. `dst` may be `src` if their elements have one size.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for operands of different lengths, of another
/// stream, or that overlap; [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for a conversion
/// from or to u32.
pub fn cast(stream: &Stream, src: &Span, dst: &Span) -> Result<()> {
    const OP: &str = "cast";
    check_streams(OP, stream, &[src, dst])?;
    if src.dtype() != dst.dtype() {
        check_floats(OP, &[src, dst])?;
    }
    dst.check_len(OP, src.len())?;
    dst.check_in_place_or_disjoint(OP, src)?;
    if src.is_empty() || src == dst {
        return Ok(());
    }
    super::enqueue(
        stream,
        Cast {
            src: *src,
            dst: *dst,
        },
    )
}

#[derive(Debug)]
struct Cast {
    src: Span,
    dst: Span,
}

impl Kernel for Cast {
    fn entry(&self) -> &'static str {
        match self.src.dtype() {
            DType::F16 => entry_name!("cast_f16", self.dst.dtype()),
            DType::Bf16 => entry_name!("cast_bf16", self.dst.dtype()),
            DType::F32 => entry_name!("cast_f32", self.dst.dtype()),
            DType::F64 => entry_name!("cast_f64", self.dst.dtype()),
            DType::U32 => entry_name!("cast_u32", self.dst.dtype()),
        }
    }

    fn elements(&self) -> u64 {
        self.src.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.src, &self.dst]);
        into.u64(self.elements());
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
                // SAFETY: chunks are disjoint: this thread alone has this part of `dst`.
                let to = unsafe { dst.sub(start, len).slice_mut::<T>() };
                to.copy_from_slice(from);
            }));
            return;
        }
        // A value of either type is a value of the compute type, so that only the store rounds.
        with_compute!([src, dst], C => {
            // SAFETY: the caller promises what `map` needs of both spans.
            unsafe { map::<C>(src, dst, |value| value) };
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
    use crate::launch::tolerance::assert_same;

    #[test]
    fn every_pair_of_floats_rounds_once() {
        for from in DType::FLOATS {
            for to in DType::FLOATS {
                for len in LENGTHS {
                    let values = rounded(from, &numbers(1, len, 70_000.0));
                    let (src, dst) = (Array::new(from, &values), Array::filled(to, len));
                    run(&Cast {
                        src: src.span(),
                        dst: dst.span(),
                    });
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
        for from in DType::FLOATS {
            for to in DType::FLOATS {
                let inputs = rounded(from, &values);
                let (src, dst) = (Array::new(from, &inputs), Array::filled(to, values.len()));
                run(&Cast {
                    src: src.span(),
                    dst: dst.span(),
                });
                assert_same(
                    &format!("{from} to {to}"),
                    &dst.values(),
                    &rounded(to, &inputs),
                );
                // NaN of every kind that f32 has at the ends: the rounding must not carry out of it.
                let nan = Array::new(from, &[f64::NAN, -f64::NAN]);
                let dst = Array::filled(to, 2);
                run(&Cast {
                    src: nan.span(),
                    dst: dst.span(),
                });
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
        run(&Cast {
            src: src.span(),
            dst: dst.span(),
        });
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
        run(&Cast { src, dst });
        // SAFETY: the twin has ended.
        let got: Vec<f64> = unsafe { dst.slice::<half::bf16>() }
            .iter()
            .map(|v| v.to_f64())
            .collect();
        assert_eq!(got, rounded(DType::Bf16, &values));
    }

    #[test]
    fn labels_are_copied() {
        let src = Array::new(DType::U32, &[1.0, 4e9, 7.0]);
        let dst = Array::filled(DType::U32, 3);
        run(&Cast {
            src: src.span(),
            dst: dst.span(),
        });
        assert_eq!(dst.values(), [1.0, 4e9, 7.0]);
    }
}
