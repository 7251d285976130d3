//! `kitsune replay` as a user has it: figures of known traces, and what is refused with which line.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::command::{json, kitsune, refusal};
use serde_json::Value;

const TINY: &str = "tests/data/tiny.at";
const HEADER: &str = "#alloctrace v1 streams=2 name=test\n";

/// A file in this test binary's folder for scratch files.
fn scratch(name: &str, contents: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&path, contents).unwrap();
    path
}

fn number(report: &Value, key: &str) -> u64 {
    report[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} in {report}"))
}

#[test]
fn the_json_object_has_its_keys_and_right_figures() {
    let report = json(&["replay", TINY, "--json", "--repeats", "1", "--check"]);
    let keys: Vec<_> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut expected = [
        "device",
        "host_threads",
        "steps",
        "allocs",
        "peak_requested_bytes",
        "peak_reserved_bytes",
        "ratio",
        "ns_per_pair",
        "driver_allocs",
        "driver_calls_steady",
        "driver_calls_settled",
        "pages_mapped_first",
        "pages_mapped_per_step",
        "pages_mapped_per_step_late",
        "map_calls_first",
        "driver_ms_first",
        "driver_ms_per_step",
        "events_recorded",
        "host_syncs",
        "ooms",
        "checked",
    ];
    expected.sort_unstable();
    let mut sorted = keys.clone();
    sorted.sort_unstable();
    assert_eq!(sorted, expected);
    assert_eq!(report["device"], "host");
    assert_eq!(report["checked"], true);
    let unchecked = json(&["replay", TINY, "--json", "--repeats", "1"]);
    assert_eq!(unchecked["checked"], false);
    assert_eq!(number(&report, "allocs"), 8);
    // Blocks 1, 2 and 5 are the most that live at once.
    assert_eq!(
        number(&report, "peak_requested_bytes"),
        1_048_576 + 3_000_000 + 6_291_456
    );
    let ratio = report["ratio"].as_f64().unwrap();
    assert!((1.0..3.0).contains(&ratio), "{ratio}");
    assert!(number(&report, "driver_allocs") > 0 && number(&report, "ooms") == 0);
    assert!(report["ns_per_pair"].as_f64().unwrap() > 0.0);
    // The trace trims, so every pass takes its memory anew.
    let steady = number(&report, "driver_calls_steady");
    assert!(steady > 0);
    assert_eq!(report["driver_calls_settled"], steady as f64);
}

#[test]
fn host_threads_steps_and_prices_are_counted() {
    let trace = "#alloctrace v1 streams=1 name=turns threads=3\n\
                 a 1 41943040\nm step 1\nh 2\na 2 512\nf 1\nh 0\nm step 2\na 3 512\nf 2\n";
    let trace = scratch("turns.at", trace.as_bytes());
    let trace = trace.to_str().unwrap();
    let report = json(&["replay", trace, "--json", "--repeats", "1", "--check"]);
    // Three threads are announced, and two of them are numbered 0 and 2.
    assert_eq!(number(&report, "host_threads"), 3);
    assert_eq!(number(&report, "steps"), 2);
    assert_eq!(number(&report, "peak_requested_bytes"), 41_943_040 + 512);
    assert!(number(&report, "pages_mapped_first") >= 20);
    assert!(number(&report, "map_calls_first") > 0);
    assert_eq!(report["pages_mapped_per_step_late"], 0.0);
    assert!(report["pages_mapped_per_step"].as_f64().unwrap() <= 1.0);
    assert!(report["driver_ms_per_step"].as_f64().unwrap() <= 0.1);
    let free = scratch(
        "free.json",
        b"{\"create_us\": 0, \"create_us_per_mib\": 0, \"map_us\": 1000, \
          \"set_access_us\": 0, \"set_access_us_per_handle\": 0}",
    );
    let prices = free.to_str().unwrap();
    let priced = json(&[
        "replay",
        trace,
        "--json",
        "--repeats",
        "1",
        "--prices",
        prices,
    ]);
    let handles = priced["driver_ms_first"].as_f64().unwrap();
    assert!(handles >= 1.0 && handles <= number(&report, "pages_mapped_first") as f64);

    let wrong = scratch("wrong.json", b"{\"map_us\": -1}");
    let wrong = wrong.to_str().unwrap();
    let message = refusal(&["replay", trace, "--prices", wrong], 2);
    assert!(
        message.contains("wrong.json: map_us must not be negative"),
        "{message}"
    );
    let message = refusal(&["replay", trace, "--prices", "/no/such/list"], 2);
    assert!(message.contains("/no/such/list: "), "{message}");
    let many = scratch(
        "many.at",
        b"#alloctrace v1 streams=1 name=many threads=65\n",
    );
    let message = refusal(&["replay", many.to_str().unwrap()], 2);
    assert!(message.contains(":1: header: threads=65"), "{message}");
}

