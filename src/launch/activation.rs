//! Activation functions and their gradients.
//!
//! - relu: `out = max(x, 0)`; `grad_in = grad_out` where `x > 0`, else 0. NaN propagates, also in the gradient.
//! - gelu, the exact form: `out = x·Φ(x)` with `Φ` the normal distribution;
//!   `grad_in = grad_out·(Φ(x) + x·φ(x))` with `φ(x) = e^(-x²/2)/√(2π)` its density.
//!
//! All operands have the same length and any float types; the output may be one of the inputs. Computed in f32 (f64 if
//! any operand is f64), rounded once. As in PyTorch, gelu of -∞ is NaN: it is `-∞ · 0`.

use std::f64::consts::PI;

use super::Span;
use super::compute::{check_floats, check_streams, map, map2, with_compute};
use super::device::{entry_by_types, push_spans, push_types};
use super::special::Special;
use crate::driver::{Arguments, Kernel, Stream};
use crate::error::Result;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x·Φ(x)`, the exact form rather than the tanh approximation.
    Gelu,
}

impl Activation {
    const fn name(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::Gelu => "gelu",
        }
    }
}

/// Enqueues `out[i] = f(x[i])`. `out` may be `x`.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for operands of different lengths, of another
/// stream, or that overlap; [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) for u32 and 8-bit types.
pub fn activation(stream: &Stream, f: Activation, x: &Span, out: &Span) -> Result<()> {
    let op = f.name();
    check_streams(op, stream, &[x, out])?;
    check_floats(op, &[x, out])?;
    out.check_len(op, x.len())?;
    out.check_in_place_or_disjoint(op, x)?;
    if x.is_empty() {
        return Ok(());
    }
    super::enqueue(
        stream,
        Forward {
            f,
            x: *x,
            out: *out,
        },
    )
}

/// Enqueues `grad_in[i] = grad_out[i]·f'(x[i])`, with `x` the input of the forward pass. `grad_in` may be
/// `grad_out` or `x`.
///
/// # Errors
/// As [`activation`].
pub fn activation_backward(
    stream: &Stream,
    f: Activation,
    x: &Span,
    grad_out: &Span,
    grad_in: &Span,
) -> Result<()> {
    let op = match f {
        Activation::Relu => "relu_backward",
        Activation::Gelu => "gelu_backward",
    };
    check_streams(op, stream, &[x, grad_out, grad_in])?;
    check_floats(op, &[x, grad_out, grad_in])?;
    for input in [x, grad_out] {
        grad_in.check_len(op, input.len())?;
        grad_in.check_in_place_or_disjoint(op, input)?;
    }
    if x.is_empty() {
        return Ok(());
    }
    super::enqueue(
        stream,
        Backward {
            f,
            x: *x,
            grad_out: *grad_out,
            grad_in: *grad_in,
        },
    )
}

#[derive(Debug)]
struct Forward {
    f: Activation,
    x: Span,
    out: Span,
}

impl Kernel for Forward {
    fn entry(&self) -> &'static str {
        match self.f {
            Activation::Relu => entry_by_types!("relu", [self.x, self.out]),
            Activation::Gelu => entry_by_types!("gelu", [self.x, self.out]),
        }
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.x, &self.out];
        push_spans(into, &spans);
        into.u64(self.elements());
        push_types(into, &spans);
    }

    unsafe fn run(&self) {
        let Self { f, x, out } = self;
        with_compute!([x, out], C => match f {
            // SAFETY: the caller promises what `map` needs of both spans.
            Activation::Relu => unsafe { map::<C>(x, out, relu) },
            // SAFETY: as above.
            Activation::Gelu => unsafe { map::<C>(x, out, gelu) },
        });
    }
}

#[derive(Debug)]
struct Backward {
    f: Activation,
    x: Span,
    grad_out: Span,
    grad_in: Span,
}

impl Kernel for Backward {
    fn entry(&self) -> &'static str {
        let Self {
            f,
            x,
            grad_out,
            grad_in,
        } = self;
        match f {
            Activation::Relu => entry_by_types!("relu_backward", [x, grad_out, grad_in]),
            Activation::Gelu => entry_by_types!("gelu_backward", [x, grad_out, grad_in]),
        }
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        let spans = [&self.x, &self.grad_out, &self.grad_in];
        push_spans(into, &spans);
        into.u64(self.elements());
        push_types(into, &spans);
    }

    unsafe fn run(&self) {
        let Self {
            f,
            x,
            grad_out,
            grad_in,
        } = self;
        with_compute!([x, grad_out, grad_in], C => match f {
            // SAFETY: the caller promises what `map2` needs of the three spans.
            Activation::Relu => unsafe { map2::<C>(x, grad_out, grad_in, relu_backward) },
            // SAFETY: as above.
            Activation::Gelu => unsafe { map2::<C>(x, grad_out, grad_in, gelu_backward) },
        });
    }
}

