//! What a thread keeps of a pool, and who may enter it.
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
//!
//! # Nobody enters twice
//! A thread that is inside a cache must not enter it again: there would be two `&mut Contents`. What runs inside are the
//! closures of this file. They call methods of `contents`, `lane` and `counts`, and of the pool's state those that call
//! no driver; two push to the pool's queues. None of that enters a cache by itself, so only code of others could. It
//! runs where a driver is called, which none of them does, and where something is dropped that others can look at: a
//! record, with which the last handle of a stream may go, or a pool. Nothing of the kind is dropped inside: it is handed
//! out and dropped by the caller. Debug builds assert that (`local::assert_outside`), so every test looks for a closure
//! that breaks the rule; release builds assert on all ways in but those of the fast path ([`Biased::with_owner`]).

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use super::arena::GRANULARITY;
use super::biased::Biased;
use super::contents::{Contents, Miss};
use super::lane::{self, Kept, Lane, LaneKey, PoolId};
use super::local::{self, LOCAL};
use super::pool::{self, Pool, Shared};
use super::record::Record;
use super::state::{Counted, State};
use super::tags::TagId;
use super::wanted::Wanted;
use crate::driver::Stream;
use crate::sync::thread_local;

/// What one thread keeps of one pool.
#[derive(Debug)]
pub(super) struct ThreadCache {
    pool: PoolId,
    contents: Biased<Contents>,
}

/// Whether a cache goes on after it was emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    Yes,
    No,
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
            cache.leave_streams();
        }
    }
}

/// The cache the calling thread used last.
#[inline]
#[expect(unsafe_code, reason = "the fast path does without the list's checks")]
fn current<'a>() -> Option<&'a ThreadCache> {
    // SAFETY: the pointer is null or that of a cache in this thread's list, which takes the pointer back
    // before it lets go of the cache. The list lets go of a cache in two places: in `find`, when its pool is gone, and
    // when the thread ends, which runs no code of ours but what it drops. `find` may be reached wherever code of others
    // runs: where a record, a lane or a stream is dropped and where a driver is called. Whoever uses the reference after
    // such a place holds the pool across it: `take`, `fetch` and `take_anywhere` by the caller's handle, `make_room`,
    // `leave_to_queue` and `keep_in_new_lane` by one of their own, the end of a thread by the list itself.
    unsafe { LOCAL.with(|local| local.cache.get()).as_ref() }
}

fn set_current(cache: *const ThreadCache) {
    LOCAL.with(|local| local.cache.set(cache));
}

/// The calling thread's cache of a pool, and its tag.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    cache: &'a ThreadCache,
    tag: TagId,
    /// The cache is that thread's to enter.
    not_send: PhantomData<*const ()>,
}

impl<'a> Caller<'a> {
    #[inline]
    fn new(cache: &'a ThreadCache, tag: TagId) -> Self {
        Self {
            cache,
            tag,
            not_send: PhantomData,
        }
    }
}

/// A block of the calling thread's lane in front, if that is the one named and has one.
#[inline]
pub(super) fn take<'a>(
    pool: &'a Pool,
    stream: &Stream,
    requested: u64,
) -> Result<Record, Miss<Caller<'a>>> {
    // First of all: the look-up is a call where this crate is part of a shared library.
    let (cache, tag) = (current(), TagId::current());
    let shared = pool.shared();
    let Some(cache) = cache.filter(|_| shared.routes.are_none()) else {
        return Err(Miss::Elsewhere);
    };
    // What is zero or too large to be rounded becomes zero, of which no lane has a block.
    let bytes = requested.wrapping_add(GRANULARITY - 1) & !(GRANULARITY - 1);
    let key = LaneKey::new(shared.id(), stream.id());
    let taken = cache.if_alone((), |contents, ()| {
        contents.take(key, tag, (requested, bytes))
    });
    match taken {
        Ok(Ok(record)) => Ok(record),
        Ok(Err(Miss::Here(()))) => Err(Miss::Here(Caller::new(cache, tag))),
        Ok(Err(Miss::Elsewhere)) | Err(()) => Err(Miss::Elsewhere),
    }
}

/// The calling thread's part in a pool, if it has a cache of it, which was the last that it used.
pub(super) fn caller(shared: &Shared) -> Option<Caller<'_>> {
    let tag = TagId::current();
    let cache = current().filter(|cache| cache.pool == shared.id())?;
    Some(Caller::new(cache, tag))
}

/// Keeps a freed block in the lane in front, if that is the block's and has room. Gives it back otherwise.
#[inline]
pub(super) fn keep(record: Record) -> Option<Record> {
    let Some(cache) = current() else {
        return Some(record);
    };
    match cache.if_alone(record, Contents::keep) {
        Ok(Kept::Yes) => None,
        Err(record) | Ok(Kept::Not(record)) => Some(record),
        Ok(kept) => {
            cache.make_room(kept);
            None
        }
    }
}

