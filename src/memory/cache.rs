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

use std::cell::RefCell;
use std::ptr;
use std::sync::Arc;

use super::biased::Biased;
use super::block::BlockRecord;
use super::counts::Counts;
use super::lane::{Kept, Lane, LaneKey, Limits, PoolId};
use super::local::LOCAL;
use super::pool::{self, Shared, rounded};
use super::state::{Counted, State};
use super::tags::TagId;
use crate::sync::thread_local;
use crate::units::MIB;

/// Bytes of small blocks that every lane may keep; more in proportion to what the pool holds.
const SMALL_BYTES_MIN: u64 = MIB;
/// A lane may keep one part in this many of what the pool holds: measured to cost nothing in peak memory.
const SHARE: u64 = 200;

/// Lanes beside the one in front, before they are forgotten: streams may come and go.
const LANES_MAX: usize = 16;

/// What one thread keeps of one pool.
#[derive(Debug)]
pub(super) struct ThreadCache {
    pool: PoolId,
    contents: Biased<Contents>,
}

#[derive(Debug)]
struct Contents {
    /// The lane used last; one without a key if there is none.
    front: Box<Lane>,
    others: Vec<Box<Lane>>,
    limits: Limits,
    is_closed: bool,
    counts: Counts,
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
    /// Bytes that the lane keeps.
    pub(super) kept: u64,
}

thread_local! {
    /// The caches of the calling thread.
    static CACHES: RefCell<ThreadCaches> = const { RefCell::new(ThreadCaches { all: Vec::new() }) };
}

struct ThreadCaches {
    all: Vec<Arc<ThreadCache>>,
}

