//! Ten million elements: every grid is at its largest, and threads, warps and blocks go on to further turns.

use kitsune::DType;
use kitsune::launch::{self, Activation, StridedCopy};

use super::support::{Nearness, compare, large, numbers, of_library};

const COLUMNS: usize = 101;

#[test]
fn ten_million_to_convert_and_to_scale() {
    for (from, to) in [(DType::F32, DType::F16), (DType::Bf16, DType::F64)] {
        compare(&format!("{from} {to}"), Nearness::Bits, |side| {
            let x = side.array(from, 1, &numbers(1, large(), 100.0));
            let factor = side.array(DType::F32, 0, &[1.0 / 3.0]);
            let [cast, scaled, sum, filled] =
                [0, 3, 1, 2].map(|lead| side.rubbish(to, lead, x.len()));
            launch::cast(&side.stream, &x, &cast).unwrap();
            launch::scale(&side.stream, &x, &factor, &scaled).unwrap();
            launch::mul(&side.stream, &x, &scaled, &sum).unwrap();
            launch::add_scaled(&side.stream, &x, 0.5, &sum).unwrap();
            launch::fill(&side.stream, &filled, -2.5).unwrap();
            vec![cast, scaled, sum, filled]
        });
    }
}

#[test]
fn ten_million_activations() {
    for dtype in [DType::F16, DType::F32] {
        compare(&format!("gelu {dtype}"), of_library([dtype; 2]), |side| {
            let x = side.array(dtype, 0, &numbers(2, large(), 5.0));
            let out = side.rubbish(dtype, 1, x.len());
            launch::activation(&side.stream, Activation::Gelu, &x, &out).unwrap();
            launch::activation_backward(&side.stream, Activation::Relu, &x, &out, &x).unwrap();
            vec![out, x]
        });
    }
}

#[test]
fn ten_million_to_sum_up() {
    for dtype in [DType::F16, DType::F64] {
        compare(
            &format!("sums {dtype}"),
            Nearness::Ulps(1.0, 1e-7),
            |side| {
                let rows = large() / COLUMNS;
                let x = side.array(dtype, 1, &numbers(3, rows * COLUMNS, 4.0));
                let [sum, mean] = [(); 2].map(|()| side.rubbish(launch::sum_dtype(dtype), 0, 1));
                let columns = side.rubbish(DType::F32, 0, COLUMNS);
                let best = side.rubbish(DType::U32, 0, rows);
                launch::sum(&side.stream, &x, &sum).unwrap();
                launch::mean(&side.stream, &x, &mean).unwrap();
                launch::sum_rows(&side.stream, &x, &columns).unwrap();
                launch::argmax_rows(&side.stream, &x, &best).unwrap();
                vec![sum, mean, columns, best]
            },
        );
    }
}

#[test]
fn ten_million_logits_with_a_bias() {
    let rows = large() / COLUMNS;
    compare("logits", Nearness::Ulps(2.0, 1e-9), |side| {
        let x = side.array(DType::F32, 0, &numbers(4, rows * COLUMNS, 6.0));
        let bias = side.array(DType::F32, 1, &numbers(5, COLUMNS, 1.0));
        let labels: Vec<f64> = (0..COLUMNS)
            .map(|at| at as f64)
            .cycle()
            .take(rows)
            .collect();
        let labels = side.array(DType::U32, 0, &labels);
        let [logits, p, grad] = [(); 3].map(|()| side.rubbish(DType::F32, 0, x.len()));
        let (losses, loss) = (
            side.rubbish(DType::F64, 0, rows),
            side.rubbish(DType::F32, 0, 1),
        );
        let seed = side.array(DType::F32, 0, &[128.0]);
        let stream = &side.stream;
        launch::add_bias(stream, &x, &bias, &logits).unwrap();
        launch::cross_entropy(stream, &logits, &labels, &losses, &loss, &p).unwrap();
        launch::cross_entropy_backward(stream, &p, &labels, &seed, &grad).unwrap();
        vec![logits, loss, p, grad]
    });
}

#[test]
fn ten_million_to_transpose() {
    let (rows, columns) = (large() / COLUMNS, COLUMNS);
    compare("transpose", Nearness::Bits, |side| {
        let src = side.array(DType::F16, 0, &numbers(6, rows * columns, 1.0));
        let dst = side.rubbish(DType::F32, 1, rows * columns);
        let copy = StridedCopy {
            shape: &[rows, columns],
            src: &src,
            src_strides: &[1, rows],
            dst: &dst,
            dst_strides: &[columns, 1],
        };
        launch::copy_strided(&side.stream, &copy).unwrap();
        vec![dst]
    });
}
