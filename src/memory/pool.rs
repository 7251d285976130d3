//! The pool: one lock, and the ladder that an allocation climbs when memory is short.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::queue::SegQueue;
use parking_lot::{Mutex, MutexGuard};

use super::arena::GRANULARITY;
use super::block::{Block, BlockRecord};
use super::cache::{self, Close, ThreadCache};
use super::config::PoolConfig;
use super::hooks::{Hooks, Registration};
use super::reclaim;
use super::state::{Counted, Found, State};
use super::stats::PoolStats;
use super::tags::TagStat;
use super::waits::wait_for_streams;
use crate::driver::{Device, Stream};
use crate::error::{Error, OutOfMemory, Result};
use crate::units::align_up;

/// Byte that freed blocks are overwritten with in poison mode: NaN in every float type.
const POISON: u8 = 0xff;

/// A caching allocator for one device. Cheap to clone; all clones are the same pool. Memory goes back to
/// the driver with the last clone and the last block.
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
    id: u64,
    pub(super) device: Device,
    pub(super) config: PoolConfig,
    state: Mutex<State>,
    /// Every thread's cache. Taken after `state` where both are needed, and before a cache's own lock.
    caches: Mutex<Caches>,
    /// Blocks freed while another thread held the lock; taken in by the next thread that holds it.
    freed: SegQueue<(Box<BlockRecord>, Counted)>,
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
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let config = config.checked(device)?;
        let shared = Shared {
            // Relaxed: the number only has to be unique.
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            device: device.clone(),
            state: Mutex::new(State::new(device, &config)?),
            config,
            caches: Mutex::default(),
            freed: SegQueue::new(),
            hooks: Arc::default(),
        };
        Ok(Self {
            handle: Arc::new(Handle {
                shared: Arc::new(shared),
            }),
        })
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// The device whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.shared().device
    }

    /// The settings the pool works with: those it was made with, and in deterministic mode a policy that does
    /// not depend on the device's pace.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.shared().config
    }

    /// Memory for `bytes` bytes, for use on `stream` from now on; its contents are undefined. Zero bytes
    /// give a block without memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with a report after every way of finding memory failed; [`Error::InvalidArgument`] for a
    /// stream of another device.
    #[inline]
    pub fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        match cache::take(self.shared().id, stream.id(), bytes) {
            Some(record) => Ok(Block::new(Some(record))),
            None => self.allocate_in_pool(bytes, stream),
        }
    }

    #[inline(never)]
    fn allocate_in_pool(&self, requested: u64, stream: &Stream) -> Result<Block> {
        let shared = self.shared();
        if !stream.device().is_same(&shared.device) {
            return Err(Error::argument(
                "allocate",
                "the stream belongs to another device",
            ));
        }
        if requested == 0 {
            return Ok(Block::new(None));
        }
        let bytes = rounded(requested).unwrap_or(u64::MAX);
        let missed = cache::take_or_miss(shared, stream.id(), (requested, bytes));
        if missed.found.is_some() {
            return Ok(Block::new(missed.found));
        }
        let mut hot = missed.hot;
        let found = reclaim::allocate(shared, requested, stream, &mut hot);
        // Whichever is left over is dropped outside the lock.
        let blank = missed.blank.or(hot);
        let record = record_of(found?, requested, stream, shared, blank);
        Ok(Block::new(Some(record)))
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

    /// Returns all memory without a block in use to the driver: [`trim`](Self::trim) to 0.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps it.
    pub fn empty_cache(&self) -> Result<()> {
        self.trim(0)
    }

    /// Returns idle memory to the driver until the pool holds at most `target` bytes, or until what is left
    /// has blocks in it. Pages, or plain allocations, go back as a whole; the smallest gaps go first. Does
    /// nothing if the pool holds no more than that. Otherwise, if what is known to be complete does not
    /// suffice, blocks the host until every stream that the pool has served has passed its last use; other
    /// threads go on meanwhile.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps it.
    pub fn trim(&self, target: u64) -> Result<()> {
        let shared = self.shared();
        reclaim::trim(shared, &mut shared.lock(), target)
    }

    /// Ends a period of [`PoolConfig::decay`] now, whether one is set or not: returns to the driver what was
    /// not needed since the last period's end, as far as it is known to be complete. Never waits on the host.
    pub fn decay_now(&self) {
        let shared = self.shared();
        reclaim::decay(shared, &mut shared.lock());
    }

    /// Most bytes the pool may hold: the limit set last, or what [`PoolConfig::limit`] and
    /// [`PoolConfig::fraction`] came to.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.shared().lock().limit()
    }

    /// Sets the most bytes the pool may hold from now on, in place of [`PoolConfig::limit`] and
    /// [`PoolConfig::fraction`]; `None` leaves it to the device. If the pool holds more, this returns what it
    /// can, as [`trim`](Self::trim) does; blocks in use stay, and until enough of them are freed and
    /// returned, nothing more is taken from the driver.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a limit that [`Pool::new`] would refuse, with nothing changed;
    /// [`Error::Driver`] if the driver did not take memory back, with the limit set all the same.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<()> {
        let shared = self.shared();
        PoolConfig::check_limit(limit, &shared.device)?;
        let mut state = shared.lock();
        state.set_limit(limit);
        reclaim::trim(shared, &mut state, limit.unwrap_or(u64::MAX))
    }

    /// Asks `callback` for memory when neither the pool nor the device has any: before the host waits for
    /// streams, with the bytes that are wanted. Several are asked in order of registration, until the
    /// allocation succeeds.
    ///
    /// A callback runs on the allocating thread, without any lock of the pool: it may free blocks, allocate,
    /// and drop handles of the pool. A shortage inside a callback asks nobody. If it panics, so does the
    /// allocation, and the pool goes on. What it owns lives until the registration is dropped; if that is a
    /// handle of this pool, so does the pool.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use kitsune::{Block, Device, HostConfig, Pool, PoolConfig};
    ///
    /// let device = Device::host(HostConfig { capacity: 64 << 20, ..HostConfig::default() })?;
    /// let pool = Pool::new(&device, PoolConfig::default())?;
    /// let stream = device.create_stream()?;
    /// let spare: Arc<Mutex<Vec<Block>>> = Arc::default();
    /// spare.lock().unwrap().push(pool.allocate(40 << 20, &stream)?);
    /// let of_callback = Arc::clone(&spare);
    /// let _registration = pool.on_shortage(move |_wanted| of_callback.lock().unwrap().clear());
    /// assert!(pool.allocate(40 << 20, &stream).is_ok());
    /// # Ok::<(), kitsune::Error>(())
    /// ```
    pub fn on_shortage(&self, callback: impl Fn(u64) + Send + Sync + 'static) -> Registration {
        self.shared().hooks.add_on_shortage(Arc::new(callback))
    }

    /// Tells `observer` of every allocation that fails for lack of memory, before the error is returned. As
    /// with [`on_shortage`](Self::on_shortage), it runs without any lock of the pool; failures inside a
    /// callback or observer are told to nobody.
    pub fn on_out_of_memory(
        &self,
        observer: impl Fn(&OutOfMemory) + Send + Sync + 'static,
    ) -> Registration {
        self.shared().hooks.add_on_failure(Arc::new(observer))
    }

    /// Flushes every thread's cache and walks every structure. For a moment when no other thread uses the
    /// pool.
    ///
    /// # Panics
    /// If an invariant is broken: a bug of this crate.
    pub fn check_invariants(&self) {
        let mut state = self.shared().lock_and_fold();
        self.shared().empty_caches(&mut state, Close::No);
        state.check_invariants();
    }
}

