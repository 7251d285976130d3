//! Tests that need a process for themselves, such as those that change a limit of the process.
//!
//! cargo-nextest gives every test a process. Under `cargo test` such a test runs this program once more, for itself
//! alone, and reports how that went.

#![allow(dead_code, reason = "a program takes the suites it needs")]

use std::ffi::OsStr;
use std::process::{Command, Output};

/// Set in the process that a test made for itself.
const ALONE: &str = "KITSUNE_TEST_ALONE";

/// Runs `test`, which is the body of the test `name`, in a process that runs nothing else. `name` is what
/// [`test_name`] gives.
pub(crate) fn alone(name: &str, test: impl FnOnce()) {
    let is_alone = std::env::var_os("NEXTEST").is_some() || std::env::var_os(ALONE).is_some();
    if is_alone {
        return test();
    }
    let output = again(name, [(ALONE, "1")]);
    let told = [output.stdout, output.stderr].concat();
    let told = String::from_utf8_lossy(&told);
    // A name that is no test runs nothing, successfully.
    let has_run = told.contains("1 passed");
    assert!(output.status.success() && has_run, "{name} alone: {told}");
}

/// Runs the test `name` of this program in another process with these variables.
pub(crate) fn again<K: AsRef<OsStr>, V: AsRef<OsStr>>(
    name: &str,
    variables: impl IntoIterator<Item = (K, V)>,
) -> Output {
    let program = std::env::current_exe().expect("a test knows its file");
    Command::new(program)
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .envs(variables)
        .output()
        .expect("a test can be run again")
}

/// The name of a test of this module as the test program knows it: its path without the crate.
macro_rules! test_name {
    ($name:expr) => {{
        let path = concat!(module_path!(), "::", $name);
        path.split_once("::").expect("a module is in a crate").1
    }};
}

pub(crate) use test_name;
