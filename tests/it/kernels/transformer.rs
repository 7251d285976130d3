//! The kernels of a transformer: softmax of attention, normalization, rows of a table.
//!
//! Sums are taken in f64 in another order than the twins', and exponentials of f64 are the device's own:
//! results are a few units in the last place off at most, plus what cancels.

use kitsune::DType;
use kitsune::launch::{self, LayerNorm, LayerNormBackward};

use super::support::{Nearness, compare, numbers, on_each};

const NEAR: Nearness = Nearness::Ulps(4.0, 1e-5);

/// Sequences and their length.
const SQUARES: [(usize, usize); 5] = [(0, 3), (2, 1), (3, 7), (1, 33), (2, 70)];

/// Pairs of types that are equal, and that differ.
const TYPES: [(DType, DType); 6] = [
    (DType::F16, DType::F16),
    (DType::Bf16, DType::Bf16),
    (DType::F32, DType::F32),
    (DType::F64, DType::F64),
    (DType::F32, DType::F16),
    (DType::F64, DType::F32),
];

#[test]
fn attention() {
    for (dtype, to) in TYPES {
        for (count, length) in SQUARES {
            let len = count * length * length;
            let what = format!("attention {dtype} {to} {count} {length}");
            compare(&what, NEAR, |side| {
                let scores = side.array(dtype, 1, &numbers(1, len, 4.0));
                let weights = side.rubbish(to, 0, len);
                launch::causal_softmax(&side.stream, &scores, &weights, length, 0.3).unwrap();
                let grad = side.array(dtype, 0, &numbers(2, len, 1.0));
                let out = side.rubbish(to, 3, len);
                launch::causal_softmax_backward(&side.stream, &weights, &grad, &out, length, 0.3)
                    .unwrap();
                vec![weights, out]
            });
        }
    }
}

#[test]
fn what_a_row_does_not_see_stays_out() {
    for bad in [f64::NAN, f64::INFINITY] {
        compare("attention, hidden", NEAR, |side| {
            let mut values = numbers(1, 25, 2.0);
            values[7] = bad;
            values[16] = bad;
            let scores = side.array(DType::F32, 0, &values);
            launch::causal_softmax(&side.stream, &scores, &scores, 5, 1.0).unwrap();
            vec![scores]
        });
    }
}

#[test]
fn normalization() {
    for (dtype, to) in TYPES {
        for (rows, columns) in [(0, 3), (1, 1), (5, 7), (9, 64), (3, 700)] {
            let what = format!("layer_norm {dtype} {to} {rows} {columns}");
            compare(&what, NEAR, |side| {
                let len = rows * columns;
                let x = side.array(dtype, 1, &numbers(1, len, 3.0));
                let weight = side.array(to, 0, &numbers(2, columns, 1.0));
                let bias = side.array(to, 3, &numbers(3, columns, 1.0));
                let wide = launch::sum_dtype(dtype);
                let (out, stats) = (side.rubbish(to, 1, len), side.rubbish(wide, 0, 2 * rows));
                let operands = LayerNorm {
                    x: &x,
                    weight: &weight,
                    bias: &bias,
                    out: &out,
                    stats: &stats,
                    epsilon: 1e-3,
                };
                launch::layer_norm(&side.stream, &operands).unwrap();
                let grad_out = side.array(to, 0, &numbers(4, len, 1.0));
                let mut outputs = vec![out, stats];
                // All operands of one type, or the terms of a sum in that of the sum.
                for terms in [dtype, wide] {
                    let (grad_in, terms) =
                        (side.rubbish(dtype, 1, len), side.rubbish(terms, 0, len));
                    let operands = LayerNormBackward {
                        x: &x,
                        weight: &weight,
                        stats: &stats,
                        grad_out: &grad_out,
                        grad_in: &grad_in,
                        grad_normalized: &terms,
                    };
                    launch::layer_norm_backward(&side.stream, &operands).unwrap();
                    outputs.extend([grad_in, terms]);
                }
                outputs
            });
        }
    }
}

