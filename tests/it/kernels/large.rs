//! Ten million elements: every grid is at its largest, and threads, warps and blocks go on to further turns.

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::launch::{
    self, Accumulate, Activation, LayerNorm, LayerNormBackward, Matrix, StridedCopy,
};
use kitsune::optim::{
    AdamW, AdamWConfig, MasterWeights, Moments, Optimizer, Parameter, Sgd, SgdConfig,
};
use kitsune::{Context, DType, Tensor};

use super::support::{Nearness, compare, large, numbers, of_library};
use super::tables::{Seen, assert_same, on_both, steps, tensor, ulps_of_adam};

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

#[test]
fn ten_million_from_8_bits_and_their_largest() {
    compare("8 bits", Nearness::Bits, |side| {
        let x = side.array(DType::F8E4M3, 1, &numbers(7, large(), 400.0));
        let inverse = side.array(DType::F32, 0, &[1.0 / 3.0]);
        let y = side.rubbish(DType::Bf16, 1, x.len());
        let amax = side.array(DType::F32, 0, &[0.0]);
        launch::dequantize(&side.stream, &x, &inverse, &y).unwrap();
        launch::amax(&side.stream, &y, &amax).unwrap();
        vec![y, amax]
    });
}

#[test]
fn ten_million_in_a_product() {
    let columns = large() / COLUMNS;
    // Each of so many steps rounds, in either order.
    let near = Nearness::Ulps(1.0, 1e-4);
    compare("product", near, |side| {
        let a = side.array(DType::F32, 0, &numbers(8, COLUMNS * columns, 0.01));
        let b = side.array(DType::F32, 0, &numbers(9, 2 * columns, 0.01));
        let out = side.rubbish(DType::F32, 0, COLUMNS * 2);
        let left = Matrix::dense(&a, COLUMNS, columns).unwrap();
        let right = Matrix::dense(&b, columns, 2).unwrap();
        launch::matmul(&side.stream, &left, &right, &out, Accumulate::Overwrite).unwrap();
        vec![out]
    });
}

#[test]
fn ten_million_of_a_transformer() {
    const LENGTH: usize = 64;
    compare("transformer", Nearness::Ulps(4.0, 1e-5), |side| {
        let rows = large() / LENGTH / LENGTH * LENGTH;
        let x = side.array(DType::F16, 0, &numbers(10, rows * LENGTH, 3.0));
        let [ones, bias] = [1, 2].map(|seed| side.array(DType::F16, 0, &numbers(seed, 64, 1.0)));
        let [out, weights, picked] = [(); 3].map(|()| side.rubbish(DType::F16, 0, x.len()));
        let stats = side.rubbish(DType::F32, 0, 2 * rows);
        let operands = LayerNorm {
            x: &x,
            weight: &ones,
            bias: &bias,
            out: &out,
            stats: &stats,
            epsilon: 1e-3,
        };
        launch::layer_norm(&side.stream, &operands).unwrap();
        launch::causal_softmax(&side.stream, &x, &weights, LENGTH, 0.5).unwrap();
        let ids: Vec<f64> = (0..rows).map(|row| (row * 7 % 1000) as f64).collect();
        let ids = side.array(DType::U32, 0, &ids);
        launch::embedding(&side.stream, &x, &ids, &picked, LENGTH).unwrap();
        vec![out, weights, picked]
    });
}

