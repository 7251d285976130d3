//! What a thread keeps of a pool: a lane per stream, and counters.
//!
//! A thread reaches its caches through thread-local storage, and the one it used last through a single
//! pointer there. It enters as the owner of a [`Biased`], with no atomic read-modify-write; other threads
//! enter only to empty a cache or to fold its counters into the pool's. Reuse is in stream order as
//! everywhere: the thread that allocates is the one that freed, so it enqueued the block's last work before.
//!
//! A cache is emptied when a lane is full (that lane), when the thread turns to a stream that is new to it,
//! when it ends, when memory runs short, and when the pool's last handle is dropped, after which it keeps
//! nothing more.
//!
//! Lock order: the pool's state, then a cache. Nothing here waits for the state from inside a cache.

use std::cell::{Cell, RefCell};
use std::ptr;
use std::sync::Arc;

use super::biased::Biased;
use super::block::BlockRecord;
use super::lane::{Kept, Lane};
use super::pool::{self, Shared, rounded};
use super::state::{Counted, State};
use super::stats::Usage;
use super::tags::TagTable;
use crate::units::{MIB, StreamId};

/// Bytes of small blocks that every lane may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A lane may keep one part in this many of what the pool holds: measured to cost nothing in peak memory.
const SHARE: u64 = 200;

/// A pool number that no pool has.
const NO_POOL: u64 = u64::MAX;

/// What one thread keeps of one pool.
#[derive(Debug)]
pub(super) struct ThreadCache {
    pool: u64,
    /// The same number, unless freed blocks have to be overwritten before they are kept.
    pool_if_kept_as_is: u64,
    contents: Biased<Contents>,
}

#[derive(Debug)]
struct Contents {
    /// The lane used last in front.
    lanes: Vec<Lane>,
    small_bytes_max: u64,
    is_closed: bool,
    /// Changes since they were folded into the pool's.
    usage: Usage,
    tags: TagTable,
}

/// Whether a cache goes on after it was emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    Yes,
    No,
}

/// What a thread has for an allocation that its lanes could not serve at once.
#[derive(Debug, Default)]
pub(super) struct Missed {
    /// A block after all.
    pub(super) found: Option<Box<BlockRecord>>,
    /// A record to reuse.
    pub(super) blank: Option<Box<BlockRecord>>,
    /// A block for the pool to take back first.
    pub(super) hot: Option<Box<BlockRecord>>,
}

thread_local! {
    /// The cache used last, which [`CACHES`] holds; null if that holds none.
    static CURRENT: Cell<*const ThreadCache> = const { Cell::new(ptr::null()) };
    static CACHES: RefCell<ThreadCaches> = const { RefCell::new(ThreadCaches { all: Vec::new() }) };
}

struct ThreadCaches {
    all: Vec<Arc<ThreadCache>>,
}

impl Drop for ThreadCaches {
    fn drop(&mut self) {
        CURRENT.set(ptr::null());
        for cache in std::mem::take(&mut self.all) {
            cache.empty_to_queue();
        }
    }
}

/// The cache the calling thread used last.
#[inline]
#[expect(unsafe_code, reason = "the fast path does without the list's checks")]
fn current<'a>() -> Option<&'a ThreadCache> {
    // SAFETY: the pointer is null or that of a cache in this thread's list, which takes the pointer back
    // before it lets go of the cache. No caller keeps the reference across a call that changes the list.
    unsafe { CURRENT.get().as_ref() }
}

/// A block of the calling thread's lane in front, if that is the lane of this pool and stream and has one.
#[inline]
pub(super) fn take(pool: u64, stream: StreamId, requested: u64) -> Option<Box<BlockRecord>> {
    let cache = current().filter(|cache| cache.pool == pool)?;
    let bytes = rounded(requested)?;
    cache.with_owner(|contents| contents.take_in_front(stream, requested, bytes))
}

/// Keeps a freed block in the lane in front, if that is the lane of its pool and stream and has room. Gives
/// it back otherwise.
#[inline]
pub(super) fn keep(pool: u64, record: Box<BlockRecord>) -> Option<Box<BlockRecord>> {
    let Some(cache) = current().filter(|cache| cache.pool_if_kept_as_is == pool) else {
        return Some(record);
    };
    let kept = cache.with_owner(|contents| contents.keep_in_front(record));
    match kept {
        Ok(Kept::Yes) => None,
        Ok(Kept::InPlaceOf(other)) => {
            pool::free_in_pool(other, Counted::Yes);
            None
        }
        Ok(Kept::Full(record)) => {
            cache.empty_lane(record);
            None
        }
        Err(record) => Some(record),
    }
}

