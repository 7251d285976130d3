//! Matrix products by cuBLASLt, over a stand-in that computes by the documented formula and refuses products
//! with an odd inner size.
//!
//! Libraries are found by the variable `LD_LIBRARY_PATH`, which is read when a process begins: the test starts
//! itself again with a folder in which they have their usual names.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests launch graphs, and fail by panicking"
)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use crate::support::cuda::{Sim, library_path};
use crate::support::process;
use kitsune::launch::why_not_cublaslt;
use kitsune::ops::{linear, matmul};
use kitsune::{Context, DType, Device, HostConfig, Tensor};

const LOG: &str = "SIMCUBLASLT";

/// Runs the test `name` of this file in a process that finds the libraries.
fn in_a_process_with_libraries(name: &str) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("cublaslt-{}", name.replace("::", "-")));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    symlink(library_path(), folder.join("libcuda.so.1")).unwrap();
    let stand_in = library_path().with_file_name("libsimcublaslt.so");
    symlink(stand_in, folder.join("libcublasLt.so.13")).unwrap();
    let variables = [
        ("LD_LIBRARY_PATH", folder.clone()),
        (LOG, folder.join("log")),
    ];
    let output = process::again(name, variables);
    let told = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&told)
    );
}

fn is_outside() -> bool {
    std::env::var_os(LOG).is_none()
}

/// What the stand-in was asked to multiply: rows, columns and inner size by its own reckoning, and workspace.
fn asked() -> Vec<String> {
    let log = fs::read_to_string(std::env::var(LOG).unwrap());
    log.unwrap_or_default().lines().map(str::to_owned).collect()
}

fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..len).map(|_| random.f32() - 0.5).collect()
}

fn tensor(context: &Context, shape: [usize; 2], dtype: DType, seed: u64) -> Tensor {
    let values = values(shape[0] * shape[1], seed);
    let tensor = Tensor::from_slice(context, shape, &values).unwrap();
    tensor.cast(dtype).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.cast(DType::F32).unwrap().to_vec().unwrap()
}

/// Products of all types and layouts, on the context's device.
fn products(context: &Context) -> Vec<Vec<f32>> {
    let mut results = Vec::new();
    for dtype in [DType::F16, DType::Bf16, DType::F32, DType::F64] {
        for [m, k, n] in [[1, 2, 1], [5, 8, 3], [33, 64, 17], [4, 7, 4], [64, 32, 64]] {
            let (a, b) = (
                tensor(context, [m, k], dtype, 1),
                tensor(context, [k, n], dtype, 2),
            );
            results.push(numbers(&matmul(&a, &b).unwrap()));
            let turned = tensor(context, [n, k], dtype, 3).transpose(0, 1).unwrap();
            results.push(numbers(&matmul(&a, &turned).unwrap()));
            let wide = tensor(context, [m + 3, k + 5], dtype, 4);
            let part = wide.narrow(0, 3, m).unwrap().narrow(1, 1, k).unwrap();
            results.push(numbers(&matmul(&part, &b).unwrap()));
            let bias = tensor(context, [1, n], dtype, 5).reshape([n]).unwrap();
            let layer = linear(&a, &turned.transpose(0, 1).unwrap(), Some(&bias)).unwrap();
            let gradients = layer.backward(layer.output()).unwrap();
            results.push(numbers(layer.output()));
            results.push(numbers(&gradients.weight));
            results.push(numbers(&gradients.input));
        }
    }
    results
}