#[test]
fn ten_million_of_a_transformer_on_the_way_back() {
    const LENGTH: usize = 64;
    const TABLE: usize = 100;
    compare("transformer, backward", Nearness::Ulps(4.0, 1e-4), |side| {
        let rows = large() / LENGTH / LENGTH * LENGTH;
        let [x, grad, ones] = [(13, rows), (14, rows), (15, 1)]
            .map(|(seed, rows)| side.array(DType::F32, 0, &numbers(seed, rows * LENGTH, 1.0)));
        let [out, back, terms, weights, scores] =
            [(); 5].map(|()| side.rubbish(DType::F32, 0, x.len()));
        let stats = side.rubbish(DType::F32, 0, 2 * rows);
        let stream = &side.stream;
        let forward = LayerNorm {
            x: &x,
            weight: &ones,
            bias: &ones,
            out: &out,
            stats: &stats,
            epsilon: 1e-3,
        };
        launch::layer_norm(stream, &forward).unwrap();
        let backward = LayerNormBackward {
            x: &x,
            weight: &ones,
            stats: &stats,
            grad_out: &grad,
            grad_in: &back,
            grad_normalized: &terms,
        };
        launch::layer_norm_backward(stream, &backward).unwrap();
        launch::causal_softmax(stream, &x, &weights, LENGTH, 0.5).unwrap();
        launch::causal_softmax_backward(stream, &weights, &grad, &scores, LENGTH, 0.5).unwrap();
        let ids: Vec<f64> = (0..rows).map(|row| (row * 7 % TABLE) as f64).collect();
        let ids = side.array(DType::U32, 0, &ids);
        let table = side.rubbish(DType::F32, 0, TABLE * LENGTH);
        launch::embedding_backward(stream, &grad, &ids, &table, LENGTH).unwrap();
        launch::activation_backward(stream, Activation::Gelu, &x, &grad, &out).unwrap();
        vec![back, terms, scores, table, out]
    });
}

/// Optimizers of every way to keep state, beside checks, unscaling and clipping.
fn ten_million_weights<O: Optimizer>(
    dtypes: &[DType],
    ulps: f64,
    make: impl Fn(Vec<Parameter>) -> O,
) {
    let both = on_both(|context| {
        let weight = |dtype: &DType| {
            let value = tensor(context, *dtype, &numbers(1, large(), 1.0));
            Parameter::new(format!("{dtype}"), value).unwrap()
        };
        let weights: Vec<_> = dtypes.iter().map(weight).collect();
        steps(context, &weights, make(weights.clone()))
    });
    assert_same("ten million", &both, 0.0, ulps);
}

#[test]
fn ten_million_weights_of_adamw() {
    ten_million_weights(&[DType::F32, DType::F16], ulps_of_adam(), |weights| {
        AdamW::new(weights, AdamWConfig::default()).unwrap()
    });
}

#[test]
fn ten_million_weights_of_narrow_adamw() {
    ten_million_weights(&[DType::Bf16], ulps_of_adam(), |weights| {
        let config = AdamWConfig {
            master_weights: MasterWeights::Split,
            moments: Moments::Bf16,
            amsgrad: true,
            ..AdamWConfig::default()
        };
        AdamW::new(weights, config).unwrap()
    });
}

#[test]
fn ten_million_weights_of_sgd() {
    ten_million_weights(&[DType::Bf16], 0.0, |weights| {
        let config = SgdConfig {
            momentum: 0.9,
            master_weights: MasterWeights::Split,
            ..SgdConfig::default()
        };
        Sgd::new(weights, config).unwrap()
    });
}

#[test]
fn ten_million_in_a_sum_that_is_checked_where_it_is_made() {
    let both = on_both(|context: &Context| {
        let first = tensor(context, DType::F32, &numbers(11, large(), 1.0));
        let weight = Tensor::zeros(context, [large()], DType::F32).unwrap();
        let weight = Parameter::new("w", weight).unwrap();
        let mut scaler = GradScaler::new(context, AmpConfig::bf16()).unwrap();
        scaler.accumulate(&weight, first).unwrap();
        let mut terms = numbers(12, large(), 1.0);
        let len = terms.len();
        (terms[len / 2], terms[len - 1]) = (f64::NAN, f64::INFINITY);
        let terms = tensor(context, DType::Bf16, &terms);
        scaler.accumulate(&weight, terms).unwrap();
        let mut sgd = Sgd::new(vec![weight.clone()], SgdConfig::default()).unwrap();
        assert!(!scaler.step(&mut sgd).unwrap().is_applied().unwrap());
        scaler.update().unwrap();
        let report = &scaler.stats().unwrap().overflows[0].tensors[0];
        let counts = [report.inf_count, report.nan_count, report.first_index];
        assert_eq!(counts, [1, 1, len as u64 / 2]);
        vec![Seen::of(&weight.grad().unwrap())]
    });
    assert_same("produced", &both, 0.0, 0.0);
}
