//! The command as a user has it: what it prints, where, and with which exit code.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::Duration;

use serde_json::Value;

fn kitsune(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kitsune"));
    command.args(line.split_whitespace());
    command
}

fn output(line: &str) -> Output {
    kitsune(line).output().unwrap()
}

/// The one line on standard error of a run that is refused with exit code `code`.
fn refusal(mut command: Command, code: i32) -> String {
    let output = command.output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{command:?} said: {told}");
    assert!(
        output.stdout.is_empty(),
        "{command:?} wrote to standard output"
    );
    assert!(
        told.starts_with("error: ") && told.ends_with('\n'),
        "{command:?} said: {told}"
    );
    assert_eq!(told.lines().count(), 1, "{command:?} said: {told}");
    told
}

/// The JSON object of a run that succeeds.
fn report(line: &str) -> Value {
    let output = output(line);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "`{line}` said: {told}"
    );
    serde_json::from_slice(&output.stdout).expect("standard output is one JSON value")
}

/// A file in this test binary's folder for scratch files.
fn scratch(name: &str, contents: &[u8]) -> PathBuf {
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, contents).unwrap();
    path
}

#[test]
fn every_type_learns_to_read() {
    for dtype in ["f16", "bf16", "f32"] {
        let report = report(&format!("train --json --dtype {dtype}"));
        let accuracy = report["test_accuracy"].as_f64().unwrap();
        assert!(accuracy >= 0.97, "{report}");
        assert!(report["final_loss"].as_f64().unwrap() < 0.1, "{report}");
        assert_eq!(report["dtype"], dtype);
        assert_eq!(report["driver_allocs_after_step_3"], 0, "{report}");
    }
}

#[test]
fn the_json_has_exactly_these_keys() {
    let report = report("train --json --steps 5 --seed 3 --inject-overflow 4");
    let mut keys: Vec<_> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    keys.sort_unstable();
    let mut expected = [
        "device",
        "dtype",
        "model",
        "steps",
        "first_step",
        "seed",
        "seconds",
        "final_loss",
        "loss_curve",
        "test_accuracy",
        "scale",
        "overflow_steps",
        "overflows",
        "driver_allocs",
        "driver_allocs_after_step_3",
        "peak_requested_bytes",
        "peak_allocated_bytes",
        "peak_reserved_bytes",
    ];
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!((&report["steps"], &report["seed"]), (&5.into(), &3.into()));
    let bytes = |key: &str| report[key].as_u64().unwrap();
    let requested = bytes("peak_requested_bytes");
    assert!(requested > 0 && requested <= bytes("peak_allocated_bytes"));
    assert!(bytes("peak_allocated_bytes") <= bytes("peak_reserved_bytes"));
    let overflow = report["overflows"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .as_object()
        .unwrap();
    let keys: Vec<_> = overflow.keys().map(String::as_str).collect();
    assert_eq!(keys, ["kind", "step", "tensor"]);
}

#[test]
fn an_injected_overflow_is_skipped_and_reported() {
    for dtype in ["f16", "bf16", "f32"] {
        let line = format!("train --json --steps 40 --dtype {dtype}");
        let clean = report(&line);
        let injected = report(&format!("{line} --inject-overflow 21"));
        let expected: Value =
            serde_json::json!({ "step": 21, "tensor": "layer1.weight", "kind": "inf" });
        assert!(!clean["overflows"].as_array().unwrap().contains(&expected));
        assert!(
            injected["overflows"]
                .as_array()
                .unwrap()
                .contains(&expected),
            "{injected}"
        );
        let count = |report: &Value| report["overflow_steps"].as_u64().unwrap();
        assert_eq!(count(&injected), count(&clean) + 1);
        // Told once, although the run looks for overflows several times after.
        let told = |report: &Value| report["overflows"].as_array().unwrap().len();
        assert_eq!(told(&injected), told(&clean) + 1, "{injected}");
        // Only f16 has a scale to halve.
        let factor = if dtype == "f16" { 0.5 } else { 1.0 };
        let scale = |report: &Value| report["scale"].as_f64().unwrap();
        assert_eq!(scale(&injected), scale(&clean) * factor);
        // A weight that had taken the infinity would have ruined the loss.
        assert!(injected["final_loss"].as_f64().unwrap() < 1.0, "{injected}");
    }
}

#[test]
fn a_seed_gives_the_same_run_again() {
    let run = |seed| {
        let mut report = report(&format!("train --json --steps 30 --seed {seed}"));
        report["seconds"] = Value::Null;
        report
    };
    assert_eq!(run(5), run(5));
    assert_ne!(run(5)["final_loss"], run(6)["final_loss"]);
}

#[test]
fn people_get_a_table() {
    let output = output("train --steps 3");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for label in ["test accuracy ", "loss scale ", "peak memory "] {
        assert!(text.lines().any(|line| line.starts_with(label)), "{text}");
    }
    assert!(
        !text.contains('\u{1b}'),
        "no escape codes where there is no terminal: {text:?}"
    );
}

#[test]
fn help_is_no_error() {
    for line in ["--help", "train --help", "--version"] {
        let output = output(line);
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{line}"
        );
        assert!(
            String::from_utf8(output.stdout)
                .unwrap()
                .contains("kitsune"),
            "{line}"
        );
    }
}

