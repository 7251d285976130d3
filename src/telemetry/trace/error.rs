//! What is wrong with a trace, and where.

use std::io;

use super::{LINE_BYTES_MAX, STREAMS_MAX, THREADS_MAX};

/// A trace that cannot be read or written. Displays as `LINE: REASON`.
#[derive(Debug, thiserror::Error)]
#[error("{line}: {reason}")]
pub struct TraceError {
    /// Line of the file, from 1.
    pub line: u64,
    /// What is wrong with it.
    #[source]
    pub reason: Reason,
}

/// Why a line is no line of a trace.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// The first line is something else, or there is none.
    #[error("not a trace: the first line must read `#alloctrace v1 streams=<n> name=<word>`")]
    NoHeader,
    /// A trace of a later version.
    #[error("version {0:?} of the format is not known; this program reads v1")]
    Version(String),
    /// The header is there, but wrong.
    #[error("header: {0}")]
    Header(String),
    /// The first field names no event.
    #[error("unknown event {0:?}: alloctrace v1 has the events a, f, h, k, m, r, s, t and w")]
    UnknownEvent(String),
    /// Too few or too many fields.
    #[error("event {event} takes {expected} fields, but has {found}")]
    FieldCount {
        /// The event's letter.
        event: String,
        /// What the grammar asks for.
        expected: &'static str,
        /// What the line has.
        found: usize,
    },
    /// A field that must be a decimal number is none.
    #[error("{field} {text:?} is not a decimal number")]
    NotANumber {
        /// The field's name in the grammar.
        field: &'static str,
        /// What stands there, shortened.
        text: String,
    },
    /// A number that does not fit.
    #[error("{field} {text} is too large: it must be below 2^{bits}")]
    TooLarge {
        /// The field's name in the grammar.
        field: &'static str,
        /// What stands there, shortened.
        text: String,
        /// Bits that the field has room for.
        bits: u32,
    },
    /// A stream that the header does not announce.
    #[error("stream {stream} does not exist: the header says streams={streams}")]
    NoSuchStream {
        /// The stream of the line.
        stream: u64,
        /// The header's count.
        streams: u32,
    },
    /// A host thread that the header does not announce.
    #[error("host thread {thread} does not exist: the header says threads={threads}")]
    NoSuchThread {
        /// The thread of the line.
        thread: u64,
        /// The header's count.
        threads: u32,
    },
    /// An allocation under an id that is taken.
    #[error("id {id} is already live, allocated on line {since}")]
    AlreadyLive {
        /// The id.
        id: u64,
        /// Line of the allocation that holds it.
        since: u64,
    },
    /// A free or use of a block after it was freed.
    #[error("id {id} was already freed on line {since}")]
    AlreadyFreed {
        /// The id.
        id: u64,
        /// Line of the free.
        since: u64,
    },
    /// A free or use of a block that never was.
    #[error("id {id} was never allocated")]
    NeverAllocated {
        /// The id.
        id: u64,
    },
    /// Bytes that are not text.
    #[error("not text: the line is not valid UTF-8")]
    NotText,
    /// A line without an end in sight.
    #[error("the line is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong,
    /// The file stops within a line.
    #[error("the file ends in the middle of this line: it is cut off, or lacks its last newline")]
    CutOff,
    /// A mark that would not come back as it was written.
    #[error("a mark must be one line without blanks at its ends")]
    Mark,
    /// The file could not be read or written; truncated compressed files are found this way.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Reason {
    /// At this line.
    pub(super) fn at(self, line: u64) -> TraceError {
        TraceError { line, reason: self }
    }

    pub(super) fn streams_out_of_range(text: &str) -> Self {
        Self::Header(format!(
            "streams={text} is not a number from 1 to {STREAMS_MAX}"
        ))
    }

    pub(super) fn threads_out_of_range(text: &str) -> Self {
        Self::Header(format!(
            "threads={text} is not a number from 1 to {THREADS_MAX}"
        ))
    }
}

/// The beginning of `text`, enough to recognize it by.
pub(super) fn shortened(text: &str) -> String {
    const CHARACTERS: usize = 40;
    match text.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
