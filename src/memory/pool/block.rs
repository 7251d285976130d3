//! A block in a caller's hands, and who is told of what becomes of it.

use std::fmt::{self, Debug};
use std::mem::ManuallyDrop;
use std::sync::Arc;

use smallvec::SmallVec;

use super::shared::{BlockRecord, Record, Shared};
use crate::driver::{DevicePtr, Stream};
use crate::memory::types::{CacheKey, Fence, HeapId};

/// What only few blocks have, and a free has to look at.
#[derive(Debug, Default)]
pub(crate) struct Extras {
    /// Other streams that used the block.
    pub(crate) users: SmallVec<[User; 1]>,
    /// The watchers of the block, that of the innermost adaptor first.
    pub(super) watchers: Vec<Watcher>,
    /// The heap that the block lies in.
    pub(crate) heap: HeapId,
}

/// A stream other than home that uses a block.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) stream: Stream,
    /// The end of its use, if that was marked. Otherwise it is where the stream is at the free.
    pub(crate) until: Option<Fence>,
}

impl BlockRecord {
    /// The extras, made if there are none. No stream cache may keep the block while it has extras.
    fn extras_mut(&mut self) -> &mut Extras {
        self.key = CacheKey::NONE;
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

    /// Whether a free needs to look at nothing but the block itself.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        self.extras.as_ref().is_none_or(|extras| {
            extras.users.is_empty() && extras.watchers.is_empty() && extras.heap == HeapId::DEFAULT
        })
    }

    /// The heap that the block lies in.
    #[inline]
    pub(crate) fn heap(&self) -> HeapId {
        self.extras
            .as_ref()
            .map_or(HeapId::DEFAULT, |extras| extras.heap)
    }

    /// The pool of a block outside of it.
    #[inline]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        self.shared
            .as_ref()
            .expect("a block outside the pool knows its pool")
    }
}

/// Is told what becomes of the blocks it was put on by [`Block::watch`].
///
/// Called by the thread that does it, with no lock of the pool held. Must not panic, and must not allocate
/// through the wrapper that it belongs to.
pub trait Watch: Debug + Send + Sync {
    /// `block` is being freed; its memory is handed out again only after this call.
    fn freed(&self, key: u64, block: &Block);

    /// `stream`, which is neither the block's home nor recorded before, was recorded on `block`.
    fn recorded(&self, _key: u64, _block: &Block, _stream: &Stream) {}
}

/// A watch on one block.
#[derive(Debug)]
pub(crate) struct Watcher {
    pub(crate) watch: Arc<dyn Watch>,
    pub(crate) key: u64,
}

/// Device memory, owned. Dropping it gives it back to its home stream in stream order, from any thread. The drop waits
/// for no stream, unless it is the last thing that keeps its pool, as [there](super::Pool#dropping) is said.
pub struct Block {
    /// `None` for a block of zero bytes, which holds no memory; taken on drop.
    record: ManuallyDrop<Option<Record>>,
}

impl Block {
    pub(crate) fn new(record: Option<Record>) -> Self {
        Self {
            record: ManuallyDrop::new(record),
        }
    }

    /// Permits the block to be used, in a build for AddressSanitizer.
    #[cfg(asan)]
    pub(super) fn permit(&self) {
        if let Some(record) = self.record.as_ref() {
            super::poison::permit(record);
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

    /// The record of a block that is being freed, which is gone after this.
    ///
    /// # Safety
    /// The block is not used again.
    #[inline]
    #[expect(unsafe_code, reason = "nothing is left to be written or dropped")]
    pub(super) unsafe fn take_record(&mut self) -> Option<Record> {
        // SAFETY: nothing takes the record again, as promised.
        unsafe { ManuallyDrop::take(&mut self.record) }
    }

    /// The record. Dropping it gives nothing back.
    pub(super) fn into_record(self) -> Option<Record> {
        ManuallyDrop::new(self).record.take()
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
    /// Records an event on `stream`, under every [`ReusePolicy`](crate::ReusePolicy): no other means marks a
    /// point that the stream has not moved on from. Where none can be had (the driver refuses, or `stream` is
    /// part of a capture), and where [`record_stream`](Self::record_stream) was called for the same stream,
    /// the meaning is that of `record_stream`.
    pub fn record_use(&mut self, stream: &Stream) {
        if let Some(record) = self.record_for(stream) {
            let until = record
                .shared
                .as_ref()
                .and_then(|pool: &Arc<Shared>| pool.mark(stream));
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