/// The record of a block that was found: `blank`, which is one of the same stream and pool, or a new one.
fn record_of(
    found: Found,
    requested: u64,
    stream: &Stream,
    shared: &Arc<Shared>,
    blank: Option<Box<BlockRecord>>,
) -> Box<BlockRecord> {
    let Found {
        placed,
        bytes,
        owner,
        tag,
    } = found;
    if let Some(mut record) = blank {
        record.ptr = placed.ptr;
        record.place = placed.place;
        record.requested = requested;
        record.allocated = bytes;
        record.owner = owner;
        record.tag = tag;
        return record;
    }
    Box::new(BlockRecord {
        ptr: placed.ptr,
        requested,
        allocated: bytes,
        place: placed.place,
        owner,
        tag,
        home: stream.clone(),
        shared: Some(shared.clone()),
        next: None,
        extras: None,
    })
}

/// Takes a block back without ever blocking on another thread's allocation: the calling thread's lane keeps
/// it, or the pool takes it in, or, while another thread has the pool's lock, finds it in its queue.
#[inline]
pub(super) fn free(record: Box<BlockRecord>) {
    if record.extras.is_some() {
        return free_in_pool(record, Counted::No);
    }
    let pool = record.shared.as_ref().map_or(0, |shared| shared.id);
    if let Some(record) = cache::keep(pool, record) {
        free_anywhere(record);
    }
}

