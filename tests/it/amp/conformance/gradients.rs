//! Cases 8 to 24: unscaling gradients, and finding what is not finite among them.

use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{Optimizer, OptimizerId, Parameter, Sgd, SgdConfig, StepInputs};
use kitsune::{Context, DType, Device, Error, HostConfig, Result, Tensor, f16, ops};

use crate::support::amp::oracle::{misuse, oracle};
use crate::support::amp::{context, flag, grad, ones, scaler, set_grad, sgd, tensor, value};

/// Weights of zeros with these gradients, and an optimizer for them.
fn weights(gradients: &[Tensor]) -> (Vec<Parameter>, Sgd) {
    let weight = |(index, gradient): (usize, &Tensor)| {
        let value = Tensor::zeros(gradient.context(), gradient.shape(), gradient.dtype()).unwrap();
        let weight = Parameter::new(format!("w{index}"), value).unwrap();
        weight.set_grad(gradient.clone()).unwrap();
        weight
    };
    let weights: Vec<_> = gradients.iter().enumerate().map(weight).collect();
    let optimizer = Sgd::new(weights.clone(), SgdConfig::default()).unwrap();
    (weights, optimizer)
}

/// Unscales by `scale`; gives the flag.
fn unscale(context: &Context, gradients: &[Tensor], scale: f64) -> f32 {
    let (_, optimizer) = weights(gradients);
    let mut scaler = scaler(context, scale);
    scaler.unscale(&optimizer).unwrap();
    flag(&scaler, &optimizer)
}

fn fours(context: &Context, dtype: DType) -> Tensor {
    Tensor::full(context, [20, 20], dtype, 4.0).unwrap()
}

/// A slice of five columns: elements with gaps between.
fn slice(context: &Context) -> Tensor {
    fours(context, DType::F32).narrow(1, 0, 5).unwrap()
}

fn put(gradient: &Tensor, row: usize, column: usize, value: f64) {
    let element = gradient
        .narrow(0, row, 1)
        .unwrap()
        .narrow(1, column, 1)
        .unwrap();
    element.fill(value).unwrap();
}

fn assert_all_one(gradients: &[Tensor]) {
    for gradient in gradients {
        let values = gradient.cast(DType::F32).unwrap().to_vec::<f32>().unwrap();
        assert!(values.iter().all(|value| *value == 1.0), "{values:?}");
    }
}

#[test]
fn case_08_unscale_dense() {
    let context = context();
    let gradients = [fours(&context, DType::F32), fours(&context, DType::F32)];
    assert_eq!(unscale(&context, &gradients, 4.0), 0.0);
    assert_all_one(&gradients);
}

#[test]
fn case_09_unscale_transposed() {
    let context = context();
    let gradients = [
        fours(&context, DType::F32),
        fours(&context, DType::F32).transpose(0, 1).unwrap(),
    ];
    assert_eq!(unscale(&context, &gradients, 4.0), 0.0);
    assert_all_one(&gradients);
}

#[test]
fn case_10_unscale_strided_slice() {
    let context = context();
    for gradients in [
        [fours(&context, DType::F32), slice(&context)],
        [slice(&context), fours(&context, DType::F32)],
        [slice(&context), slice(&context)],
    ] {
        assert_eq!(unscale(&context, &gradients, 4.0), 0.0);
        assert_all_one(&gradients);
    }
    // What lies between the rows of a slice is none of it.
    let whole = fours(&context, DType::F32);
    let part = [whole.narrow(1, 5, 5).unwrap()];
    put(&whole, 2, 4, f64::INFINITY);
    put(&whole, 2, 10, f64::NAN);
    assert_eq!(unscale(&context, &part, 4.0), 0.0);
    for (at, value) in whole.to_vec::<f32>().unwrap().into_iter().enumerate() {
        let expected = match (at / 20, at % 20) {
            (_, 5..10) => 1.0,
            (2, 4) => f32::INFINITY,
            (2, 10) => f32::NAN,
            _ => 4.0,
        };
        assert!(
            value == expected || value.is_nan() && expected.is_nan(),
            "{at}: {value}"
        );
    }
}

/// Puts `bad` into the first or second of dense and sliced gradients, in six ways.
fn find(bad: f64) {
    let context = context();
    let (dense, slice) = (|| fours(&context, DType::F32), || slice(&context));
    for (pair, victim) in [
        ([dense(), dense()], 0),
        ([dense(), dense()], 1),
        ([dense(), slice()], 0),
        ([dense(), slice()], 1),
        ([slice(), dense()], 0),
        ([slice(), slice()], 1),
    ] {
        put(&pair[victim], 2, 2, bad);
        assert_eq!(unscale(&context, &pair, 4.0), 1.0);
    }
}

#[test]
fn case_11_find_inf_each_position() {
    find(f64::INFINITY);
}

#[test]
fn case_12_find_nan() {
    find(f64::NAN);
}

