//! Kernels over the rows of a matrix, reductions, and the matrix product.
//!
//! Where sums are taken in another order than the twin's, in f64, results differ by one unit in the last
//! place of the type they are rounded to at most, plus what cancels: the absolute term.

use kitsune::DType;
use kitsune::launch::{self, Accumulate, Matrix};

use super::support::{Nearness, compare, numbers, with_specials};

/// Rows and columns.
const SHAPES: [(usize, usize); 9] = [
    (0, 3),
    (1, 1),
    (7, 5),
    (3, 2049),
    (4001, 3),
    (30, 700),
    (2, 32),
    (257, 33),
    (64, 10),
];

#[test]
fn biases() {
    for dtype in DType::FLOATS {
        for to in DType::FLOATS {
            for (rows, columns) in SHAPES {
                let lead = rows % 4;
                compare(
                    &format!("bias {dtype} {to} {rows} {columns}"),
                    Nearness::Bits,
                    |side| {
                        let x = side.array(dtype, lead, &with_specials(1, rows * columns, 9.0));
                        let bias = side.array(to, 1, &with_specials(2, columns, 9.0));
                        let out = side.rubbish(to, lead, x.len());
                        launch::add_bias(&side.stream, &x, &bias, &out).unwrap();
                        launch::add_bias(&side.stream, &x, &bias, &x).unwrap();
                        vec![out, x]
                    },
                );
            }
        }
    }
}

#[test]
fn sums_of_rows() {
    for dtype in DType::FLOATS {
        for (rows, columns) in SHAPES {
            for (numbers, what) in [
                (numbers as fn(_, _, _) -> _, "finite"),
                (with_specials, "any"),
            ] {
                // The specials of the narrow types are as large as 65519.
                let near = Nearness::Ulps(1.0, 1e-9);
                compare(
                    &format!("sum_rows {dtype} {rows} {columns} {what}"),
                    near,
                    |side| {
                        let x = side.array(dtype, rows % 3, &numbers(3, rows * columns, 4.0));
                        DType::FLOATS
                            .map(|to| {
                                let out = side.rubbish(to, 0, columns);
                                launch::sum_rows(&side.stream, &x, &out).unwrap();
                                out
                            })
                            .to_vec()
                    },
                );
            }
        }
    }
}

#[test]
fn totals() {
    for dtype in DType::FLOATS {
        for len in [0, 1, 2, 31, 1023, 1025, 100_003, 1_000_003] {
            compare(
                &format!("sum {dtype} {len}"),
                Nearness::Ulps(1.0, 1e-9),
                |side| {
                    let x = side.array(dtype, len % 5, &numbers(4, len, 10.0));
                    let out_type = launch::sum_dtype(dtype);
                    let (sum, mean) = (side.rubbish(out_type, 0, 1), side.rubbish(out_type, 0, 1));
                    launch::sum(&side.stream, &x, &sum).unwrap();
                    launch::mean(&side.stream, &x, &mean).unwrap();
                    vec![sum, mean]
                },
            );
        }
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for at in [0, 1, 500, 1023] {
                compare(&format!("sum {dtype} with {bad}"), Nearness::Bits, |side| {
                    let mut values = vec![1.0; 1024];
                    values[at] = bad;
                    let x = side.array(dtype, 0, &values);
                    let sum = side.rubbish(launch::sum_dtype(dtype), 0, 1);
                    launch::sum(&side.stream, &x, &sum).unwrap();
                    vec![sum]
                });
            }
        }
    }
}

#[test]
fn largest_elements() {
    let nan = f64::NAN;
    for dtype in DType::FLOATS {
        for (rows, columns) in SHAPES {
            compare(
                &format!("argmax {dtype} {rows} {columns}"),
                Nearness::Bits,
                |side| {
                    // Few different numbers, so that many are equal.
                    let values = with_specials(5, rows * columns, 3.0);
                    let values: Vec<f64> = values.iter().map(|value| value.round()).collect();
                    let x = side.array(dtype, rows % 2, &values);
                    let out = side.rubbish(DType::U32, 0, rows);
                    launch::argmax_rows(&side.stream, &x, &out).unwrap();
                    vec![out]
                },
            );
        }
        compare("argmax of NaN", Nearness::Bits, |side| {
            let mut values = vec![1.0; 300];
            (values[70], values[203], values[299]) = (nan, nan, f64::INFINITY);
            let x = side.array(dtype, 0, &values);
            let out = side.rubbish(DType::U32, 0, 3);
            launch::argmax_rows(&side.stream, &x, &out).unwrap();
            vec![out]
        });
    }
}

