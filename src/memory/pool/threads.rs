//! The caches of threads: who has which, and who may enter it.
//!
//! A thread finds its caches in thread-local storage, and the one it used last through a single pointer there. It
//! enters as the owner of a biased lock, without an atomic read-modify-write. Other threads enter to take its contents
//! over (`thread_cache::registry`), to empty it, or to fold its counters into the pool's. Reuse is in stream order as
//! everywhere: the thread that allocates is the one that freed, or took over what that one freed, so the block's last
//! work was enqueued before.
//!
//! A stream cache is emptied when it is full. The whole cache is emptied when its thread turns to a stream that is new
//! to it or ends, when memory runs short, and when the pool's last handle is dropped; after that it keeps nothing.
//!
//! Lock order: the pool's lock, then a cache. Nothing here waits for the pool's lock from inside a cache.
//!
//! # Nobody enters twice
//! A thread that is inside a cache must not enter it again: there would be two `&mut ThreadCache`. The closures of this
//! file and of `allocate` are what runs inside. They call methods of `thread_cache`, and those of the pool's core that
//! call no driver; two push to the pool's queues. None of these enters a cache, so only foreign code could. It runs
//! where a driver is called, which none of them does, and where something is dropped that others can observe: a record,
//! which may hold the last handle of a stream, or a pool. Nothing of the kind is dropped inside; it is returned, and
//! the caller drops it. Debug builds assert that (`thread_locals::assert_outside`), so every test looks for a closure
//! that breaks the rule. Release builds assert on every way in except those of the fast path.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use super::core::Core;
use super::shared::{Handle, Record, Shared, ThreadCache};
use crate::driver::Stream;
use crate::memory::thread_cache::{Kept, List, Miss, OwnedCache, StreamCache, list};
use crate::memory::thread_locals::LOCAL;
use crate::memory::types::{CacheKey, Counted, GRANULARITY, PoolId, TagId};
use crate::sync::thread_local;

/// The cache of one thread for a pool.
type Cache = OwnedCache<Shared>;

/// Whether a cache stays closed after it was emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Close {
    Yes,
    No,
}

thread_local! {
    /// The caches of the calling thread.
    static CACHES: RefCell<ThreadCaches> = const { RefCell::new(ThreadCaches { all: Vec::new() }) };
}

struct ThreadCaches {
    all: Vec<Arc<Cache>>,
}

impl Drop for ThreadCaches {
    fn drop(&mut self) {
        set_current(ptr::null());
        for cache in std::mem::take(&mut self.all) {
            end(&cache);
        }
    }
}

/// The cache the calling thread used last.
#[inline]
#[expect(unsafe_code, reason = "the fast path does without the list's checks")]
fn current<'a>() -> Option<&'a Cache> {
    let cache: *const Cache = LOCAL.with(|local| local.cache.get()).cast();
    // SAFETY: the pointer is null or that of a cache in this thread's list, which takes the pointer back before it lets
    // go of the cache. The list lets go of a cache in two places: in `find`, when its pool is gone, and when the thread
    // ends, which runs no code of ours but what it drops. `find` may be reached wherever code of others runs: where a
    // record, a stream cache or a stream is dropped and where a driver is called. Whoever uses the reference after such
    // a place holds the pool across it: `take`, `fetch` and `take_anywhere` by the caller's handle, `drain_overflow`,
    // `leave_to_queue` and `keep_in_new_stream_cache` by one of their own, the end of a thread by the list itself.
    unsafe { cache.as_ref() }
}

fn set_current(cache: *const Cache) {
    LOCAL.with(|local| local.cache.set(cache.cast()));
}

/// The calling thread's cache of a pool, and its tag.
#[derive(Clone, Copy)]
pub(crate) struct Caller<'a> {
    cache: &'a Cache,
    tag: TagId,
    /// The cache is that thread's to enter.
    not_send: PhantomData<*const ()>,
}

impl<'a> Caller<'a> {
    /// The tag of what is allocated.
    #[inline]
    pub(super) fn tag(&self) -> TagId {
        self.tag
    }

    /// Enters the cache. `with` must not allocate, free, drop foreign values or call a driver: see the head.
    #[inline]
    pub(super) fn enter<R>(&self, with: impl FnOnce(&mut ThreadCache) -> R) -> R {
        with_owner(self.cache, with)
    }

    #[inline]
    fn new(cache: &'a Cache, tag: TagId) -> Self {
        Self {
            cache,
            tag,
            not_send: PhantomData,
        }
    }
}

