//! The lock of a pool: who may change its books, and who may only look at them.

use super::guard::{Breakable, Locked};
use super::pool::Shared;
use super::state::State;
use crate::error::{Error, Result};
use crate::sync::MutexGuard;

/// The state, locked.
pub(super) type StateGuard<'a> = Locked<'a, MutexGuard<'a, State>, Shared>;

/// What a call on a broken pool returns.
pub(super) const BROKEN: Error = Error::BrokenPool {
    pool: "memory pool",
};

impl Breakable for Shared {
    type Books = State;

    #[cold]
    fn break_down(&self, state: &mut State) {
        state.is_broken = true;
        self.routes.close();
    }

    #[inline]
    fn check(&self, state: &State) -> Result<()> {
        if state.is_broken { Err(BROKEN) } else { Ok(()) }
    }
}

impl Shared {
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

    /// The state as it is, unless another thread has it or it cannot be trusted.
    pub(super) fn try_lock(&self) -> Option<StateGuard<'_>> {
        let state = Locked::new(self.state.try_lock()?, self);
        self.check(&state).ok()?;
        Some(state)
    }

    /// As [`lock`](Self::lock), unless another thread has it or it cannot be trusted.
    pub(super) fn lock_if_free(&self) -> Option<StateGuard<'_>> {
        let mut state = self.try_lock()?;
        self.take_in_freed(&mut state);
        Some(state)
    }

    /// The state, for its counters alone: as [`lock`](Self::lock), or as it is if it cannot be trusted.
    pub(super) fn look(&self) -> StateGuard<'_> {
        self.lock()
            .unwrap_or_else(|_| Locked::new(self.state.lock(), self))
    }

    /// As [`look`](Self::look), with what every cache has counted.
    pub(super) fn lock_and_fold(&self) -> StateGuard<'_> {
        let mut state = self.look();
        if !state.is_broken {
            self.fold_caches(&mut state);
        }
        state
    }
}
