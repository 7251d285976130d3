//! Trace files, plain or compressed.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use ruzstd::decoding::{FrameDecoder, StreamingDecoder};

use super::{Reason, TraceError, TraceReader};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTANDARD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Opens a trace file; whether it is gzip, Zstandard or plain text is found in its first bytes.
///
/// # Errors
/// [`TraceError`], with line 0 if the file cannot be opened, else as [`TraceReader::new`].
pub fn open(path: &Path) -> Result<TraceReader<Box<dyn BufRead + Send>>, TraceError> {
    TraceReader::new(text(path).map_err(|error| Reason::Io(error).at(0))?)
}

/// The file's text, decompressed.
fn text(path: &Path) -> io::Result<Box<dyn BufRead + Send>> {
    let file = File::open(path)?;
    if file.metadata()?.is_dir() {
        return Err(io::Error::new(
            io::ErrorKind::IsADirectory,
            "it is a directory",
        ));
    }
    decompressed(file)
}

/// The text in `file`, which may be compressed.
pub(super) fn decompressed(
    mut file: impl Read + Send + 'static,
) -> io::Result<Box<dyn BufRead + Send>> {
    let mut head = Vec::with_capacity(ZSTANDARD.len());
    (&mut file)
        .take(ZSTANDARD.len() as u64)
        .read_to_end(&mut head)?;
    let kind = head.clone();
    // What was read is put back in front of the rest: a pipe cannot be wound back.
    let file = BufReader::new(io::Cursor::new(head).chain(file));
    Ok(if kind.starts_with(&GZIP) {
        Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file)))
    } else if kind == ZSTANDARD {
        Box::new(BufReader::new(ZstandardFrames::Between(file)))
    } else {
        Box::new(file)
    })
}

/// The text of a Zstandard file: one frame after the other, each checked against its checksum.
///
/// The decoder below knows one frame and no checksum. A file of several frames, as parallel compressors
/// and `cat` make them, would end early without a word.
enum ZstandardFrames<R: BufRead> {
    Between(R),
    Within(Box<StreamingDecoder<R, FrameDecoder>>),
    /// After an error, which leaves the place in the file unknown.
    Over,
}

impl<R: BufRead> ZstandardFrames<R> {
    /// Enters the next frame, or the text's end.
    fn enter(mut source: R) -> io::Result<Self> {
        if source.fill_buf()?.is_empty() {
            return Ok(Self::Over);
        }
        let decoder = StreamingDecoder::new(source).map_err(io::Error::other)?;
        Ok(Self::Within(Box::new(decoder)))
    }

    /// Leaves a frame whose text is at its end.
    fn leave(decoder: StreamingDecoder<R, FrameDecoder>) -> io::Result<Self> {
        let told = decoder.decoder.get_checksum_from_data();
        if told.is_some() && told != decoder.decoder.get_calculated_checksum() {
            let message = "the Zstandard checksum does not match";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Self::Between(decoder.into_inner()))
    }
}

impl<R: BufRead> Read for ZstandardFrames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            *self = match std::mem::replace(self, Self::Over) {
                Self::Over => return Ok(0),
                Self::Between(source) => Self::enter(source)?,
                Self::Within(mut decoder) => match decoder.read(buffer)? {
                    0 if !buffer.is_empty() => Self::leave(*decoder)?,
                    read => {
                        *self = Self::Within(decoder);
                        return Ok(read);
                    }
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};

    use super::*;

    const FIRST: &str = "#alloctrace v1 streams=1 name=x\na 1 512 0\n";
    const REST: &str = "a 2 512 0\nf 1\nf 2\n";

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn zstandard(text: &str) -> Vec<u8> {
        compress_to_vec(text.as_bytes(), CompressionLevel::Fastest)
    }

    /// Number of events in a file of these bytes, or its error.
    fn events(name: &str, bytes: &[u8]) -> Result<usize, String> {
        let path = std::env::temp_dir().join(format!("kitsune-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        let reader = open(&path);
        let events = reader.and_then(|reader| reader.collect::<Result<Vec<_>, _>>());
        std::fs::remove_file(&path).unwrap();
        events
            .map(|events| events.len())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn plain_and_compressed_files_in_one_or_several_parts_are_read() {
        assert_eq!(events("plain", [FIRST, REST].concat().as_bytes()), Ok(4));
        for (name, compress) in [("gz", gzip as fn(&str) -> Vec<u8>), ("zst", zstandard)] {
            assert_eq!(events(name, &compress(&[FIRST, REST].concat())), Ok(4));
            assert_eq!(
                events(name, &[compress(FIRST), compress(REST)].concat()),
                Ok(4)
            );
        }
    }

    #[test]
    fn damaged_files_are_refused() {
        for (name, compress) in [
            ("cut.gz", gzip as fn(&str) -> Vec<u8>),
            ("cut.zst", zstandard),
        ] {
            let whole = [compress(FIRST), compress(REST)].concat();
            for keep in [compress(FIRST).len() + 5, whole.len() - 1] {
                let error = events(name, &whole[..keep]).unwrap_err();
                assert!(
                    error.starts_with("3: ") || error.starts_with("6: "),
                    "{keep}: {error}"
                );
            }
            let mut flipped = whole;
            *flipped.last_mut().unwrap() ^= 1;
            assert!(
                events(name, &flipped).is_err(),
                "a checksum or length that is wrong"
            );
        }
        let followed = [zstandard(FIRST), b"trailing".to_vec()].concat();
        assert!(events("tail.zst", &followed).is_err());
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let error = |path: &Path| open(path).map(drop).unwrap_err().to_string();
        assert_eq!(error(&std::env::temp_dir()), "0: it is a directory");
        assert!(error(Path::new("/no/such/trace")).starts_with("0: "));
        assert!(
            events("empty", b"")
                .unwrap_err()
                .starts_with("1: not a trace")
        );
    }
}
