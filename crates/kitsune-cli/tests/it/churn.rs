//! `kitsune churn` as a user has it: every workload runs and keeps its contents, and flags that say nothing
//! are refused.

use crate::command::{json, refusal};

const WORKLOADS: [&str; 9] = [
    "random",
    "multi-stream",
    "lifo",
    "producer-consumer",
    "hot",
    "varying-length",
    "priming",
    "vectors",
    "fuzz",
];

#[test]
fn every_workload_runs_and_keeps_its_contents() {
    for workload in WORKLOADS {
        for threads in ["2", "4"] {
            let report = json(&[
                "churn",
                "--workload",
                workload,
                "--allocs",
                "300",
                "--threads",
                threads,
                "--streams",
                "2",
                "--repeats",
                "1",
                "--json",
                "--check",
            ]);
            assert_eq!(report["ooms"], 0, "{workload}: {report}");
            assert!(
                report["allocs"].as_u64() >= Some(300),
                "{workload}: {report}"
            );
            assert!(
                report["ns_per_pair"].as_f64() > Some(0.0),
                "{workload}: {report}"
            );
            assert!(
                report["malloc_ns_per_pair"].as_f64() > Some(0.0),
                "{workload}: {report}"
            );
            let bytes = |key: &str| report[key].as_u64();
            assert!(
                bytes("peak_requested_bytes") <= bytes("peak_reserved_bytes"),
                "{report}"
            );
        }
    }
}

#[test]
fn the_seed_gives_the_work() {
    let peak = |seed: &str| {
        let line = [
            "churn",
            "--workload",
            "random",
            "--allocs",
            "200",
            "--max-mib",
            "1",
        ];
        let flags = ["--repeats", "1", "--json", "--seed", seed];
        json(&[line.as_slice(), &flags].concat())["peak_requested_bytes"].as_u64()
    };
    assert_eq!(peak("3"), peak("3"));
    assert_ne!(peak("3"), peak("4"));
}

#[test]
fn a_hot_pair_asks_the_driver_once() {
    let report = json(&[
        "churn",
        "--workload",
        "hot",
        "--allocs",
        "1000",
        "--repeats",
        "1",
        "--json",
    ]);
    assert_eq!(
        (&report["driver_allocs"], &report["driver_calls_steady"]),
        (&1.into(), &0.into())
    );
    assert_eq!(
        (&report["events_recorded"], &report["host_syncs"]),
        (&0.into(), &0.into())
    );
    assert_eq!(report["peak_requested_bytes"], 512);
}

#[test]
fn priming_takes_nine_tenths_of_the_device_in_a_hundred_blocks() {
    for threads in ["1", "3"] {
        let line = ["churn", "--workload", "priming", "--allocs", "200"];
        let flags = ["--device-bytes", "1GiB", "--threads", threads];
        let rest = ["--repeats", "1", "--json"];
        let report = json(&[line.as_slice(), &flags, &rest].concat());
        let peak = report["peak_requested_bytes"].as_u64();
        // Threads need not be at their peaks at once.
        let least = if threads == "1" { 0.899 } else { 0.2 };
        let whole = f64::from(1 << 30);
        let share = peak.map(|peak| peak as f64 / whole);
        assert!(share >= Some(least) && share <= Some(0.9), "{report}");
        assert_eq!(report["ooms"], 0, "{report}");
    }
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    let cases: [(&[&str], &str); 8] = [
        (&[], "--workload"),
        (&["--workload", "pingpong"], "possible values: random"),
        (&["--workload", "random", "--bytes", "512"], "--bytes"),
        (&["--workload", "hot", "--max-mib", "4"], "--max-mib"),
        (&["--workload", "hot", "--allocs", "0"], "0 is not in 1.."),
        (
            &["--workload", "hot", "--allocs", "999999999999"],
            "--allocs",
        ),
        (
            &["--workload", "producer-consumer", "--threads", "3"],
            "--threads 3",
        ),
        (&["--workload", "hot", "--limit", "1MiB"], "limit"),
    ];
    for (flags, expected) in cases {
        let told = refusal(&[&["churn"], flags].concat(), 2);
        assert!(told.contains(expected), "{flags:?}: {told}");
    }
}
