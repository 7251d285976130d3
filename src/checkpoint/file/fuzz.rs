//! Files that nobody would write: whatever the bytes, the reader answers with the checkpoint that was written
//! or with one error that names the culprit, and never panics.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::dtype::f16;
use crate::fuzz::{changed, changes, fuzz};
use crate::optim::NamedTensors;

const CASES: u32 = 2048;

/// A checkpoint with tensors of several types, one without elements, and settings.
fn checkpoint() -> Checkpoint {
    let tensors = NamedTensors::from([
        (
            "a".to_owned(),
            HostTensor::from_slice([2, 3], &[1f32, 2.0, -0.0, 4.0, 5.0, 6.0]).unwrap(),
        ),
        (
            "b/moment".to_owned(),
            HostTensor::from_slice([3], &[f16::NAN; 3]).unwrap(),
        ),
        (
            "none".to_owned(),
            HostTensor::from_slice([0, 7], &[0f64; 0]).unwrap(),
        ),
        (
            "zero".to_owned(),
            HostTensor::from_slice([], &[7u32]).unwrap(),
        ),
    ]);
    let mut checkpoint = Checkpoint::new();
    checkpoint
        .add_part("part", &json!({"rate": 0.1, "names": ["a", "b"]}), tensors)
        .unwrap();
    checkpoint
        .add_extra("data", &json!({"order": [3, 1, 2], "next": u64::MAX}))
        .unwrap();
    let order = HostTensor::from_slice([2], &[1f64, f64::MIN_POSITIVE]).unwrap();
    checkpoint.add_extra_tensor("order", order).unwrap();
    checkpoint
}

fn file() -> Vec<u8> {
    checkpoint().to_bytes().unwrap().concat()
}

fn read(bytes: &[u8]) -> Result<Checkpoint, Error> {
    let read = Checkpoint::read_from(&mut &bytes[..], bytes.len() as u64);
    read.map_err(|error| match error {
        ReadError::Refused(error) => error,
        ReadError::Io(error) => panic!("memory does not fail: {error}"),
    })
}

/// The key and the line of a refusal.
fn refusal(bytes: &[u8]) -> (String, String) {
    match read(bytes) {
        Err(Error::InvalidState { key, reason }) => (key, reason),
        other => panic!("{other:?}"),
    }
}

/// Splits a file into its header as JSON, the state in it, and the rest.
fn parts(file: &[u8]) -> (Value, Value, Vec<u8>) {
    let length = u64::from_le_bytes(file[..8].try_into().unwrap());
    let (header, data) = file[8..].split_at(usize::try_from(length).unwrap());
    let header: Value = serde_json::from_slice(header).unwrap();
    let state = header["__metadata__"]["state"].as_str().unwrap();
    (
        header.clone(),
        serde_json::from_str(state).unwrap(),
        data.to_vec(),
    )
}

/// A file with this header as text.
fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), data].concat()
}

/// A file whose state is `state`, with its checksum.
fn with_state(state: &str) -> Vec<u8> {
    let (mut header, _, data) = parts(&file());
    header["__metadata__"]["state"] = json!(state);
    header["__metadata__"]["state_crc32"] = json!(crc32fast::hash(state.as_bytes()).to_string());
    with_header(&header.to_string(), &data)
}

/// A file whose header `change` changed.
fn with_changed(change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let (mut header, _, data) = parts(&file());
    change(&mut header);
    with_header(&header.to_string(), &data)
}

#[test]
fn what_was_written_is_read() {
    assert_eq!(read(&file()).unwrap(), checkpoint());
    assert_eq!(read(&with_changed(|_| ())).unwrap(), checkpoint());
    let empty = Checkpoint::new();
    assert_eq!(read(&empty.to_bytes().unwrap().concat()).unwrap(), empty);
}

