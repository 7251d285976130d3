//! Allocation traces: what a program asked an allocator for, in order, as a text file.
//!
//! # The format: `alloctrace v1`
//! One event a line, fields separated by blanks, numbers in decimal, every line ended by a newline. The
//! first line is `#alloctrace v1 streams=<n> name=<word> [threads=<n>] [key=value ...]`; further keys are free. Streams
//! are `0..n`, and 0 is the default stream. Host threads are `0..n` too, up to [`THREADS_MAX`]; without `threads=` there
//! is one. Later lines that are empty or start with `#` mean nothing. A byte-order mark in front means nothing either,
//! nor do blanks after the last newline.
//!
//! | line | event |
//! | --- | --- |
//! | `a id bytes [stream=0]` | [`Allocate`](Event::Allocate) |
//! | `f id [stream]` | [`Free`](Event::Free) |
//! | `r id stream` | [`RecordStream`](Event::RecordStream) |
//! | `w waiter signaller` | [`Wait`](Event::Wait) |
//! | `s [stream]` | [`Synchronize`](Event::Synchronize) |
//! | `t` | [`Trim`](Event::Trim) |
//! | `h thread` | [`Thread`](Event::Thread) |
//! | `k stream` | [`Kernel`](Event::Kernel) |
//! | `m text` | [`Mark`](Event::Mark) |
//!
//! Ids are below 2^63 and may be used again after the free. Blocks that are live at the end of a file are
//! freed there, so that a trace can be repeated. Host threads of one file take turns: thread 0 makes the calls until an
//! `h` line names another, and a thread has returned from all its calls before the next one begins.
//!
//! [`TraceReader`] refuses everything else with the line and the reason; what [`TraceWriter`] accepts,
//! the reader gives back unchanged.
//!
//! [`TraceLog`] writes what passes an allocator.
//!
//! Must not know: pools, devices. A trace is a description and can be made by any program.

mod error;
#[cfg(all(test, feature = "compressed-traces"))]
mod fuzz;
mod log;
#[cfg(feature = "compressed-traces")]
mod open;
mod parse;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use error::{Reason, TraceError};
pub use log::TraceLog;
#[cfg(feature = "compressed-traces")]
pub use open::open;
pub use reader::TraceReader;
pub use writer::TraceWriter;

/// Most streams that a header may announce.
pub const STREAMS_MAX: u32 = 1 << 16;

/// Most host threads that a header may announce.
pub const THREADS_MAX: u32 = 64;

/// Most bytes of a line without its newline. No event but a mark comes near it; a file without newlines
/// must not be taken into memory as a whole.
pub const LINE_BYTES_MAX: usize = 1 << 16;

/// First id that is too large.
const ID_END: u64 = 1 << 63;

/// What the first line of a trace says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Streams are numbered from 0 to one less than this; from 1 to [`STREAMS_MAX`].
    pub streams: u32,
    /// Host threads are numbered from 0 to one less than this; from 1 to [`THREADS_MAX`].
    pub threads: u32,
    /// What was traced: one word.
    pub name: String,
    /// All other keys with their values, in the file's order. Neither contains blanks.
    pub others: Vec<(String, String)>,
}

/// One line of a trace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// `bytes`, before any rounding, are allocated for use on `stream`. No live block has this id.
    Allocate {
        /// Names the block until it is freed.
        id: u64,
        /// Bytes asked for; may be 0.
        bytes: u64,
        /// The block's home.
        stream: u32,
    },
    /// The program frees a block.
    Free {
        /// A live block.
        id: u64,
        /// The stream in whose order it is freed; `None` is the block's home.
        stream: Option<u32>,
    },
    /// The block is used on `stream` as well, up to here.
    RecordStream {
        /// A live block.
        id: u64,
        /// The stream that uses it.
        stream: u32,
    },
    /// `waiter` waits for all work that `signaller` has been given so far.
    Wait {
        /// The stream that waits.
        waiter: u32,
        /// The stream waited for.
        signaller: u32,
    },
    /// The host waits for a stream, or for the whole device.
    Synchronize {
        /// `None` is the device.
        stream: Option<u32>,
    },
    /// The program asks the allocator to return cached memory.
    Trim,
    /// From here on, another host thread makes the calls. The one before it has returned from all of its own.
    Thread {
        /// The thread.
        thread: u32,
    },
    /// A kernel is launched.
    Kernel {
        /// Where it runs.
        stream: u32,
    },
    /// A word to the reader, such as `step 3`. One line, without blanks at its ends.
    Mark(String),
}
