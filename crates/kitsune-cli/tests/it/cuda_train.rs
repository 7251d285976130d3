//! `kitsune train` on the CUDA device, over a simulated driver that runs the device kernels.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

fn train(device: &str, dtype: &str) -> Value {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("train-{dtype}"));
    fs::create_dir_all(&folder).unwrap();
    let test = std::env::current_exe().unwrap();
    fs::copy(
        test.with_file_name("libsimcuda.so"),
        folder.join("libcuda.so"),
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kitsune"))
        .args(["train", "--json", "--steps", "12", "--inject-overflow", "4"])
        .args(["--device", device, "--dtype", dtype])
        .env("LD_LIBRARY_PATH", &folder)
        .env("SIMCUDA", format!("shim={}", kitsune_shim::LIBRARY))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "{device} {dtype}: {told}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The same arithmetic in another order where a reduction is parallel: losses agree closely, not in bits.
#[test]
fn the_same_training_on_the_host_and_on_device_kernels() {
    for dtype in ["f32", "f16", "bf16"] {
        let (host, cuda) = (train("host", dtype), train("cuda", dtype));
        assert_eq!(cuda["device"], "Simulated CUDA device");
        let loss = |report: &Value| report["final_loss"].as_f64().unwrap();
        let difference = (loss(&host) - loss(&cuda)).abs() / loss(&host);
        assert!(
            difference < 0.01,
            "{dtype}: {} and {}",
            loss(&host),
            loss(&cuda)
        );
        for same in [
            "scale",
            "overflow_steps",
            "overflows",
            "driver_allocs_after_step_3",
            "peak_reserved_bytes",
        ] {
            assert_eq!(host[same], cuda[same], "{dtype}: {same}");
        }
    }
}