impl Drop for ThreadCaches {
    fn drop(&mut self) {
        set_current(ptr::null());
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
    unsafe { LOCAL.with(|local| local.cache.get()).as_ref() }
}

fn set_current(cache: *const ThreadCache) {
    LOCAL.with(|local| local.cache.set(cache));
}

/// A block of the calling thread's lane in front, if that is the one named and has one.
#[inline]
pub(super) fn take(key: LaneKey, requested: u64) -> Option<Box<BlockRecord>> {
    let bytes = rounded(requested)?;
    current()?.if_alone(move |contents| contents.take_in_front(key, requested, bytes))?
}

/// Keeps a freed block in the lane in front, if that is the block's and has room. Gives it back otherwise.
#[inline]
pub(super) fn keep(record: Box<BlockRecord>) -> Option<Box<BlockRecord>> {
    let Some(cache) = current() else {
        return Some(record);
    };
    // In a place of its own, so that it is still here if another thread is inside.
    let mut record = Some(record);
    let kept = cache.if_alone(|contents| match record.take() {
        Some(record) => contents.keep_in_front(record.key, record),
        None => Kept::Yes,
    });
    let Some(kept) = kept else {
        return record;
    };
    match kept {
        Kept::Yes => None,
        Kept::Not(record) => Some(record),
        kept => {
            cache.make_room(kept);
            None
        }
    }
}

/// Looks again with the named lane in front, which is made if need be, for a request that [`take`] did not
/// serve.
pub(super) fn take_or_miss(
    shared: &Arc<Shared>,
    key: LaneKey,
    (requested, bytes): (u64, u64),
) -> Missed {
    let missed = enter(shared, key, |contents| {
        if let Some(record) = contents.take_in_front(key, requested, bytes) {
            return Missed {
                found: Some(record),
                ..Missed::default()
            };
        }
        Missed {
            found: None,
            blank: contents.front.take_blank(),
            kept: contents.front.kept_bytes(),
        }
    });
    // A thread that is going down has no lanes; it allocates from the pool itself.
    missed.unwrap_or_default()
}

/// Keeps a freed block with the lane `key` in front. Gives it back when the thread is going down or the pool
/// closed.
pub(super) fn keep_anywhere(
    shared: &Arc<Shared>,
    key: LaneKey,
    record: Box<BlockRecord>,
) -> Option<Box<BlockRecord>> {
    let mut record = Some(record);
    let kept = enter(shared, key, |contents| {
        contents.keep_in_front(key, record.take().expect("taken once"))
    });
    match kept {
        None => record,
        Some(Kept::Yes) => None,
        Some(Kept::InPlaceOf(other) | Kept::Full(other)) => {
            drop(pool::free_in_pool(other, Counted::Yes));
            None
        }
        Some(Kept::Not(record)) => Some(record),
    }
}

/// Counts an allocation that a lane did not serve; its tag, and whether there is a cache that counted it.
pub(super) fn count(pool: PoolId, requested: u64, allocated: u64) -> (TagId, Counted) {
    let tag = TagId::current();
    let Some(cache) = current().filter(|cache| cache.pool == pool) else {
        return (tag, Counted::No);
    };
    cache.with_owner(|contents| contents.counts.allocate(tag, requested, allocated));
    (tag, Counted::Yes)
}

/// Gives the pool the large blocks that the calling thread keeps. If there were any: the bytes that the lane
/// in front still keeps.
pub(super) fn give_hot(pool: PoolId, state: &mut State) -> Option<u64> {
    let cache = current().filter(|cache| cache.pool == pool)?;
    cache.with_owner(|contents| {
        let mut given = false;
        let lanes = contents.others.iter_mut().chain([&mut contents.front]);
        for lane in lanes {
            lane.drain_hot(|mut record| {
                given = true;
                // Inside the pool a block must not keep the pool alive.
                record.shared = None;
                state.free(record, Counted::Yes);
            });
        }
        contents.learn(state);
        given.then(|| contents.front.kept_bytes())
    })
}

/// Folds what the calling thread has counted.
pub(super) fn fold_of_thread(pool: PoolId, state: &mut State) {
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

/// Enters the calling thread's cache of a pool with the lane `key` in front; makes both if need be. `None`
/// when the thread is going down or the pool is closed.
fn enter<R>(
    shared: &Arc<Shared>,
    key: LaneKey,
    with: impl FnOnce(&mut Contents) -> R,
) -> Option<R> {
    let cache = match current() {
        Some(cache) if cache.pool == shared.id() => cache,
        _ => find(shared)?,
    };
    if !cache.with_owner(|contents| contents.bring_to_front(key)) {
        // Before it turns to a stream that is new to it, so that what it kept for others that are gone by
        // now does not stay for ever.
        cache.empty_to_queue();
        if !cache.with_owner(|contents| contents.add(Lane::new(key))) {
            return None;
        }
    }
    Some(cache.with_owner(with))
}

/// The calling thread's cache of a pool, made if need be, and then the current one.
#[cold]
fn find<'a>(shared: &Arc<Shared>) -> Option<&'a ThreadCache> {
    let found = CACHES.try_with(|caches| {
        let all = &mut caches.borrow_mut().all;
        if let Some(cache) = all.iter().find(|cache| cache.pool == shared.id()) {
            set_current(Arc::as_ptr(cache));
            return;
        }
        set_current(ptr::null());
        // Caches of pools that are gone have no other holder.
        all.retain(|cache| Arc::strong_count(cache) > 1);
        let cache = Arc::new(ThreadCache::new(shared));
        shared.register(&cache);
        set_current(Arc::as_ptr(&cache));
        all.push(cache);
    });
    found.ok()?;
    shared.fold_if_free();
    current()
}

impl ThreadCache {
    fn new(shared: &Shared) -> Self {
        let pool = shared.id();
        Self {
            pool,
            contents: Biased::new(Contents {
                front: Lane::new(LaneKey::VACANT),
                others: Vec::new(),
                limits: Limits {
                    small_bytes: SMALL_BYTES_MIN,
                    is_asked: false,
                },
                is_closed: false,
                counts: Counts::default(),
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

    /// As [`with_owner`](Self::with_owner), unless another thread wants in.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "who owns a cache is known by where it was found"
    )]
    fn if_alone<R>(&self, with: impl FnOnce(&mut Contents) -> R) -> Option<R> {
        // SAFETY: as in `with_owner`.
        unsafe { self.contents.try_with_owner(with) }.ok()
    }

    /// Gives the pool what the lane in front had no room for.
    #[cold]
    #[inline(never)]
    fn make_room(&self, kept: Kept) {
        match kept {
            Kept::Yes | Kept::Not(_) => {}
            Kept::InPlaceOf(other) => {
                let Some(blank) = pool::free_in_pool(other, Counted::Yes) else {
                    return;
                };
                let refused = self.with_owner(|contents| contents.keep_blank(blank));
                // Outside the cache, because it may hold the pool's last reference.
                drop(refused);
            }
            Kept::Full(record) => {
                let shared = record.shared.clone();
                let shared = shared.expect("a block outside the pool knows its pool");
                // Each goes to the pool's queue from inside the cache: whoever empties all caches and then
                // looks into the queue misses none.
                self.with_owner(|contents| {
                    contents
                        .front
                        .drain(|record| pool::leave(record, Counted::Yes));
                });
                pool::leave(record, Counted::Yes);
                shared.take_in_left();
            }
        }
    }

    /// Empties every lane into the pool's queue. Only for the owner.
    fn empty_to_queue(&self) {
        let mut pool = None;
        let blanks = self.with_owner(|contents| {
            let lanes = contents.others.iter_mut().chain([&mut contents.front]);
            let mut blanks = Vec::new();
            for lane in lanes {
                lane.drain(|record| {
                    pool.clone_from(&record.shared);
                    pool::leave(record, Counted::Yes);
                });
                blanks.append(&mut lane.take_blanks());
            }
            blanks
        });
        // Outside the cache, because they may hold the pool's last references.
        drop(blanks);
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
            for mut lane in contents.take_lanes(Lane::new(LaneKey::VACANT)) {
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
    /// Whether there is a lane of this name, which is then in front.
    fn bring_to_front(&mut self, key: LaneKey) -> bool {
        if self.front.key == key {
            return true;
        }
        let Some(lane) = self.others.iter_mut().find(|lane| lane.key == key) else {
            return false;
        };
        std::mem::swap(&mut self.front, lane);
        true
    }

    /// Puts a new lane in front, unless nothing is to be kept. All lanes are empty.
    fn add(&mut self, lane: Box<Lane>) -> bool {
        if self.is_closed {
            return false;
        }
        let before = std::mem::replace(&mut self.front, lane);
        if self.others.len() == LANES_MAX {
            self.others.clear();
        }
        self.others.push(before);
        true
    }

    /// All lanes; `vacant` takes their place.
    fn take_lanes(&mut self, vacant: Box<Lane>) -> Vec<Box<Lane>> {
        let mut lanes = std::mem::take(&mut self.others);
        lanes.push(std::mem::replace(&mut self.front, vacant));
        lanes
    }

    #[inline]
    fn take_in_front(
        &mut self,
        key: LaneKey,
        requested: u64,
        bytes: u64,
    ) -> Option<Box<BlockRecord>> {
        if self.front.key != key {
            return None;
        }
        let mut record = self.front.take(bytes)?;
        record.hand_out(requested);
        self.counts.allocate(record.tag, requested, bytes);
        Some(record)
    }

    /// Counts a free and keeps the block, unless the lane is not for it.
    #[inline]
    fn keep_in_front(&mut self, key: LaneKey, record: Box<BlockRecord>) -> Kept {
        if self.front.key != key {
            return Kept::Not(record);
        }
        self.counts
            .free(record.tag, record.requested, record.allocated);
        self.front.keep(record, self.limits)
    }

    /// Keeps the record of a block that is gone, or gives it back.
    fn keep_blank(&mut self, blank: Box<BlockRecord>) -> Option<Box<BlockRecord>> {
        if self.front.key != blank.key {
            return Some(blank);
        }
        self.front.keep_blank(blank)
    }

    /// Folds the counters into the pool's.
    fn fold(&mut self, state: &mut State) {
        self.learn(state);
        self.counts.fold(state);
    }

    /// Learns how much may be kept.
    fn learn(&mut self, state: &State) {
        self.limits = Limits {
            small_bytes: SMALL_BYTES_MIN.max(state.bytes_held() / SHARE),
            is_asked: state.fences.are_asked(),
        };
    }
}
