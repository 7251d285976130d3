//! The pool: one lock, and the ladder that an allocation climbs when memory is short.

#[cfg(feature = "metrics")]
use std::any::Any;
use std::fmt;
use std::sync::Arc;
#[cfg(feature = "metrics")]
use std::sync::Weak;
use std::thread;

use super::arena::GRANULARITY;
use super::backing::{Place, Refusal};
use super::block::{self, Block, BlockRecord, Extras};
use super::cache::{self, Caller, Close, ThreadCache};
use super::config::PoolConfig;
use super::contents::Miss;
use super::fences::Fence;
use super::guard::Locked;
use super::hooks::Hooks;
use super::lane::{LaneKey, PoolId};
use super::local;
use super::lock::BROKEN;
use super::memories::MemoryIndex;
use super::packed::Size;
use super::poison;
use super::reclaim;
use super::record::Record;
use super::report::report;
use super::routes::Routes;
use super::state::{Counted, State};
use super::stats::PoolStats;
use super::tags::{TagId, TagStat};
use super::wanted::{Found, Wanted};
use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, SegQueue};
use crate::units::{Numbers, align_up};

/// A caching allocator for one device. Cheap to clone; all clones are the same pool. Memory goes back to
/// the driver with the last clone and the last block.
///
/// # Dropping
/// A pool is kept by its clones and by what was made with it: blocks, so tensors and buffers too, private pools and their
/// graphs, peak scopes. Dropping one of these waits for no stream while another is left. Dropping the last clone takes
/// the pool's lock to empty the threads' caches, so it may wait for a driver call of another thread.
///
/// The drop of the last of all *blocks the host* until every stream that the pool served has run what uses its memory,
/// and calls the driver for each segment. A thread that must not wait keeps none of the last ones, or has the streams
/// synchronized before. In a kernel, which may not wait, a thread made for it returns the rest.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
}

/// Dropped with the last clone of a pool, whatever blocks are still out.
struct Handle {
    shared: Arc<Shared>,
}

/// What all clones of a pool and all its blocks share.
pub(super) struct Shared {
    /// Unique in the process.
    id: PoolId,
    pub(super) device: Device,
    pub(super) config: PoolConfig,
    pub(super) routes: Routes,
    pub(super) state: Mutex<State>,
    /// Every thread's cache. Taken after `state` where both are needed, and before a cache's own lock.
    caches: Mutex<Caches>,
    /// Blocks freed while another thread held the lock; taken in by the next thread that holds it.
    pub(super) freed: SegQueue<(Record, Counted)>,
    /// Private memories whose last holder went, in the same way.
    pub(super) released: SegQueue<MemoryIndex>,
    /// Whether either queue may hold something.
    pub(super) is_left: AtomicBool,
    /// Whether several threads have had a cache.
    has_threads: std::sync::atomic::AtomicBool,
    pub(super) hooks: Arc<Hooks>,
}

/// The threads' caches of a pool.
#[derive(Default)]
struct Caches {
    all: Vec<Arc<ThreadCache>>,
    /// Set with the last clone of the pool: caches made later, for blocks still out, keep nothing.
    is_closed: bool,
}

impl Pool {
    /// A pool on `device`, empty until the first allocation.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for settings that cannot work on this device; [`Error::Driver`] if it has
    /// no range of addresses for the pool.
    pub fn new(device: &Device, config: PoolConfig) -> Result<Self> {
        static NUMBERS: Numbers = Numbers::new("pools");
        Self::numbered(device, config, &NUMBERS)
    }

    pub(super) fn numbered(device: &Device, config: PoolConfig, numbers: &Numbers) -> Result<Self> {
        let config = config.checked(device)?;
        let shared = Shared {
            id: PoolId::new(numbers.next()),
            device: device.clone(),
            state: Mutex::new(State::new(device, &config)?),
            config,
            routes: Routes::default(),
            caches: Mutex::default(),
            freed: SegQueue::new(),
            released: SegQueue::new(),
            is_left: AtomicBool::new(false),
            has_threads: std::sync::atomic::AtomicBool::new(false),
            hooks: Arc::default(),
        };
        Ok(Self {
            handle: Arc::new(Handle {
                shared: Arc::new(shared),
            }),
        })
    }