/// Looks again with the named lane in front, which is made if need be, for a request that [`take`] did not
/// serve.
pub(super) fn take_anywhere(
    shared: &Arc<Shared>,
    key: LaneKey,
    sizes: (u64, u64),
) -> Option<Record> {
    let tag = TagId::current();
    let cache = of_thread(shared)?;
    let taken = cache.with_lane(key, (), |contents, ()| contents.take_of_front(tag, sizes));
    taken.ok()?.ok()
}

/// Keeps a freed block with the lane `key` in front. Gives it back when the thread is going down or the pool
/// closed.
pub(super) fn keep_anywhere(key: LaneKey, record: Record) -> Option<Record> {
    let Some(cache) = of_thread(record.shared()) else {
        return Some(record);
    };
    match cache.with_front(key, record, Contents::keep_in_front) {
        Ok(Kept::Yes) => None,
        Ok(Kept::Not(record)) => Some(record),
        Ok(kept) => {
            cache.make_room(kept);
            None
        }
        Err((record, _)) => cache.keep_in_new_lane(key, record),
    }
}

/// Places a block in memory that is free for the stream at once, when the pool has taken back what the calling
/// thread left, and if need be also the large blocks that it keeps. If that cannot be done: the bytes that the
/// thread still keeps for the stream.
#[inline]
pub(super) fn fetch(
    Caller { cache, tag, .. }: Caller<'_>,
    shared: &Arc<Shared>,
    state: &mut State,
    key: LaneKey,
    wanted: &Wanted<'_>,
) -> Result<Record, u64> {
    let mut refused = None;
    let found = cache
        .with_owner(|contents| contents.fetch(shared, state, key, (wanted, tag), &mut refused));
    state.settle_frees();
    if refused.is_some() {
        lane::drop_all(refused);
    }
    found
}

/// Counts an allocation that a lane did not serve; its tag, and whether there is a cache that counted it.
pub(super) fn count(pool: PoolId, requested: u64, allocated: u64) -> (TagId, Counted) {
    let tag = TagId::current();
    let Some(cache) = current().filter(|cache| cache.pool == pool) else {
        return (tag, Counted::No);
    };
    cache.with_owner(|contents| contents.count(tag, requested, allocated));
    (tag, Counted::Yes)
}

