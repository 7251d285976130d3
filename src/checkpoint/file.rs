//! A checkpoint as a file.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::path::Path;

use super::header::{Entry, HEADER_MAX, Header, State, name_of};
use super::replace::replace;
use super::{Checkpoint, EXTRA, Part, check_part_name};
use crate::error::{Error, Result};
use crate::storage::HostTensor;
use crate::units::to_usize;

/// Bytes of the number that tells how long the header is.
const LENGTH_BYTES: usize = size_of::<u64>();

impl Checkpoint {
    /// Makes `path` a file of this. It has its name only when all of it is on the disk; until then a file that was
    /// there stays as it is.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written, with nothing left behind; [`Error::InvalidState`] for more than
    /// 16 MiB of names and settings.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<()> {
        little_endian()?;
        let runs = self.to_bytes()?;
        replace(path.as_ref(), |file| {
            runs.iter().try_for_each(|run| file.write_all(run))
        })
    }

    /// The bytes of the file, as runs one after another.
    fn to_bytes(&self) -> Result<Vec<Cow<'_, [u8]>>> {
        let mut tensors = self.tensors();
        // The widest elements first, so that all of them begin at a multiple of their size.
        tensors.sort_by_key(|(_, tensor)| Reverse(tensor.dtype().bits()));
        let entry = |(name, tensor): &(String, &HostTensor)| Entry {
            name: name.clone(),
            dtype: tensor.dtype(),
            shape: tensor.shape().clone(),
            bytes: tensor.bytes().len() as u64,
        };
        let check = |(name, tensor): &(String, &HostTensor)| (name.clone(), checksum(tensor));
        let settings = |(name, part): (&String, &Part)| (name.clone(), part.settings.clone());
        let header = Header {
            entries: tensors.iter().map(entry).collect(),
            state: State {
                checksums: tensors.iter().map(check).collect(),
                parts: self.parts.iter().map(settings).collect(),
                extra: self.extra.clone(),
            },
        };
        let header = Cow::Owned(header.to_bytes()?);
        let elements = tensors
            .iter()
            .map(|(_, tensor)| Cow::Borrowed(tensor.bytes()));
        Ok(std::iter::once(header).chain(elements).collect())
    }

    /// Reads a file that [`write`](Self::write) made, and checks that it is whole.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be read; [`Error::InvalidState`] with the culprit if it is anything else.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        little_endian()?;
        let failed = |source| Error::File {
            action: "read",
            path: path.as_ref().to_owned(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            let reason = "not a regular file";
            return Err(failed(io::Error::new(ErrorKind::InvalidInput, reason)));
        }
        Self::read_from(&mut BufReader::new(file), about.len()).map_err(|error| match error {
            ReadError::Refused(error) => error,
            ReadError::Io(error) => failed(error),
        })
    }

    /// Reads `bytes` bytes of `source`.
    fn read_from(source: &mut impl Read, bytes: u64) -> Result<Self, ReadError> {
        let mut length = [0; LENGTH_BYTES];
        let Some(rest) = bytes.checked_sub(LENGTH_BYTES as u64) else {
            return Err(Error::state("file", format!("{bytes} bytes are no checkpoint")).into());
        };
        source.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        if length > rest || length > HEADER_MAX {
            let reason = format!("of {length} bytes, in a file of {bytes}; at most {HEADER_MAX}");
            return Err(Error::state("header", reason).into());
        }
        let mut text = vec![0; to_usize(length)];
        source.read_exact(&mut text)?;
        let header = Header::parse(&text, rest - length)?;
        let mut checkpoint = Self {
            extra: header.state.extra,
            ..Self::default()
        };
        for (name, settings) in header.state.parts {
            check_part_name(&name)?;
            let part = Part {
                settings,
                ..Part::default()
            };
            checkpoint.parts.insert(name, part);
        }
        for entry in header.entries {
            // No longer than the rest of the file: the entries add up to it.
            let mut bytes = vec![0; to_usize(entry.bytes)];
            source.read_exact(&mut bytes)?;
            let tensor = HostTensor::new(entry.dtype, entry.shape, bytes)?;
            if header.state.checksums.get(&entry.name) != Some(&checksum(&tensor)) {
                let reason = "does not have its checksum: the file is damaged";
                return Err(Error::state(entry.name, reason).into());
            }
            checkpoint.place(entry.name, tensor)?;
        }
        Ok(checkpoint)
    }

    /// All tensors by their names in the file.
    fn tensors(&self) -> Vec<(String, &HostTensor)> {
        let of_parts = self.parts.iter().flat_map(|(part, content)| {
            let tensors = content.tensors.iter();
            tensors.map(move |(name, tensor)| (format!("{part}/{name}"), tensor))
        });
        let extra = self.extra_tensors.iter();
        let extra = extra.map(|(name, tensor)| (format!("{EXTRA}/{name}"), tensor));
        of_parts.chain(extra).collect()
    }

    fn place(&mut self, full: String, tensor: HostTensor) -> Result<()> {
        let (part, name) = full.split_once('/').unwrap_or(("", &full));
        if part == EXTRA {
            self.extra_tensors.insert(name.to_owned(), tensor);
            return Ok(());
        }
        match self.parts.get_mut(part) {
            Some(part) => {
                part.tensors.insert(name.to_owned(), tensor);
                Ok(())
            }
            None => Err(Error::state(full, "a tensor of no part")),
        }
    }
}

/// CRC-32 of what stands before the elements, `F32[2, 3]`, and of their bytes.
fn checksum(tensor: &HostTensor) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let kind = format!("{}{}", name_of(tensor.dtype()), tensor.shape());
    hasher.update(kind.as_bytes());
    hasher.update(tensor.bytes());
    hasher.finalize()
}

/// Refuses machines whose memory is not laid out as the file is.
fn little_endian() -> Result<()> {
    if cfg!(target_endian = "big") {
        let reason = "checkpoints are little-endian, and this machine is not";
        return Err(Error::argument("Checkpoint", reason));
    }
    Ok(())
}

/// Why reading ended.
#[derive(Debug)]
enum ReadError {
    Refused(Error),
    Io(io::Error),
}

impl From<Error> for ReadError {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

#[cfg(test)]
mod fuzz;