#[test]
fn cross_entropy() {
    for dtype in DType::FLOATS {
        let wide = launch::sum_dtype(dtype);
        for (number, (rows, columns)) in SHAPES.into_iter().enumerate() {
            // One label is no column.
            let label = |row: usize| {
                if row == 5 {
                    columns + 3
                } else {
                    row * 7 % columns
                }
            };
            let labels: Vec<f64> = (0..rows)
                .map(|row| f64::from(u32::try_from(label(row)).unwrap()))
                .collect();
            let grad_type = DType::FLOATS[number % DType::FLOATS.len()];
            // In f64 the order of the sum of a row shows in every quotient.
            let ulps = if dtype == DType::F64 { 32.0 } else { 2.0 };
            let near = Nearness::Ulps(ulps, 0.0);
            for numbers in [numbers as fn(_, _, _) -> _, with_specials] {
                compare(
                    &format!("cross entropy {dtype} {rows} {columns}"),
                    near,
                    |side| {
                        let logits = side.array(dtype, rows % 3, &numbers(6, rows * columns, 8.0));
                        let labels = side.array(DType::U32, 1, &labels);
                        let losses = side.rubbish(DType::F64, 0, rows);
                        let (loss, p) = (
                            side.rubbish(wide, 0, 1),
                            side.rubbish(wide, 1, logits.len()),
                        );
                        let seed = side.array(DType::F32, 0, &[1024.0]);
                        let grad = side.rubbish(grad_type, 0, logits.len());
                        launch::cross_entropy(&side.stream, &logits, &labels, &losses, &loss, &p)
                            .unwrap();
                        launch::cross_entropy_backward(&side.stream, &p, &labels, &seed, &grad)
                            .unwrap();
                        // The probabilities may take the place of the logits.
                        if wide == dtype {
                            let (stream, x) = (&side.stream, &logits);
                            launch::cross_entropy(stream, x, &labels, &losses, &loss, x).unwrap();
                        }
                        vec![loss, p, grad]
                    },
                );
            }
        }
    }
}

/// Rows that count for nothing: none, some, all, by a label that is a class or none.
#[test]
fn cross_entropy_with_ignored_rows() {
    for dtype in DType::FLOATS {
        let wide = launch::sum_dtype(dtype);
        for (number, (rows, columns)) in SHAPES.into_iter().enumerate() {
            let grad_type = DType::FLOATS[number % DType::FLOATS.len()];
            let ulps = if dtype == DType::F64 { 32.0 } else { 2.0 };
            let ignored = [(1, u32::MAX), (2, 0), (3, u32::MAX - 99), (usize::MAX, 7)];
            // All of them for small shapes, one in turn for large ones.
            let few = if rows * columns < 1000 { 4 } else { 1 };
            for (every, label) in ignored.into_iter().cycle().skip(number).take(few) {
                let labels = (0..rows).map(|row| match row % every {
                    0 => f64::from(label),
                    _ => (row * 7 % columns) as f64,
                });
                let labels: Vec<f64> = labels.collect();
                let what = format!("{dtype} {rows} {columns}, {label} in one of {every}");
                compare(&what, Nearness::Ulps(ulps, 0.0), |side| {
                    let stream = &side.stream;
                    let x = with_specials(6, rows * columns, 8.0);
                    let logits = side.array(dtype, rows % 3, &x);
                    let labels = side.array(DType::U32, 1, &labels);
                    let losses = side.rubbish(DType::F64, 1, rows);
                    let loss = side.rubbish(wide, 0, 1);
                    let p = side.rubbish(wide, 1, logits.len());
                    let seed = side.array(DType::F32, 0, &[1024.0]);
                    let grad = side.rubbish(grad_type, 0, logits.len());
                    let counted = side.rubbish(DType::F64, 0, 1);
                    let ignored = launch::Ignored { label, counted };
                    launch::cross_entropy_ignoring(
                        stream, &logits, &labels, &losses, &loss, &p, &ignored,
                    )
                    .unwrap();
                    launch::cross_entropy_ignoring_backward(
                        stream, &p, &labels, &seed, &grad, &ignored,
                    )
                    .unwrap();
                    vec![loss, counted, p, grad]
                });
            }
        }
    }
}

