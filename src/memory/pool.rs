//! The pool: one lock, and the ladder that an allocation climbs when memory is short.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::arena::GRANULARITY;
use super::backing::Refusal;
use super::block::{Block, BlockRecord};
use super::config::PoolConfig;
use super::lane::{self, Close, Kept, Lane};
use super::reclaim;
use super::state::{Counted, State};
use super::stats::PoolStats;
use super::tags::TagStat;
use crate::driver::{Device, Stream};
use crate::error::{Error, OutOfMemory, Result};
use crate::sync::{Mutex, MutexGuard, SegQueue};
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
    /// Every thread's lanes. Taken after `state` where both are needed, and before a lane's own lock.
    lanes: Mutex<Lanes>,
    /// Blocks freed while another thread held the lock; taken in by the next thread that holds it.
    freed: SegQueue<(Box<BlockRecord>, Counted)>,
}

/// The lanes of a pool.
#[derive(Default)]
struct Lanes {
    all: Vec<Arc<Lane>>,
    /// Set with the last clone of the pool: lanes made later, for blocks still out, keep nothing.
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
        config.validate(device)?;
        let shared = Shared {
            // Relaxed: the number only has to be unique.
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            device: device.clone(),
            state: Mutex::new(State::new(device, &config)?),
            config,
            lanes: Mutex::default(),
            freed: SegQueue::new(),
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

    /// The settings the pool was made with.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.shared().config
    }

    /// Memory for `bytes` bytes, for use on `stream` from now on; its contents are undefined. Zero bytes
    /// give a block without memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with a report after every rung failed; [`Error::InvalidArgument`] for a
    /// stream of another device.
    pub fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let shared = self.shared();
        if !stream.device().is_same(&shared.device) {
            return Err(Error::argument(
                "allocate",
                "the stream belongs to another device",
            ));
        }
        if bytes == 0 {
            return Ok(Block::new(None));
        }
        let key = (shared.id, stream.id());
        let take = |lane: &Lane, _: &Arc<Shared>| lane.take(bytes, rounded(bytes)?);
        // A thread that is going down has no lanes; it allocates from the pool itself.
        if let Ok(Some(record)) = lane::with_lane(key, shared, register, take) {
            return Ok(Block::new(Some(record)));
        }
        lane::give_up_hot(key, bytes);
        let mut record = reclaim::allocate(shared, bytes, stream)?;
        record.shared = Some(shared.clone());
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

    /// Returns all memory without a block in use to the driver. Blocks the host until every stream that the
    /// pool has served has passed its last use; other threads go on meanwhile.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps it.
    pub fn empty_cache(&self) -> Result<()> {
        let shared = self.shared();
        let mut state = shared.lock();
        reclaim::wait_for_streams(shared, &mut state);
        state.release_idle()
    }

    /// Flushes every thread's cache and walks every structure. For a moment when no other thread uses the
    /// pool.
    ///
    /// # Panics
    /// If an invariant is broken: a bug of this crate.
    pub fn check_invariants(&self) {
        let mut state = self.shared().lock_and_fold();
        self.shared().flush_lanes(&mut state, Close::No);
        state.check_invariants();
    }
}

fn register(shared: &&Arc<Shared>, lane: &Arc<Lane>) {
    shared.register(lane);
}

/// Takes a block back without ever blocking on another thread's allocation: the calling thread's lane keeps
/// it, or the pool takes it in, or, while another thread has the pool's lock, finds it in its queue.
pub(super) fn free(record: Box<BlockRecord>) {
    let shared = record
        .shared
        .as_ref()
        .expect("a block in a caller's hands knows its pool");
    if !record.users.is_empty() {
        return free_in_pool(record, Counted::No);
    }
    if shared.config.poison {
        poison(&shared.device, &record);
    }
    let key = (shared.id, record.home.id());
    #[expect(clippy::borrowed_box, reason = "the lane hands over what it was given")]
    let register = |record: &Box<BlockRecord>, lane: &Arc<Lane>| {
        let shared = record.shared.as_ref().expect("checked above");
        shared.register(lane);
    };
    let kept = lane::with_lane(key, record, register, |lane, record| lane.keep(record));
    match kept {
        Ok(Kept::Yes) => {}
        Ok(Kept::InPlaceOf(record) | Kept::Not(record)) => free_in_pool(record, Counted::Yes),
        Ok(Kept::Full(record)) => {
            lane::flush_thread_lane(key);
            free_in_pool(record, Counted::Yes);
        }
        Err(record) => free_in_pool(record, Counted::No),
    }
}

