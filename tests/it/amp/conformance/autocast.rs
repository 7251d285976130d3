//! Cases 71 to 74: autocast, and the documents' examples.

use std::sync::Arc;

use kitsune::amp::{AmpConfig, GradScaler, autocast};
use kitsune::driver::fault::FaultDriver;
use kitsune::ops::autocast::{Autocast, autocast_dtype, autocast_state};
use kitsune::optim::{Optimizer, Parameter};
use kitsune::{Context, DType, Device, HostConfig, Tensor, f16, ops};

use super::shaped;
use crate::support::amp::{context, ones, sgd, tensor};
use crate::support::device::device;

#[test]
fn case_71_autocast_types_nesting_unwind_threads() {
    let context = context();
    let x = shaped(&context, &[2, 2], &[1.0; 4]);
    let wide = Tensor::full(&context, [2, 2], DType::F64, 1.0).unwrap();
    {
        let _outer = autocast(true, DType::F16);
        assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F16);
        assert_eq!(
            ops::sum(&x.cast(DType::F16).unwrap()).unwrap().dtype(),
            DType::F32
        );
        assert_eq!(
            ops::matmul(&wide, &wide).unwrap().dtype(),
            DType::F64,
            "f64 is left alone"
        );
        assert!(ops::matmul(&x, &wide).is_err());
        {
            let _inner = autocast(true, DType::Bf16);
            assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::Bf16);
            let _off = autocast(false, DType::F16);
            assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F32);
        }
        assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F16);
        let unwound = std::panic::catch_unwind(|| {
            let _scope = autocast(true, DType::Bf16);
            panic!("in a scope");
        });
        assert!(unwound.is_err());
        assert_eq!(
            autocast_dtype("matmul"),
            Some(DType::F16),
            "the unwound scope is gone"
        );
        let other = std::thread::spawn(|| autocast_state().is_enabled()).join();
        assert!(!other.unwrap(), "a new thread has no scope");
    }
    assert_eq!(ops::matmul(&x, &x).unwrap().dtype(), DType::F32);
    // Gradients of f32 weights are f32, whatever the product ran in.
    let scope = autocast(true, DType::F16);
    let layer = ops::linear(&x, &x, None).unwrap();
    drop(scope);
    assert_eq!(layer.output().dtype(), DType::F16);
    let gradients = layer.backward(layer.output()).unwrap();
    assert_eq!(gradients.weight.dtype(), DType::F32);
}

/// Kernels that three products with `weight` take under this scope.
fn launches(faults: &FaultDriver, x: &Tensor, weight: &Tensor, scope: Autocast) -> u64 {
    let _scope = scope.enter();
    faults.reset_calls();
    for _ in 0..3 {
        ops::matmul(x, weight).unwrap();
    }
    faults.calls("launch")
}

#[test]
fn case_72_autocast_cache() {
    let device = device(HostConfig::default());
    let faults = Arc::new(FaultDriver::new(device.driver().clone()));
    let context = Context::new(&Device::from_driver(faults.clone())).unwrap();
    let leaf = Parameter::new("w", shaped(&context, &[2, 2], &[1.0; 4])).unwrap();
    let other = shaped(&context, &[2, 2], &[1.0; 4]);
    let half = other.cast(DType::F16).unwrap();
    let scope = || Autocast::new(DType::F16);
    let count = |weight: &Tensor, scope| launches(&faults, &half, weight, scope);
    let without_casts = count(&half, scope());
    assert_eq!(count(leaf.value(), scope()), without_casts + 1);
    let uncached = scope().caches_weights(false);
    assert_eq!(count(leaf.value(), uncached), without_casts + 3);
    assert_eq!(count(&other, scope()), without_casts + 3, "not a parameter");

    // PyTorch keeps a cast until the scope ends, even of a weight that was written since. Ours goes with the
    // weight's version.
    let _scope = scope().enter();
    let product = || {
        ops::matmul(&half, leaf.value())
            .unwrap()
            .to_vec::<f16>()
            .unwrap()[0]
            .to_f32()
    };
    assert_eq!([product(), product()], [2.0; 2]);
    leaf.value().fill(2.0).unwrap();
    assert_eq!(product(), 4.0);
    leaf.set_grad(shaped(&context, &[2, 2], &[-3.0; 4]))
        .unwrap();
    sgd(&[&leaf], 1.0).step_unscaled().unwrap();
    assert_eq!(product(), 10.0);
}

#[test]
fn case_73_autocast_nograd_cache() {
    // There is no tape that a kept cast could be missing from: a product used for its output alone leaves a
    // cast behind, and the gradient of the next one is whole.
    let context = context();
    let weight = Parameter::new("w", shaped(&context, &[1, 2], &[1.0, 2.0])).unwrap();
    let x = shaped(&context, &[1, 2], &[3.0, 4.0]);
    let _scope = autocast(true, DType::F16);
    drop(ops::linear(&x, weight.value(), None).unwrap().into_output());
    let layer = ops::linear(&x, weight.value(), None).unwrap();
    let one = Tensor::full(&context, [1, 1], DType::F16, 1.0).unwrap();
    let gradients = layer.backward(&one).unwrap();
    let gradient = gradients
        .weight
        .cast(DType::F32)
        .unwrap()
        .to_vec::<f32>()
        .unwrap();
    assert_eq!(gradient, [3.0, 4.0]);
}

#[test]
fn case_74_doc_examples_run() {
    // Documents run as tests of the library if it says so.
    let library = include_str!("../../../../src/lib.rs");
    for (document, text) in [
        (
            "docs/from-pytorch.md",
            include_str!("../../../../docs/from-pytorch.md"),
        ),
        ("docs/amp.md", include_str!("../../../../docs/amp.md")),
    ] {
        assert!(
            library.contains(&format!("include_str!(\"../{document}\")")),
            "{document}"
        );
        assert!(text.matches("```rust\n").count() >= 3, "{document}");
        assert!(
            !text.contains("```rust,"),
            "{document}: no snippet is only compiled"
        );
    }
    // The three uses that the Python page shows: a loop, settings of one's own, a scope for a part.
    let context = context();
    let weight = ones(&context, "w", &[0f32]);
    let mut optimizer = sgd(&[&weight], 1.0);
    let settings = AmpConfig {
        dtype: DType::F16,
        growth_interval: 2000,
        backoff_factor: 0.5,
        growth_factor: 2.0,
        enabled: true,
        ..AmpConfig::default()
    };
    let mut scaler = GradScaler::new(&context, settings.clone()).unwrap();
    let gradient = scaler.scale(&tensor(&context, &[0.5f32])).unwrap();
    weight.set_grad(gradient).unwrap();
    let outcome = scaler.step(&mut optimizer).unwrap();
    scaler.update().unwrap();
    assert!(outcome.is_applied().unwrap());
    let inside = settings.in_autocast(|| autocast_dtype("linear"));
    assert_eq!((inside, autocast_dtype("linear")), (Some(DType::F16), None));
}
