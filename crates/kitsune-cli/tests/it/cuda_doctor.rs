//! `kitsune doctor`, and what the command makes of every driver that cannot be used.
//!
//! The command is run with a library of the driver's name on its path: the simulated one as it is, told to
//! fail, or with a function less.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use crate::command::kitsune;
use serde_json::Value;

/// A folder with the simulated library under the driver's name, changed by `change`.
fn folder(name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    let test = std::env::current_exe().unwrap();
    let mut library = fs::read(test.with_file_name("libsimcuda.so")).unwrap();
    change(&mut library);
    fs::write(folder.join("libcuda.so"), library).unwrap();
    folder
}

fn run(arguments: &[&str], folder: &PathBuf, settings: &str) -> Output {
    kitsune(arguments)
        .env("LD_LIBRARY_PATH", folder)
        .env("SIMCUDA", settings)
        .output()
        .unwrap()
}

/// The findings of `kitsune doctor --json`.
fn findings(folder: &PathBuf, settings: &str) -> Value {
    let output = run(&["doctor", "--json"], folder, settings);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "{settings}: {told}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Asserts that there is no CUDA for the reason `expected`, and that the host takes over.
fn assert_no_cuda(folder: &PathBuf, settings: &str, expected: &str) {
    let found = findings(folder, settings);
    let reason = found["why_not_cuda"].as_str().unwrap_or_default();
    assert!(reason.contains(expected), "{settings}: {reason}");
    let file = folder.join("libcuda.so");
    if file.exists() {
        assert_eq!(found["driver_library"], file.to_str().unwrap());
    }
    assert_eq!(found["host_fallback"], true);
    assert_eq!(found["auto"], "host");
    let output = run(
        &["train", "--device", "cuda", "--steps", "1"],
        folder,
        settings,
    );
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert_eq!(told.lines().count(), 1, "{told}");
    assert!(told.contains(expected), "{told}");
}

#[test]
fn a_working_driver_is_described() {
    let folder = folder("doctor-works", |_| {});
    let found = findings(&folder, "devices=2,capability=86,version=12040");
    assert_eq!(found["why_not_cuda"], Value::Null);
    assert_eq!(
        found["driver_library"],
        folder.join("libcuda.so").to_str().unwrap()
    );
    assert_eq!(found["driver_cuda_version"], "12.4");
    assert_eq!(found["auto"], "Simulated CUDA device");
    assert_eq!(found["host_fallback"], false);
    let devices = found["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 2);
    assert_eq!(devices[1]["compute_capability"], "8.6");
    assert_eq!(devices[1]["kernels_for"], "8.0");
    assert_eq!(devices[1]["virtual_memory"], true);
    assert_eq!(devices[1]["memory_pools"], true);
    let text = run(
        &["doctor"],
        &folder,
        "virtual_memory=0,pools=0,capability=75",
    )
    .stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("virtual memory: no"), "{text}");
    assert!(text.contains("memory pools: no"), "{text}");
    assert!(text.contains("kernels: none for this device"), "{text}");
}

#[test]
fn a_driver_that_does_not_start_is_an_error_and_no_panic() {
    let folder = folder("doctor-broken", |_| {});
    for (settings, expected) in [
        ("fail=cuInit:1:999", "cuInit: CUDA_ERROR_SIMULATED"),
        ("fail=cuInit:1:100", "CUDA_ERROR_NO_DEVICE"),
        ("fail=cuInit:1:34", "CUDA_ERROR_STUB_LIBRARY"),
        ("devices=0", "the driver has no CUDA device"),
        (
            "version=11080",
            "supports CUDA 11.8, which is older than 12.0",
        ),
        (
            "fail=cuDriverGetVersion:1:1",
            "cuDriverGetVersion of libcuda.so failed",
        ),
    ] {
        assert_no_cuda(&folder, settings, expected);
    }
}

#[test]
fn whatever_fails_while_a_device_is_opened_is_an_error_and_no_panic() {
    let folder = folder("doctor-fails", |_| {});
    for function in [
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetName",
        "cuDeviceTotalMem_v2",
        "cuDeviceGetAttribute",
        "cuMemGetAllocationGranularity",
        "cuDevicePrimaryCtxRetain",
    ] {
        // Doctor asks more than once; each time something else fails.
        let fails = (1..=4)
            .map(|nth| format!("fail={function}:{nth}:46"))
            .collect::<Vec<_>>();
        let output = run(
            &["train", "--device", "cuda", "--steps", "1"],
            &folder,
            &fails.join(","),
        );
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(
            told.starts_with(&format!("error: open failed: {function}: ")),
            "{told}"
        );
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn a_missing_function_is_named() {
    for (index, function) in [
        "cuMemMap",
        "cuMemFreeAsync",
        "cuGraphLaunch",
        "cuGetErrorName",
        "cuDriverGetVersion",
        "cuInit",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("\0{function}\0").into_bytes();
        let folder = folder(&format!("doctor-missing-{index}"), |library| {
            let places: Vec<usize> = library
                .windows(name.len())
                .enumerate()
                .filter_map(|(at, window)| (window == name).then_some(at))
                .collect();
            assert!(!places.is_empty(), "{function} is exported");
            for at in places {
                library[at + name.len() - 2] = b'_';
            }
        });
        let expected =
            format!("libcuda.so has no function {function}: the driver's installation is damaged");
        assert_no_cuda(&folder, "", &expected);
    }
}

/// Memory can be had on it, so it opens; but nobody is led there without asking.
#[test]
fn a_device_that_is_too_old_for_the_kernels_is_told_and_passed_over() {
    let folder = folder("doctor-old-device", |_| {});
    let expected = "has compute capability 7.5, and the kernels need 8.0";
    assert_no_cuda(&folder, "capability=75", expected);
    let found = findings(&folder, "capability=75");
    assert_eq!(found["devices"][0]["kernels_for"], Value::Null);
}

/// A container without the driver's compiler, and a driver that was told to compile nothing.
#[test]
fn code_that_cannot_be_compiled_is_told_in_one_line() {
    let folder = folder("doctor-no-compiler", |_| {});
    for code in [218, 221, 223] {
        let settings = format!("fail=cuModuleLoadDataEx:1:{code}");
        let output = run(
            &["train", "--device", "cuda", "--steps", "1"],
            &folder,
            &settings,
        );
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(
            told.starts_with("error: launch failed: cuModuleLoadDataEx: "),
            "{told}"
        );
        assert!(
            told.contains(&code.to_string()) && told.lines().count() == 1,
            "{told}"
        );
    }
}

#[test]
fn a_cublaslt_that_cannot_be_used_is_told_and_passed_over() {
    let folder = folder("doctor-cublaslt", |_| {});
    let usual = folder.join("libcuda.so.1");
    let library = folder.join("libcublasLt.so.13");
    let told = |expected: &str| {
        let found = findings(&folder, "");
        let reason = found["devices"][0]["why_not_cublaslt"]
            .as_str()
            .unwrap_or_default();
        assert!(reason.contains(expected), "{reason}");
        let shim = format!("shim={}", kitsune_shim::LIBRARY);
        let output = run(
            &["train", "--device", "cuda", "--steps", "2"],
            &folder,
            &shim,
        );
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    for file in [&usual, &library] {
        let _ = fs::remove_file(file);
    }
    // A library that would talk to another driver than this one, as it does not find this one by its name.
    fs::copy(folder.join("libcuda.so"), &library).unwrap();
    told("libcublasLt.so.13 would use another driver than this program");
    // The same driver by its usual name, and a library without the functions.
    std::os::unix::fs::symlink("libcuda.so", &usual).unwrap();
    told("libcublasLt.so.13 has no function cublasLtCreate");
    fs::write(&library, b"no library").unwrap();
    told("cannot be loaded");
}

#[test]
fn without_a_driver_the_host_takes_over() {
    let empty = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("doctor-empty");
    fs::create_dir_all(&empty).unwrap();
    let found = findings(&empty, "");
    let Some(reason) = found["why_not_cuda"].as_str() else {
        // This machine has a driver of its own, which the loader finds without help.
        assert_eq!(found["host_fallback"], false);
        return;
    };
    if found["driver_library"].is_null() && reason.contains("cannot be loaded") {
        assert!(
            reason.contains("no NVIDIA driver: libcuda.so or libcuda.so.1"),
            "{reason}"
        );
        assert_no_cuda(&empty, "", "no NVIDIA driver");
    }
    // A file that is no library is as good as none, and named.
    let junk = folder("doctor-junk", |library| *library = b"no library".to_vec());
    let of_junk = findings(&junk, "");
    let told = of_junk["why_not_cuda"].as_str().unwrap();
    let file = junk.join("libcuda.so");
    assert!(
        told.contains("cannot be loaded (") && told.contains(file.to_str().unwrap()),
        "{told}"
    );
    assert_eq!(of_junk["driver_library"], Value::Null);
}