#[test]
fn products_of_every_type_and_layout_agree_with_the_host() {
    if is_outside() {
        return in_a_process_with_libraries(process::test_name!(
            "products_of_every_type_and_layout_agree_with_the_host"
        ));
    }
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    assert_eq!(why_not_cublaslt(0).unwrap(), None);
    let host = Device::host(HostConfig::default()).unwrap();
    let expected = products(&Context::new(&host).unwrap());
    let seen = products(&Context::new(&device).unwrap());
    for (index, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
        assert_eq!(seen.len(), expected.len());
        for (seen, expected) in seen.iter().zip(expected) {
            let tolerance = 0.02 * expected.abs().max(1.0);
            assert!(
                (seen - expected).abs() <= tolerance,
                "{index}: {seen}, not {expected}"
            );
        }
    }
    let asked = asked();
    assert!(
        asked.iter().any(|line| line.ends_with(" 65536")),
        "workspace was given: {asked:?}"
    );
    assert!(asked.iter().any(|line| line.ends_with(" 0")));
    assert!(
        !asked.iter().any(|line| line.contains(", 7]")),
        "odd inner sizes went to the kernel"
    );
    assert!(asked.len() > 60, "{}", asked.len());
}

#[test]
fn a_product_can_be_captured_and_runs_in_order() {
    if is_outside() {
        return in_a_process_with_libraries(process::test_name!(
            "a_product_can_be_captured_and_runs_in_order"
        ));
    }
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    let context = Context::new(&device).unwrap();
    let a = tensor(&context, [32, 32], DType::F32, 1);
    let identity: Vec<f32> = (0..1024)
        .map(|at| f32::from(u8::from(at % 33 == 0)))
        .collect();
    let b = Tensor::from_slice(&context, [32, 32], &identity).unwrap();
    let out = Tensor::zeros(&context, [32, 32], DType::F32).unwrap();
    drop(matmul(&a, &b).unwrap());
    let before = asked().len();
    let mut kept = None;
    let graph = context
        .stream()
        .capture(|| {
            let product = matmul(&a, &b)?;
            out.copy_from(&product)?;
            kept = Some(product);
            Ok(())
        })
        .unwrap();
    assert_eq!(
        asked().len(),
        before + 1,
        "the library made the captured product"
    );
    assert_eq!(
        out.to_vec::<f32>().unwrap(),
        [0.0; 1024],
        "capturing runs nothing"
    );
    for seed in [7, 8] {
        let values = values(1024, seed);
        a.copy_from_slice(&values).unwrap();
        // SAFETY: the tensors live until the test ends. The workspace went back to the pool, and nobody takes
        // memory before the stream has passed here.
        unsafe { graph.launch(context.stream()) }.unwrap();
        assert_eq!(out.to_vec::<f32>().unwrap(), values);
    }
}

#[test]
fn a_product_without_its_workspace_is_made_by_the_kernel() {
    if is_outside() {
        return in_a_process_with_libraries(process::test_name!(
            "a_product_without_its_workspace_is_made_by_the_kernel"
        ));
    }
    use kitsune::driver::DevicePtr;
    use kitsune::launch::{Accumulate, Matrix, Span, matmul, matmul_workspace};
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    let context = Context::new(&device).unwrap();
    let stream = context.stream();
    let [a, b, out] = [1, 2, 3].map(|seed| tensor(&context, [32, 32], DType::F32, seed));
    let span = |tensor: &Tensor| {
        // SAFETY: the tensors live until the test ends.
        unsafe { Span::new(DevicePtr(tensor.ptr().0), 1024, DType::F32, stream.id()) }
    };
    let [left, right] = [&a, &b].map(|tensor| Matrix::dense(&span(tensor), 32, 32).unwrap());
    let bytes = matmul_workspace(stream, &left, &right, &span(&out), Accumulate::Overwrite);
    assert_eq!(bytes, 65536);
    matmul(stream, &left, &right, &span(&out), Accumulate::Overwrite).unwrap();
    assert_eq!(asked(), [""; 0]);
    let by_library = kitsune::ops::matmul(&a, &b).unwrap();
    assert_eq!(asked().len(), 1);
    for (one, other) in numbers(&out).iter().zip(numbers(&by_library)) {
        assert!((one - other).abs() < 1e-4);
    }
}
