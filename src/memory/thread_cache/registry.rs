//! The caches of all threads of a pool, and which of them are in use.
//!
//! Most programs use several host threads, of which one at a time makes calls: a framework runs the backward pass on a
//! thread of its own while the main thread waits. Their caches then work as one. A single cache is in use, and a thread
//! that makes a call takes over its contents, so that it finds every block that the thread before it freed, and the
//! counters stay exact. The hand-over costs a system call; a thread that is alone pays nothing.
//!
//! Threads whose calls overlap would hand the contents back and forth, and so would a producer and a consumer that change
//! after every call or two. So a thread that finds another one in the middle of a hand-over, or too many hand-overs with
//! hardly a call between them, makes the caches *separate*: each thread works with a cache of its own, and the pool empties them now
//! and then before it looks further than the stream's own memory, and whenever memory is short. [`join`](Registry::join) makes them one again. The pool calls it from time to time,
//! because threads that overlapped once may take turns from then on.
//!
//! # Invariant
//! Unless the caches are separate, all but one are revoked, and a revoked cache holds no block and no count.
//!
//! Lock order: the registry, then a cache. Nothing is dropped and no driver is called under either.

use std::sync::{Arc, Weak};

use super::{Home, OwnedCache, ThreadCache};
use crate::memory::types::PoolId;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Misses after which separate caches are joined, if they were not separate a short time before.
const TERM_MIN: u32 = 256;
/// The same, if the threads overlapped each time that their caches were joined.
const TERM_MAX: u32 = 1 << 16;
/// A hand-over is hasty if fewer calls than this were made since the one before.
const HASTY: u64 = 4;
/// Hasty hand-overs in a row after which caches are separate.
const HASTY_MAX: u32 = 64;
/// While caches are separate, the pool empties them all for one in this many searches beyond a stream's own free memory.
const EMPTYING_SHARE: u32 = 64;
/// Hand-overs in a row that show that threads take turns.
const TURNS: u32 = 1024;

/// The caches of a pool's threads.
#[derive(Debug)]
pub(crate) struct Registry<H: Home> {
    state: Mutex<State<H>>,
    /// Written under the lock.
    is_separate: AtomicBool,
}

#[derive(Debug)]
struct State<H: Home> {
    all: Vec<Arc<OwnedCache<H>>>,
    /// A closed registry has caches that keep nothing.
    is_closed: bool,
    /// Misses until separate caches are joined, and how many that were at first.
    left: u32,
    term: u32,
    /// Hand-overs since the caches were joined.
    turns: u32,
    /// Searches since separate caches were emptied.
    searches: u32,
    /// Calls that the contents had counted at the last hand-over, and hasty hand-overs since one that was not.
    calls: u64,
    hasty: u32,
}

impl<H: Home> Default for Registry<H> {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                all: Vec::new(),
                is_closed: false,
                left: 0,
                term: TERM_MIN,
                turns: TURNS,
                searches: 0,
                calls: 0,
                hasty: 0,
            }),
            is_separate: AtomicBool::new(false),
        }
    }
}

impl<H: Home> Registry<H> {
    /// A cache for the calling thread. Its first use takes over the contents of the one in use.
    pub(crate) fn add(self: &Arc<Self>, pool: PoolId) -> Arc<OwnedCache<H>> {
        let mut state = self.state.lock();
        let cache = OwnedCache::new(pool, Arc::downgrade(self), state.is_closed);
        let cache = Arc::new(cache);
        state.all.push(cache.clone());
        cache
    }

    /// Whether threads use caches of their own.
    #[inline]
    pub(crate) fn is_separate(&self) -> bool {
        // Relaxed: it only decides how soon counters are folded and caches are joined.
        self.is_separate.load(Ordering::Relaxed)
    }