#[test]
fn bad_flags_are_refused_in_one_line() {
    for (line, reason) in [
        ("", "no command given"),
        ("tarin", "tarin"),
        ("train --dtype f8", "possible values: f16, bf16, f32"),
        ("train --device cuda:9", "possible values"),
        ("train --steps 0", "0"),
        ("train --steps ten", "ten"),
        ("train --seed -1", "invalid value '-1' for '--seed <N>'"),
        (
            "train --steps 10 --inject-overflow 11",
            "after the last step",
        ),
        ("train --batch-size 100000", "there are 1438 images"),
        (
            "train --model gpt --batch-size 4294967295",
            "--batch-size 4294967295: at most 4096 sequences",
        ),
        ("train --learning-rate NaN", "not above 0"),
        ("train --limit 0", "above 0"),
        ("train --limit lots", "not a byte count"),
        (
            "train --limit 1KiB",
            "--limit: 1024 bytes; at least 2097152",
        ),
        (
            "train --limit 900TiB",
            "--limit: 989560464998400 bytes, but the device has",
        ),
        (
            "churn --workload hot --device-bytes 1",
            "--device-bytes: 1 B is not between",
        ),
        ("train --limit 99999999999999999999", "more bytes"),
        (
            "train --limit 2MiB --batch-size 1000",
            "--limit is too small",
        ),
        ("train --metrics here", "here"),
        // An address for documentation, which no machine has.
        ("train --metrics 192.0.2.1:9100", "192.0.2.1:9100"),
        // A name that is kept from ever being one.
        (
            "train --metrics nowhere.invalid:9100",
            "--metrics nowhere.invalid:9100: ",
        ),
        ("train extra", "extra"),
    ] {
        let told = refusal(kitsune(line), 2);
        assert!(told.contains(reason), "`{line}` said: {told}");
    }
}

