//! Elementwise arithmetic.
//!
//! - `add`: `out[i] = a[i] + b[i]`, and `mul`: `out[i] = a[i] · b[i]`;
//! - `scale`: `out[i] = x[i] · factor[0]`, with the factor read on the device;
//! - `add_scaled`: `out[i] = out[i] + factor · x[i]`.
//!
//! All operands have the same length and any float types; `out` may be one of the inputs. Computed in f32, or in f64 if
//! any operand is f64, and rounded once into `out`. `scale` with a half-precision output also computes in f64: the
//! product of a half and an f32 has up to 35 bits, and rounding it to f32 first would round twice.

use super::Span;
use super::compute::{
    Compute, check_floats, check_streams, entry_name, load_scalar, map, map2, with_compute,
};
use super::device::{entry_by_types, push_spans, push_types};
use crate::driver::{Arguments, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;

/// Enqueues `out[i] = a[i] + b[i]`, rounded once. `out` may be `a` or `b`.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for operands of different lengths, of another
/// stream, or that overlap; [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for u32 and 8-bit types.
pub fn add(stream: &Stream, a: &Span, b: &Span, out: &Span) -> Result<()> {
    let kernel = Binary {
        op: BinaryOp::Add,
        a: *a,
        b: *b,
        out: *out,
    };
    kernel.enqueue("add", stream)
}

/// Enqueues `out[i] = a[i] · b[i]`, rounded once. `out` may be `a` or `b`.
///
/// # Errors
/// As [`add`].
pub fn mul(stream: &Stream, a: &Span, b: &Span, out: &Span) -> Result<()> {
    let kernel = Binary {
        op: BinaryOp::Mul,
        a: *a,
        b: *b,
        out: *out,
    };
    kernel.enqueue("mul", stream)
}

/// Enqueues `out[i] = x[i] · factor[0]`, rounded once. `out` may be `x`; `factor` is a single f32 or f64 that is read
/// when the kernel runs.
///
/// # Errors
/// As [`add`], and if `factor` is not a single f32 or f64, or overlaps `out`.
pub fn scale(stream: &Stream, x: &Span, factor: &Span, out: &Span) -> Result<()> {
    const OP: &str = "scale";
    check_streams(OP, stream, &[x, factor, out])?;
    check_floats(OP, &[x, out])?;
    factor.check_len(OP, 1)?;
    if factor.dtype() != DType::F64 {
        factor.check_dtype(OP, DType::F32)?;
    }
    out.check_len(OP, x.len())?;
    out.check_in_place_or_disjoint(OP, x)?;
    if x.is_empty() {
        return Ok(());
    }
    out.check_disjoint(OP, factor)?;
    super::enqueue(
        stream,
        Scale {
            x: *x,
            factor: *factor,
            out: *out,
        },
    )
}

/// Enqueues `out[i] = out[i] + factor · x[i]`, product and sum in the compute type, rounded once into
/// `out`. `out` may be `x`.
///
/// # Errors
/// As [`add`].
pub fn add_scaled(stream: &Stream, x: &Span, factor: f64, out: &Span) -> Result<()> {
    const OP: &str = "add_scaled";
    check_streams(OP, stream, &[x, out])?;
    check_floats(OP, &[x, out])?;
    out.check_len(OP, x.len())?;
    out.check_in_place_or_disjoint(OP, x)?;
    if x.is_empty() {
        return Ok(());
    }
    super::enqueue(
        stream,
        AddScaled {
            x: *x,
            factor,
            out: *out,
        },
    )
}

#[derive(Clone, Copy, Debug)]
enum BinaryOp {
    Add,
    Mul,
}

#[derive(Debug)]
struct Binary {
    op: BinaryOp,
    a: Span,
    b: Span,
    out: Span,
}

impl Binary {
    fn enqueue(self, op: &'static str, stream: &Stream) -> Result<()> {
        check_streams(op, stream, &[&self.a, &self.b, &self.out])?;
        check_floats(op, &[&self.a, &self.b, &self.out])?;
        for input in [&self.a, &self.b] {
            self.out.check_len(op, input.len())?;
            self.out.check_in_place_or_disjoint(op, input)?;
        }
        if self.out.is_empty() {
            return Ok(());
        }
        super::enqueue(stream, self)
    }
}

impl Kernel for Binary {
    fn entry(&self) -> &'static str {
        match self.op {
            BinaryOp::Add => entry_by_types!("add", [self.a, self.b, self.out]),
            BinaryOp::Mul => entry_by_types!("mul", [self.a, self.b, self.out]),
        }
    }

    fn elements(&self) -> u64 {
        self.out.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.a, &self.b, &self.out];
        push_spans(into, &spans);
        into.u64(self.elements());
        push_types(into, &spans);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic {
            read: self.a.bytes() + self.b.bytes(),
            written: self.out.bytes(),
        })
    }

    unsafe fn run(&self) {
        let Self { op, a, b, out } = self;
        with_compute!([a, b, out], C => match op {
            // SAFETY: the caller promises what `map2` needs of the three spans.
            BinaryOp::Add => unsafe { map2::<C>(a, b, out, |a, b| a + b) },
            // SAFETY: as above.
            BinaryOp::Mul => unsafe { map2::<C>(a, b, out, |a, b| a * b) },
        });
    }
}

#[derive(Debug)]
struct Scale {
    x: Span,
    factor: Span,
    out: Span,
}

impl Scale {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_in<C: Compute>(&self) {
        // SAFETY: the caller promises that nothing writes the factor.
        let factor: C = unsafe { load_scalar(&self.factor) };
        // SAFETY: the caller promises what `map` needs of both spans.
        unsafe { map::<C>(&self.x, &self.out, |x| x * factor) };
    }
}

impl Kernel for Scale {
    fn entry(&self) -> &'static str {
        match self.x.dtype() {
            DType::F16 => entry_name!("scale_f16", self.out.dtype()),
            DType::Bf16 => entry_name!("scale_bf16", self.out.dtype()),
            DType::F32 => entry_name!("scale_f32", self.out.dtype()),
            DType::F64 => entry_name!("scale_f64", self.out.dtype()),
            DType::U32 | DType::F8E4M3 | DType::F8E5M2 => {
                unreachable!("the launcher admits only types that ops compute with")
            }
        }
    }

    fn elements(&self) -> u64 {
        self.out.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.factor, &self.out]);
        into.u64(self.elements());
        push_types(into, &[&self.factor]);
    }

    unsafe fn run(&self) {
        if self.out.dtype().is_half() {
            // SAFETY: the caller promises the same.
            return unsafe { self.run_in::<f64>() };
        }
        with_compute!([self.x, self.factor, self.out], C => {
            // SAFETY: the caller promises the same.
            unsafe { self.run_in::<C>() }
        });
    }
}

#[derive(Debug)]
struct AddScaled {
    x: Span,
    factor: f64,
    out: Span,
}

impl Kernel for AddScaled {
    fn entry(&self) -> &'static str {
        entry_by_types!("add_scaled", [self.x, self.out])
    }

    fn elements(&self) -> u64 {
        self.out.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.x, &self.out];
        push_spans(into, &spans);
        into.u64(self.elements());
        into.f64(self.factor);
        push_types(into, &spans);
    }

    unsafe fn run(&self) {
        let Self { x, factor, out } = self;
        with_compute!([x, out], C => {
            let factor = <C as crate::dtype::Element>::from_f64(*factor);
            // SAFETY: the caller promises what `map2` needs of both spans.
            unsafe { map2::<C>(x, out, out, |x, y| y + factor * x) };
        });
    }
}

#[cfg(test)]
mod tests;
