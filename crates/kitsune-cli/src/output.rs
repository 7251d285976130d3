//! Writes standard output and reports write errors. No other module writes to it.

use std::io::{self, Write};

use crate::failure::Failure;

/// Writes `text` and returns once the system has taken all of it.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    write_all(&mut io::stdout().lock(), text).map_err(|error| Failure::of_output(&error))
}

fn write_all(sink: &mut impl Write, text: &str) -> io::Result<()> {
    sink.write_all(text.as_bytes())?;
    if !text.ends_with('\n') {
        sink.write_all(b"\n")?;
    }
    // Flush, because an error while flushing at exit would be lost.
    sink.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_ends_with_one_line_feed() {
        let mut sink = Vec::new();
        write_all(&mut sink, "a").unwrap();
        write_all(&mut sink, "b\n").unwrap();
        assert_eq!(sink, b"a\nb\n");
    }
}