/// Looks again with the lane of this pool and stream in front, which is made if need be, for a request that
/// [`take`] did not serve.
pub(super) fn take_or_miss(
    shared: &Arc<Shared>,
    stream: StreamId,
    (requested, bytes): (u64, u64),
) -> Missed {
    let missed = enter(shared, stream, |contents| {
        if let Some(record) = contents.take_in_front(stream, requested, bytes) {
            return Missed {
                found: Some(record),
                ..Missed::default()
            };
        }
        let lane = &mut contents.lanes[0];
        Missed {
            found: None,
            blank: lane.take_blank(),
            hot: (bytes > super::lane::SMALL_MAX)
                .then(|| lane.take_hot())
                .flatten(),
        }
    });
    // A thread that is going down has no lanes; it allocates from the pool itself.
    missed.unwrap_or_default()
}

/// Keeps a freed block as [`keep`] does, with the lane of its pool and stream in front. Gives it back when
/// the thread is going down or the pool closed.
pub(super) fn keep_anywhere(
    shared: &Arc<Shared>,
    record: Box<BlockRecord>,
) -> Option<Box<BlockRecord>> {
    let mut record = Some(record);
    let stream = record.as_ref()?.home.id();
    let kept = enter(shared, stream, |contents| {
        let record = record.take().expect("taken once");
        contents.keep_in_front(record)
    });
    match kept {
        None => record,
        Some(Ok(Kept::Yes)) => None,
        Some(Ok(Kept::InPlaceOf(other))) => {
            pool::free_in_pool(other, Counted::Yes);
            None
        }
        Some(Ok(Kept::Full(record))) => {
            pool::free_in_pool(record, Counted::Yes);
            None
        }
        Some(Err(record)) => Some(record),
    }
}

/// Keeps the record of a block that is gone, or drops it.
pub(super) fn keep_blank(pool: u64, blank: Box<BlockRecord>) {
    // What the lane does not take is dropped here: outside the cache, because it may hold the pool's last
    // reference.
    let refused = match current().filter(|cache| cache.pool == pool) {
        None => Some(blank),
        Some(cache) => cache.with_owner(|contents| {
            let stream = blank.home.id();
            match contents.lanes.first_mut() {
                Some(lane) if lane.stream == stream && !contents.is_closed => {
                    lane.keep_blank(blank)
                }
                _ => Some(blank),
            }
        }),
    };
    drop(refused);
}

/// Folds what the calling thread has counted, so that peaks are exact where one thread uses the pool.
pub(super) fn fold_of_thread(pool: u64, state: &mut State) {
    let mut fold = |cache: &ThreadCache| {
        cache.with_owner(|contents| contents.fold(state));
    };
    if let Some(cache) = current().filter(|cache| cache.pool == pool) {
        return fold(cache);
    }
    // A thread that is going down has left its counters to whoever folds all.
    let _ = CACHES.try_with(|caches| {
        let caches = caches.borrow();
        if let Some(cache) = caches.all.iter().find(|cache| cache.pool == pool) {
            fold(cache);
        }
    });
}

/// Enters the calling thread's cache of a pool with the lane of `stream` in front; makes both if need be.
/// `None` when the thread is going down.
fn enter<R>(
    shared: &Arc<Shared>,
    stream: StreamId,
    with: impl FnOnce(&mut Contents) -> R,
) -> Option<R> {
    let has_lane = move |contents: &mut Contents| contents.bring_to_front(stream);
    let is_current = current().is_some_and(|cache| cache.pool == shared.id());
    let cache = if is_current { current() } else { find(shared) }?;
    if !cache.with_owner(has_lane) {
        // Before it turns to a stream that is new to it, so that what it kept for others that are gone by
        // now does not stay for ever.
        cache.empty_to_queue();
        shared.take_in_left();
        cache.with_owner(|contents| contents.lanes.insert(0, Lane::new(stream)));
    }
    Some(cache.with_owner(with))
}

/// The calling thread's cache of a pool, made if need be, and then the current one.
#[cold]
fn find<'a>(shared: &Arc<Shared>) -> Option<&'a ThreadCache> {
    let found = CACHES.try_with(|caches| {
        let all = &mut caches.borrow_mut().all;
        if let Some(cache) = all.iter().find(|cache| cache.pool == shared.id()) {
            CURRENT.set(Arc::as_ptr(cache));
            return;
        }
        CURRENT.set(ptr::null());
        // Caches of pools that are gone have no other holder.
        all.retain(|cache| Arc::strong_count(cache) > 1);
        let cache = Arc::new(ThreadCache::new(shared));
        shared.register(&cache);
        CURRENT.set(Arc::as_ptr(&cache));
        all.push(cache);
    });
    found.ok()?;
    current()
}

