//! Cross entropy with rows that count for nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use crate::support::amp::{context, scaler};
use kitsune::ops::autocast::{CastPolicy, OpLists};
use kitsune::ops::{self, Loss, softmax_cross_entropy, softmax_cross_entropy_ignoring};
use kitsune::{Context, DType, Error, Tensor};

const IGNORE: u32 = -100i32 as u32;

/// Logits of a type, `rows` by `columns`.
fn logits(context: &Context, dtype: DType, rows: usize, columns: usize) -> Tensor {
    let values: Vec<f64> = (0..rows * columns)
        .map(|at| f64::from(u32::try_from(at * 37 % 101).unwrap()) / 16.0 - 3.0)
        .collect();
    let wide = Tensor::from_slice(context, [rows, columns], &values).unwrap();
    wide.cast(dtype).unwrap()
}

fn labels(context: &Context, labels: &[u32]) -> Tensor {
    Tensor::from_slice(context, [labels.len()], labels).unwrap()
}

fn wide(tensor: &Tensor) -> Vec<f64> {
    tensor.cast(DType::F64).unwrap().to_vec().unwrap()
}

/// The loss and its gradient.
fn results(loss: &Loss) -> (f64, Vec<f64>) {
    (wide(loss.value())[0], wide(&loss.backward().unwrap()))
}

/// The rows of `x` whose number is in `rows`.
fn rows_of(x: &Tensor, rows: &[usize]) -> Tensor {
    let columns = x.shape()[1];
    let values = wide(x);
    let kept: Vec<f64> = rows
        .iter()
        .flat_map(|row| values[row * columns..][..columns].to_vec())
        .collect();
    let kept = Tensor::from_slice(x.context(), [rows.len(), columns], &kept).unwrap();
    kept.cast(x.dtype()).unwrap()
}

#[test]
fn the_rows_that_count_give_the_loss_of_a_batch_of_their_own() {
    let context = context();
    for dtype in DType::FLOATS {
        for (rows, columns) in [(2, 1), (7, 3), (33, 10), (3000, 4), (5, 700)] {
            for ignore in [IGNORE, 0] {
                let x = logits(&context, dtype, rows, columns);
                // Class 0 is ignored, or a label that is no class stands at every third row.
                let all: Vec<u32> = (0..rows)
                    .map(|row| match row % 3 {
                        1 => ignore,
                        _ => u32::try_from(row % columns).unwrap(),
                    })
                    .collect();
                let counted: Vec<usize> = (0..rows).filter(|row| all[*row] != ignore).collect();
                let loss =
                    softmax_cross_entropy_ignoring(&x, &labels(&context, &all), ignore).unwrap();
                let (value, gradient) = results(&loss);
                let what = format!("{dtype} {rows}x{columns}, {ignore}");
                if counted.is_empty() {
                    assert_eq!(
                        (value, gradient),
                        (0.0, vec![0.0; rows * columns]),
                        "{what}"
                    );
                    continue;
                }
                let own: Vec<u32> = counted.iter().map(|row| all[*row]).collect();
                let alone =
                    softmax_cross_entropy(&rows_of(&x, &counted), &labels(&context, &own)).unwrap();
                let (right, of_alone) = results(&alone);
                assert!(
                    (value - right).abs() <= 1e-6 * right.abs(),
                    "{what}: {value}, {right}"
                );
                let mut of_alone = of_alone.chunks(columns);
                for (row, gradient) in gradient.chunks(columns).enumerate() {
                    if all[row] == ignore {
                        assert!(
                            gradient.iter().all(|one| one.to_bits() == 0),
                            "{what}, row {row}"
                        );
                    } else {
                        assert_eq!(gradient, of_alone.next().unwrap(), "{what}, row {row}");
                    }
                }
            }
        }
    }
}

#[test]
fn with_nothing_to_ignore_nothing_changes() {
    let context = context();
    for dtype in DType::FLOATS {
        for rows in [1, 2, 1023, 5001] {
            let x = logits(&context, dtype, rows, 5);
            // A label that is no class makes its own row NaN, as ever.
            for bad in [false, true] {
                let mut own: Vec<u32> = (0..5).cycle().take(rows).collect();
                if bad {
                    own[rows - 1] = 5;
                }
                let own = labels(&context, &own);
                let (value, gradient) =
                    results(&softmax_cross_entropy_ignoring(&x, &own, IGNORE).unwrap());
                let (right, expected) = results(&softmax_cross_entropy(&x, &own).unwrap());
                let same = |a: &f64, b: &f64| a == b || a.is_nan() && b.is_nan();
                assert!(same(&value, &right), "{dtype} {rows}: {value}, {right}");
                assert_eq!(value.is_nan(), bad);
                assert!(
                    gradient.iter().zip(&expected).all(|(a, b)| same(a, b)),
                    "{dtype} {rows}"
                );
                assert!(
                    gradient
                        .iter()
                        .take(5 * (rows - 1))
                        .all(|one| one.is_finite())
                );
            }
        }
    }
}

