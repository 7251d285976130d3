//! `kitsune replay` and `kitsune churn` on the CUDA device, over a simulated driver: the same pool, so the same
//! figures as on the host, and blocks that keep their contents.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use crate::command::kitsune;
use serde_json::Value;

const TINY: &str = "tests/data/tiny.at";

/// A folder with the simulated library under the driver's name.
fn folder(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&folder).unwrap();
    let test = std::env::current_exe().unwrap();
    fs::copy(
        test.with_file_name("libsimcuda.so"),
        folder.join("libcuda.so"),
    )
    .unwrap();
    folder
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    kitsune(arguments)
        .env("LD_LIBRARY_PATH", folder)
        .env("SIMCUDA", "memory=17179869184")
        .output()
        .unwrap()
}

fn report(folder: &Path, arguments: &[&str]) -> Value {
    let output = run(folder, arguments);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "{arguments:?}: {told}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Reports of the same work on either device agree in all that is the pool's own.
fn assert_same_on_both(folder: &Path, arguments: &[&str]) {
    let on = |device: &str| {
        let common = ["--json", "--repeats", "1", "--check", "--device", device];
        report(folder, &[arguments, &common].concat())
    };
    let (host, cuda, auto) = (on("host"), on("cuda"), on("auto"));
    assert_eq!(host["device"], "host");
    assert_eq!(cuda["device"], "Simulated CUDA device");
    assert_eq!(auto["device"], "Simulated CUDA device");
    for same in [
        "allocs",
        "peak_requested_bytes",
        "peak_reserved_bytes",
        "driver_allocs",
        "driver_calls_steady",
        "events_recorded",
        "host_syncs",
        "ooms",
    ] {
        assert_eq!(host[same], cuda[same], "{arguments:?}: {same}");
    }
    assert!(cuda["ns_per_pair"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_trace_takes_the_same_memory_on_both_devices() {
    let folder = folder("replay-cuda");
    assert_same_on_both(&folder, &["replay", TINY]);
    let digest = |device: &[&str]| {
        let words = [
            "replay",
            TINY,
            "--json",
            "--repeats",
            "1",
            "--deterministic",
        ];
        let report = report(&folder, &[&words[..], &["--device"], device].concat());
        report["address_digest"].as_str().unwrap().to_owned()
    };
    // Where the pages of small blocks end depends on the memory of the device.
    let host = ["host", "--device-bytes", "16GiB"];
    assert_eq!(digest(&host), digest(&["cuda"]));
}

#[test]
fn workloads_take_the_same_memory_on_both_devices() {
    let folder = folder("churn-cuda");
    for workload in ["hot", "multi-stream", "random"] {
        let words = ["churn", "--workload", workload, "--allocs", "200"];
        assert_same_on_both(&folder, &words);
    }
    // What the device has decides, and not what a host device would pretend to have.
    let words = [
        "churn",
        "--workload",
        "priming",
        "--allocs",
        "100",
        "--json",
    ];
    let primed = report(&folder, &[&words[..], &["--device", "cuda"]].concat());
    let requested = primed["peak_requested_bytes"].as_u64().unwrap();
    let expected = (16_u64 << 30) / 10 * 9;
    assert!(
        (expected - expected / 50..=expected).contains(&requested),
        "{requested}"
    );
    assert_eq!(primed["ooms"], 0);
}

#[test]
fn what_only_the_host_device_can_do_is_refused() {
    let folder = folder("replay-cuda-refused");
    for (words, reason) in [
        (
            &["replay", TINY, "--device-bytes", "1GiB"][..],
            "--device-bytes: the memory of a CUDA device is fixed",
        ),
        (
            &["replay", TINY, "--min-device"],
            "--min-device: the memory of a CUDA device is fixed",
        ),
        (
            &["churn", "--workload", "hot", "--device-bytes", "1GiB"],
            "--device-bytes: the memory of a CUDA device is fixed",
        ),
    ] {
        for device in ["cuda", "auto"] {
            let output = run(&folder, &[words, &["--device", device]].concat());
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {told}");
            assert!(told.contains(reason) && told.lines().count() == 1, "{told}");
        }
    }
    // Without a driver, the one that was asked for is missing, and `auto` is the host.
    let empty = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("replay-no-driver");
    fs::create_dir_all(&empty).unwrap();
    fs::write(empty.join("libcuda.so"), b"no library").unwrap();
    let output = run(&empty, &["replay", TINY, "--device", "cuda"]);
    if output.status.success() {
        // This machine has a driver of its own.
        return;
    }
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        told.starts_with("error: open failed") && told.lines().count() == 1,
        "{told}"
    );
    let auto = report(&empty, &["replay", TINY, "--json", "--device", "auto"]);
    assert_eq!(auto["device"], "host");
}
