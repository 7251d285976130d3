//! Files that nobody would write: whatever the bytes, the reader answers with events or with a line and a
//! reason, and never panics.

use std::io::{Cursor, Write};

use flate2::write::GzEncoder;
use proptest::prelude::*;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

use super::open::decompressed;
use super::{Event, TraceError, TraceReader};
use crate::fuzz::{changed, changes, fuzz};

const CASES: u32 = 512;

/// Reads a file of these bytes to its end or to the first error.
fn read(bytes: Vec<u8>) -> Result<Vec<Event>, TraceError> {
    let text = decompressed(Cursor::new(bytes)).map_err(|error| super::Reason::Io(error).at(0))?;
    TraceReader::new(text)?.collect()
}

/// Asserts that a refusal says where and why, in one line.
fn check(outcome: Result<Vec<Event>, TraceError>, lines: usize) -> Result<(), TestCaseError> {
    let Err(error) = outcome else {
        return Ok(());
    };
    let (line, message) = (error.line, error.to_string());
    prop_assert!(line <= lines as u64 + 1, "{message} in {lines} lines");
    let told = message.strip_prefix(&format!("{line}: "));
    prop_assert!(told.is_some_and(|reason| !reason.is_empty()), "{message:?}");
    prop_assert!(!message.contains('\n'), "{message:?}");
    Ok(())
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text).expect("a vector takes all");
    encoder.finish().expect("a vector takes all")
}

fn zstandard(text: &[u8]) -> Vec<u8> {
    compress_to_vec(text, CompressionLevel::Fastest)
}

/// A valid trace of `blocks` blocks.
fn valid(blocks: u64) -> Vec<u8> {
    let mut text = String::from("#alloctrace v1 streams=3 name=fuzz seed=1\n");
    for id in 0..blocks {
        text += &format!("a {id} {} {}\nr {id} 1\n", id * 4096, id % 3);
        if id % 4 == 3 {
            text += &format!("f {}\nw 0 1\nk 2\nm step {id}\n", id - 2);
        }
    }
    text.into_bytes()
}

#[test]
fn arbitrary_bytes_behind_any_head_are_answered() {
    let heads = prop::sample::select(vec![
        &b""[..],
        b"\x1f\x8b",
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03",
        b"\x28\xb5\x2f\xfd",
        b"\x28\xb5\x2f\xfd\x04\x58",
        b"#alloctrace v1 streams=2 name=x\n",
        b"\xef\xbb\xbf#alloctrace v1 streams=2 name=x\n",
        b"\xef\xbb\xbf",
    ]);
    let rest = prop::collection::vec(any::<u8>(), 0..400);
    fuzz(CASES, &(heads, rest), |(head, rest)| {
        let outcome = read([head, &rest].concat());
        // Compressed lines can be many more than the file has.
        let is_plain = head.ends_with(b"\n");
        check(
            outcome,
            if is_plain {
                rest.len() + 1
            } else {
                usize::MAX - 1
            },
        )
    });
}

#[test]
fn changed_traces_are_answered() {
    fuzz(CASES, &(1..40_u64, changes()), |(blocks, changes)| {
        let text = changed(valid(blocks), &changes);
        let lines = text.iter().filter(|byte| **byte == b'\n').count();
        check(read(text), lines)
    });
}

#[test]
fn changed_compressed_traces_are_answered() {
    let strategy = (1..40_u64, changes(), any::<bool>());
    fuzz(CASES, &strategy, |(blocks, changes, is_gzip)| {
        let compress = if is_gzip { gzip } else { zstandard };
        let file = changed(compress(&valid(blocks)), &changes);
        check(read(file), usize::MAX - 1)
    });
}

#[test]
fn marks_line_ends_and_empty_ends_change_nothing() {
    let ends = prop::collection::vec(prop::sample::select(vec!["\n", "\r\n", " \t\n"]), 0..5);
    let tail = prop::sample::select(vec!["", " ", "\t  ", "\r"]);
    let strategy = (1..20_u64, any::<bool>(), any::<bool>(), ends, tail);
    fuzz(
        CASES,
        &strategy,
        |(blocks, has_mark, is_windows, ends, tail)| {
            let plain = String::from_utf8(valid(blocks)).expect("text");
            let events = read(plain.clone().into_bytes()).expect("a trace");
            let lines = match is_windows {
                true => plain.replace('\n', "\r\n"),
                false => plain,
            };
            let mark = if has_mark { "\u{feff}" } else { "" };
            let text = format!("{mark}{lines}{}{tail}", ends.concat());
            prop_assert_eq!(read(text.into_bytes()).ok(), Some(events));
            Ok(())
        },
    );
}

#[test]
fn files_cut_off_anywhere_are_refused() {
    let text = valid(30);
    for whole in [gzip(&text), zstandard(&text)] {
        assert!(read(whole.clone()).is_ok());
        for keep in 0..whole.len() {
            let error = read(whole[..keep].to_vec()).expect_err("a part is no trace");
            assert!(!error.to_string().is_empty(), "{keep}");
        }
    }
    // A plain file cut behind a newline is a trace, a shorter one.
    for keep in 0..text.len() {
        let is_whole = keep > 0 && text[keep - 1] == b'\n';
        assert_eq!(read(text[..keep].to_vec()).is_ok(), is_whole, "{keep}");
    }
}
