//! The table of live blocks.
//!
//! A block enters when the allocator inside has handed it out and leaves before its memory can be handed out
//! again, so the table never shows two blocks at one address. It is kept by a number that no other block
//! gets, never by address.

use std::backtrace::Backtrace;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use parking_lot::Mutex;

use super::Allocate;
use crate::driver::{DevicePtr, Stream};
use crate::error::Result;
use crate::memory::pool::{Block, Pool, Watch};
use crate::memory::types::TagId;
use crate::units::{Bytes, StreamId};

/// An allocator that knows which of its blocks are live, for leak hunting.
///
/// # Examples
/// ```
/// use kitsune::memory::{Allocate, Track, tag};
/// use kitsune::{Device, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let track = Track::new(Pool::new(&device, PoolConfig::default())?);
/// let stream = device.create_stream()?;
/// let scope = tag("loader");
/// let block = track.allocate(1000, &stream)?;
/// drop(scope);
/// let report = track.report();
/// assert_eq!(report.blocks[0].tag, "loader");
/// println!("{report}");
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Debug)]
pub struct Track<A> {
    inner: A,
    table: Arc<Table>,
    with_backtraces: bool,
}

#[derive(Debug, Default)]
struct Table {
    live: Mutex<Live>,
}

#[derive(Debug, Default)]
struct Live {
    /// The number of the next block.
    next: u64,
    blocks: BTreeMap<u64, TrackedBlock>,
}

/// A live block, as it was handed out.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TrackedBlock {
    /// Counts the blocks of this wrapper, from 0: a lower number is an older block.
    pub number: u64,
    /// Address of the first byte.
    pub ptr: DevicePtr,
    /// Bytes asked for.
    pub requested: u64,
    /// Bytes in the caller's hands.
    pub allocated: u64,
    /// The block's home.
    pub stream: StreamId,
    /// The component that allocated it; `untagged` outside any [`tag`](crate::memory::tag) scope.
    pub tag: &'static str,
    /// The thread that allocated it.
    pub thread: ThreadId,
    /// Where it was allocated, if the wrapper captures that.
    pub backtrace: Option<Arc<Backtrace>>,
}

impl<A: Allocate> Track<A> {
    /// Tracks the blocks of `inner`.
    #[must_use]
    pub fn new(inner: A) -> Self {
        Self {
            inner,
            table: Arc::default(),
            with_backtraces: false,
        }
    }

    /// Tracks the blocks of `inner` and where each was allocated, whatever `RUST_BACKTRACE` says. A
    /// backtrace takes microseconds to capture and far longer to print.
    #[must_use]
    pub fn with_backtraces(inner: A) -> Self {
        Self {
            with_backtraces: true,
            ..Self::new(inner)
        }
    }

    /// What is live at this moment.
    #[must_use]
    pub fn report(&self) -> TrackReport {
        let live = self.table.live.lock();
        TrackReport {
            blocks: live.blocks.values().cloned().collect(),
        }
    }

    /// The allocator inside.
    #[must_use]
    pub fn inner(&self) -> &A {
        &self.inner
    }
}

impl Watch for Table {
    /// The key is the block's number.
    fn freed(&self, key: u64, _block: &Block) {
        let entry = self.live.lock().blocks.remove(&key);
        // Dropped without the lock: a backtrace is much to free.
        drop(entry);
    }
}

impl<A: Allocate> Allocate for Track<A> {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let mut block = self.inner.allocate(bytes, stream)?;
        if bytes == 0 {
            return Ok(block);
        }
        let capture = || Arc::new(Backtrace::force_capture());
        let mut entry = TrackedBlock {
            number: 0,
            ptr: block.ptr(),
            requested: bytes,
            allocated: block.allocated(),
            stream: stream.id(),
            tag: TagId::current().name(),
            thread: thread::current().id(),
            backtrace: self.with_backtraces.then(capture),
        };
        let mut live = self.table.live.lock();
        entry.number = live.next;
        live.next += 1;
        block.watch(self.table.clone(), entry.number);
        live.blocks.insert(entry.number, entry);
        Ok(block)
    }

    fn pool(&self) -> &Pool {
        self.inner.pool()
    }
}

/// The live blocks of a [`Track`] at one moment. Displays as a line for all and one for each block, the
/// largest first, each followed by its backtrace.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct TrackReport {
    /// Every live block, the oldest first.
    pub blocks: Vec<TrackedBlock>,
}

impl TrackReport {
    /// Bytes asked for by all live blocks.
    #[must_use]
    pub fn requested_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.requested).sum()
    }

    /// Bytes in the hands of callers.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.blocks.iter().map(|block| block.allocated).sum()
    }
}

impl fmt::Display for TrackedBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "block {}: {} at {:#x}, stream {}, {}, {:?}",
            self.number,
            Bytes(self.requested),
            self.ptr.0,
            self.stream.0,
            self.tag,
            self.thread,
        )?;
        match &self.backtrace {
            Some(backtrace) => write!(f, "\n{backtrace}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for TrackReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bytes) = (self.blocks.len(), Bytes(self.requested_bytes()));
        write!(f, "{count} live blocks, {bytes} requested")?;
        let mut largest: Vec<&TrackedBlock> = self.blocks.iter().collect();
        largest.sort_by_key(|block| std::cmp::Reverse(block.requested));
        largest
            .into_iter()
            .try_for_each(|block| write!(f, "\n{block}"))
    }
}