#[test]
fn the_table_is_for_people_and_shows_the_check() {
    let output = kitsune(&["replay", TINY, "--repeats", "3", "--check"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let table = String::from_utf8(output.stdout).unwrap();
    for part in [
        "allocations        8 per pass",
        "3 repeats)",
        "all blocks kept their contents",
    ] {
        // Labels stand in a column whose width is the table's own business.
        let squeezed = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(
            squeezed(&table).contains(&squeezed(part)),
            "{part} in {table}"
        );
    }
}

#[test]
fn every_policy_lag_and_seed_passes_the_check() {
    for policy in ["never", "only-complete", "wait"] {
        for lag in ["0", "3", "1000"] {
            let arguments = [
                "--policy",
                policy,
                "--event-lag",
                lag,
                "--seed",
                "5",
                "--check",
            ];
            let mut line = vec!["replay", TINY, TINY, "--json", "--repeats", "1"];
            line.extend(arguments);
            assert_eq!(number(&json(&line), "ooms"), 0, "{line:?}");
        }
    }
}

#[test]
fn the_smallest_device_passes_and_less_does_not() {
    let report = json(&["replay", TINY, "--json", "--repeats", "1", "--min-device"]);
    let least = number(&report, "min_device_bytes");
    let requested = number(&report, "peak_requested_bytes");
    assert!(
        (requested..=number(&report, "peak_reserved_bytes")).contains(&least),
        "{least}"
    );
    let ooms = |bytes: u64| {
        let bytes = bytes.to_string();
        number(
            &json(&[
                "replay",
                TINY,
                "--json",
                "--repeats",
                "1",
                "--device-bytes",
                &bytes,
            ]),
            "ooms",
        )
    };
    assert_eq!(ooms(least), 0);
    assert!(ooms(least - requested / 200) > 0);
}

#[test]
fn a_limit_makes_allocations_fail_and_the_replay_goes_on() {
    let report = json(&[
        "replay",
        TINY,
        "--json",
        "--repeats",
        "1",
        "--limit",
        "8MiB",
    ]);
    assert!(number(&report, "ooms") > 0);
    assert!(number(&report, "peak_reserved_bytes") <= 8 << 20);
    assert_eq!(number(&report, "allocs"), 8);
}

#[test]
fn without_allocations_there_is_no_ratio_and_no_time() {
    let file = scratch("nothing.at", format!("{HEADER}m nothing\n").as_bytes());
    let report = json(&["replay", file.to_str().unwrap(), "--json", "--min-device"]);
    assert!(report["ratio"].is_null() && report["ns_per_pair"].is_null());
    assert_eq!(number(&report, "min_device_bytes"), 0);
}

#[test]
fn bad_traces_are_refused_with_line_and_reason() {
    let cut = [HEADER, "a 1 512 0\nf 1\na 2 51"].concat();
    let body = |lines: &str| [HEADER, lines].concat().into_bytes();
    let garbage: Vec<u8> = (0..4096_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let cases: [(&str, Vec<u8>, &str); 17] = [
        ("empty", Vec::new(), ":1: not a trace"),
        (
            "header-cut",
            b"#alloctrace v1 streams=2 na".to_vec(),
            ":1: the file ends in the middle",
        ),
        ("cut", cut.into_bytes(), ":4: the file ends in the middle"),
        (
            "unknown-event",
            body("a 1 512 0\nq 1\n"),
            ":3: unknown event \"q\"",
        ),
        (
            "double-free",
            body("a 1 512 0\nf 1\nf 1\n"),
            ":4: id 1 was already freed on line 3",
        ),
        ("unknown-id", body("f 7\n"), ":2: id 7 was never allocated"),
        (
            "live-id",
            body("a 1 1 0\na 1 1 0\n"),
            ":3: id 1 is already live",
        ),
        (
            "huge",
            body("a 1 18446744073709551616 0\n"),
            ":2: bytes 18446744073709551616 is too large",
        ),
        (
            "fields",
            body("a 1\n"),
            ":2: event a takes 2 or 3 fields, but has 1",
        ),
        (
            "negative",
            body("a 1 -512 0\n"),
            ":2: bytes \"-512\" is not a decimal number",
        ),
        (
            "used-after-free",
            body("a 1 512 0\nf 1\nr 1 1\n"),
            ":4: id 1 was already freed on line 3",
        ),
        (
            "bytes-within",
            [body("a 1 512 0\n"), vec![0xff, 0x00, 0xfe, b'\n']].concat(),
            ":3: not text",
        ),
        ("zeros", vec![0; 4096], ":1: "),
        ("zstd-garbage", b"\x28\xb5\x2f\xfdgarbage".to_vec(), ":1: "),
        ("stream", body("a 1 512 2\n"), ":2: stream 2 does not exist"),
        ("garbage", garbage, ":1: not a trace"),
        ("gzip-garbage", b"\x1f\x8b\x08\x00garbage".to_vec(), ":1: "),
    ];
    for (name, contents, expected) in cases {
        let file = scratch(&format!("{name}.at"), &contents);
        let file = file.to_str().unwrap();
        let told = refusal(&["replay", file], 2);
        assert!(
            told.starts_with(&format!("error: {file}{expected}")),
            "{name}: {told}"
        );
    }
}

/// A trace of some thousand lines.
fn long_trace() -> Vec<u8> {
    let lines = (0..2000_u64).map(|id| format!("a {id} {} 0\n", 512 * (id * id % 977)));
    [HEADER.to_owned(), lines.collect()].concat().into_bytes()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn compressed_files_that_are_damaged_are_refused_with_a_line() {
    let text = long_trace();
    let level = ruzstd::encoding::CompressionLevel::Fastest;
    let zstandard = ruzstd::encoding::compress_to_vec(&text[..], level);
    for (extension, whole) in [("gz", gzip(&text)), ("zst", zstandard)] {
        let replay = |name: &str, contents: &[u8]| {
            let file = scratch(&format!("{name}.at.{extension}"), contents);
            file.to_str().unwrap().to_owned()
        };
        let sound = replay("sound", &whole);
        let report = json(&["replay", &sound, "--json", "--repeats", "1"]);
        assert_eq!(number(&report, "allocs"), 2000);
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x10;
        let mut wrong_sum = whole.clone();
        *wrong_sum.last_mut().unwrap() ^= 1;
        let followed = [&whole[..], b"more"].concat();
        for (name, contents) in [
            ("cut", &whole[..whole.len() / 2]),
            ("almost", &whole[..whole.len() - 1]),
            ("flipped", &flipped),
            ("wrong-sum", &wrong_sum),
            ("followed", &followed),
        ] {
            let file = replay(name, contents);
            let told = refusal(&["replay", &file], 2);
            let place = told.strip_prefix(&format!("error: {file}:"));
            let place = place.unwrap_or_else(|| panic!("{name}.{extension}: {told}"));
            let (line, reason) = place.split_once(": ").unwrap();
            let line: u64 = line.parse().unwrap();
            assert!((1..=2002).contains(&line), "{name}.{extension}: {told}");
            assert!(reason.trim().len() > 3, "{name}.{extension}: {told}");
        }
    }
}

/// Digest, peak, driver calls and failures of a deterministic run.
fn placed(files: &[&str], flags: &[&str]) -> (String, u64, u64, u64) {
    let head = ["replay", "--json", "--repeats", "1", "--deterministic"];
    let report = json(&[&head[..], files, flags].concat());
    let digest = report["address_digest"].as_str().unwrap().to_owned();
    assert_eq!(digest.len(), 16);
    let figures = ["peak_reserved_bytes", "driver_allocs", "ooms"];
    let [peak, calls, ooms] = figures.map(|key| number(&report, key));
    (digest, peak, calls, ooms)
}

/// A trace with more than a small device holds, on four streams that use each other's blocks.
fn crowded(seed: u64) -> PathBuf {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut text = String::from("#alloctrace v1 streams=4 name=crowded\n");
    let mut live = Vec::new();
    for id in 0..3000_u64 {
        let bytes = match random.u32(0..10) {
            0..6 => random.u64(1..200_000),
            6..9 => random.u64(1..4 << 20),
            _ => random.u64(1..20 << 20),
        };
        text += &format!("a {id} {bytes} {}\n", random.u32(0..4));
        live.push(id);
        if random.u32(0..4) == 0 {
            let used = random.choice(&live).unwrap();
            text += &format!("r {used} {}\n", random.u32(0..4));
        }
        while live.len() > 40 || random.u32(0..3) == 0 && !live.is_empty() {
            text += &format!("f {}\n", live.swap_remove(random.usize(0..live.len())));
        }
        match random.u32(0..200) {
            0 => text += "t\n",
            1..4 => text += &format!("w {} {}\n", random.u32(0..4), random.u32(0..4)),
            _ => {}
        }
    }
    scratch(&format!("crowded-{seed}.at"), text.as_bytes())
}

#[test]
fn a_deterministic_replay_gives_the_same_addresses_and_peaks_on_every_run() {
    let (first, second) = (crowded(1), crowded(2));
    let [first, second] = [&first, &second].map(|file| file.to_str().unwrap());
    let mut digests = Vec::new();
    for (files, ooms) in [(&[first][..], false), (&[first, second], true)] {
        for flags in [
            &["--device-bytes", "128MiB"][..],
            &["--device-bytes", "128MiB", "--policy", "never"],
            &["--limit", "96MiB"],
        ] {
            let once = placed(files, flags);
            assert!(once.3 > 0 || !ooms, "memory is to be short: {once:?}");
            // Neither how far the device is nor in which order its streams get there matters.
            for pace in [&[][..], &["--event-lag", "1000", "--seed", "5"]] {
                assert_eq!(placed(files, &[flags, pace].concat()), once, "{flags:?}");
            }
            digests.push(once.0);
        }
    }
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(
        digests.len(),
        6,
        "each setting places blocks in its own way"
    );
}

#[test]
fn the_largest_size_is_no_crash() {
    let file = scratch(
        "largest.at",
        [HEADER, "a 1 18446744073709551615 0\nf 1\n"]
            .concat()
            .as_bytes(),
    );
    let report = json(&[
        "replay",
        file.to_str().unwrap(),
        "--json",
        "--repeats",
        "1",
        "--check",
    ]);
    assert_eq!(number(&report, "ooms"), 1);
}

#[test]
fn what_is_no_trace_file_is_refused() {
    assert!(refusal(&["replay", "/no/such/file.at"], 2).contains("/no/such/file.at: No such file"));
    assert!(refusal(&["replay", "tests"], 2).contains("tests: it is a directory"));
    assert!(refusal(&["replay"], 2).contains("<FILE>..."));
    // The second file is wrong, and is the one that is named.
    assert!(refusal(&["replay", TINY, "Cargo.toml"], 2).contains("Cargo.toml:1: not a trace"));
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let cases = [
        (["--limit", "1MiB"], "--limit: 1048576 bytes"),
        (["--limit", "200GiB"], "--limit: 214748364800 bytes"),
        (["--device-bytes", "1"], "--device-bytes: 1 B"),
        (["--device-bytes", "99999999TiB"], "more bytes"),
        (["--repeats", "0"], "0 is not in 1..=10000"),
        (["--policy", "always"], "never, only-complete, wait"),
        (["--event-lag", "-1"], "-1"),
        (["--seed", "18446744073709551616"], "number too large"),
    ];
    for (flags, expected) in cases {
        let told = refusal(&["replay", TINY, flags[0], flags[1]], 2);
        assert!(told.contains(expected), "{flags:?}: {told}");
    }
    let told = refusal(&["replay", TINY, "--min-device", "--limit", "8MiB"], 2);
    assert!(told.contains("cannot be used with"), "{told}");
    let told = refusal(
        &["replay", TINY, "--min-device", "--device-bytes", "4MiB"],
        1,
    );
    assert!(told.contains("do not fit on a device of 4.0 MiB"), "{told}");
}