    #[inline]
    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// The device whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.shared().device
    }

    /// Names this pool among all that ever were, and tells whether its last clone is gone.
    #[cfg(feature = "metrics")]
    pub(crate) fn token(&self) -> Weak<dyn Any + Send + Sync> {
        let handle: Weak<Handle> = Arc::downgrade(&self.handle);
        handle
    }

    /// The settings the pool works with: those it was made with, and in deterministic mode a policy that does
    /// not depend on the device's pace.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.shared().config
    }

    /// Memory for `bytes` bytes, for use on `stream` from now on; its contents are undefined. Zero bytes
    /// give a block without memory. During a capture or a pass of a [`PrivatePool`](super::PrivatePool) of
    /// this pool, the block comes from that one, as said there.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with a report after every way of finding memory failed;
    /// [`Error::InvalidArgument`] for a stream of another device; during a capture, [`Error::Driver`] if the
    /// driver cannot tell whether the stream is part of it; [`Error::BrokenPool`] if the pool
    /// [is broken](Self::is_broken).
    #[inline]
    pub fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let block = match cache::take(self, stream, bytes) {
            Ok(record) => Ok(Block::new(Some(record))),
            Err(miss) => self.allocate_past_lane(bytes, stream, miss),
        };
        #[cfg(asan)]
        let block = block.inspect(Block::permit);
        block
    }

    /// Allocates where the lane in front was not looked at.
    #[inline(never)]
    fn allocate_anywhere(&self, requested: u64, stream: &Stream) -> Result<Block> {
        let shared = self.shared();
        shared.check_device(stream)?;
        if shared.routes.are_closed() {
            return Err(BROKEN);
        }
        if requested == 0 {
            return Ok(Block::new(None));
        }
        let memory = shared.routes.find(shared.id, stream)?;
        let wanted = Wanted::new(requested, stream, memory);
        if memory != MemoryIndex::ORDINARY {
            let found = reclaim::allocate(shared, shared.lock()?, wanted)?;
            return Ok(Block::new(Some(record_of(found, wanted, shared))));
        }
        let key = LaneKey::new(shared.id, stream.id());
        if let Some(record) = cache::take_anywhere(shared, key, (requested, wanted.bytes)) {
            return Ok(Block::new(Some(record)));
        }
        // A thread that is going down has no cache, and one that a driver had do other work by now may be at that of
        // another pool: this pool looks by itself.
        match cache::caller(shared) {
            Some(caller) => self.allocate_past_lane(requested, stream, Miss::Here(caller)),
            None => {
                let mut state = shared.lock()?;
                reclaim::prepare(shared, &mut state, stream);
                let found = reclaim::allocate(shared, state, wanted)?;
                Ok(Block::new(Some(record_of(found, wanted, shared))))
            }
        }
    }

    /// Allocates what the lane in front did not have. After [`Miss::Here`] the memory is ordinary and the stream of the
    /// pool's device: there was no route when the lane was looked at, and no other stream has a lane.
    #[inline(never)]
    fn allocate_past_lane(
        &self,
        requested: u64,
        stream: &Stream,
        miss: Miss<Caller<'_>>,
    ) -> Result<Block> {
        let Miss::Here(caller) = miss else {
            return self.allocate_anywhere(requested, stream);
        };
        if requested == 0 {
            return Ok(Block::new(None));
        }
        let shared = self.shared();
        let wanted = Wanted::new(requested, stream, MemoryIndex::ORDINARY);
        let key = LaneKey::new(shared.id, stream.id());
        let (mut state, fuse) = shared.lock_with_fuse()?;
        reclaim::prepare(shared, &mut state, stream);
        let record = match cache::fetch(caller, shared, &mut state, key, &wanted) {
            Ok(record) => {
                fuse.defuse();
                drop(state);
                record
            }
            Err(kept) => {
                fuse.defuse();
                let state = Locked::new(state, &**shared);
                let found = reclaim::allocate(shared, state, Wanted { kept, ..wanted })?;
                record_of(found, wanted, shared)
            }
        };
        Ok(Block::new(Some(record)))
    }

    /// Why a wrapper with a limit, of which it says (used, limit), refuses `bytes` on `stream`.
    #[cold]
    pub(super) fn refuse(&self, bytes: u64, stream: &Stream, (used, limit): (u64, u64)) -> Error {
        let shared = self.shared();
        if let Err(error) = shared.check_device(stream) {
            return error;
        }
        if shared.routes.are_closed() {
            return BROKEN;
        }
        let mut state = shared.lock_and_fold();
        let wanted = Wanted {
            bytes,
            ..Wanted::new(bytes, stream, MemoryIndex::ORDINARY)
        };
        let mut report = report(shared, &mut state, wanted, Refusal::Limit, Vec::new());
        report.limit = Some(limit);
        report.limit_used = Some(used);
        report.into()
    }

    /// The statistics now. Peaks are exact while one thread uses the pool; with several they are at most
    /// off by what the threads' caches held.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shared().lock_and_fold().stats()
    }

    /// Allocated bytes by tag, with the peak of each.
    #[must_use]
    pub fn tag_stats(&self) -> Vec<TagStat> {
        self.shared().lock_and_fold().tags.snapshot()
    }

    /// Sets every peak to the present value.
    pub fn reset_peaks(&self) {
        self.shared().lock_and_fold().reset_peaks();
    }

    /// Flushes every thread's cache and walks every structure. For a moment when no other thread uses the
    /// pool.
    ///
    /// # Panics
    /// If an invariant is broken: a bug of this crate.
    pub fn check_invariants(&self) {
        let shared = self.shared();
        let mut state = shared.lock().unwrap_or_else(|error| panic!("{error}"));
        shared.fold_caches(&mut state);
        shared.empty_caches(&mut state, Close::No);
        state.check_invariants();
    }
}