/// A block of the stream cache in front, if that is the one for `stream` and has a block of this size.
#[inline]
pub(super) fn take<'a>(
    pool: &'a Arc<Handle>,
    stream: &Stream,
    requested: u64,
) -> Result<Record, Miss<Caller<'a>>> {
    // Before anything else: the lookup is a call if this crate is part of a shared library.
    let (cache, tag) = (current(), TagId::current());
    let shared = &pool.shared;
    let Some(cache) = cache.filter(|_| shared.routing.is_idle()) else {
        return Err(Miss::Elsewhere);
    };
    // Zero, and what is too large to round, become zero; no stream cache has a block of zero bytes.
    let bytes = requested.wrapping_add(GRANULARITY - 1) & !(GRANULARITY - 1);
    let key = CacheKey::new(shared.id(), stream.id());
    let taken = if_alone(cache, (), |cache, ()| {
        cache.take(key, tag, (requested, bytes))
    });
    match taken {
        Ok(Ok(record)) => Ok(record),
        Ok(Err(Miss::Here(()))) => Err(Miss::Here(Caller::new(cache, tag))),
        Ok(Err(Miss::Elsewhere)) | Err(()) => Err(Miss::Elsewhere),
    }
}

/// The calling thread's cache of a pool, if that is the cache it used last.
pub(super) fn caller(shared: &Shared) -> Option<Caller<'_>> {
    let tag = TagId::current();
    let cache = current().filter(|cache| cache.pool == shared.id())?;
    Some(Caller::new(cache, tag))
}

/// Keeps a freed block in the stream cache in front, if that is the block's and has room. Returns it otherwise.
#[inline]
pub(super) fn keep(record: Record) -> Option<Record> {
    let Some(cache) = current() else {
        return Some(record);
    };
    match if_alone(cache, record, ThreadCache::keep) {
        Ok(Kept::Yes) => None,
        Err(record) | Ok(Kept::Not(record)) => Some(record),
        Ok(kept) => {
            drain_overflow(cache, kept);
            None
        }
    }
}

/// Looks again, for a request that [`take`] did not serve, with the stream cache `key` brought to the front or made.
pub(super) fn take_anywhere(
    shared: &Arc<Shared>,
    key: CacheKey,
    sizes: (u64, u64),
) -> Option<Record> {
    let tag = TagId::current();
    let cache = of_thread(shared)?;
    let taken = with_stream_cache(cache, key, (), |cache, ()| cache.take_in_front(tag, sizes));
    taken.ok()?.ok()
}

/// Keeps a freed block with the stream cache `key` in front. Returns it if the thread is ending or the pool is closed.
pub(super) fn keep_anywhere(key: CacheKey, record: Record) -> Option<Record> {
    let Some(cache) = of_thread(record.shared()) else {
        return Some(record);
    };
    match with_front(cache, key, record, ThreadCache::keep_in_front) {
        Ok(Kept::Yes) => None,
        Ok(Kept::Not(record)) => Some(record),
        Ok(kept) => {
            drain_overflow(cache, kept);
            None
        }
        Err((record, _)) => keep_in_new_stream_cache(cache, key, record),
    }
}

/// Counts an allocation that no stream cache served. Returns its tag, and whether a cache has counted it.
pub(super) fn count(pool: PoolId, requested: u64, allocated: u64) -> (TagId, Counted) {
    let tag = TagId::current();
    let Some(cache) = current().filter(|cache| cache.pool == pool) else {
        return (tag, Counted::No);
    };
    with_owner(cache, |cache| cache.count(tag, requested, allocated));
    (tag, Counted::Yes)
}

/// Folds what was counted before the calling thread's call into the pool's counters. While caches are separate, that is
/// what this thread has counted.
pub(super) fn fold_of_thread(shared: &Shared, core: &mut Core) {
    let mut fold = |cache: &Cache| {
        with_owner(cache, |cache| {
            cache.fold_counts(&mut core.usage, &mut core.tags);
        });
    };
    if let Some(cache) = current().filter(|cache| cache.pool == shared.id()) {
        return fold(cache);
    }
    let found = CACHES.try_with(|caches| {
        let caches = caches.borrow();
        let cache = caches.all.iter().find(|cache| cache.pool == shared.id());
        cache.map(|cache| fold(cache))
    });
    // A thread without a cache, or one that is ending, folds what others have counted.
    if !matches!(found, Ok(Some(()))) && !shared.caches.is_separate() {
        shared.fold_caches(core);
    }
}

/// Makes the calling thread's cache of a pool the current one, unless the thread is ending.
#[inline]
pub(super) fn make_current(shared: &Arc<Shared>) {
    of_thread(shared);
}

/// The calling thread's cache of a pool, made if there is none, and current from then on. `None` if the thread is
/// ending.
#[inline]
fn of_thread<'a>(shared: &Arc<Shared>) -> Option<&'a Cache> {
    match current() {
        Some(cache) if cache.pool == shared.id() => Some(cache),
        _ => find(shared),
    }
}

