//! What is asked of the pool and of a heap, and what comes back.

use super::{HeapId, StreamIndex, rounded};
use crate::driver::Stream;
use crate::error::Error;
use crate::memory::config::ReusePolicy;

/// An allocation on its way through the ladder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    /// What the caller asked for, and that rounded to the granularity.
    pub(crate) requested: u64,
    pub(crate) bytes: u64,
    pub(crate) stream: &'a Stream,
    pub(crate) heap: HeapId,
    /// Bytes that the thread keeps for this stream: free, though the memory does not know.
    pub(crate) kept: u64,
    /// Whether it is for a graph whose capture is under way.
    pub(crate) is_captured: bool,
}

impl<'a> Request<'a> {
    pub(crate) fn new(requested: u64, stream: &'a Stream, heap: HeapId) -> Self {
        Self {
            requested,
            // What cannot be rounded in 64 bits no device has.
            bytes: rounded(requested).unwrap_or(u64::MAX),
            stream,
            heap,
            kept: 0,
            is_captured: false,
        }
    }
}

/// Memory wanted by a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search {
    /// A positive multiple of the granularity.
    pub(crate) bytes: u64,
    pub(crate) owner: StreamIndex,
    pub(crate) reuse: ReusePolicy,
    /// Bytes of blocks that were freed and wait for other streams.
    pub(crate) deferred: u64,
    /// Whether another stream may lend a block out of memory that it shares with nobody.
    pub(crate) may_borrow: bool,
    /// Whether the driver may be given memory back meanwhile. In a capture it may not.
    pub(crate) may_return: bool,
}

/// Why memory was not to be had.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The pool's limit.
    Limit,
    /// The size itself, which is more than the device has.
    Size,
    /// The driver, with its error.
    Driver(Error),
}

/// Whether a free has gone into some counters already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counted {
    /// A thread cache has counted it.
    Yes,
    No,
}