/// The record of a block that was found, counted.
fn record_of(found: Found, wanted: Wanted<'_>, shared: &Arc<Shared>) -> Record {
    let tag = shared.count(wanted.requested, found.bytes);
    new_record(found, wanted, tag, shared)
}

/// The record of a block that was found.
pub(super) fn new_record(
    found: Found,
    wanted: Wanted<'_>,
    tag: TagId,
    shared: &Arc<Shared>,
) -> Record {
    let Found {
        placed,
        memory,
        bytes,
    } = found;
    let is_private = memory != MemoryIndex::ORDINARY;
    let extras = is_private.then(|| {
        Box::new(Extras {
            memory,
            ..Extras::default()
        })
    });
    // A block that is to be overwritten when it is freed is kept as it is by no lane, nor is a private or a
    // lent one.
    let is_lent = matches!(placed.location.place(), Place::Lent { .. });
    let size = Size::new((wanted.requested, bytes), tag);
    let key = if shared.config.poison || is_private || is_lent {
        LaneKey::NONE
    } else {
        LaneKey::new(shared.id, wanted.stream.id())
    };
    Record::new(BlockRecord {
        ptr: placed.ptr,
        size,
        location: placed.location,
        key,
        next: None,
        home: wanted.stream.clone(),
        shared: Some(shared.clone()),
        extras,
    })
}

/// Takes a block back without ever blocking on another thread's allocation: the calling thread's lane keeps
/// it, or the pool takes it in, or, while another thread has the pool's lock, finds it in its queue.
#[inline]
pub(super) fn free(record: Record) {
    if let Some(record) = cache::keep(record) {
        free_anywhere(record);
    }
}

/// Takes a block back that others are to be told of, or that other streams used.
#[inline(never)]
fn free_with_extras(record: Record) {
    // Before the memory can be handed out again: nobody is told of two live blocks at one address.
    let record = block::tell_freed(record);
    // A lane may keep it now.
    if record.is_plain() {
        return free(record);
    }
    let extras = record.extras.as_ref();
    if extras.is_some_and(|extras| extras.users.is_empty()) {
        poison::private(&record);
    }
    drop(free_in_pool(record, Counted::No));
}

/// Takes a block back that the lane in front is not for.
#[inline(never)]
fn free_anywhere(mut record: Record) {
    if !record.is_plain() {
        return free_with_extras(record);
    }
    // What is lent goes back to its lender, who waits for the borrower.
    if matches!(record.location.place(), Place::Lent { .. }) {
        return drop(free_in_pool(record, Counted::No));
    }
    let shared = record.shared();
    let key = LaneKey::new(shared.id, record.home.id());
    if shared.config.poison {
        poison::ordinary(&shared.device, &record);
    } else {
        record.key = key;
    }
    if let Some(record) = cache::keep_anywhere(key, record) {
        drop(free_in_pool(record, Counted::No));
    }
}

/// Takes a block back into the pool itself. What is left of it is its record, to be reused.
#[must_use]
pub(super) fn free_in_pool(mut record: Record, counted: Counted) -> Option<Record> {
    // Inside the pool a block must not keep the pool alive.
    let shared = record
        .shared
        .take()
        .expect("a block outside the pool knows its pool");
    let Some((mut state, fuse)) = shared.try_lock_with_fuse() else {
        shared.leave(record, counted);
        shared.take_in_left();
        return None;
    };
    if counted == Counted::No || shared.has_threads() {
        cache::fold_of_thread(shared.id, &mut state);
    }
    let blank = state.free(record, counted);
    fuse.defuse();
    drop(state);
    let mut blank = blank?;
    blank.shared = Some(shared);
    Some(blank)
}

/// Leaves a block for the next thread that has the pool's lock. The caller holds the pool.
pub(super) fn leave(mut record: Record, counted: Counted) {
    if let Some(shared) = record.shared.take() {
        shared.leave(record, counted);
    }
}

impl Shared {
    #[inline]
    fn check_device(&self, stream: &Stream) -> Result<()> {
        if stream.device().is_same(&self.device) {
            return Ok(());
        }
        Err(Error::argument(
            "allocate",
            "the stream belongs to another device",
        ))
    }