/// Probabilities of every type, the gradient of the same one or of another.
#[test]
fn cross_entropy_backward_of_any_probabilities() {
    for dtype in DType::FLOATS {
        for to in DType::FLOATS {
            for (rows, columns) in SHAPES {
                let what = format!("cross entropy backward {dtype} {to} {rows} {columns}");
                compare(&what, Nearness::Bits, |side| {
                    let p = side.array(dtype, rows % 3, &with_specials(12, rows * columns, 1.0));
                    let labels: Vec<f64> = (0..rows).map(|row| (row % columns) as f64).collect();
                    let labels = side.array(DType::U32, 1, &labels);
                    let seed = side.array(DType::F32, 0, &[3.0]);
                    let grad = side.rubbish(to, 1, p.len());
                    launch::cross_entropy_backward(&side.stream, &p, &labels, &seed, &grad)
                        .unwrap();
                    vec![grad]
                });
            }
        }
    }
}

#[test]
fn products_of_matrices() {
    let sizes = [
        (1, 1, 1),
        (3, 5, 7),
        (64, 16, 64),
        (65, 17, 130),
        (2, 1000, 3),
        (100, 0, 4),
    ];
    for (dtype, to) in [
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
        (DType::Bf16, DType::Bf16),
        (DType::Bf16, DType::F32),
        (DType::F32, DType::F32),
        (DType::F64, DType::F64),
    ] {
        for (m, k, n) in sizes {
            for (number, add) in [Accumulate::Overwrite, Accumulate::Add]
                .into_iter()
                .enumerate()
            {
                // The compute type rounds at each of k steps, in either order.
                #[expect(clippy::cast_precision_loss, reason = "sizes are small")]
                let absolute = launch::sum_dtype(dtype).epsilon() * 4.0 * (k as f64 + 1.0);
                let near = Nearness::Ulps(1.0, absolute);
                compare(
                    &format!("matmul {dtype} {to} {m} {k} {n} {add:?}"),
                    near,
                    |side| {
                        let a = side.array(dtype, number, &numbers(7, m * k, 1.0));
                        let b = side.array(dtype, 1, &numbers(8, k * n, 1.0));
                        let out = side.array(to, 0, &numbers(9, m * n, 1.0));
                        let left = Matrix::dense(&a, m, k).unwrap();
                        let turned = Matrix::dense(&b, n, k).unwrap().transposed();
                        let (stream, right) = (&side.stream, Matrix::dense(&b, k, n).unwrap());
                        launch::matmul(stream, &left, &right, &out, add).unwrap();
                        launch::matmul(stream, &left, &turned, &out, Accumulate::Add).unwrap();
                        vec![out]
                    },
                );
            }
        }
    }
}

/// Infinity and NaN stay in their row and column, also beside the ends of a tile.
#[test]
fn products_with_non_finite_elements() {
    for at in [0, 15, 16, 33] {
        for bad in [f64::INFINITY, f64::NAN] {
            compare(
                &format!("matmul with {bad} at {at}"),
                Nearness::Ulps(1.0, 1e-4),
                |side| {
                    let mut values = numbers(10, 3 * 34, 1.0);
                    values[34 + at] = bad;
                    let a = side.array(DType::F32, 0, &values);
                    let b = side.array(DType::F32, 0, &numbers(11, 34 * 70, 1.0));
                    let out = side.rubbish(DType::F32, 0, 3 * 70);
                    let (a, b) = (
                        Matrix::dense(&a, 3, 34).unwrap(),
                        Matrix::dense(&b, 34, 70).unwrap(),
                    );
                    launch::matmul(&side.stream, &a, &b, &out, Accumulate::Overwrite).unwrap();
                    vec![out]
                },
            );
        }
    }
}
