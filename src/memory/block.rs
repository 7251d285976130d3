//! A block in a caller's hands.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use super::backing::Place;
use super::pool::{self, Shared};
use super::tags::TagId;
use super::wrap::{Watch, Watcher};
use crate::driver::{DevicePtr, Stream};

/// What the pool must know to take a block back. Boxed, and kept as it is while a lane has the block, so that
/// reuse touches no reference count.
#[derive(Debug)]
pub(super) struct BlockRecord {
    pub(super) ptr: DevicePtr,
    pub(super) requested: u64,
    pub(super) allocated: u64,
    pub(super) place: Place,
    pub(super) tag: TagId,
    pub(super) home: Stream,
    /// Other streams that used the block.
    pub(super) users: SmallVec<[Stream; 1]>,
    /// Who is told of what becomes of the block, the innermost wrapper first.
    pub(super) watchers: Vec<Watcher>,
    /// The pool, while the block is in a caller's hands or in a lane; none inside the pool itself.
    pub(super) shared: Option<Arc<Shared>>,
    /// The next block of this size in a lane.
    pub(super) next: Option<Box<BlockRecord>>,
}

impl BlockRecord {
    /// Makes the record that of a new allocation of `requested` bytes by the calling thread.
    #[inline]
    pub(super) fn hand_out(&mut self, requested: u64) {
        self.requested = requested;
        self.tag = TagId::current();
    }
}

/// Device memory, owned. Dropping it gives it back to its home stream in stream order, from any thread,
/// without blocking.
pub struct Block {
    /// `None` for a block of zero bytes, which holds no memory; taken on drop.
    record: Option<Box<BlockRecord>>,
}

impl Block {
    pub(super) fn new(record: Option<Box<BlockRecord>>) -> Self {
        Self { record }
    }

    /// Address of the first byte, a multiple of 512; zero for a block of zero bytes.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr {
        self.record
            .as_ref()
            .map_or(DevicePtr(0), |record| record.ptr)
    }

    /// Bytes asked for.
    #[must_use]
    pub fn requested(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.requested)
    }

    /// Bytes that may be used: the request rounded up to the allocator's granularity of 512.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.record.as_ref().map_or(0, |record| record.allocated)
    }

    /// The stream the block was allocated for; `None` for a block of zero bytes.
    #[must_use]
    pub fn home(&self) -> Option<&Stream> {
        self.record.as_ref().map(|record| &record.home)
    }

    /// Has `watch` told, under `key`, of what becomes of the block: for wrappers around an allocator. Those
    /// that came last are told first. A block of zero bytes holds nothing, and nobody is told of it.
    pub fn watch(&mut self, watch: Arc<dyn Watch>, key: u64) {
        if let Some(record) = &mut self.record {
            record.watchers.push(Watcher { watch, key });
        }
    }

    /// Says that work enqueued on `stream` so far uses this block, so that the memory is reused only after
    /// that work, as of the moment of the free, has run. The home stream needs no record.
    ///
    /// The meaning is PyTorch's: it is decided at the free which work has to be waited for, so work that
    /// `stream` is given between this call and the free delays the reuse as well.
    pub fn record_stream(&mut self, stream: &Stream) {
        let Some(record) = &mut self.record else {
            return;
        };
        let known = std::iter::once(&record.home).chain(&record.users);
        if known.into_iter().any(|known| known.id() == stream.id()) {
            return;
        }
        record.users.push(stream.clone());
        let watchers = self.record.iter().flat_map(|record| &record.watchers);
        for Watcher { watch, key } in watchers.rev() {
            watch.recorded(*key, self, stream);
        }
    }

    #[cold]
    fn tell_freed(&self, watchers: &[Watcher]) {
        for Watcher { watch, key } in watchers.iter().rev() {
            watch.freed(*key, self);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(record) = &mut self.record
            && !record.watchers.is_empty()
        {
            let watchers = std::mem::take(&mut record.watchers);
            // Before the memory can be handed out again: nobody is told of two live blocks at one address.
            self.tell_freed(&watchers);
        }
        if let Some(record) = self.record.take() {
            pool::free(record);
        }
    }
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Block({} of {} bytes at {:#x})",
            self.requested(),
            self.allocated(),
            self.ptr().0
        )
    }
}
