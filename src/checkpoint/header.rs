//! The head of a file: which tensor lies where, and the rest of the state as JSON.
//!
//! The layout is that of safetensors, which many programs read: the length of a JSON object as eight bytes,
//! the object, then the tensors one after another. Each key of the object is a tensor's name; beside them
//! `__metadata__` maps strings to strings. There [`STATE`] holds what is not a tensor, as JSON text, and
//! [`CHECK`] the CRC-32 of that text; the text holds that of each tensor.
//!
//! The crate `safetensors` is not used to read: it takes the last of two tensors of one name, names no tensor
//! in the error of an impossible shape, and wants the whole file in memory first. A test holds this module
//! against it.
//!
//! Must not know: what sections and tensors are for.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::json;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::storage::Shape;

/// Most bytes of JSON. An end to what a file can make its reader allocate: room for 60,000 tensors with names of 40 characters.
pub(super) const HEADER_MAX: u64 = 16 << 20;

/// What a file says it is.
const FORMAT: &str = "kitsune checkpoint";
/// The version of everything in a file that is written.
const VERSION: &str = "2";
/// The versions that are read. In version 1 an optimizer's part is the list of its groups alone, a group has no flags,
/// and a schedule's has no form.
const READABLE: [&str; 2] = ["1", VERSION];

const METADATA: &str = "__metadata__";
const STATE: &str = "state";
const CHECK: &str = "state_crc32";

/// A tensor in the file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Shape,
    /// Length of its bytes.
    pub(super) bytes: u64,
}

/// What a file begins with. The tensors lie in the order of the entries, without gaps.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) entries: Vec<Entry>,
    pub(super) state: State,
}

/// What is no tensor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// CRC-32 of each tensor: of its type, shape and bytes.
    pub(super) checksums: BTreeMap<String, u32>,
    /// The settings of each part.
    pub(super) parts: BTreeMap<String, Value>,
    /// What the caller added.
    pub(super) extra: BTreeMap<String, Value>,
}

/// An entry as it is written.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The name of an element type in the file.
pub(super) fn name_of(dtype: DType) -> &'static str {
    match dtype {
        DType::F16 => "F16",
        DType::Bf16 => "BF16",
        DType::F32 => "F32",
        DType::F64 => "F64",
        DType::U32 => "U32",
        DType::F8E4M3 => "F8_E4M3",
        DType::F8E5M2 => "F8_E5M2",
    }
}

impl Header {
    /// The bytes up to the first tensor.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if they are more than a reader takes.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>> {
        let state = serde_json::to_string(&self.state);
        let state = state.map_err(|error| Error::state("state", error.to_string()))?;
        let check = crc32fast::hash(state.as_bytes()).to_string();
        let metadata = BTreeMap::from([
            ("format", FORMAT),
            ("version", VERSION),
            (STATE, &state),
            (CHECK, &check),
        ]);
        let mut object = serde_json::Map::new();
        object.insert(METADATA.to_owned(), serde_json::json!(metadata));
        let mut start = 0;
        for entry in &self.entries {
            let raw = RawEntry {
                dtype: name_of(entry.dtype).to_owned(),
                shape: entry.shape.iter().map(|length| *length as u64).collect(),
                data_offsets: [start, start + entry.bytes],
            };
            start += entry.bytes;
            object.insert(entry.name.clone(), serde_json::json!(raw));
        }
        let mut text = Value::Object(object).to_string();
        // So that the tensors begin at a multiple of eight bytes.
        text.extend(std::iter::repeat_n(
            ' ',
            text.len().next_multiple_of(8) - text.len(),
        ));
        if text.len() as u64 > HEADER_MAX {
            let reason = format!(
                "{} bytes of names and settings, more than {HEADER_MAX}; put large lists into tensors",
                text.len()
            );
            return Err(Error::state("header", reason));
        }
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        Ok(bytes)
    }

    /// What the bytes behind the length say, of a file with `data` bytes behind them.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the tensor or the part that cannot be.
    pub(super) fn parse(text: &[u8], data: u64) -> Result<Self> {
        let text =
            std::str::from_utf8(text).map_err(|error| Error::state("header", error.to_string()))?;
        let mut object: BTreeMap<String, Value> =
            json::parse(text).map_err(|reason| Error::state("header", reason))?;
        let Some(metadata) = object.remove(METADATA) else {
            return Err(Error::state(
                "header",
                "tensors without the state of a training",
            ));
        };
        let state = parse_state(metadata)?;
        let mut placed = Vec::with_capacity(object.len());
        for (name, raw) in object {
            placed.push(parse_entry(name, raw)?);
        }
        placed.sort_by(|one, other| {
            let key = |(start, entry): &(u64, Entry)| (*start, entry.bytes);
            key(one).cmp(&key(other))
        });
        let mut end = 0;
        for (start, entry) in &placed {
            if *start != end {
                let reason = format!("begins at byte {start}; the tensors before end at {end}");
                return Err(Error::state(&entry.name, reason));
            }
            // The parts of an entry were checked to add up.
            end = start + entry.bytes;
        }
        if end != data {
            let reason = format!("{data} bytes of tensors in the file, {end} in its header");
            return Err(Error::state("file", reason));
        }
        let entries: Vec<_> = placed.into_iter().map(|(_, entry)| entry).collect();
        let known = entries.len() == state.checksums.len()
            && entries
                .iter()
                .all(|entry| state.checksums.contains_key(&entry.name));
        if !known {
            return Err(Error::state(
                "checksums",
                "are not those of the tensors in the file",
            ));
        }
        Ok(Self { entries, state })
    }
}

