//! Fingerprints of data, to detect a run that is resumed with different data.

use serde::{Deserialize, Serialize};

/// Length and checksum of the training data. Different data of the same length has the same fingerprint with
/// probability 2⁻³².
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    bytes: u64,
    crc32: u32,
}

impl Fingerprint {
    /// The fingerprint of these parts, one after the other.
    pub(crate) fn of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let mut hasher = crc32fast::Hasher::new();
        let mut bytes = 0;
        for part in parts {
            hasher.update(part);
            bytes += part.len() as u64;
        }
        let crc32 = hasher.finalize();
        Self { bytes, crc32 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_and_its_place_count() {
        let whole = Fingerprint::of([&b"123456789"[..]]);
        // The check value of this checksum.
        let expected = Fingerprint {
            bytes: 9,
            crc32: 0xcbf4_3926,
        };
        assert_eq!(whole, expected);
        assert_eq!(whole, Fingerprint::of([&b"1234"[..], b"", b"56789"]));
        assert_ne!(whole, Fingerprint::of([&b"123456798"[..]]));
        assert_ne!(whole, Fingerprint::of([&b"12345678"[..]]));
    }
}
