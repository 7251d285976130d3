//! An allocation that the thread's cache could not serve: what is asked of the pool, and what it found.

use super::backing::Placed;
use super::memories::MemoryIndex;
use crate::driver::Stream;

/// An allocation on its way through the ladder.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted<'a> {
    /// What the caller asked for, and that rounded to the granularity.
    pub(super) requested: u64,
    pub(super) bytes: u64,
    pub(super) stream: &'a Stream,
    pub(super) memory: MemoryIndex,
    /// Bytes that the thread keeps for this stream: free, though the memory does not know.
    pub(super) kept: u64,
    /// Whether it is for a graph whose capture is under way.
    pub(super) is_captured: bool,
}

impl<'a> Wanted<'a> {
    pub(super) fn new(requested: u64, stream: &'a Stream, memory: MemoryIndex) -> Self {
        Self {
            requested,
            // What cannot be rounded in 64 bits no device has.
            bytes: super::pool::rounded(requested).unwrap_or(u64::MAX),
            stream,
            memory,
            kept: 0,
            is_captured: false,
        }
    }
}

/// Memory for a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    pub(super) placed: Placed,
    pub(super) memory: MemoryIndex,
    /// As asked for, rounded.
    pub(super) bytes: u64,
}
