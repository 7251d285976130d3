//! Checks every scaled conversion, and its counts, against f64 arithmetic.

use super::*;
use crate::launch::testing::{Array, LENGTHS, numbers, rounded, run};
use crate::launch::tolerance::assert_same;

/// Numbers with special values among them, rounded to the type of the tensor.
fn inputs(dtype: DType, len: usize) -> Vec<f64> {
    let mut values = numbers(7, len, 600.0);
    let specials = [
        f64::INFINITY,
        f64::NAN,
        -0.0,
        1e-6,
        f64::NEG_INFINITY,
        -1e-7,
        1e6,
    ];
    for (value, special) in values.iter_mut().skip(3).step_by(5).zip(specials) {
        *value = special;
    }
    rounded(dtype, &values)
}

/// x · scale as the kernel computes it before it rounds to 8 bits. f64 represents the product of two f32 exactly.
fn product(dtype: DType, x: f64, scale: f64) -> f64 {
    let exact = x * scale;
    if dtype == DType::F64 {
        return exact;
    }
    f64::from(<f32 as Element>::from_f64(exact))
}

fn to_f8(dtype: DType, overflow: Overflow, value: f64) -> f64 {
    match (dtype, overflow) {
        (DType::F8E4M3, Overflow::Infinity) => F8E4M3::from_f64(value).to_f64(),
        (DType::F8E4M3, Overflow::Saturate) => F8E4M3::saturating_from_f64(value).to_f64(),
        (_, Overflow::Infinity) => F8E5M2::from_f64(value).to_f64(),
        (_, Overflow::Saturate) => F8E5M2::saturating_from_f64(value).to_f64(),
    }
}

#[test]
fn products_inverse_amax_and_counts() {
    for from in DType::FLOATS {
        for to in DType::F8 {
            for len in LENGTHS {
                for (overflow, scale) in [
                    (Overflow::Infinity, 1.1f32),
                    (Overflow::Saturate, 1.1),
                    (Overflow::Saturate, 300.0),
                ] {
                    check(from, to, len, overflow, scale);
                }
            }
        }
    }
}

fn check(from: DType, to: DType, len: usize, overflow: Overflow, scale: f32) {
    let what = format!("{from} to {to}, {len} elements, {overflow:?}, scale {scale}");
    let values = inputs(from, len);
    let (x, y) = (Array::new(from, &values), Array::filled(to, len));
    let factor = Array::new(DType::F32, &[f64::from(scale)]);
    let inverse = Array::filled(DType::F32, 1);
    let amax = Array::new(DType::F32, &[0.5]);
    let counts = Array::new(DType::F64, &[10.0, 20.0, 30.0, 40.0]);
    run(&Quantize {
        x: x.span(),
        y: y.span(),
        scale: factor.span(),
        inverse: Some(inverse.span()),
        amax: Some(amax.span()),
        counts: Some(counts.span()),
        overflow,
    });
    let products: Vec<f64> = values
        .iter()
        .map(|x| product(from, *x, f64::from(scale)))
        .collect();
    let expected: Vec<f64> = products.iter().map(|p| to_f8(to, overflow, *p)).collect();
    assert_same(&what, &y.values(), &expected);
    assert_same(&what, &inverse.values(), &[f64::from(1.0 / scale)]);

    let largest = values.iter().fold(0.5, |largest: f64, x| {
        let magnitude = f64::from(<f32 as Element>::from_f64(x.abs()));
        if largest.is_nan() || magnitude <= largest {
            largest
        } else {
            magnitude
        }
    });
    assert_same(&what, &amax.values(), &[largest]);

    let is_over = |p: &&f64| !p.is_nan() && !to_f8(to, Overflow::Infinity, **p).is_finite();
    let count = |n: usize| u32::try_from(n).unwrap();
    let overflowed = count(products.iter().filter(is_over).count());
    let pairs = values.iter().zip(&expected);
    let vanished = count(pairs.filter(|(x, y)| **x != 0.0 && **y == 0.0).count());
    let nan = count(products.iter().filter(|p| p.is_nan()).count());
    let expected = [10 + count(len), 20 + overflowed, 30 + vanished, 40 + nan].map(f64::from);
    assert_same(&what, &counts.values(), &expected);
    assert!(len < 1024 || overflowed > 2 && nan > 0, "{what}");
}

#[test]
fn amax_takes_over_the_larger_and_nan() {
    for dtype in DType::FLOATS {
        for len in LENGTHS {
            let values = rounded(dtype, &numbers(9, len, 5.0));
            let x = Array::new(dtype, &values);
            let largest = values
                .iter()
                .map(|x| f64::from(<f32 as Element>::from_f64(x.abs())));
            let largest = largest.fold(0.0, f64::max);
            for start in [0.0, 1.5, 9.0, f64::INFINITY, f64::NAN] {
                let amax = Array::new(DType::F32, &[start]);
                let (x, span) = (x.span(), amax.span());
                run(&Amax { x, amax: span });
                let expected = if start.is_nan() {
                    start
                } else {
                    start.max(largest)
                };
                assert_same(&format!("{dtype} {len}"), &amax.values(), &[expected]);
            }
        }
        for special in [f64::INFINITY, f64::NAN] {
            let x = Array::new(dtype, &[1.0, -special, 2.0]);
            let amax = Array::new(DType::F32, &[0.0]);
            let (x, span) = (x.span(), amax.span());
            run(&Amax { x, amax: span });
            assert_same("special", &amax.values(), &[special]);
        }
    }
}

#[test]
fn every_code_times_an_inverse() {
    let inverse = 1.0f32 / 3.0;
    for from in DType::F8 {
        let codes: Vec<f64> = (0..=u8::MAX)
            .map(|code| match from {
                DType::F8E4M3 => F8E4M3::from_bits(code).to_f64(),
                _ => F8E5M2::from_bits(code).to_f64(),
            })
            .collect();
        for to in DType::FLOATS {
            let (x, y) = (Array::new(from, &codes), Array::filled(to, codes.len()));
            let factor = Array::new(DType::F32, &[f64::from(inverse)]);
            run(&Dequantize {
                x: x.span(),
                inverse: factor.span(),
                y: y.span(),
            });
            let products: Vec<f64> = codes
                .iter()
                .map(|x| product(to, *x, f64::from(inverse)))
                .collect();
            assert_same(
                &format!("{from} to {to}"),
                &y.values(),
                &rounded(to, &products),
            );
        }
    }
}
