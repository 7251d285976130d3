//! The lock of a pool: who may change its books, who may only look at them, and what is left for the next who has it.

use super::cache;
use super::guard::{Breakable, Locked};
use super::pool::Shared;
use super::record::Record;
use super::state::{Counted, State};
use crate::error::{Error, Result};
use crate::sync::MutexGuard;
use crate::sync::atomic::Ordering;

/// The state, locked.
pub(super) type StateGuard<'a> = Locked<'a, MutexGuard<'a, State>, Shared>;

/// What a call on a broken pool returns.
pub(super) const BROKEN: Error = Error::BrokenPool {
    pool: "memory pool",
};

impl Breakable for Shared {
    type Books = State;

    fn break_down(&self, _: &mut State) {
        self.stop();
    }

    #[inline]
    fn check(&self, _: &State) -> Result<()> {
        // Closed under the lock, which orders this look after it.
        if self.routes.are_closed() {
            return Err(BROKEN);
        }
        Ok(())
    }
}

/// Breaks the pool when it is dropped, which only a panic does: other ways [defuse](Self::defuse) it. For the paths of
/// most allocations and frees: unlike [`Locked`] it is one pointer and asks nothing, so it costs them no instruction.
#[derive(Debug)]
pub(super) struct Fuse<'a>(&'a Shared);

impl Fuse<'_> {
    /// Says that the books are whole.
    #[inline(always)]
    pub(super) fn defuse(self) {
        std::mem::forget(self);
    }
}

impl Drop for Fuse<'_> {
    #[cold]
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl Shared {
    /// Breaks the pool: from now on its books are not looked at.
    #[cold]
    fn stop(&self) {
        self.mark_left();
        self.routes.close();
    }

    /// The state, with every block in it that was freed to it so far.
    ///
    /// # Errors
    /// [`Error::BrokenPool`] if it cannot be trusted.
    pub(super) fn lock(&self) -> Result<StateGuard<'_>> {
        let mut state = Locked::new(self.state.lock(), self);
        self.check(&state)?;
        self.take_in_freed(&mut state);
        Ok(state)
    }

    /// As [`lock`](Self::lock), for the path of most allocations that no lane serves. The fuse must be dropped before the
    /// guard. The queues of a broken pool count as filled for ever, so one look is enough for both.
    #[inline(always)]
    pub(super) fn lock_with_fuse(&self) -> Result<(MutexGuard<'_, State>, Fuse<'_>)> {
        let mut state = self.state.lock();
        let fuse = Fuse(self);
        if self.is_left() {
            self.take_in_queues(&mut state);
            if self.routes.are_closed() {
                fuse.defuse();
                return Err(BROKEN);
            }
        }
        Ok((state, fuse))
    }

    /// As [`lock_with_fuse`](Self::lock_with_fuse), unless another thread has the state or it cannot be trusted.
    #[inline(always)]
    pub(super) fn try_lock_with_fuse(&self) -> Option<(MutexGuard<'_, State>, Fuse<'_>)> {
        let mut state = self.state.try_lock()?;
        let fuse = Fuse(self);
        if self.is_left() {
            self.take_in_queues(&mut state);
            if self.routes.are_closed() {
                fuse.defuse();
                return None;
            }
        }
        Some((state, fuse))
    }

    /// The state as it is, unless another thread has it or it cannot be trusted.
    pub(super) fn try_lock(&self) -> Option<StateGuard<'_>> {
        let state = Locked::new(self.state.try_lock()?, self);
        self.check(&state).is_ok().then_some(state)
    }

    /// As [`lock`](Self::lock), unless another thread has it or it cannot be trusted.
    pub(super) fn lock_if_free(&self) -> Option<StateGuard<'_>> {
        let mut state = self.try_lock()?;
        self.take_in_freed(&mut state);
        Some(state)
    }

    /// The state, for its counters alone: as [`lock`](Self::lock), or as it is if it cannot be trusted.
    pub(super) fn look(&self) -> StateGuard<'_> {
        self.lock().unwrap_or_else(|_| {
            let mut state = Locked::new(self.state.lock(), self);
            state.is_broken = true;
            state
        })
    }

    /// As [`look`](Self::look), with what every cache has counted.
    pub(super) fn lock_and_fold(&self) -> StateGuard<'_> {
        let mut state = self.look();
        if !state.is_broken {
            self.fold_caches(&mut state);
        }
        state
    }

    /// Takes in what was left, unless another thread has the lock: that one, or the next, will.
    pub(super) fn take_in_left(&self) {
        drop(self.lock_if_free());
    }

    /// Takes in what was left while another thread had the lock. Not from inside a cache.
    #[inline]
    pub(super) fn take_in_freed(&self, state: &mut State) {
        if self.is_left() {
            self.take_in_queues(state);
        }
    }

    /// Whether the queues may hold something.
    #[inline(always)]
    pub(super) fn is_left(&self) -> bool {
        // Relaxed: what is not seen yet is taken in by the next.
        self.is_left.load(Ordering::Relaxed)
    }

    /// Takes in what the queues hold, unless the pool is broken.
    #[inline(never)]
    pub(super) fn take_in_queues(&self, state: &mut State) {
        if self.routes.are_closed() {
            return;
        }
        // Acquire: whoever marked the queues before has filled them before. Marked anew by whoever comes later.
        self.is_left.swap(false, Ordering::AcqRel);
        // What was not counted yet is counted in order with what this thread has counted.
        cache::fold_of_thread(self.id(), state);
        while let Some((record, counted)) = self.freed.pop() {
            drop(state.free(record, counted));
        }
        while let Some(memory) = self.released.pop() {
            state.release_memory(memory);
        }
    }

    /// Leaves a block for the next thread that has the lock.
    pub(super) fn leave(&self, record: Record, counted: Counted) {
        self.freed.push((record, counted));
        self.mark_left();
    }

    pub(super) fn mark_left(&self) {
        self.is_left.store(true, Ordering::Release);
    }
}
