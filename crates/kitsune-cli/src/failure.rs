//! Failures that end a run early, reported as one line on standard error and an exit code.

use std::io::{self, Write};
use std::process::ExitCode;

/// Why the command stops.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The user's input is invalid: exit code 2.
    Input(String),
    /// The input is valid, but the run failed: exit code 1.
    Run(String),
    /// The reader of standard output has closed it, as `head` does: no message, exit code 0.
    ReaderGone,
}

impl Failure {
    /// Reports the failure to the user and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        let (message, code) = match self {
            Self::Input(message) => (message, 2),
            Self::Run(message) => (message, 1),
            Self::ReaderGone => return ExitCode::SUCCESS,
        };
        // If standard error is closed too, only the exit code reports the failure.
        let _ = writeln!(io::stderr(), "error: {}", one_line(message));
        ExitCode::from(code)
    }

    /// The failure for an error while writing standard output.
    pub(crate) fn of_output(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ReaderGone,
            _ => Self::Run(format!("cannot write to standard output: {error}")),
        }
    }
}

impl From<kitsune::Error> for Failure {
    fn from(error: kitsune::Error) -> Self {
        match &error {
            kitsune::Error::OutOfMemory(report) if report.limited => {
                Self::Input(format!("--limit is too small: {error}"))
            }
            // For settings that have a flag, name the flag.
            kitsune::Error::InvalidConfig { key, reason } => Self::Input(match *key {
                "limit" => format!("--limit: {reason}"),
                "capacity" => format!("--device-bytes: {reason}"),
                _ => error.to_string(),
            }),
            _ => Self::Run(error.to_string()),
        }
    }
}

/// Warns the user of something that does not stop the run.
pub(crate) fn warn(message: &str) {
    // If standard error is closed, the warning is lost.
    let _ = writeln!(io::stderr(), "warning: {}", one_line(message));
}

/// `text` on one line: runs of white space become one space, and other control characters are escaped, so that text
/// from a user or a file cannot control the terminal.
pub(crate) fn one_line(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let mut line = String::with_capacity(text.len());
    for c in words.join(" ").chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_fit_on_one_line() {
        assert_eq!(one_line(" a\n\t b\r\nc\u{1b}[2J "), "a b c\\u{1b}[2J");
    }

    #[test]
    fn a_reader_that_left_is_no_failure() {
        let pipe = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(matches!(Failure::of_output(&pipe), Failure::ReaderGone));
        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert!(matches!(Failure::of_output(&full), Failure::Run(_)));
    }
}