/// Takes a block back into the pool itself.
pub(super) fn free_in_pool(record: Box<BlockRecord>, counted: Counted) {
    leave(record, counted).take_in_left();
}

/// Leaves a block for the next thread that has the pool's lock. Inside the pool a block must not keep the
/// pool alive, so the caller gets that reference.
pub(super) fn leave(mut record: Box<BlockRecord>, counted: Counted) -> Arc<Shared> {
    let shared = record
        .shared
        .take()
        .expect("a block outside the pool knows its pool");
    shared.freed.push((record, counted));
    shared
}

impl Shared {
    /// The state, with every block in it that was freed to it so far.
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        self.take_in_freed(&mut state);
        state
    }

    /// The state, with what every lane has counted.
    fn lock_and_fold(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        self.fold_lanes(&mut state);
        state
    }

    fn register(&self, lane: &Arc<Lane>) {
        let mut lanes = self.lanes.lock();
        if lanes.is_closed {
            lane.close();
        }
        lanes.all.push(lane.clone());
    }

    fn fold_lanes(&self, state: &mut State) {
        let held = state.bytes_held();
        self.lanes.lock().all.retain_mut(|lane| {
            // Looked at before the fold: what nobody else holds then is folded for the last time.
            let is_of_ended_thread = Arc::get_mut(lane).is_some();
            lane.fold(&mut state.usage, &mut state.tags, held);
            !is_of_ended_thread
        });
    }

    /// Folds what the calling thread's lanes have counted, so that peaks are exact where one thread uses
    /// the pool.
    pub(super) fn fold_thread_lanes(&self, state: &mut State) {
        let held = state.bytes_held();
        lane::for_each_of_thread(self.id, |lane| {
            lane.fold(&mut state.usage, &mut state.tags, held);
        });
    }

    /// Takes in what was left, unless another thread has the lock: that one, or the next, will.
    pub(super) fn take_in_left(&self) {
        if let Some(mut state) = self.state.try_lock() {
            self.fold_thread_lanes(&mut state);
            self.take_in_freed(&mut state);
        }
    }

    /// Takes in every block that a lane keeps, and every block that is on its way from one.
    pub(super) fn flush_lanes(&self, state: &mut State, close: Close) {
        let mut lanes = self.lanes.lock();
        lanes.is_closed |= close == Close::Yes;
        for lane in &lanes.all {
            lane.flush(close, |mut record| {
                // Inside the pool a block must not keep the pool alive. This is never the last reference:
                // the caller holds one.
                record.shared = None;
                state.free(record, Counted::Yes);
            });
        }
        drop(lanes);
        self.take_in_freed(state);
        self.fold_lanes(state);
    }

    pub(super) fn take_in_freed(&self, state: &mut State) {
        while let Some((record, counted)) = self.freed.pop() {
            state.free(record, counted);
        }
    }

    /// The report of an allocation that failed.
    pub(super) fn report(
        &self,
        state: &mut State,
        requested: u64,
        stream: &Stream,
        refusal: Option<Refusal>,
        tried: Vec<&'static str>,
    ) -> OutOfMemory {
        let device = self.device.memory_info().ok();
        let mut tags = state.tags.snapshot();
        tags.sort_by_key(|tag| std::cmp::Reverse(tag.allocated_bytes.current));
        let largest = tags
            .iter()
            .filter(|tag| tag.allocated_bytes.current > 0)
            .take(3);
        OutOfMemory {
            requested,
            allocated: state.usage.allocated.stat().current,
            pending: state.pending.bytes(),
            reserved: state.bytes_held(),
            largest_free: state.largest_free(stream),
            device_free: device.map_or(0, |info| info.free),
            device_total: self.device.properties().total_memory,
            limit: self.config.limit,
            limited: matches!(refusal, Some(Refusal::Limit)),
            driver_error: match refusal {
                Some(Refusal::Driver(error)) => Some(error.to_string()),
                _ => None,
            },
            tried,
            largest_tags: largest
                .map(|tag| (tag.tag.to_owned(), tag.allocated_bytes.current))
                .collect(),
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
        // Blocks in lanes keep the pool alive: without this, its memory would stay until their threads end.
        let mut state = self.shared.lock();
        self.shared.flush_lanes(&mut state, Close::Yes);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = self.lock();
        reclaim::wait_for_streams(self, &mut state);
        // What the driver does not take back now is lost with the pool.
        drop(state.release_idle());
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
