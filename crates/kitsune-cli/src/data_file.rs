//! Files of data, which are the user's: read as far as they may go.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// Room for a hundred thousand images, and an end to files that have none.
const BYTES_MAX: u64 = 16 << 20;

/// What some editors put in front of text in UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What `parse` makes of the contents of `path`, without a byte-order mark in front; whatever is wrong is told with the file's name.
pub(crate) fn load<T>(
    path: &Path,
    parse: impl FnOnce(&[u8]) -> Result<T, String>,
) -> Result<T, Failure> {
    read(path)
        .and_then(|bytes| parse(bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes)))
        .map_err(|reason| Failure::Input(format!("{}: {reason}", path.display())))
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    // What a system says of the length of a device or a pipe means nothing.
    let read = File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Ok(length) if length as u64 > BYTES_MAX => {
            Err(format!("larger than {} MiB", BYTES_MAX >> 20))
        }
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}