fn parse_state(metadata: Value) -> Result<State> {
    let metadata: BTreeMap<String, String> = serde_json::from_value(metadata)
        .map_err(|error| Error::state(METADATA, error.to_string()))?;
    let text = |key: &str| metadata.get(key).map_or("", String::as_str);
    if text("format") != FORMAT {
        return Err(Error::state("format", format!("the file is no {FORMAT}")));
    }
    if !READABLE.contains(&text("version")) {
        let reason = format!(
            "{:?} is not known; this is version {VERSION}",
            text("version")
        );
        return Err(Error::state("version", reason));
    }
    let state = text(STATE);
    if text(CHECK) != crc32fast::hash(state.as_bytes()).to_string() {
        return Err(Error::state(
            STATE,
            "does not have its checksum: the file is damaged",
        ));
    }
    json::parse(state).map_err(|reason| Error::state(STATE, reason))
}

/// An entry and where it begins.
fn parse_entry(name: String, raw: Value) -> Result<(u64, Entry)> {
    let refuse = |reason: String| Err(Error::state(&name, reason));
    let raw: RawEntry = match serde_json::from_value(raw) {
        Ok(raw) => raw,
        Err(error) => return refuse(error.to_string()),
    };
    let known = DType::ALL
        .into_iter()
        .find(|dtype| name_of(*dtype) == raw.dtype);
    let Some(dtype) = known else {
        return refuse(format!("elements of type {:?} are not known", raw.dtype));
    };
    if raw.shape.len() > Shape::RANK_MAX {
        let most = Shape::RANK_MAX;
        return refuse(format!("{} dimensions, more than {most}", raw.shape.len()));
    }
    let lengths = raw.shape.iter().map(|length| usize::try_from(*length).ok());
    let shape = lengths
        .collect::<Option<Vec<_>>>()
        .map(|lengths| Shape::from(&lengths[..]));
    let elements = shape.as_ref().and_then(Shape::elements);
    let bytes = elements.and_then(|elements| dtype.bytes_for(elements as u64));
    let [start, end] = raw.data_offsets;
    match (shape, bytes) {
        (Some(shape), Some(bytes)) if end.checked_sub(start) == Some(bytes) => {
            let entry = Entry {
                name,
                dtype,
                shape,
                bytes,
            };
            Ok((start, entry))
        }
        _ => refuse(format!(
            "bytes {start} to {end} are not {:?} of {dtype}",
            raw.shape
        )),
    }
}
