//! Runs the `kitsune` command as a user does.

use std::process::Command;

use serde_json::Value;

/// The command with these arguments, in the root of the repository.
pub(crate) fn kitsune(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kitsune"));
    command
        .args(arguments)
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    command
}

/// The JSON object of a run that succeeds and says nothing else.
pub(crate) fn json(arguments: &[&str]) -> Value {
    let output = kitsune(arguments).output().expect("the command was built");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.is_empty(),
        "{arguments:?} said: {told}"
    );
    serde_json::from_slice(&output.stdout).expect("standard output is one JSON value")
}

/// The one line on standard error of a run that ends with exit code `code`.
pub(crate) fn refusal(arguments: &[&str], code: i32) -> String {
    let output = kitsune(arguments).output().expect("the command was built");
    let told = String::from_utf8(output.stderr).expect("messages are UTF-8");
    assert_eq!(
        output.status.code(),
        Some(code),
        "{arguments:?} said: {told}"
    );
    assert!(
        output.stdout.is_empty(),
        "{arguments:?} wrote to standard output"
    );
    assert!(
        told.starts_with("error: ") && told.ends_with('\n'),
        "{arguments:?} said: {told}"
    );
    assert_eq!(told.lines().count(), 1, "{arguments:?} said: {told}");
    told
}
