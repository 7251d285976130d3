//! Fills a tensor with one value.
//!
//! `dst[i] = value`, any element type; `value` is rounded once (u32 truncates and saturates).

use super::Span;
use super::compute::{entry_name, for_chunks, with_element};
use crate::driver::{Arguments, Kernel, Stream};
use crate::dtype::Element;
use crate::error::Result;

/// Enqueues `dst[i] = value`, rounded to the type of `dst`.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if `dst` belongs to another stream.
pub fn fill(stream: &Stream, dst: &Span, value: f64) -> Result<()> {
    dst.check_stream("fill", stream)?;
    if dst.is_empty() {
        return Ok(());
    }
    super::enqueue(stream, Fill { dst: *dst, value })
}

#[derive(Debug)]
struct Fill {
    dst: Span,
    value: f64,
}

impl Kernel for Fill {
    fn entry(&self) -> &'static str {
        entry_name!("fill", self.dst.dtype())
    }

    fn elements(&self) -> u64 {
        self.dst.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        into.ptr(self.dst.ptr());
        into.u64(self.elements());
        into.f64(self.value);
    }

    unsafe fn run(&self) {
        with_element!(self.dst.dtype(), T => {
            let value = <T as Element>::from_f64(self.value);
            for_chunks(self.dst.len(), |start, len| {
                // SAFETY: the caller promises exclusive access to `dst`, and chunks are disjoint.
                unsafe { self.dst.sub(start, len).slice_mut::<T>() }.fill(value);
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::launch::testing::{Array, LENGTHS, rounded, run};

    #[test]
    fn fills_every_type_and_length() {
        for dtype in DType::ALL {
            for len in LENGTHS {
                let dst = Array::filled(dtype, len);
                run(&Fill {
                    dst: dst.span(),
                    value: 3.3,
                });
                assert_eq!(
                    dst.values(),
                    rounded(dtype, &vec![3.3; len]),
                    "{dtype} {len}"
                );
            }
        }
    }

    #[test]
    fn values_out_of_range() {
        let cases = [
            // The nearest bf16, not the result of rounding to f32 first.
            (
                DType::Bf16,
                1.0 + 2f64.powi(-8) + 2f64.powi(-40),
                1.0 + 2f64.powi(-7),
            ),
            (DType::F16, 1e6, f64::INFINITY),
            (DType::F32, -1e300, f64::NEG_INFINITY),
            (DType::U32, -1.0, 0.0),
            (DType::U32, 1e12, f64::from(u32::MAX)),
        ];
        for (dtype, value, expected) in cases {
            let dst = Array::filled(dtype, 1);
            run(&Fill {
                dst: dst.span(),
                value,
            });
            assert_eq!(dst.values(), [expected], "{dtype} {value}");
        }
    }
}