#[test]
fn bad_images_are_refused_with_their_place() {
    let good = format!("{}\n", ["3"; 65].join(",")).repeat(4);
    let cases: [(&str, Vec<u8>, &str); 7] = [
        ("empty.csv", Vec::new(), "0 images"),
        ("few.csv", good.clone().into(), "4 images"),
        (
            "columns.csv",
            format!("{good}1,2,3\n").into(),
            "line 5: 3 columns, not 65",
        ),
        (
            "range.csv",
            good.replacen('3', "17", 1).into(),
            "line 1: column 1: pixel `17`",
        ),
        (
            "text.csv",
            format!("{good}{}", good.replacen('3', "x", 1)).into(),
            "line 5: column 1",
        ),
        (
            "binary.csv",
            [good.as_bytes(), &[0xff, 0, 1]].concat(),
            "line 5: not UTF-8",
        ),
        ("big.csv", good.repeat(40_000).into(), "larger than 16 MiB"),
    ];
    for (name, contents, reason) in cases {
        let path = scratch(name, &contents);
        let mut command = kitsune("train --data");
        command.arg(&path);
        let told = refusal(command, 2);
        assert!(
            told.contains(reason) && told.contains(name),
            "{name} said: {told}"
        );
        fs::remove_file(path).unwrap();
    }
    let told = refusal(kitsune("train --data /nowhere/at/all.csv"), 2);
    assert!(told.contains("/nowhere/at/all.csv: No such file"), "{told}");
    let mut command = kitsune("train --data");
    command.arg(env!("CARGO_TARGET_TMPDIR"));
    assert!(refusal(command, 2).contains("directory"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_without_an_end_is_refused() {
    for model in ["mlp", "gpt"] {
        let line = format!("train --model {model} --data /dev/zero");
        let told = refusal(kitsune(&line), 2);
        assert_eq!(told, "error: /dev/zero: larger than 16 MiB\n");
    }
}

#[test]
fn images_of_ones_own_are_used() {
    // Two kinds of images that one step tells apart: all paper is 0, all ink is 1.
    let line = |value: &str, digit: &str| format!("{},{digit}\n", [value; 64].join(","));
    let mut text = String::new();
    for index in 0..50 {
        text += &if index % 2 == 0 {
            line("0", "0")
        } else {
            line("16", "1")
        };
    }
    let mut losses = Vec::new();
    // As editors write it: with a byte-order mark in front, and empty lines at the end.
    for (mark, end) in [("", ""), ("\u{feff}", "\n"), ("\u{feff}", "\r\n  \n")] {
        let path = scratch("own.csv", format!("{mark}{text}{end}").as_bytes());
        let mut command = kitsune("train --json --steps 30 --batch-size 20 --data");
        let output = command.arg(&path).output().unwrap();
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(report["test_accuracy"], 1.0, "{report}");
        losses.push(report["final_loss"].to_string());
        fs::remove_file(path).unwrap();
    }
    losses.dedup();
    assert_eq!(losses.len(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_told() {
    for line in ["train --steps 1", "train --steps 1 --json", "--help"] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = kitsune(line).stdout(full).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "`{line}` said: {told}");
        assert!(
            told.starts_with("error: cannot write to standard output"),
            "{told}"
        );
        assert_eq!(told.lines().count(), 1, "{told}");
    }
}

#[test]
fn a_reader_that_left_is_no_error() {
    for line in ["train --steps 1", "train --steps 1 --json", "--help"] {
        let mut command = kitsune(line);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{line}");
        assert!(
            output.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[cfg(target_os = "linux")]
#[test]
fn where_standard_error_is_full_the_exit_code_remains() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let status = kitsune("train --steps 0").stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn a_port_in_use_is_told() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let named = format!("localhost:{}", address.port());
    // Where the name has addresses of both kinds, the port of the other one may be free.
    let other = TcpListener::bind(("::1", address.port()));
    for address in [address.to_string(), named] {
        let told = refusal(kitsune(&format!("train --steps 1 --metrics {address}")), 2);
        assert!(told.contains(&address), "{told}");
    }
    drop(other);
}

/// A run that is ended with the test, however that ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, with an error that the test has seen.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

#[test]
fn metrics_can_be_scraped_while_it_trains() {
    // Far more steps than it takes to be scraped.
    let line = "train --steps 10000000 --inject-overflow 3 --metrics localhost:0";
    let mut command = kitsune(line);
    let mut run = Running(
        command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut told = String::new();
    BufReader::new(run.0.stderr.take().unwrap())
        .read_line(&mut told)
        .unwrap();
    let address = told.trim().strip_prefix("metrics: http://").expect(&told);
    let address = address.strip_suffix("/metrics").unwrap();

    // Metrics come with the first look at the scaler.
    let mut answer = get(address);
    while !answer.contains("kitsune_amp_steps_total{") {
        sleep(Duration::from_millis(20));
        answer = get(address);
    }
    let value = |series: &str| {
        let line = answer.lines().find_map(|line| line.strip_prefix(series));
        line.unwrap_or_else(|| panic!("no {series} in\n{answer}"))
            .trim()
            .parse::<f64>()
            .unwrap()
    };
    let pool = "{device=\"host:0\",pool=\"default\"}";
    assert!(value("kitsune_amp_scale{scaler=\"default\"}") > 0.0);
    assert!(value("kitsune_amp_overflow_steps_total{scaler=\"default\"}") >= 1.0);
    assert!(value(&format!("kitsune_pool_allocated_bytes{pool}")) > 0.0);
    assert!(value(&format!("kitsune_pool_cache_hits_total{pool}")) > 0.0);
    assert!(value(&format!("kitsune_pool_driver_allocs_total{pool}")) >= 1.0);
    assert!(answer.contains(
        "kitsune_tag_allocated_bytes{device=\"host:0\",pool=\"default\",tag=\"weights\"}"
    ));
    assert!(answer.contains("# HELP kitsune_pool_reserved_bytes "));
}