#[cold]
fn find<'a>(shared: &Arc<Shared>) -> Option<&'a Cache> {
    let found = CACHES.try_with(|caches| {
        let all = &mut caches.borrow_mut().all;
        if let Some(cache) = all.iter().find(|cache| cache.pool == shared.id()) {
            set_current(Arc::as_ptr(cache));
            return;
        }
        set_current(ptr::null());
        // Caches of dropped pools have no other holder.
        all.retain(|cache| Arc::strong_count(cache) > 1);
        let cache = shared.caches.add(shared.id());
        set_current(Arc::as_ptr(&cache));
        all.push(cache);
    });
    found.ok()?;
    current()
}

#[inline]
#[expect(
    unsafe_code,
    reason = "who owns a cache is known by where it was found"
)]
fn with_owner<R>(cache: &Cache, with: impl FnOnce(&mut ThreadCache) -> R) -> R {
    // SAFETY: private to this file, where it is called for caches found in the calling thread's
    // storage only, and each is in one thread's. A `Caller` stays on its thread. `with` is one of the closures of
    // this file and of `allocate`, none of which enters a cache: see the head.
    unsafe { cache.with_owner(with) }
}

/// As [`with_owner`], unless another thread wants in: then `input` comes back.
#[inline]
#[expect(
    unsafe_code,
    reason = "who owns a cache is known by where it was found"
)]
fn if_alone<I, R>(
    cache: &Cache,
    input: I,
    with: impl FnOnce(&mut ThreadCache, I) -> R,
) -> Result<R, I> {
    // SAFETY: as in `with_owner`. The owner is not inside: only a closure could run this, and none does.
    unsafe { cache.if_alone(input, with) }
}

/// Enters with the stream cache `key` in front. Returns the arguments if there is none.
#[inline]
fn with_front<I, R, W: FnOnce(&mut ThreadCache, I) -> R>(
    cache: &Cache,
    key: CacheKey,
    input: I,
    with: W,
) -> Result<R, (I, W)> {
    with_owner(cache, |cache| {
        if !cache.bring_to_front(key) {
            return Err((input, with));
        }
        Ok(with(cache, input))
    })
}

/// Keeps a freed block in a stream cache that is made for it. Returns it if the pool is closed.
#[cold]
#[inline(never)]
fn keep_in_new_stream_cache(cache: &Cache, key: CacheKey, record: Record) -> Option<Record> {
    // Stream caches that are dropped for the new one may hold the last references to the pool except that of the
    // record, and another thread may take the record out of the cache. This reference keeps the pool, and so the cache.
    let _pool = record.shared().clone();
    match with_stream_cache(cache, key, record, ThreadCache::keep_in_front) {
        Ok(Kept::Yes) => None,
        Err(record) | Ok(Kept::Not(record)) => Some(record),
        Ok(kept) => {
            drain_overflow(cache, kept);
            None
        }
    }
}

/// Enters with the stream cache `key` in front, which is made if there is none. Returns `input` if the pool is closed.
/// The caller holds the pool, because foreign code may run in between.
fn with_stream_cache<I, R>(
    cache: &Cache,
    key: CacheKey,
    input: I,
    with: impl FnOnce(&mut ThreadCache, I) -> R,
) -> Result<R, I> {
    let attempt = with_front(cache, key, input, with);
    attempt.or_else(|(input, with)| {
        // Before the thread turns to a stream that is new to it, so that blocks of streams that are dropped by now do
        // not stay for ever.
        leave_streams(cache);
        let mut gone = None;
        let outcome = with_owner(cache, |cache| {
            gone = cache.add(StreamCache::new(key));
            if gone.is_none() {
                return Err(input);
            }
            Ok(with(cache, input))
        });
        // Outside the cache, because the records may hold the pool's last references.
        drop(gone);
        outcome
    })
}

/// Has the pool take back what the stream cache in front had no room for.
#[cold]
#[inline(never)]
fn drain_overflow(cache: &Cache, kept: Kept<Shared>) {
    match kept {
        Kept::Yes | Kept::Not(_) => return,
        // Inside the cache, so that whoever empties all caches and then looks into the queue misses no block.
        Kept::InPlaceOf(record) | Kept::Full(record) => {
            with_owner(cache, |cache| cache.overflow_front(record));
        }
        Kept::OverBudget => {}
    }
    let Some(shared) = with_owner(cache, |cache| cache.overflow_home()) else {
        return;
    };
    match shared.try_lock_with_fuse() {
        Some((mut core, fuse)) => {
            let mut refused = None;
            with_owner(cache, |cache| core.take_overflow(cache, &mut refused));
            core.record_due_events();
            fuse.defuse();
            // Outside the cache, because records may hold their streams' last references.
            list::drop_all(refused);
        }
        None => leave_to_queue(cache, |_| {}),
    }
}