#[test]
fn what_is_ignored_does_not_show_whatever_it_is() {
    let context = context();
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for dtype in DType::FLOATS {
            let values = [[bad, 0.0, 1.0], [0.0, 1.0, 2.0], [bad; 3]].concat();
            let x = Tensor::from_slice(&context, [3, 3], &values).unwrap();
            let x = x.cast(dtype).unwrap();
            let own = labels(&context, &[IGNORE, 2, IGNORE]);
            let loss = softmax_cross_entropy_ignoring(&x, &own, IGNORE).unwrap();
            let (value, gradient) = results(&loss);
            let right = (1.0 + (-1f64).exp() + (-2f64).exp()).ln();
            assert!((value - right).abs() < 1e-6, "{dtype} {bad}: {value}");
            assert_eq!(gradient[..3], [0.0; 3], "{dtype} {bad}");
            assert_eq!(gradient[6..], [0.0; 3], "{dtype} {bad}");
            assert!(
                gradient[3..6]
                    .iter()
                    .all(|one| one.is_finite() && *one != 0.0)
            );
            // Neither does a seed that is not finite.
            let seed = Tensor::full(&context, [], DType::F32, f64::INFINITY).unwrap();
            let gradient = wide(&loss.scaled_by(&seed).unwrap().backward().unwrap());
            assert_eq!(gradient[..3], [0.0; 3], "{dtype} {bad}");
            assert!(gradient[3..6].iter().all(|one| one.is_infinite()));
            // Nothing but such rows.
            let own = labels(&context, &[IGNORE; 3]);
            let loss = softmax_cross_entropy_ignoring(&x, &own, IGNORE).unwrap();
            for loss in [&loss, &scaler(&context, 65536.0).scale(&loss).unwrap()] {
                assert_eq!(results(loss), (0.0, vec![0.0; 9]), "{dtype} {bad}");
            }
        }
    }
}

#[test]
fn a_scaled_loss_has_a_scaled_gradient() {
    let context = context();
    let x = logits(&context, DType::F16, 4, 3);
    let own = labels(&context, &[1, IGNORE, 2, IGNORE]);
    let loss = softmax_cross_entropy_ignoring(&x, &own, IGNORE).unwrap();
    let scaled = scaler(&context, 1024.0).scale(&loss).unwrap();
    let ((value, gradient), (large, scaled)) = (results(&loss), results(&scaled));
    assert!((large / value - 1024.0).abs() < 1e-3);
    for (one, scaled) in gradient.iter().zip(scaled) {
        assert!((scaled - 1024.0 * one).abs() <= 1e-3 * scaled.abs() + 1e-7 * 1024.0);
    }
}

#[test]
fn no_rows_and_one_class() {
    let context = context();
    let empty = Tensor::zeros(&context, [0, 4], DType::F32).unwrap();
    let loss = softmax_cross_entropy_ignoring(&empty, &labels(&context, &[]), IGNORE).unwrap();
    assert_eq!(results(&loss), (0.0, vec![]));
    let one = logits(&context, DType::Bf16, 2, 1);
    let loss = softmax_cross_entropy_ignoring(&one, &labels(&context, &[0, 7]), 7).unwrap();
    assert_eq!(results(&loss), (0.0, vec![0.0; 2]));
}

#[test]
fn logits_and_labels_may_be_parts_of_others() {
    let context = context();
    let x = logits(&context, DType::F32, 3, 6);
    let all = labels(&context, &[9, 9, 9, 0, IGNORE, 2, 1, 0, 1, 9]);
    let own = all.narrow(0, 3, 6).unwrap();
    let x = x.transpose(0, 1).unwrap();
    let (value, gradient) = results(&softmax_cross_entropy_ignoring(&x, &own, IGNORE).unwrap());
    let plain = (
        x.contiguous().unwrap(),
        labels(&context, &[0, IGNORE, 2, 1, 0, 1]),
    );
    let right = results(&softmax_cross_entropy_ignoring(&plain.0, &plain.1, IGNORE).unwrap());
    assert_eq!((value, gradient), right);
    assert!(right.0 > 0.0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let context = context();
    let x = Tensor::zeros(&context, [2, 3], DType::F32).unwrap();
    let own = labels(&context, &[0, 1]);
    let entropy = |x: &Tensor, own: &Tensor| softmax_cross_entropy_ignoring(x, own, 1).err();
    let argument = |error: Option<Error>| matches!(error, Some(Error::InvalidArgument { .. }));
    assert!(argument(entropy(&x, &labels(&context, &[0]))));
    assert!(argument(entropy(&x, &x.narrow(1, 0, 1).unwrap())));
    assert!(argument(entropy(
        &Tensor::zeros(&context, [2, 0], DType::F32).unwrap(),
        &own
    )));
    assert!(argument(entropy(
        &x,
        &Tensor::zeros(&context, [2], DType::F32).unwrap()
    )));
    let integers = Tensor::zeros(&context, [2, 3], DType::U32).unwrap();
    assert!(matches!(
        entropy(&integers, &own),
        Some(Error::UnsupportedDtype {
            op: "softmax_cross_entropy_ignoring",
            ..
        })
    ));
    let elsewhere = Context::with_pool(context.pool()).unwrap();
    assert!(argument(entropy(&x, &own.copy_to(&elsewhere).unwrap())));
}

#[test]
fn autocast_lists_it_with_the_losses() {
    for lists in [OpLists::cuda(), OpLists::cpu()] {
        for op in ["softmax_cross_entropy", "softmax_cross_entropy_ignoring"] {
            assert_eq!(lists.policy(op), CastPolicy::Single);
        }
    }
    let context = context();
    let _scope = ops::autocast::autocast(true, DType::F16);
    let x = logits(&context, DType::F16, 2, 3);
    let loss = softmax_cross_entropy_ignoring(&x, &labels(&context, &[1, 0]), 0).unwrap();
    assert_eq!(loss.value().dtype(), DType::F32);
    assert_eq!(loss.backward().unwrap().dtype(), DType::F16);
}