    /// Puts the calling thread's cache in use, with the contents of the cache that was in use before.
    ///
    /// # Safety
    /// The calling thread owns `mine` and is not inside.
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    pub(super) unsafe fn take_over(&self, mine: &OwnedCache<H>) {
        let state = self.state.try_lock();
        let overlaps = state.is_none();
        let mut state = state.unwrap_or_else(|| self.state.lock());
        if overlaps && !self.is_separate() {
            state.separate();
            self.is_separate.store(true, Ordering::Relaxed);
        }
        let mut calls = None;
        let is_alone = self.is_separate() || state.is_closed;
        let others = if is_alone { &[] } else { &*state.all };
        // The owner's own cache is among them, and revoked.
        let take_over = |cache: &mut ThreadCache<H>| {
            for other in others.iter().filter(|other| !std::ptr::eq(&***other, mine)) {
                other.revoke(|other| std::mem::swap(cache, other));
            }
            calls = Some(cache.calls());
        };
        // SAFETY: as the caller promises.
        unsafe { mine.restore(take_over) };
        state.turns = state.turns.saturating_add(1);
        if let Some(calls) = calls
            && !is_alone
            && state.note_calls(calls)
        {
            state.separate();
            self.is_separate.store(true, Ordering::Relaxed);
        }
    }

    /// Counts a miss while caches are separate; returns whether they should be joined.
    pub(crate) fn is_due(&self) -> bool {
        let Some(mut state) = self.state.try_lock() else {
            return false;
        };
        state.left = state.left.saturating_sub(1);
        state.left == 0
    }

    /// Counts a search beyond a stream's own free memory while caches are separate; returns whether the caches should be
    /// emptied before.
    pub(crate) fn is_emptying_due(&self) -> bool {
        let Some(mut state) = self.state.try_lock() else {
            return false;
        };
        state.searches = (state.searches + 1) % EMPTYING_SHARE;
        state.searches == 1
    }

    /// Makes separate caches one again: `take` empties each of them.
    pub(crate) fn join(&self, mut take: impl FnMut(&mut ThreadCache<H>)) {
        let mut state = self.state.lock();
        if !self.is_separate() {
            return;
        }
        for cache in &state.all {
            cache.revoke(&mut take);
        }
        self.is_separate.store(false, Ordering::Relaxed);
        state.turns = 0;
    }

    /// Enters every cache, and closes them and those to come. The registry forgets them.
    pub(crate) fn close(&self, mut with: impl FnMut(&mut ThreadCache<H>)) {
        let mut state = self.state.lock();
        state.is_closed = true;
        for cache in state.all.drain(..) {
            cache.with_any(|cache| {
                cache.is_closed = true;
                with(cache);
            });
        }
    }

    /// Enters every cache. Drops those of threads that have ended, whose blocks went back when they ended.
    pub(crate) fn for_each(&self, mut with: impl FnMut(&mut ThreadCache<H>)) {
        self.state.lock().all.retain_mut(|cache| {
            // Checked before: a cache that nobody else holds is entered for the last time.
            let is_of_ended_thread = Arc::get_mut(cache).is_some();
            cache.with_any(&mut with);
            !is_of_ended_thread
        });
    }
}

impl<H: Home> State<H> {
    /// Notes what the contents have counted at a hand-over; returns whether hand-overs have become too frequent.
    fn note_calls(&mut self, calls: u64) -> bool {
        // Less than before: these are the contents of another cache.
        let is_hasty = calls >= self.calls && calls - self.calls < HASTY;
        self.hasty = if is_hasty { self.hasty + 1 } else { 0 };
        self.calls = calls;
        self.hasty >= HASTY_MAX
    }

    /// Starts a term of separate caches, longer than the last one if the threads have hardly taken turns since.
    fn separate(&mut self) {
        self.term = match self.turns < TURNS {
            true => (self.term * 2).min(TERM_MAX),
            false => TERM_MIN,
        };
        self.left = self.term;
        self.hasty = 0;
    }
}

/// What a cache has of its registry: nothing once the pool is gone.
pub(super) type RegistryRef<H> = Weak<Registry<H>>;