/// Takes a block back that the lane in front is not for.
#[inline(never)]
fn free_anywhere(record: Box<BlockRecord>) {
    let shared = record
        .shared
        .clone()
        .expect("a block in a caller's hands knows its pool");
    if shared.config.poison {
        poison(&shared.device, &record);
    }
    if let Some(record) = cache::keep_anywhere(&shared, record) {
        free_in_pool(record, Counted::No);
    }
}

/// Takes a block back into the pool itself.
pub(super) fn free_in_pool(mut record: Box<BlockRecord>, counted: Counted) {
    // Inside the pool a block must not keep the pool alive.
    let shared = record
        .shared
        .take()
        .expect("a block outside the pool knows its pool");
    let Some(mut state) = shared.state.try_lock() else {
        shared.freed.push((record, counted));
        shared.take_in_left();
        return;
    };
    cache::fold_of_thread(shared.id, &mut state);
    shared.take_in_freed(&mut state);
    let blank = state.free(record, counted);
    drop(state);
    if let Some(mut blank) = blank {
        let pool = shared.id;
        blank.shared = Some(shared);
        cache::keep_blank(pool, blank);
    }
}

/// Leaves a block for the next thread that has the pool's lock. The caller holds the pool.
pub(super) fn leave(mut record: Box<BlockRecord>, counted: Counted) {
    if let Some(shared) = record.shared.take() {
        shared.freed.push((record, counted));
    }
}

impl Shared {
    /// The state, with every block in it that was freed to it so far.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        self.take_in_freed(&mut state);
        state
    }

    /// The state, with what every cache has counted.
    fn lock_and_fold(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        self.fold_caches(&mut state);
        state
    }

    #[inline]
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    pub(super) fn register(&self, cache: &Arc<ThreadCache>) {
        let mut caches = self.caches.lock();
        if caches.is_closed {
            cache.close();
        }
        caches.all.push(cache.clone());
    }

    pub(super) fn fold_caches(&self, state: &mut State) {
        self.caches.lock().all.retain_mut(|cache| {
            // Looked at before the fold: what nobody else holds then is folded for the last time.
            let is_of_ended_thread = Arc::get_mut(cache).is_some();
            cache.fold(state);
            !is_of_ended_thread
        });
    }

    /// Takes in what was left, unless another thread has the lock: that one, or the next, will.
    pub(super) fn take_in_left(&self) {
        if let Some(mut state) = self.state.try_lock() {
            cache::fold_of_thread(self.id, &mut state);
            self.take_in_freed(&mut state);
        }
    }

    /// Takes in every block that a cache keeps, and every block that is on its way from one.
    pub(super) fn empty_caches(&self, state: &mut State, close: Close) {
        let mut caches = self.caches.lock();
        caches.is_closed |= close == Close::Yes;
        for cache in &caches.all {
            cache.empty(close, state);
        }
        drop(caches);
        self.take_in_freed(state);
    }

    pub(super) fn take_in_freed(&self, state: &mut State) {
        while let Some((record, counted)) = self.freed.pop() {
            drop(state.free(record, counted));
        }
    }
}

/// Bytes that a request takes in the pool; `None` if it cannot be rounded in 64 bits.
pub(super) fn rounded(bytes: u64) -> Option<u64> {
    align_up(bytes, GRANULARITY)
}

/// Overwrites a block that is about to become reusable, in order with its home stream.
#[expect(unsafe_code, reason = "the pool owns the memory it overwrites")]
pub(super) fn poison(device: &Device, record: &BlockRecord) {
    let raw = record.home.raw();
    // SAFETY: the block was freed by its owner and is in no free list yet, so nothing touches it until the
    // home stream has passed this fill; its segment is returned only after that stream has passed.
    let filled = unsafe {
        device
            .driver()
            .fill(record.ptr, POISON, record.allocated, raw)
    };
    // A refused fill leaves the block unpoisoned, which only a test could notice.
    drop(filled);
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Blocks in caches keep the pool alive: without this, its memory would stay until their threads end.
        let mut state = self.shared.lock();
        self.shared.empty_caches(&mut state, Close::Yes);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = self.lock();
        wait_for_streams(self, &mut state);
        // What the driver does not take back now is lost with the pool.
        drop(state.release_idle(0));
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