impl ThreadCache {
    fn new(shared: &Shared) -> Self {
        let pool = shared.id();
        Self {
            pool,
            pool_if_kept_as_is: if shared.config.poison { NO_POOL } else { pool },
            contents: Biased::new(Contents {
                lanes: Vec::new(),
                small_bytes_max: SMALL_BYTES_MIN,
                is_closed: false,
                usage: Usage::default(),
                tags: TagTable::default(),
            }),
        }
    }

    #[inline]
    #[expect(
        unsafe_code,
        reason = "who owns a cache is known by where it was found"
    )]
    fn with_owner<R>(&self, with: impl FnOnce(&mut Contents) -> R) -> R {
        // SAFETY: private to this file, where it is called for caches found in the calling thread's
        // storage only, and each is in one thread's.
        unsafe { self.contents.with_owner(with) }
    }

    /// Empties the lane in front, which is full, and frees `record` as well.
    #[cold]
    fn empty_lane(&self, record: Box<BlockRecord>) {
        let shared = record
            .shared
            .clone()
            .expect("a block in hand knows its pool");
        // Each goes to the pool's queue from inside the cache: whoever empties all caches and then looks
        // into the queue misses none.
        self.with_owner(|contents| {
            contents.lanes[0].drain(|record| pool::leave(record, Counted::Yes));
        });
        pool::leave(record, Counted::Yes);
        shared.take_in_left();
    }

    /// Empties every lane into the pool's queue and forgets the lanes. Only for the owner.
    fn empty_to_queue(&self) {
        let mut pool = None;
        let lanes = self.with_owner(|contents| {
            for lane in &mut contents.lanes {
                lane.drain(|record| {
                    pool.clone_from(&record.shared);
                    pool::leave(record, Counted::Yes);
                });
            }
            std::mem::take(&mut contents.lanes)
        });
        // Outside the cache, because the records may hold the pool's last references.
        drop(lanes);
        if let Some(pool) = pool {
            pool.take_in_left();
        }
    }

    /// Makes a cache that is empty keep nothing.
    pub(super) fn close(&self) {
        self.contents.with(|contents| contents.is_closed = true);
    }

    /// Empties the cache from any thread, each block to `give`, and forgets the lanes. The caller holds the
    /// pool.
    pub(super) fn empty(&self, close: Close, state: &mut State) {
        self.contents.with(|contents| {
            contents.is_closed |= close == Close::Yes;
            for mut lane in std::mem::take(&mut contents.lanes) {
                lane.drain(|mut record| {
                    // Inside the pool a block must not keep the pool alive.
                    record.shared = None;
                    state.free(record, Counted::Yes);
                });
            }
            contents.fold(state);
        });
    }

    /// Folds the counters from any thread.
    pub(super) fn fold(&self, state: &mut State) {
        self.contents.with(|contents| contents.fold(state));
    }
}

impl Contents {
    /// Whether there is a lane for `stream`, which is then in front.
    fn bring_to_front(&mut self, stream: StreamId) -> bool {
        let position = self.lanes.iter().position(|lane| lane.stream == stream);
        position.map(|at| self.lanes.swap(0, at)).is_some()
    }

    #[inline]
    fn take_in_front(
        &mut self,
        stream: StreamId,
        requested: u64,
        bytes: u64,
    ) -> Option<Box<BlockRecord>> {
        let lane = self.lanes.first_mut()?;
        if lane.stream != stream {
            return None;
        }
        let mut record = lane.take(bytes)?;
        record.hand_out(requested);
        self.usage.allocate(requested, bytes);
        self.tags.increase(record.tag, bytes);
        Some(record)
    }

    /// Counts a free and keeps the block, or gives it back uncounted.
    #[inline]
    fn keep_in_front(&mut self, record: Box<BlockRecord>) -> Result<Kept, Box<BlockRecord>> {
        let is_closed = self.is_closed;
        let lane = self.lanes.first_mut().filter(|_| !is_closed);
        let Some(lane) = lane.filter(|lane| lane.stream == record.home.id()) else {
            return Err(record);
        };
        self.usage.free(record.requested, record.allocated);
        self.tags.decrease(record.tag, record.allocated);
        Ok(lane.keep(record, self.small_bytes_max))
    }

    /// Folds the counters into the pool's, and learns how many bytes the pool holds.
    fn fold(&mut self, state: &mut State) {
        self.small_bytes_max = SMALL_BYTES_MIN.max(state.bytes_held() / SHARE);
        state.fold(&mut self.usage, &mut self.tags);
    }
}
