//! A block in a caller's hands.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use smallvec::SmallVec;

use super::fences::Fence;
use super::lane::LaneKey;
use super::memories::MemoryIndex;
use super::packed::{Location, Size};
use super::pool::{self, Shared};
use super::record::Record;
use super::wrap::{Watch, Watcher};
use crate::driver::{DevicePtr, Stream};

/// What the pool must know to take a block back. Owned as by a box, and kept as it is while a lane has the block, so that
/// reuse touches no reference count. Most are read for the first time in long when they are freed, so they are small,
/// and what a free reads lies side by side.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct BlockRecord {
    pub(super) ptr: DevicePtr,
    /// The next record in the same list of a lane.
    pub(super) next: Option<Record>,
    /// The lane that may keep the block as it is, if any.
    pub(super) key: LaneKey,
    pub(super) size: Size,
    pub(super) location: Location,
    pub(super) home: Stream,
    /// The pool, while the block is in a caller's hands or in a lane; none inside the pool itself.
    pub(super) shared: Option<Arc<Shared>>,
    /// What few blocks have; those that have anything in it have the key of no lane. Kept with the record.
    pub(super) extras: Option<Box<Extras>>,
}

const _: () = assert!(size_of::<BlockRecord>() == 64);

/// What a free has to look at only where it is there at all.
#[derive(Debug, Default)]
pub(super) struct Extras {
    /// Other streams that used the block.
    pub(super) users: SmallVec<[User; 1]>,
    /// Who is told of what becomes of the block, the innermost wrapper first.
    pub(super) watchers: Vec<Watcher>,
    /// Where the block lies.
    pub(super) memory: MemoryIndex,
}

/// A stream other than home that uses a block.
#[derive(Debug)]
pub(super) struct User {
    pub(super) stream: Stream,
    /// The end of its use, if that was marked; otherwise it is where the stream is at the free.
    pub(super) until: Option<Fence>,
}

impl BlockRecord {
    /// The extras, made if need be: no lane may keep the block while it has them.
    fn extras_mut(&mut self) -> &mut Extras {
        self.key = LaneKey::NONE;
        self.extras.get_or_insert_default()
    }

    /// Notes a use by `stream`, which ends where `until` says, as [`User::until`]. Of two uses by one stream
    /// the later end counts. Whether it is the stream's first.
    fn add_user(&mut self, stream: &Stream, until: Option<Fence>) -> bool {
        let id = stream.id();
        let users = &mut self.extras_mut().users;
        match users.iter_mut().find(|user| user.stream.id() == id) {
            // Marks of one stream come in order, and a free comes after all of them.
            Some(user) => {
                user.until = user.until.and(until);
                false
            }
            None => {
                users.push(User {
                    stream: stream.clone(),
                    until,
                });
                true
            }
        }
    }

    /// Whether nothing but the block itself is to be looked at when it is freed.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.extras.as_ref().is_none_or(|extras| {
            extras.users.is_empty()
                && extras.watchers.is_empty()
                && extras.memory == MemoryIndex::ORDINARY
        })
    }

    /// The memory that the block lies in.
    #[inline]
    pub(super) fn memory(&self) -> MemoryIndex {
        self.extras
            .as_ref()
            .map_or(MemoryIndex::ORDINARY, |extras| extras.memory)
    }

    /// The pool of a block outside of it.
    #[inline]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.shared
            .as_ref()
            .expect("a block outside the pool knows its pool")
    }
}

/// Device memory, owned. Dropping it gives it back to its home stream in stream order, from any thread. The drop waits
/// for no stream, unless it is the last thing that keeps its pool, as [there](super::Pool#dropping) is said.
pub struct Block {
    /// `None` for a block of zero bytes, which holds no memory; taken on drop.
    record: ManuallyDrop<Option<Record>>,
}

impl Block {
    pub(super) fn new(record: Option<Record>) -> Self {
        Self {
            record: ManuallyDrop::new(record),
        }
    }

    /// Permits the block to be used, in a build for AddressSanitizer.
    #[cfg(asan)]
    pub(super) fn permit(&self) {
        if let Some(record) = self.record.as_ref() {
            super::poison::permit_handed_out(record);
        }
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
        self.record
            .as_ref()
            .map_or(0, |record| record.size.requested())
    }