/// One element that is not finite spoils its own row of every result, and no other, wherever in the row it is.
#[test]
fn one_element_that_is_not_finite_spoils_its_row_alone() {
    const ROWS: usize = 9;
    const COLUMNS: usize = 9;
    for dtype in DType::FLOATS {
        for bad in [f64::NAN, f64::INFINITY] {
            for (row, column) in [(0, 0), (3, 1), (8, 7), (8, 8)] {
                let mut values = numbers(5, ROWS * COLUMNS, 2.0);
                values[row * COLUMNS + column] = bad;
                let outputs = on_each(|side| {
                    let x = side.array(dtype, 1, &values);
                    let ones = side.array(dtype, 0, &[1.0; COLUMNS]);
                    let wide = launch::sum_dtype(dtype);
                    let [out, grad_in, terms, weights, picked] =
                        [(); 5].map(|()| side.rubbish(dtype, 0, x.len()));
                    let stats = side.rubbish(wide, 0, 2 * ROWS);
                    let forward = LayerNorm {
                        x: &x,
                        weight: &ones,
                        bias: &ones,
                        out: &out,
                        stats: &stats,
                        epsilon: 1e-3,
                    };
                    launch::layer_norm(&side.stream, &forward).unwrap();
                    let finite = side.array(dtype, 0, &numbers(6, x.len(), 1.0));
                    let backward = LayerNormBackward {
                        x: &x,
                        weight: &ones,
                        stats: &stats,
                        grad_out: &finite,
                        grad_in: &grad_in,
                        grad_normalized: &terms,
                    };
                    launch::layer_norm_backward(&side.stream, &backward).unwrap();
                    launch::causal_softmax(&side.stream, &x, &weights, COLUMNS, 1.0).unwrap();
                    let ids: Vec<f64> = (0..9).map(f64::from).collect();
                    let ids = side.array(DType::U32, 0, &ids);
                    launch::embedding(&side.stream, &x, &ids, &picked, COLUMNS).unwrap();
                    let grad = side.rubbish(dtype, 0, x.len());
                    launch::embedding_backward(&side.stream, &x, &ids, &grad, COLUMNS).unwrap();
                    vec![out, grad_in, terms, weights, picked, grad]
                });
                for (side, outputs) in outputs.iter().enumerate() {
                    for (number, output) in outputs.iter().enumerate() {
                        let what = format!("{dtype} {bad} at {row} {column}: {number} of {side}");
                        let is_bad = |at: usize| !output[at].is_finite();
                        let elsewhere = |at: &usize| at / COLUMNS != row && is_bad(*at);
                        assert_eq!((0..output.len()).find(elsewhere), None, "{what}");
                        // A row sees what stands up to its own place.
                        let shows = number != 3 || column <= row;
                        let in_row = (row * COLUMNS..(row + 1) * COLUMNS).any(is_bad);
                        assert_eq!(in_row, shows, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn rows_of_a_table() {
    for (dtype, to) in TYPES {
        for (picked, columns) in [(0, 3), (1, 1), (6, 5), (40, 70)] {
            let what = format!("embedding {dtype} {to} {picked} {columns}");
            compare(&what, Nearness::Bits, |side| {
                let table = side.array(dtype, 1, &numbers(1, 9 * columns, 3.0));
                // Some numbers are no rows.
                let ids: Vec<f64> = (0..picked).map(|row| f64::from(row * 7 % 11)).collect();
                let ids = side.array(DType::U32, 0, &ids);
                let len = ids.len() * columns;
                let out = side.rubbish(dtype, 0, len);
                launch::embedding(&side.stream, &table, &ids, &out, columns).unwrap();
                let grad_out = side.array(dtype, 3, &numbers(2, len, 1.0));
                let grad = side.rubbish(to, 1, 9 * columns);
                launch::embedding_backward(&side.stream, &grad_out, &ids, &grad, columns).unwrap();
                vec![out, grad]
            });
        }
    }
}
