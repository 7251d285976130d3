//! Checks matrix products against plain sums in f64.

use super::*;
use crate::launch::testing::{Array, numbers, rounded, run};
use crate::launch::tolerance::assert_close;

/// Sums in f64, in the plain order.
fn reference([m, k, n]: [usize; 3], a: &[f64], b: &[f64], c: &[f64]) -> Vec<f64> {
    (0..m * n)
        .map(|idx| {
            let (row, column) = (idx / n, idx % n);
            c[idx]
                + (0..k)
                    .map(|i| a[row * k + i] * b[i * n + column])
                    .sum::<f64>()
        })
        .collect()
}

fn transpose(rows: usize, columns: usize, x: &[f64]) -> Vec<f64> {
    (0..rows * columns)
        .map(|idx| x[idx % rows * columns + idx / rows])
        .collect()
}

/// Runs one product, each input dense or given transposed.
fn product(shape: [usize; 3], types: [DType; 2], transposed: [bool; 2], accumulate: Accumulate) {
    let [m, k, n] = shape;
    let [dtype, out_dtype] = types;
    let a = rounded(dtype, &numbers(1, m * k, 1.0));
    let b = rounded(dtype, &numbers(2, k * n, 1.0));
    let c = rounded(out_dtype, &numbers(3, m * n, 1.0));
    let operand = |x: &[f64], rows, columns, transposed| {
        if transposed {
            Array::new(dtype, &transpose(rows, columns, x))
        } else {
            Array::new(dtype, x)
        }
    };
    let view = |array: &Array, rows, columns, transposed| {
        if transposed {
            Matrix::dense(&array.span(), columns, rows)
                .unwrap()
                .transposed()
        } else {
            Matrix::dense(&array.span(), rows, columns).unwrap()
        }
    };
    let left = operand(&a, m, k, transposed[0]);
    let right = operand(&b, k, n, transposed[1]);
    let out = Array::new(out_dtype, &c);
    run(&Matmul {
        a: view(&left, m, k, transposed[0]),
        b: view(&right, k, n, transposed[1]),
        out: out.span(),
        accumulate,
    });
    let held = if accumulate == Accumulate::Add {
        c
    } else {
        vec![0.0; m * n]
    };
    let sums = DType::F32.epsilon().min(DType::epsilon(dtype));
    // k products below 1, with each sum rounded: the error grows as √k; 4 leaves a margin.
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let absolute = 4.0 * sums * (k as f64 + 1.0).sqrt();
    assert_close(
        out_dtype,
        absolute,
        &out.values(),
        &reference(shape, &a, &b, &held),
    );
}

#[test]
fn every_type_shape_and_layout() {
    let pairs = [
        [DType::F16, DType::F16],
        [DType::F16, DType::F32],
        [DType::Bf16, DType::Bf16],
        [DType::Bf16, DType::F32],
        [DType::F32, DType::F32],
        [DType::F64, DType::F64],
    ];
    let shapes = [
        [1, 1, 1],
        [3, 5, 2],
        [65, 33, 17],
        [150, 40, 60],
        [1, 300, 9],
        [70, 0, 3],
    ];
    for types in pairs {
        for shape in shapes {
            for transposed in [[false, false], [true, false], [false, true], [true, true]] {
                product(shape, types, transposed, Accumulate::Overwrite);
                product(shape, types, transposed, Accumulate::Add);
            }
        }
    }
}

#[test]
fn overwriting_does_not_read_what_the_output_held() {
    for dtype in DType::FLOATS {
        let (a, b) = (Array::new(dtype, &[2.0]), Array::new(dtype, &[3.0]));
        let out = Array::new(dtype, &[f64::NAN]);
        run(&Matmul {
            a: Matrix::dense(&a.span(), 1, 1).unwrap(),
            b: Matrix::dense(&b.span(), 1, 1).unwrap(),
            out: out.span(),
            accumulate: Accumulate::Overwrite,
        });
        assert_eq!(out.values(), [6.0], "{dtype}");
    }
}

#[test]
fn views_with_gaps_and_repeats() {
    for dtype in DType::FLOATS {
        // Every second column of a [2, 4] matrix, times one repeated number.
        let a = Array::new(dtype, &[1.0, 9.0, 2.0, 9.0, 3.0, 9.0, 4.0]);
        let b = Array::new(dtype, &[5.0]);
        let out = Array::filled(dtype, 2);
        run(&Matmul {
            a: Matrix::new(&a.span(), [2, 2], [4, 2]).unwrap(),
            b: Matrix::new(&b.span(), [2, 1], [0, 0]).unwrap(),
            out: out.span(),
            accumulate: Accumulate::Overwrite,
        });
        assert_eq!(out.values(), [15.0, 35.0], "{dtype}");
    }
}

#[test]
fn half_sums_round_once_and_may_overflow() {
    let (a, b) = (
        Array::new(DType::F16, &[256.0, 256.0]),
        Array::new(DType::F16, &[256.0, -1.0]),
    );
    let product = |k| {
        let out = Array::filled(DType::F16, 1);
        run(&Matmul {
            a: Matrix::dense(&a.span(), 1, k).unwrap(),
            b: Matrix::dense(&b.span(), k, 1).unwrap(),
            out: out.span(),
            accumulate: Accumulate::Overwrite,
        });
        out.values()[0]
    };
    assert_eq!(product(1), f64::INFINITY);
    // 65536 as an intermediate sum, 65280 as the result, which f16 can represent.
    assert_eq!(product(2), 65280.0);
}

#[test]
fn a_nan_spoils_its_row_alone() {
    let a = Array::new(DType::F32, &[f64::NAN, 1.0, 1.0, 1.0]);
    let b = Array::new(DType::F32, &[0.0, 1.0, 1.0, 1.0]);
    let out = Array::filled(DType::F32, 4);
    run(&Matmul {
        a: Matrix::dense(&a.span(), 2, 2).unwrap(),
        b: Matrix::dense(&b.span(), 2, 2).unwrap(),
        out: out.span(),
        accumulate: Accumulate::Overwrite,
    });
    assert_close(
        DType::F32,
        0.0,
        &out.values(),
        &[f64::NAN, f64::NAN, 1.0, 2.0],
    );
}

#[test]
fn a_view_outside_its_memory_is_refused() {
    let x = Array::new(DType::F32, &[0.0; 6]);
    assert!(Matrix::dense(&x.span(), 2, 3).is_ok());
    assert!(Matrix::dense(&x.span(), 3, 3).is_err());
    assert!(Matrix::new(&x.span(), [2, 2], [4, 2]).is_err());
    assert!(Matrix::new(&x.span(), [usize::MAX, 2], [usize::MAX, 2]).is_err());
    assert!(Matrix::new(&x.span(), [0, usize::MAX], [usize::MAX, 2]).is_ok());
}