/// Empties every stream cache into the pool's queue, and drops the free records, which hold streams. Only for the
/// owner.
fn leave_streams(cache: &Cache) {
    leave_to_queue(cache, ThreadCache::overflow_all);
    let free_records = with_owner(cache, ThreadCache::take_free_records);
    // Outside the cache, because they may hold the pool's last references.
    drop(free_records);
}

/// Runs `leave`, and puts the overflow into the pool's queue. Only for the owner.
fn leave_to_queue(cache: &Cache, leave: impl FnOnce(&mut ThreadCache)) {
    let pool = with_owner(cache, |cache| {
        leave(cache);
        queue_overflow(cache)
    });
    if let Some(pool) = pool {
        pool.take_in_if_free();
    }
}

/// Puts the overflow into the pool's queue; returns the pool if there was any. Inside the cache, so that whoever empties
/// all caches and then looks into the queue misses no block.
fn queue_overflow(cache: &mut ThreadCache) -> Option<Arc<Shared>> {
    let mut pool = None;
    let mut overflow = cache.take_overflow();
    while let Some(record) = list::pop(&mut overflow) {
        pool.clone_from(&record.shared);
        queue(record, Counted::Yes);
    }
    pool
}

/// Empties the cache of a thread that ends, unless another thread has what it contained. The counters stay, for the
/// thread that takes them over or folds them.
fn end(cache: &Cache) {
    let left = cache.if_in_use(|cache| {
        cache.overflow_all();
        (queue_overflow(cache), cache.take_free_records())
    });
    if let Some((pool, free_records)) = left {
        if let Some(pool) = pool {
            pool.take_in_if_free();
        }
        // Outside the cache, because they may hold the pool's last references.
        drop(free_records);
    }
}

/// What a cache contained, to be taken back and dropped outside the cache.
struct Contents {
    overflow: List<Shared>,
    /// They have no blocks, but free records, which hold streams.
    stream_caches: Vec<Box<StreamCache<Shared>>>,
}

impl Contents {
    /// Takes all blocks out of a cache.
    fn of(cache: &mut ThreadCache) -> Self {
        cache.overflow_all();
        Self {
            overflow: cache.take_overflow(),
            stream_caches: cache.forget_stream_caches(),
        }
    }

    /// Takes the blocks back. The caller holds the pool.
    fn take_back(self, core: &mut Core) {
        let Self {
            mut overflow,
            stream_caches,
        } = self;
        while let Some(record) = list::pop(&mut overflow) {
            core.take_back(&record);
        }
        core.record_due_events();
        drop(stream_caches);
    }

    /// Drops the records: a broken pool takes nothing back.
    fn abandon(self) {
        list::drop_all(self.overflow);
        drop(self.stream_caches);
    }
}

/// Queues a block for the next thread that has the pool's lock. The caller holds the pool.
fn queue(mut record: Record, counted: Counted) {
    if let Some(shared) = record.shared.take() {
        shared.leave(record, counted);
    }
}

impl Shared {
    /// Folds the counters before deferred frees may be returned, which the pool itself counts: the peak of active bytes
    /// lies before that.
    pub(super) fn fold_before_returns(&self, core: &mut Core) {
        if !core.deferred.is_empty() {
            fold_of_thread(self, core);
        }
    }

    /// Folds the counters of all caches.
    pub(super) fn fold_caches(&self, core: &mut Core) {
        self.caches.for_each(|cache| core.fold(cache));
    }

    /// Makes separate caches one again, and takes back what they contained.
    pub(super) fn join_caches(&self, core: &mut Core) {
        let mut contents = Vec::new();
        self.caches.join(|cache| {
            core.fold(cache);
            contents.push(Contents::of(cache));
        });
        for contents in contents {
            contents.take_back(core);
        }
    }

    /// Takes back every block that a cache keeps or that is queued.
    pub(super) fn empty_caches(&self, core: &mut Core, close: Close) {
        // Taken back without the registry's lock, because that may call the driver, which may run work that frees a
        // block on this thread, and that may need a cache.
        let mut all = Vec::new();
        let mut take = |cache: &mut ThreadCache| {
            core.fold(cache);
            all.push(Contents::of(cache));
        };
        match close {
            Close::Yes => self.caches.close(&mut take),
            Close::No => self.caches.for_each(&mut take),
        }
        for contents in all {
            contents.take_back(core);
        }
        self.take_in_queued(core);
    }

    /// Drops what every cache of a broken pool keeps.
    pub(super) fn abandon_caches(&self) {
        let mut all = Vec::new();
        self.caches.close(|cache| all.push(Contents::of(cache)));
        all.into_iter().for_each(Contents::abandon);
    }
}
