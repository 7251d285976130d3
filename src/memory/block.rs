//! A block in a caller's hands.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use super::backing::Place;
use super::lane::LaneKey;
use super::pool::{self, Shared};
use super::tags::TagId;
use super::territory::Owner;
use crate::driver::{DevicePtr, Stream};

/// What the pool must know to take a block back. Boxed, and kept as it is while a lane has the block, so that
/// reuse touches no reference count.
#[derive(Debug)]
pub(super) struct BlockRecord {
    pub(super) ptr: DevicePtr,
    pub(super) requested: u64,
    pub(super) allocated: u64,
    pub(super) place: Place,
    /// The number of `home` in the pool.
    pub(super) owner: Owner,
    pub(super) tag: TagId,
    /// The lane that may keep the block as it is.
    pub(super) key: LaneKey,
    pub(super) home: Stream,
    /// The pool, while the block is in a caller's hands or in a lane; none inside the pool itself.
    pub(super) shared: Option<Arc<Shared>>,
    /// The next record in the same list of a lane.
    pub(super) next: Option<Box<BlockRecord>>,
    /// What few blocks have. None while a lane has the block.
    pub(super) extras: Option<Box<Extras>>,
}

/// What a free has to look at only where it is there at all.
#[derive(Debug, Default)]
pub(super) struct Extras {
    /// Other streams that used the block.
    pub(super) users: SmallVec<[Stream; 1]>,
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

    /// Says that work enqueued on `stream` so far uses this block, so that the memory is reused only after
    /// that work, as of the moment of the free, has run. The home stream needs no record.
    ///
    /// The meaning is PyTorch's: it is decided at the free which work has to be waited for, so work that
    /// `stream` is given between this call and the free delays the reuse as well.
    pub fn record_stream(&mut self, stream: &Stream) {
        let Some(record) = &mut self.record else {
            return;
        };
        if record.home.id() == stream.id() {
            return;
        }
        let users = &mut record.extras.get_or_insert_default().users;
        if !users.iter().any(|known| known.id() == stream.id()) {
            users.push(stream.clone());
        }
    }
}

impl Drop for Block {
    #[inline]
    fn drop(&mut self) {
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