// Both comparisons fail for a NaN input, which selects the branch that returns it, or the gradient.

#[inline]
fn relu<C: Special>(x: C) -> C {
    if x <= C::default() { C::default() } else { x }
}

#[inline]
fn relu_backward<C: Special>(x: C, grad: C) -> C {
    if x <= C::default() {
        C::default()
    } else {
        grad
    }
}

#[inline]
fn gelu<C: Special>(x: C) -> C {
    x * x.normal_cdf()
}

#[inline]
fn gelu_backward<C: Special>(x: C, grad: C) -> C {
    let density = (x * x * C::from_f64(-0.5)).exp() * C::from_f64(1.0 / (2.0 * PI).sqrt());
    grad * (x.normal_cdf() + x * density)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::DType;
    use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
    use crate::launch::tolerance::assert_close;

    /// Gelu of a few values to 16 digits, from a multiple-precision evaluation.
    const GELU: [(f64, f64, f64); 5] = [
        (-4.5, -1.528952906128527e-5, -6.852916185634457e-5),
        (-1.0, -0.1586552539314571, -0.0833154705876863),
        (-0.25, -0.1003234185792691, 0.304626645116364),
        (0.5, 0.3457312306370066, 0.8674951246561628),
        (3.0, 2.99595030590511, 1.011945647204184),
    ];

    fn forward(f: Activation, dtype: DType, values: &[f64]) -> Vec<f64> {
        let (x, out) = (
            Array::new(dtype, values),
            Array::filled(dtype, values.len()),
        );
        run(&Forward {
            f,
            x: x.span(),
            out: out.span(),
        });
        out.values()
    }

    fn backward(f: Activation, dtype: DType, x: &[f64], grad: &[f64]) -> Vec<f64> {
        let (x, grad_out) = (Array::new(dtype, x), Array::new(dtype, grad));
        // In place, as in a trainer that saves memory.
        let grad_in = grad_out.span();
        run(&Backward {
            f,
            x: x.span(),
            grad_out: grad_out.span(),
            grad_in,
        });
        grad_out.values()
    }

    #[test]
    fn relu_and_its_gradient() {
        for dtype in DType::FLOATS {
            for len in LENGTHS {
                let x = rounded(dtype, &numbers(1, len, 4.0));
                let grad = rounded(dtype, &numbers(2, len, 4.0));
                let expected: Vec<_> = x.iter().map(|x| x.max(0.0)).collect();
                assert_eq!(forward(Activation::Relu, dtype, &x), expected);
                let expected: Vec<_> = x
                    .iter()
                    .zip(&grad)
                    .map(|(x, g)| if *x > 0.0 { *g } else { 0.0 })
                    .collect();
                assert_eq!(backward(Activation::Relu, dtype, &x, &grad), expected);
            }
        }
    }

    #[test]
    fn gelu_against_known_values() {
        for (x, value, slope) in GELU {
            for dtype in [DType::F32, DType::F64] {
                let absolute = if dtype == DType::F64 { 1e-15 } else { 1e-7 };
                let rounded_x = rounded(dtype, &[x]);
                assert_close(
                    dtype,
                    absolute,
                    &forward(Activation::Gelu, dtype, &rounded_x),
                    &[value],
                );
                let got = backward(Activation::Gelu, dtype, &rounded_x, &[1.0]);
                assert_close(dtype, 2.0 * absolute, &got, &[slope]);
            }
        }
    }

    #[test]
    fn gelu_in_every_type_against_f64() {
        for dtype in DType::FLOATS {
            for len in LENGTHS {
                let x = rounded(dtype, &numbers(3, len, 6.0));
                let grad = rounded(dtype, &numbers(4, len, 3.0));
                let expected: Vec<f64> = x.iter().map(|x| gelu(*x)).collect();
                assert_close(
                    dtype,
                    2e-7,
                    &forward(Activation::Gelu, dtype, &x),
                    &expected,
                );
                let expected: Vec<f64> = x
                    .iter()
                    .zip(&grad)
                    .map(|(x, g)| gelu_backward(*x, *g))
                    .collect();
                assert_close(
                    dtype,
                    1e-6,
                    &backward(Activation::Gelu, dtype, &x, &grad),
                    &expected,
                );
            }
        }
    }

    #[test]
    fn non_finite_inputs() {
        let x = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        for dtype in DType::FLOATS {
            let relu = forward(Activation::Relu, dtype, &x);
            assert_close(dtype, 0.0, &relu, &[f64::NAN, f64::INFINITY, 0.0]);
            let gelu = forward(Activation::Gelu, dtype, &x);
            assert_close(dtype, 0.0, &gelu, &[f64::NAN, f64::INFINITY, f64::NAN]);
            let grads = backward(Activation::Relu, dtype, &[1.0, -1.0], &[f64::NAN, f64::NAN]);
            assert_close(dtype, 0.0, &grads, &[f64::NAN, 0.0]);
        }
    }
}