    /// Bytes that may be used: the request rounded up to the allocator's granularity of 512.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.record
            .as_ref()
            .map_or(0, |record| record.size.allocated())
    }

    /// The stream the block was allocated for; `None` for a block of zero bytes.
    #[must_use]
    pub fn home(&self) -> Option<&Stream> {
        self.record.as_ref().map(|record| &record.home)
    }

    /// Has `watch` told, under `key`, of what becomes of the block: for wrappers around an allocator. Those
    /// that came last are told first. A block of zero bytes holds nothing, and nobody is told of it.
    pub fn watch(&mut self, watch: Arc<dyn Watch>, key: u64) {
        if let Some(record) = self.record.as_mut() {
            let extras = record.extras_mut();
            extras.watchers.push(Watcher { watch, key });
        }
    }

    fn watchers(&self) -> &[Watcher] {
        let extras = self
            .record
            .as_ref()
            .and_then(|record| record.extras.as_ref());
        extras.map_or(&[], |extras| &extras.watchers)
    }

    /// Says that work enqueued on `stream` so far uses this block, so that the memory is reused only after
    /// that work, as of the moment of the free, has run. The home stream needs no record, and a stream of another
    /// platform (a host device made separately, say), which cannot reach the memory, gets none.
    ///
    /// The meaning is PyTorch's: it is decided at the free which work has to be waited for, so work that
    /// `stream` is given between this call and the free delays the reuse as well. It costs nothing now; to
    /// be exact, at the price of an event, is what [`record_use`](Self::record_use) is for.
    pub fn record_stream(&mut self, stream: &Stream) {
        if let Some(record) = self.record_for(stream)
            && record.add_user(stream, None)
        {
            self.tell_recorded(stream);
        }
    }

    /// Says that work enqueued on `stream` so far, and none after it, uses this block: the memory is reused
    /// only after that work has run, and what `stream` is given later does not delay the reuse. To be called
    /// after the last use on `stream`; a later use needs a later call, which replaces this one. The home
    /// stream needs no record.
    ///
    /// Records an event on `stream`, under every [`ReusePolicy`](super::ReusePolicy): no other means marks a
    /// point that the stream has not moved on from. Where none can be had (the driver refuses, or `stream` is
    /// part of a capture), and where [`record_stream`](Self::record_stream) was called for the same stream,
    /// the meaning is that of `record_stream`.
    pub fn record_use(&mut self, stream: &Stream) {
        if let Some(record) = self.record_for(stream) {
            let until = record.shared.as_ref().and_then(|pool| pool.mark(stream));
            if record.add_user(stream, until) {
                self.tell_recorded(stream);
            }
        }
    }

    fn tell_recorded(&self, stream: &Stream) {
        for Watcher { watch, key } in self.watchers().iter().rev() {
            watch.recorded(*key, self, stream);
        }
    }

    /// The record, if there is memory and `stream` may use it without being its home.
    fn record_for(&mut self, stream: &Stream) -> Option<&mut BlockRecord> {
        let record = self.record.as_deref_mut()?;
        let home = &record.home;
        let may_use = home.driver().platform() == stream.driver().platform();
        (may_use && home.id() != stream.id()).then_some(record)
    }
}

/// Tells the watchers of a block, if it has any, that it is freed.
pub(super) fn tell_freed(mut record: Record) -> Record {
    let Some(extras) = record.extras.as_mut() else {
        return record;
    };
    if extras.watchers.is_empty() {
        return record;
    }
    let watchers = std::mem::take(&mut extras.watchers);
    let mut block = Block::new(Some(record));
    for Watcher { watch, key } in watchers.iter().rev() {
        watch.freed(*key, &block);
    }
    block.record.take().expect("the block was made above")
}

impl Drop for Block {
    #[inline]
    #[expect(unsafe_code, reason = "nothing is left to be written or dropped")]
    fn drop(&mut self) {
        // SAFETY: the value is gone after this, so that nothing takes the record again.
        let record = unsafe { ManuallyDrop::take(&mut self.record) };
        if let Some(record) = record {
            #[cfg(asan)]
            super::poison::forbid_freed(&record);
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
