//! Reads the user's data files, up to a size limit.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::failure::Failure;

/// The size limit: enough for a hundred thousand images, and an end to files such as `/dev/zero`.
const BYTES_MAX: u64 = 16 << 20;

/// The UTF-8 byte-order mark that some editors write.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads `path` and parses its contents, without a leading byte-order mark, with `parse`. Errors name the file.
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
    // The reported length of a device or a pipe is meaningless, so limit the read instead.
    let read = File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes));
    match read {
        Ok(length) if length as u64 > BYTES_MAX => {
            Err(format!("larger than {} MiB", BYTES_MAX >> 20))
        }
        Ok(_) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}