/// Folds what the calling thread has counted.
pub(super) fn fold_of_thread(pool: PoolId, state: &mut State) {
    let mut fold = |cache: &ThreadCache| {
        cache.with_owner(|contents| contents.fold_counts(state));
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

/// The calling thread's cache of a pool, made if need be, and then the current one. `None` when the thread is
/// going down.
#[inline]
fn of_thread<'a>(shared: &Arc<Shared>) -> Option<&'a ThreadCache> {
    match current() {
        Some(cache) if cache.pool == shared.id() => Some(cache),
        _ => find(shared),
    }
}

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
        Self {
            pool: shared.id(),
            contents: Biased::new(Contents::new()),
        }
    }

    #[inline]
    #[expect(
        unsafe_code,
        reason = "who owns a cache is known by where it was found"
    )]
    fn with_owner<R>(&self, with: impl FnOnce(&mut Contents) -> R) -> R {
        // SAFETY: private to this file, where it is called for caches found in the calling thread's
        // storage only, and each is in one thread's. A `Caller` stays on its thread. `with` is one of the closures of
        // this file, none of which enters a cache: see the head.
        local::inside(|| unsafe { self.contents.with_owner(with) })
    }

    /// As [`with_owner`](Self::with_owner), unless another thread wants in: then `input` comes back.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "who owns a cache is known by where it was found"
    )]
    fn if_alone<I, R>(&self, input: I, with: impl FnOnce(&mut Contents, I) -> R) -> Result<R, I> {
        // SAFETY: as in `with_owner`. The owner is not inside: only a closure could run this, and none does.
        local::inside(|| unsafe { self.contents.try_with_owner(input, with) })
    }

    /// Enters with the lane `key` in front. Gives everything back if there is none.
    #[inline]
    fn with_front<I, R, W: FnOnce(&mut Contents, I) -> R>(
        &self,
        key: LaneKey,
        input: I,
        with: W,
    ) -> Result<R, (I, W)> {
        self.with_owner(|contents| {
            if !contents.bring_to_front(key) {
                return Err((input, with));
            }
            Ok(with(contents, input))
        })
    }

    /// Keeps a freed block in a lane that is made for it. Gives it back when the pool is closed.
    #[cold]
    #[inline(never)]
    fn keep_in_new_lane(&self, key: LaneKey, record: Record) -> Option<Record> {
        // Lanes that are forgotten for the new one may hold the last references to the pool but for that of the record,
        // and once that is in the cache, another thread may take it out. This one keeps the pool, and so the cache, to
        // the end.
        let _pool = record.shared().clone();
        match self.with_lane(key, record, Contents::keep_in_front) {
            Ok(Kept::Yes) => None,
            Err(record) | Ok(Kept::Not(record)) => Some(record),
            Ok(kept) => {
                self.make_room(kept);
                None
            }
        }
    }

    /// Enters with the lane `key` in front, which is made if need be. Gives `input` back when the pool is
    /// closed. The caller holds the pool: code of others may run in between.
    fn with_lane<I, R>(
        &self,
        key: LaneKey,
        input: I,
        with: impl FnOnce(&mut Contents, I) -> R,
    ) -> Result<R, I> {
        let attempt = self.with_front(key, input, with);
        attempt.or_else(|(input, with)| {
            // Before it turns to a stream that is new to it, so that what it kept for others that are gone by
            // now does not stay for ever.
            self.leave_streams();
            let mut gone = None;
            let outcome = self.with_owner(|contents| {
                gone = contents.add(Lane::new(key));
                if gone.is_none() {
                    return Err(input);
                }
                Ok(with(contents, input))
            });
            // Outside the cache, because their records may hold the pool's last references.
            drop(gone);
            outcome
        })
    }

    /// Gives the pool what the lane in front had no room for.
    #[cold]
    #[inline(never)]
    fn make_room(&self, kept: Kept) {
        match kept {
            Kept::Yes | Kept::Not(_) => return,
            // Inside the cache: whoever empties all caches and then looks into the queue misses no block.
            Kept::InPlaceOf(record) | Kept::Full(record) => {
                self.with_owner(|contents| contents.leave_front(record));
            }
            Kept::Crowded => {}
        }
        let Some(shared) = self.with_owner(|contents| contents.pool_of_left()) else {
            return;
        };
        match shared.try_lock_with_fuse() {
            Some((mut state, fuse)) => {
                let mut refused = None;
                self.with_owner(|contents| contents.give_all_left(&mut state, &mut refused));
                state.settle_frees();
                fuse.defuse();
                // Outside the cache, because they may hold their streams' last references.
                lane::drop_all(refused);
            }
            None => self.leave_to_queue(|_| {}),
        }
    }

    /// Empties every lane into the pool's queue, and lets go of all streams. Only for the owner.
    fn leave_streams(&self) {
        self.leave_to_queue(Contents::leave_all);
        let blanks = self.with_owner(Contents::take_blanks);
        // Outside the cache, because they may hold the pool's last references.
        drop(blanks);
    }

    /// Puts what is left into the pool's queue, and what `leave` leaves. Only for the owner.
    fn leave_to_queue(&self, leave: impl FnOnce(&mut Contents)) {
        let mut pool = None;
        self.with_owner(|contents| {
            leave(contents);
            // From inside the cache: whoever empties all caches and then looks into the queue misses none.
            let mut left = contents.take_left();
            while let Some(record) = lane::pop(&mut left) {
                pool.clone_from(&record.shared);
                pool::leave(record, Counted::Yes);
            }
        });
        if let Some(pool) = pool {
            pool.take_in_left();
        }
    }

    /// Makes a cache that is empty keep nothing.
    pub(super) fn close(&self) {
        self.contents.with(|contents| contents.is_closed = true);
    }

    /// Empties the cache from any thread, each block to the pool, and forgets the lanes. The caller holds the
    /// pool.
    pub(super) fn empty(&self, close: Close, state: &mut State) {
        let (mut left, lanes) = self.contents.with(|contents| {
            contents.is_closed |= close == Close::Yes;
            contents.fold(state);
            contents.leave_all();
            (contents.take_left(), contents.forget_lanes())
        });
        while let Some(record) = lane::pop(&mut left) {
            state.take_back(&record);
        }
        state.settle_frees();
        drop(lanes);
    }

    /// Makes the cache of a broken pool keep nothing, from any thread: the pool takes nothing back, and only the records
    /// go.
    pub(super) fn abandon(&self) {
        let (left, lanes) = self.contents.with(|contents| {
            contents.is_closed = true;
            contents.leave_all();
            (contents.take_left(), contents.forget_lanes())
        });
        lane::drop_all(left);
        drop(lanes);
    }

    /// Folds the counters from any thread.
    pub(super) fn fold(&self, state: &mut State) {
        self.contents.with(|contents| contents.fold(state));
    }
}