#[test]
fn case_13_mixed_dtype_list() {
    let context = context();
    let gradients = [fours(&context, DType::F32), fours(&context, DType::F16)];
    assert_eq!(unscale(&context, &gradients, 4.0), 0.0);
    assert_all_one(&gradients);
}

/// Contexts on two devices.
fn two_devices() -> Vec<Context> {
    let devices = Device::hosts(HostConfig::default(), 2).unwrap();
    let context = |device: &Device| Context::new(device).unwrap();
    devices.iter().map(context).collect()
}

#[test]
fn case_14_mixed_device_list() {
    let contexts = two_devices();
    let weights: Vec<_> = contexts
        .iter()
        .map(|context| ones(context, "w", &[4f32]))
        .collect();
    let refused = Sgd::new(weights.clone(), SgdConfig::default());
    assert!(matches!(refused, Err(Error::InvalidArgument { .. })));
    let foreign = weights[0].set_grad(tensor(&contexts[1], &[4f32]));
    assert!(matches!(foreign, Err(Error::InvalidArgument { .. })));
    // Nor does the scaler of one device take the optimizer of another.
    let mut scaler = scaler(&contexts[0], 4.0);
    let refused = scaler.unscale(&sgd(&[&weights[1]], 1.0));
    assert!(
        matches!(refused, Err(Error::InvalidArgument { .. })),
        "{refused:?}"
    );
}

#[test]
fn case_15_perfect_storm() {
    let contexts = two_devices();
    let gradients = |context: &Context| {
        [
            fours(context, DType::F32),
            slice(context),
            fours(context, DType::F16),
            fours(context, DType::F16),
        ]
    };
    for victim in 0..9 {
        let lists: Vec<_> = contexts.iter().map(gradients).collect();
        if victim < 8 {
            put(&lists[victim / 4][victim % 4], 1, 3, f64::INFINITY);
        }
        let flags = contexts
            .iter()
            .zip(&lists)
            .map(|(context, list)| unscale(context, list, 4.0));
        let expected = if victim < 8 { 1.0 } else { 0.0 };
        assert_eq!(flags.sum::<f32>(), expected, "victim {victim}");
        if victim == 8 {
            lists.iter().for_each(|list| assert_all_one(list));
        }
    }
}

#[test]
fn case_16_unscale_f64() {
    let context = context();
    let gradients = [tensor(&context, &[1e300])];
    assert_eq!(unscale(&context, &gradients, 2.0), 0.0);
    assert_eq!(gradients[0].to_vec::<f64>().unwrap(), [5e299]);
}

#[test]
fn case_17_neg_inf_neg_zero() {
    let context = context();
    assert_eq!(
        unscale(
            &context,
            &[tensor(&context, &[4.0, f32::NEG_INFINITY])],
            4.0
        ),
        1.0
    );
    let zero = [tensor(&context, &[-0.0f32])];
    assert_eq!(unscale(&context, &zero, 4.0), 0.0);
    assert!(zero[0].to_vec::<f32>().unwrap()[0].is_sign_negative());
}

