//! Checks arithmetic against f64, in every type.

use super::*;
use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
use crate::launch::tolerance::{assert_close, assert_same};

#[test]
fn add_and_mul_against_f64() {
    for dtype in DType::FLOATS {
        for len in LENGTHS {
            let (x, y) = (numbers(1, len, 8.0), numbers(2, len, 8.0));
            let (x, y) = (rounded(dtype, &x), rounded(dtype, &y));
            let (a, b) = (Array::new(dtype, &x), Array::new(dtype, &y));
            let out = Array::filled(dtype, len);
            let spans = |op| Binary {
                op,
                a: a.span(),
                b: b.span(),
                out: out.span(),
            };
            run(&spans(BinaryOp::Add));
            let sums: Vec<_> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_close(dtype, 0.0, &out.values(), &sums);
            run(&spans(BinaryOp::Mul));
            let products: Vec<_> = x.iter().zip(&y).map(|(x, y)| x * y).collect();
            // Small products may be subnormal in f16, where the spacing is 2^-24.
            assert_close(dtype, 6e-8, &out.values(), &products);
        }
    }
}

#[test]
fn in_place_and_non_finite() {
    let values = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1.0];
    let other = [f64::NEG_INFINITY, 0.0, 1.0, f64::INFINITY];
    for dtype in DType::FLOATS {
        let (a, b) = (Array::new(dtype, &values), Array::new(dtype, &other));
        run(&Binary {
            op: BinaryOp::Add,
            a: a.span(),
            b: b.span(),
            out: a.span(),
        });
        let expected = [f64::NAN, f64::NEG_INFINITY, f64::NAN, f64::INFINITY];
        assert_close(dtype, 0.0, &a.values(), &expected);
        run(&Binary {
            op: BinaryOp::Mul,
            a: b.span(),
            b: b.span(),
            out: b.span(),
        });
        assert_close(
            dtype,
            0.0,
            &b.values(),
            &[f64::INFINITY, 0.0, 1.0, f64::INFINITY],
        );
    }
}

#[test]
fn scale_rounds_once_into_every_type() {
    for from in DType::FLOATS {
        for to in DType::FLOATS {
            let values = rounded(from, &numbers(3, 3001, 300.0));
            let (x, out) = (Array::new(from, &values), Array::filled(to, values.len()));
            let factor = Array::new(DType::F32, &[1.1]);
            run(&Scale {
                x: x.span(),
                factor: factor.span(),
                out: out.span(),
            });
            let exact = factor.values()[0];
            let products: Vec<_> = values.iter().map(|x| x * exact).collect();
            // From f64 the reference is itself rounded; from the others it is exact.
            assert_same(
                &format!("{from} to {to}"),
                &out.values(),
                &rounded(to, &products),
            );
        }
    }
}

#[test]
fn scale_overflows_to_infinity() {
    let (x, factor) = (
        Array::new(DType::F16, &[2.0, -2.0]),
        Array::new(DType::F32, &[65536.0]),
    );
    let (narrow, wide) = (Array::filled(DType::F16, 2), Array::filled(DType::F32, 2));
    run(&Scale {
        x: x.span(),
        factor: factor.span(),
        out: narrow.span(),
    });
    assert_eq!(narrow.values(), [f64::INFINITY, f64::NEG_INFINITY]);
    run(&Scale {
        x: x.span(),
        factor: factor.span(),
        out: wide.span(),
    });
    assert_eq!(wide.values(), [131_072.0, -131_072.0]);
}

#[test]
fn add_scaled_accumulates() {
    for dtype in DType::FLOATS {
        for len in LENGTHS {
            let (x, y) = (numbers(4, len, 2.0), numbers(5, len, 2.0));
            let (x, y) = (rounded(dtype, &x), rounded(dtype, &y));
            let (a, out) = (Array::new(dtype, &x), Array::new(dtype, &y));
            run(&AddScaled {
                x: a.span(),
                factor: -0.3,
                out: out.span(),
            });
            let sums: Vec<_> = x.iter().zip(&y).map(|(x, y)| y - 0.3 * x).collect();
            // The product is rounded too: one part in 2^24 of numbers below 1.
            assert_close(dtype, 1e-7, &out.values(), &sums);
        }
    }
}
