//! Device code that a driver does not take. In a process of its own, since code is loaded once a process.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests load the simulated driver, and fail by panicking"
)]

use crate::support::cuda::Sim;
use crate::support::process;
use kitsune::{Context, DType, Tensor};

#[test]
fn ptx_that_is_too_new_for_the_driver_is_an_error_that_says_so() {
    let name = process::test_name!("ptx_that_is_too_new_for_the_driver_is_an_error_that_says_so");
    process::alone(name, || {
        let (sim, device) = Sim::device();
        sim.fail("cuModuleLoadDataEx", 1, 222);
        let context = Context::new(&device).unwrap();
        let refused = Tensor::full(&context, [4], DType::F32, 1.0).map(drop);
        let told = refused.unwrap_err().to_string();
        assert!(
            told.contains("supports CUDA 13.0 and cannot compile PTX 8.0"),
            "{told}"
        );
        // The next launch tries again.
        sim.set("shim", kitsune_shim::LIBRARY);
        let ones = Tensor::full(&context, [4], DType::F32, 1.0).unwrap();
        assert_eq!(ones.to_vec::<f32>().unwrap(), [1.0; 4]);
    });
}