#[test]
fn case_18_flag_sticky() {
    let context = context();
    let weight = ones(&context, "w", &[1f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 2.0);
    scaler.unscale(&optimizer).unwrap();
    scaler.update().unwrap();
    scaler
        .found_inf(&optimizer)
        .unwrap()
        .copy_from_slice(&[1f32])
        .unwrap();
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(flag(&scaler, &optimizer), 1.0);
    assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
}

/// An optimizer of nothing.
struct Empty(OptimizerId);

impl Optimizer for Empty {
    fn id(&self) -> &OptimizerId {
        &self.0
    }
    fn parameters(&self) -> &[Parameter] {
        &[]
    }
    fn step(&mut self, _: &StepInputs) -> Result<()> {
        Ok(())
    }
}

#[test]
fn case_19_empty_list_empty_tensor() {
    let context = context();
    assert_eq!(unscale(&context, &[tensor::<f32>(&context, &[])], 2.0), 0.0);
    // It counts as a check, and leaves a flag that is set alone.
    let (_, empty) = weights(&[tensor::<f32>(&context, &[])]);
    let mut checked = scaler(&context, 2.0);
    checked.unscale(&empty).unwrap();
    checked.update().unwrap();
    let set = checked.found_inf(&empty).unwrap().copy_from_slice(&[1f32]);
    set.unwrap();
    checked.unscale(&empty).unwrap();
    assert_eq!(flag(&checked, &empty), 1.0);
    checked.update().unwrap();
    assert_eq!(checked.get_scale().unwrap(), 1.0);
    // PyTorch takes an empty list as clean; an optimizer without a gradient is an error there, too.
    assert_eq!(oracle()["unscale_emptylist"], "ok:None");
    let refused = scaler(&context, 2.0).unscale(&Empty(OptimizerId::new()));
    assert_eq!(
        misuse(refused),
        kitsune::error::ScalerMisuse::NothingChecked
    );
}

#[test]
fn case_20_f16_subnormal() {
    let context = context();
    let half = |exponent: i32| f16::from_f64(2f64.powi(exponent));
    let gradients = [tensor(&context, &[half(-8), half(-9)])];
    assert_eq!(unscale(&context, &gradients, 65536.0), 0.0);
    assert_eq!(
        gradients[0].to_vec::<f16>().unwrap(),
        [half(-24), f16::ZERO]
    );
}

/// A way to have gradients looked at.
type Look = fn(&mut GradScaler, &Sgd);

#[test]
fn case_21_inv_gt1_overflow() {
    // PyTorch looks before it multiplies, and steps with what became infinite.
    assert_eq!(
        oracle()["scale_lt1_unscale_overflow_undetected"],
        "ok:([-inf], 0.25)"
    );
    let context = context();
    let weight = ones(&context, "w", &[2e38f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 0.25);
    assert!(!scaler.step(&mut optimizer).unwrap().is_applied().unwrap());
    scaler.update().unwrap();
    assert_eq!(
        (value::<f32>(&weight), scaler.get_scale().unwrap()),
        (vec![1.0], 0.125)
    );
    // The same for each way to have it found.
    let ways: [(&str, Look); 3] = [
        ("unscale", |scaler, one| scaler.unscale(one).unwrap()),
        ("check", |scaler, one| scaler.check(one).unwrap()),
        ("clip", |scaler, one| {
            drop(scaler.clip_grad_norm(one, 1.0).unwrap())
        }),
    ];
    for (how, look) in ways {
        set_grad(&weight, &[2e38f32]);
        look(&mut scaler, &optimizer);
        assert_eq!(flag(&scaler, &optimizer), 1.0, "{how}");
        scaler.update_to(0.25).unwrap();
    }
}

#[test]
fn case_22_zero_scale() {
    assert_eq!(oracle()["zero_scale"], "ok:([nan], 0.0)");
    let context = context();
    let config = AmpConfig {
        init_scale: 0.0,
        ..AmpConfig::default()
    };
    let refused = GradScaler::new(&context, config).err();
    assert!(matches!(
        refused,
        Some(Error::InvalidConfig {
            key: "init_scale",
            ..
        })
    ));
    assert!(scaler(&context, 1.0).update_to(0.0).is_err());
}

#[test]
fn case_23_sparse_ok_inf_nan() {
    // There are no sparse gradients: what PyTorch keeps as indices and values is a gradient of few rows.
    let context = context();
    for (bad, expected) in [
        (None, 0.0),
        (Some(f64::INFINITY), 1.0),
        (Some(f64::NAN), 1.0),
    ] {
        let gradient = Tensor::zeros(&context, [16, 32], DType::F32).unwrap();
        for row in [3, 11] {
            gradient.narrow(0, row, 1).unwrap().fill(8.0).unwrap();
        }
        if let Some(bad) = bad {
            put(&gradient, 11, 31, bad);
        }
        let rows = [gradient];
        assert_eq!(unscale(&context, &rows, 4.0), expected);
        let values = rows[0].to_vec::<f32>().unwrap();
        assert_eq!(
            (values[0], values[3 * 32], values[11 * 32]),
            (0.0, 2.0, 2.0)
        );
    }
}

#[test]
fn case_24_sparse_f16_duplicates() {
    // Terms for the same row are summed where they are accumulated, so their overflow is seen.
    let context = context();
    let big = f16::from_f32(64_000.0);
    let weight = ones(&context, "w", &[f16::ZERO; 4]);
    weight.zero_grad();
    for _ in 0..2 {
        weight
            .accumulate_grad(tensor(&context, &[f16::ZERO, big, f16::ZERO, f16::ZERO]))
            .unwrap();
    }
    let optimizer = sgd(&[&weight], 1.0);
    let mut scaler = scaler(&context, 4.0);
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(flag(&scaler, &optimizer), 1.0);
    assert_eq!(grad::<f16>(&weight)[1], f16::INFINITY);
    scaler.update().unwrap();
    // So are the rows of a table that an index names twice.
    let table = Tensor::zeros(&context, [4, 1], DType::F16).unwrap();
    let ids = Tensor::from_slice(&context, [2], &[2u32, 2]).unwrap();
    let rows = Tensor::from_slice(&context, [2, 1], &[big, big]).unwrap();
    let by_table = ops::embedding_backward(&table, &ids, &rows).unwrap();
    assert_eq!(
        unscale(&context, &[by_table.duplicate().unwrap()], 4.0),
        1.0
    );
    let sums = by_table.to_vec::<f16>().unwrap();
    assert_eq!(sums, [f16::ZERO, f16::ZERO, f16::INFINITY, f16::ZERO]);
    // One alone is finite.
    set_grad(&weight, &[f16::ZERO, big, f16::ZERO, f16::ZERO]);
    scaler.unscale(&optimizer).unwrap();
    assert_eq!(flag(&scaler, &optimizer), 0.0);
}
