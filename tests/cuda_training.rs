//! Training on the CUDA device over a simulated driver, which runs the device kernels compiled for the host.

#![cfg(all(target_os = "linux", feature = "cuda"))]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests load the simulated driver, and fail by panicking"
)]

mod cuda_support;

use cuda_support::Sim;
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::optim::{AdamW, AdamWConfig, Optimizer, Parameter};
use kitsune::{Context, Result, Tensor, ops};

/// What makes the host wait, or the device.
const WAITS: [&str; 10] = [
    "cuCtxSynchronize",
    "cuStreamSynchronize",
    "cuEventSynchronize",
    "cuMemcpyDtoHAsync_v2",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemFreeHost",
    "cuMemUnmap",
    "cuMemCreate",
];

/// A network of one hidden layer, and what trains it.
struct Trainer {
    context: Context,
    hidden: Parameter,
    output: Parameter,
    optimizer: AdamW,
    config: AmpConfig,
    scaler: GradScaler,
}

fn weight(context: &Context, name: &str, shape: [usize; 2]) -> Parameter {
    let value = |index: usize| (index as f32 * 0.618_034).fract() - 0.5;
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(value).collect();
    Parameter::new(name, Tensor::from_slice(context, shape, &values).unwrap()).unwrap()
}

impl Trainer {
    fn new(context: Context) -> Self {
        let (hidden, output) = (
            weight(&context, "hidden", [32, 16]),
            weight(&context, "output", [10, 32]),
        );
        let parameters = vec![hidden.clone(), output.clone()];
        let config = AmpConfig::default();
        Self {
            optimizer: AdamW::new(parameters, AdamWConfig::default()).unwrap(),
            scaler: GradScaler::new(&context, config.clone()).unwrap(),
            context,
            hidden,
            output,
            config,
        }
    }

    fn step(&mut self, number: u32) -> Result<Tensor> {
        let pixels: Vec<f32> = (0..8 * 16)
            .map(|at| ((at + number) % 7) as f32 / 7.0)
            .collect();
        let digits: Vec<u32> = (0..8).map(|at| (at + number) % 10).collect();
        let images = Tensor::from_slice(&self.context, [8, 16], &pixels)?;
        let digits = Tensor::from_slice(&self.context, [8], &digits)?;
        let scope = self.config.autocast();
        let below = ops::linear(&images, self.hidden.value(), None)?;
        let active = ops::relu(below.output())?;
        let above = ops::linear(&active, self.output.value(), None)?;
        let loss = ops::softmax_cross_entropy(above.output(), &digits)?;
        drop(scope);
        let above = above.backward(&self.scaler.scale(&loss)?.backward()?)?;
        let below = below.backward(&ops::relu_backward(below.output(), &above.input)?)?;
        self.output.set_grad(above.weight)?;
        self.hidden.set_grad(below.weight)?;
        self.scaler.clip_grad_norm(&self.optimizer, 1.0)?;
        drop(self.scaler.step(&mut self.optimizer)?);
        self.scaler.update()?;
        self.optimizer.zero_grad();
        Ok(loss.value().clone())
    }
}

#[test]
fn a_training_step_makes_nobody_wait() {
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    let mut trainer = Trainer::new(Context::new(&device).unwrap());
    for number in 0..5 {
        trainer.step(number).unwrap();
    }
    let log = sim.log();
    let mut loss = None;
    for number in 5..15 {
        loss = Some(trainer.step(number).unwrap());
    }
    let names = sim.names_since(&log);
    assert!(names.iter().any(|name| name == "cuLaunchKernel"));
    for waiting in WAITS {
        assert!(
            !names.iter().any(|name| name == waiting),
            "{waiting} in {names:?}"
        );
    }
    assert!(
        !names.iter().any(|name| name.starts_with("cuEvent")),
        "one stream needs no event: {names:?}"
    );
    let loss: f32 = loss.unwrap().item().unwrap();
    assert!(loss.is_finite() && loss < 4.0, "{loss}");
    // Where the library knows nothing of an address, it is ordinary memory: that is asked before each upload.
    let log = sim.log();
    let failed = |line: &&str| !line.ends_with(" 0") && !line.starts_with("cuPointerGetAttribute");
    assert_eq!(log.lines().find(failed), None);
}

#[cfg(feature = "cli")]
mod command {
    use std::fs;
    use std::path::PathBuf;
    use std::process::Command;

    use serde_json::Value;

    use super::cuda_support::library_path;

    fn train(device: &str, dtype: &str) -> Value {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("train-{dtype}"));
        fs::create_dir_all(&folder).unwrap();
        fs::copy(library_path(), folder.join("libcuda.so")).unwrap();
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
}
