//! Checks loss and gradient against f64, and the inputs that make them NaN.

use super::*;
use crate::launch::testing::{Array, numbers, rounded, run};
use crate::launch::tolerance::assert_close;

/// Loss and probabilities.
fn forward(dtype: DType, logits: &[f64], labels: &[f64]) -> (f64, Vec<f64>) {
    let (x, labels_array) = (Array::new(dtype, logits), Array::new(DType::U32, labels));
    let losses = Array::filled(DType::F64, labels.len());
    let loss = Array::filled(sum_dtype(dtype), 1);
    let probabilities = Array::filled(sum_dtype(dtype), logits.len());
    run(&CrossEntropy {
        logits: x.span(),
        labels: labels_array.span(),
        losses: losses.span(),
        probabilities: probabilities.span(),
        columns: logits.len().checked_div(labels.len()).unwrap_or(0),
        ignore: None,
    });
    run(&Total::mean_of(&losses.span(), &loss.span()));
    (loss.values()[0], probabilities.values())
}

fn backward(dtype: DType, probabilities: &[f64], labels: &[f64], seed: f64) -> Vec<f64> {
    let columns = probabilities.len() / labels.len();
    let p = Array::new(sum_dtype(dtype), probabilities);
    let (labels, seed) = (
        Array::new(DType::U32, labels),
        Array::new(DType::F32, &[seed]),
    );
    let grad = Array::filled(dtype, probabilities.len());
    run(&Backward {
        probabilities: p.span(),
        labels: labels.span(),
        seed: seed.span(),
        grad_logits: grad.span(),
        columns,
        ignored: None,
    });
    grad.values()
}

fn labels_for(rows: usize, columns: usize) -> Vec<f64> {
    (0..rows)
        .map(|row| f64::from(u32::try_from(row * 7 % columns).unwrap()))
        .collect()
}

#[test]
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "labels and counts are small"
)]
fn loss_and_gradient_against_f64() {
    for dtype in DType::FLOATS {
        for (rows, columns) in [(1, 1), (3, 10), (1, 5000), (4001, 3), (64, 1000)] {
            let logits = rounded(dtype, &numbers(1, rows * columns, 8.0));
            let labels = labels_for(rows, columns);
            let (loss, p) = forward(dtype, &logits, &labels);
            let (mut expected_loss, mut expected_p) = (0.0, Vec::new());
            for (row, label) in logits.chunks(columns).zip(&labels) {
                let sum: f64 = row.iter().map(|x| x.exp()).sum();
                expected_loss += sum.ln() - row[*label as usize];
                expected_p.extend(row.iter().map(|x| x.exp() / sum));
            }
            expected_loss /= rows as f64;
            assert_close(sum_dtype(dtype), 1e-6, &[loss], &[expected_loss]);
            assert_close(sum_dtype(dtype), 2e-7, &p, &expected_p);

            let seed = 1024.0;
            let expected: Vec<_> = p
                .iter()
                .enumerate()
                .map(|(idx, p)| {
                    let chosen = idx % columns == labels[idx / columns] as usize;
                    (p - f64::from(u8::from(chosen))) * seed / rows as f64
                })
                .collect();
            // Below the normal range of f16 the spacing is 2^-24.
            assert_close(
                dtype,
                1.3e-7,
                &backward(dtype, &p, &labels, seed),
                &expected,
            );
        }
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let (loss, p) = forward(DType::F16, &[60_000.0, -60_000.0], &[1.0]);
    assert_eq!((loss, p), (120_000.0, vec![1.0, 0.0]));
}

#[test]
fn a_large_seed_overflows_f16_only() {
    let p = [0.25, 0.75];
    let grad = backward(DType::F16, &p, &[0.0], 131_072.0);
    assert_eq!(grad, [f64::NEG_INFINITY, f64::INFINITY]);
    assert_eq!(
        backward(DType::F32, &p, &[0.0], 131_072.0),
        [-98_304.0, 98_304.0]
    );
}

#[test]
fn a_label_out_of_range_gives_nan_in_its_row() {
    let (loss, p) = forward(DType::F32, &[0.0; 4], &[0.0, 2.0]);
    assert!(loss.is_nan());
    assert_eq!(p, [0.5; 4]);
    let grad = backward(DType::F32, &p, &[0.0, 2.0], 1.0);
    assert_close(DType::F32, 0.0, &grad, &[-0.25, 0.25, f64::NAN, f64::NAN]);
}

#[test]
fn non_finite_logits() {
    let infinite = [f64::INFINITY, f64::NAN];
    for bad in infinite {
        for row in [[bad, 1.0, 2.0], [1.0, bad, 2.0], [1.0, 2.0, bad]] {
            let (loss, p) = forward(DType::F32, &row, &[0.0]);
            assert!(loss.is_nan() && p.iter().any(|p| p.is_nan()), "{row:?}");
        }
    }
    assert!(
        forward(DType::F32, &[f64::NEG_INFINITY; 2], &[0.0])
            .0
            .is_nan()
    );
    // A masked class counts as absent, unless it is the label.
    let masked = [f64::NEG_INFINITY, 0.0, 0.0];
    assert_close(
        DType::F32,
        0.0,
        &[forward(DType::F32, &masked, &[1.0]).0],
        &[2f64.ln()],
    );
    assert_eq!(forward(DType::F32, &masked, &[0.0]).0, f64::INFINITY);
    assert!(forward(DType::F32, &[], &[]).0.is_nan());
}
