//! One line of text as a header or an event, whatever the lines around it say.

use smallvec::SmallVec;

use super::error::{Reason, shortened};
use super::{Event, Header, STREAMS_MAX, THREADS_MAX};

/// Reads the first line.
pub(super) fn header(line: &str) -> Result<Header, Reason> {
    let mut words = line.split_ascii_whitespace();
    if words.next() != Some("#alloctrace") {
        return Err(Reason::NoHeader);
    }
    match words.next() {
        Some("v1") => {}
        Some(version) => return Err(Reason::Version(shortened(version))),
        None => return Err(Reason::NoHeader),
    }
    let (mut streams, mut threads, mut name, mut others) = (None, None, None, Vec::new());
    for word in words {
        let Some((key, value)) = word.split_once('=') else {
            return Err(Reason::Header(format!(
                "{:?} is not key=value",
                shortened(word)
            )));
        };
        let earlier = match key {
            "streams" => streams.replace(stream_count(value)?).is_some(),
            "threads" => threads.replace(thread_count(value)?).is_some(),
            "name" => name.replace(value.to_owned()).is_some(),
            _ => {
                others.push((key.to_owned(), value.to_owned()));
                false
            }
        };
        if earlier {
            return Err(Reason::Header(format!("{key} is given twice")));
        }
    }
    let missing = |key| Reason::Header(format!("{key}= is missing"));
    Ok(Header {
        streams: streams.ok_or_else(|| missing("streams"))?,
        threads: threads.unwrap_or(1),
        name: name.ok_or_else(|| missing("name"))?,
        others,
    })
}

fn stream_count(text: &str) -> Result<u32, Reason> {
    match text.parse() {
        Ok(count @ 1..=STREAMS_MAX) => Ok(count),
        _ => Err(Reason::streams_out_of_range(&shortened(text))),
    }
}

fn thread_count(text: &str) -> Result<u32, Reason> {
    match text.parse() {
        Ok(count @ 1..=THREADS_MAX) => Ok(count),
        _ => Err(Reason::threads_out_of_range(&shortened(text))),
    }
}

/// Reads a later line; `None` for one that means nothing.
pub(super) fn event(line: &str, header: &Header) -> Result<Option<Event>, Reason> {
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with('#') {
        return Ok(None);
    }
    let (name, rest) = line
        .split_once(|c: char| c.is_ascii_whitespace())
        .unwrap_or((line, ""));
    if name == "m" {
        return Ok(Some(Event::Mark(rest.trim_ascii().to_owned())));
    }
    let stream = |text: &str| stream(text, header.streams);
    let fields: SmallVec<[&str; 4]> = rest.split_ascii_whitespace().collect();
    let event = match (name, fields.as_slice()) {
        ("a", [id, bytes]) => Event::Allocate {
            id: self::id(id)?,
            bytes: number("bytes", bytes, 64)?,
            stream: 0,
        },
        ("a", [id, bytes, home]) => Event::Allocate {
            id: self::id(id)?,
            bytes: number("bytes", bytes, 64)?,
            stream: stream(home)?,
        },
        ("f", [id]) => Event::Free {
            id: self::id(id)?,
            stream: None,
        },
        ("f", [id, other]) => Event::Free {
            id: self::id(id)?,
            stream: Some(stream(other)?),
        },
        ("r", [id, user]) => Event::RecordStream {
            id: self::id(id)?,
            stream: stream(user)?,
        },
        ("w", [waiter, signaller]) => Event::Wait {
            waiter: stream(waiter)?,
            signaller: stream(signaller)?,
        },
        ("s", []) => Event::Synchronize { stream: None },
        ("s", [only]) => Event::Synchronize {
            stream: Some(stream(only)?),
        },
        ("t", []) => Event::Trim,
        ("h", [next]) => Event::Thread {
            thread: thread(next, header.threads)?,
        },
        ("k", [place]) => Event::Kernel {
            stream: stream(place)?,
        },
        (_, fields) => return Err(no_event(name, fields.len())),
    };
    Ok(Some(event))
}

/// Why a line is no event: its name, or the number of its fields.
fn no_event(name: &str, found: usize) -> Reason {
    let expected = match name {
        "a" => "2 or 3",
        "f" => "1 or 2",
        "r" | "w" => "2",
        "s" => "0 or 1",
        "t" => "0",
        "h" | "k" => "1",
        _ => return Reason::UnknownEvent(shortened(name)),
    };
    Reason::FieldCount {
        event: name.to_owned(),
        expected,
        found,
    }
}

fn id(text: &str) -> Result<u64, Reason> {
    number("id", text, 63)
}

fn stream(text: &str, streams: u32) -> Result<u32, Reason> {
    let stream = number("stream", text, 32)?;
    match u32::try_from(stream) {
        Ok(stream) if stream < streams => Ok(stream),
        _ => Err(Reason::NoSuchStream { stream, streams }),
    }
}

fn thread(text: &str, threads: u32) -> Result<u32, Reason> {
    let thread = number("thread", text, 32)?;
    match u32::try_from(thread) {
        Ok(thread) if thread < threads => Ok(thread),
        _ => Err(Reason::NoSuchThread { thread, threads }),
    }
}

/// A decimal number below `2^bits`: digits only, without a sign.
fn number(field: &'static str, text: &str, bits: u32) -> Result<u64, Reason> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Reason::NotANumber {
            field,
            text: shortened(text),
        });
    }
    match text.parse::<u64>() {
        Ok(number) if bits == u64::BITS || number >> bits == 0 => Ok(number),
        _ => Err(Reason::TooLarge {
            field,
            text: shortened(text),
            bits,
        }),
    }
}