    /// Whether several threads have had a cache.
    #[inline]
    pub(super) fn has_threads(&self) -> bool {
        // Relaxed: it only decides how soon counters are folded.
        self.has_threads.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn id(&self) -> PoolId {
        self.id
    }

    pub(super) fn register(&self, cache: &Arc<ThreadCache>) {
        let mut caches = self.caches.lock();
        if caches.is_closed {
            cache.close();
        }
        caches.all.push(cache.clone());
        if caches.all.len() > 1 {
            // Relaxed: it only decides how soon counters are folded.
            self.has_threads.store(true, Ordering::Relaxed);
        }
    }

    /// Counts an allocation that no lane served; its tag.
    fn count(&self, requested: u64, allocated: u64) -> TagId {
        let (tag, counted) = cache::count(self.id, requested, allocated);
        if counted == Counted::No
            && let Ok(mut state) = self.lock()
        {
            state.count(tag, requested, allocated);
        }
        tag
    }

    /// Folds the calling thread's counters where other threads count as well: a peak is the more exact the
    /// sooner it is folded. Those of a thread that is alone are exact whenever that happens.
    pub(super) fn fold_among_threads(&self, state: &mut State) {
        if self.has_threads() {
            cache::fold_of_thread(self.id, state);
        }
    }

    /// Folds the calling thread's counters before blocks may come back from other streams, which the pool itself
    /// counts: the peak of what is active lies before that.
    pub(super) fn fold_before_returns(&self, state: &mut State) {
        if !state.pending.is_empty() {
            cache::fold_of_thread(self.id, state);
        }
    }

    /// Folds every thread's counters, unless another thread has the lock.
    pub(super) fn fold_if_free(&self) {
        if let Some(mut state) = self.try_lock() {
            self.fold_caches(&mut state);
        }
    }

    pub(super) fn fold_caches(&self, state: &mut State) {
        self.caches.lock().all.retain_mut(|cache| {
            // Looked at before the fold: what nobody else holds then is folded for the last time.
            let is_of_ended_thread = Arc::get_mut(cache).is_some();
            cache.fold(state);
            !is_of_ended_thread
        });
    }

    /// Takes in every block that a cache keeps, and every block that is on its way from one.
    pub(super) fn empty_caches(&self, state: &mut State, close: Close) {
        let all = {
            let mut caches = self.caches.lock();
            caches.is_closed |= close == Close::Yes;
            caches.all.clone()
        };
        // Without that lock: taking back may call the driver, which may run work that frees a block on this thread,
        // and that may need a cache.
        for cache in all {
            cache.empty(close, state);
        }
        self.take_in_freed(state);
    }

    /// Lets go of what every cache of a broken pool keeps.
    fn abandon_caches(&self) {
        let all = {
            let mut caches = self.caches.lock();
            caches.is_closed = true;
            std::mem::take(&mut caches.all)
        };
        for cache in all {
            cache.abandon();
        }
    }

    /// The present end of `stream`, marked with an event, if one can be recorded.
    pub(super) fn mark(&self, stream: &Stream) -> Option<Fence> {
        self.lock().ok()?.fences.mark(stream)
    }

    /// Releases a private memory. Never blocks: a graph may go while its thread has the lock, in a driver call
    /// that runs work.
    pub(super) fn release_memory(&self, memory: MemoryIndex) {
        self.released.push(memory);
        self.mark_left();
        self.take_in_left();
    }
}

/// Bytes that a request takes in the pool; `None` if it cannot be rounded in 64 bits.
#[inline]
pub(super) fn rounded(bytes: u64) -> Option<u64> {
    align_up(bytes, GRANULARITY)
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Blocks in caches keep the pool alive: without this, its memory would stay until their threads end.
        match self.shared.lock() {
            Ok(mut state) => self.shared.empty_caches(&mut state, Close::Yes),
            Err(_) => self.shared.abandon_caches(),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        local::assert_outside("a pool");
        let mut state = match self.lock() {
            Ok(mut state) => state.take(),
            Err(_) => {
                // Which of the memory is in use, nobody knows: it stays taken.
                let books = self.state.lock().take();
                return std::mem::forget(books);
            }
        };
        reclaim::close(&mut state);
        if state.bytes_held() > 0 {
            // A kernel that owned the last block may not wait, least of all for its own stream. What another
            // thread does not get returned, or where there is none, is lost with the pool.
            let close = move || reclaim::close(&mut state);
            let thread = thread::Builder::new().name("kitsune-pool".to_owned());
            drop(thread.spawn(close));
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({:?}, {:?})", self.device(), self.config())
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({:?})", self.device)
    }
}