#[test]
fn the_file_is_what_other_readers_of_safetensors_expect() {
    let file = file();
    let theirs = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(theirs.len(), 5);
    let tensor = theirs.tensor("part/a").unwrap();
    assert_eq!(
        (tensor.dtype(), tensor.shape()),
        (safetensors::Dtype::F32, &[2, 3][..])
    );
    let saved = checkpoint();
    assert_eq!(tensor.data(), saved.tensor("part", "a").unwrap().bytes());
    assert_eq!(theirs.tensor("part/none").unwrap().data(), b"");
    // Each begins at a multiple of its element's size.
    for (name, tensor) in theirs.iter() {
        let at = tensor.data().as_ptr() as usize - file.as_ptr() as usize;
        assert!(
            at.is_multiple_of(tensor.dtype().bitsize() / 8),
            "{name} at {at}"
        );
    }
    // And a file of theirs is understood, but is no training.
    let none: [(&str, safetensors::tensor::TensorView<'_>); 0] = [];
    let foreign = safetensors::serialize(none, None).unwrap();
    assert_eq!(
        refusal(&foreign).1,
        "tensors without the state of a training"
    );
}

#[test]
fn what_is_cut_off_or_added_to_is_refused() {
    let file = file();
    for keep in 0..file.len() {
        let (key, reason) = refusal(&file[..keep]);
        assert!(
            ["file", "header"].contains(&&key[..]),
            "{keep}: {key}: {reason}"
        );
    }
    let longer = [&file[..], b" "].concat();
    assert_eq!(refusal(&longer).0, "file");
}

#[test]
fn every_flipped_bit_is_found() {
    let file = file();
    let header = 8 + usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
    for at in 0..file.len() {
        for bit in 0..8 {
            let mut flipped = file.clone();
            flipped[at] ^= 1 << bit;
            match read(&flipped) {
                Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
                // Padding, or a key that nothing reads.
                Ok(read) => assert!(at < header && read == checkpoint(), "byte {at}"),
            }
        }
    }
}

#[test]
fn tensors_that_change_places_are_found() {
    let swapped = with_changed(|header| {
        let first = header["part/zero"]["data_offsets"].take();
        header["part/zero"]["data_offsets"] = json!([24, 28]);
        header["part/a"]["data_offsets"] = json!([0, 24]);
        assert_ne!(first, json!([24, 28]));
    });
    assert!(read(&swapped).is_err());
    // The order of the keys says nothing: their places do.
    let (header, _, data) = parts(&file());
    let entries = header.as_object().unwrap().iter().rev();
    let entries: Vec<_> = entries
        .map(|(name, entry)| format!("{}:{entry}", json!(name)))
        .collect();
    let reordered = with_header(&format!("{{{}}}", entries.join(",")), &data);
    assert_eq!(read(&reordered).unwrap(), checkpoint());
}

#[test]
fn hostile_entries_are_named() {
    let of = |dtype: &str, shape: Value, offsets: Value| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    let with = |name: &str, value: &Value| with_changed(|header| header[name] = value.clone());
    let (huge, right) = (1u64 << 63, json!([16, 40]));
    for value in [
        of("F32", json!([huge]), right.clone()),
        of("F32", json!([huge, huge, 0]), right.clone()),
        of("F32", json!([1u64 << 62, 4]), json!([0, huge])),
        of("F32", json!([2, 3]), json!([40, 16])),
        of("F32", json!([2, 3]), json!([8, 32])),
        of("F32", json!([2, 3]), json!([u64::MAX - 23, u64::MAX])),
        of("F32", json!([2, 3]), json!([16, 40, 41])),
        of("F32", json!([1, 1, 1, 1, 1, 1, 1, 2, 3]), right.clone()),
        of("F32", json!([-2, -3]), right.clone()),
        of("F32", json!([2, 3.0]), right.clone()),
        of("F32", json!([3, 2]), right.clone()),
        of("U32", json!([2, 3]), right.clone()),
        of("F128", json!([2, 3]), right.clone()),
        json!({"dtype": "F32", "shape": [2, 3], "data_offsets": right, "x": 1}),
        json!(null),
    ] {
        let (named, reason) = refusal(&with("part/a", &value));
        assert_eq!(named, "part/a", "{value}: {reason}");
    }
    let more = of("F32", json!([0]), json!([0, 0]));
    assert_eq!(refusal(&with("part/more", &more)).0, "checksums");
}

#[test]
fn hostile_headers_are_named() {
    for (key, value) in [("version", "3"), ("format", "x"), ("state", "{}")] {
        let file = with_changed(|header| header["__metadata__"][key] = json!(value));
        assert_eq!(refusal(&file).0, key);
    }
    let (header, _, data) = parts(&file());
    let twice = header.to_string().replacen('{', r#"{"part/a":{},"#, 1);
    let (key, reason) = refusal(&with_header(&twice, &data));
    let told = reason.contains("`part/a` stands twice");
    assert!(key == "header" && told, "{reason}");
    let deep = "[".repeat(1 << 20);
    let unfinished = r#"{"__metadata__": "#;
    for header in [unfinished, "[]", "{}", "", &deep, "\u{feff}{}"] {
        assert_eq!(refusal(&with_header(header, &[])).0, "header");
    }
    for length in [1 << 63, u64::MAX, HEADER_MAX + 1] {
        let file = [&length.to_le_bytes()[..], &[b' '; 100]].concat();
        assert_eq!(refusal(&file).0, "header");
    }
}

#[test]
fn hostile_states_name_the_culprit() {
    let (_, state, _) = parts(&file());
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut state = state.clone();
        change(&mut state);
        refusal(&with_state(&state.to_string()))
    };
    assert_eq!(
        changed(&|state| state["checksums"]["part/a"] = json!(1)).0,
        "part/a"
    );
    assert_eq!(changed(&|state| state["parts"] = json!({})).0, "part/none");
    assert_eq!(
        changed(&|state| state["parts"]["a/b"] = json!({})).0,
        "part"
    );
    assert_eq!(
        changed(&|state| state["parts"]["extra"] = json!({})).0,
        "part"
    );
    assert_eq!(
        changed(&|state| state["checksums"] = json!({})).0,
        "checksums"
    );
    assert_eq!(changed(&|state| state["more"] = json!({})).0, "state");
    let text = state.to_string();
    let twice = text.replacen("{", r#"{"parts":{},"#, 1);
    assert!(
        refusal(&with_state(&twice))
            .1
            .contains("`parts` stands twice")
    );
    let nan = text.replacen("0.1", "NaN", 1);
    assert_eq!(refusal(&with_state(&nan)).0, "state");
    let deep = text.replacen("0.1", &"[".repeat(100_000), 1);
    assert!(refusal(&with_state(&deep)).1.contains("recursion limit"));
}

/// Asserts that a refusal names something, in one line.
fn check(outcome: &Result<Checkpoint, Error>) -> Result<(), TestCaseError> {
    if let Err(error) = outcome {
        let told = error.to_string();
        prop_assert!(!told.contains('\n'), "{told:?}");
        let named = matches!(error, Error::InvalidState { key, reason } if !key.is_empty() && !reason.is_empty());
        prop_assert!(named, "{error:?}");
    }
    Ok(())
}

#[test]
fn changed_files_are_refused_or_the_same() {
    fuzz(CASES, &changes(), |changes| {
        let outcome = read(&changed(file(), &changes));
        check(&outcome)?;
        prop_assert!(outcome.map_or(true, |read| read == checkpoint()));
        Ok(())
    });
}

#[test]
fn changed_headers_and_states_are_answered() {
    fuzz(CASES, &(changes(), any::<bool>()), |(changes, in_state)| {
        let (header, state, data) = parts(&file());
        let text = if in_state { state } else { header }.to_string();
        let text = changed(text.into_bytes(), &changes);
        let text = String::from_utf8_lossy(&text);
        let file = if in_state {
            with_state(&text)
        } else {
            with_header(&text, &data)
        };
        check(&read(&file))
    });
}

#[test]
fn arbitrary_bytes_are_refused() {
    let lengths = prop_oneof![0..200_u64, any::<u64>()];
    let rest = prop::collection::vec(any::<u8>(), 0..200);
    fuzz(CASES, &(lengths, rest), |(length, rest)| {
        let outcome = read(&[&length.to_le_bytes()[..], &rest].concat());
        check(&outcome)?;
        prop_assert!(outcome.is_err());
        Ok(())
    });
}
