//! `kitsune train --model gpt`: 16-bit trainings follow the one in f32, and a seed gives the same run again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use serde_json::Value;

/// The report of a short run.
fn report(line: &str) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kitsune"));
    let output = command
        .args("train --model gpt --json --device host --batch-size 4".split(' '))
        .args(line.split(' '))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "`{line}`: {told}"
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn curve(report: &Value) -> Vec<f64> {
    let curve = report["loss_curve"].as_array().unwrap();
    curve.iter().map(|loss| loss.as_f64().unwrap()).collect()
}

#[test]
fn loss_curves_in_16_bits_are_within_one_percent_of_f32() {
    for seed in 1..=3 {
        let run = |dtype| {
            curve(&report(&format!(
                "--steps 96 --seed {seed} --dtype {dtype}"
            )))
        };
        let single = run("f32");
        assert!(
            single[5] < 0.9 * single[0],
            "seed {seed} learned nothing: {single:?}"
        );
        for dtype in ["f16", "bf16"] {
            let half = run(dtype);
            assert_eq!(half.len(), single.len());
            for (half, single) in half.iter().zip(&single) {
                assert!(
                    (half - single).abs() <= 0.01 * single,
                    "seed {seed} in {dtype}: {half}, in f32 {single}"
                );
            }
        }
    }
}

#[test]
fn a_run_with_skips_and_added_batches_is_the_same_again() {
    let run = |accumulate| {
        let line = format!("--steps 6 --accumulate {accumulate} --clip 0.5 --inject-overflow 3");
        let mut report = report(&line);
        report["seconds"] = Value::Null;
        report
    };
    let first = run(2);
    assert_eq!(first, run(2));
    assert_eq!(first["overflow_steps"], 1);
    assert_eq!(first["overflows"][0]["tensor"], "characters");
    assert_eq!(first["scale"], 32768.0);
    assert_ne!(first["final_loss"], run(1)["final_loss"]);
}

#[test]
fn a_text_that_is_too_short_is_refused() {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("short.txt");
    std::fs::write(&path, "a short text").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_kitsune"))
        .args(["train", "--model", "gpt", "--data"])
        .arg(path)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("12 characters, fewer than 650"), "{told}");
}
