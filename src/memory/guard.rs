//! A lock that fails for good when a panic unwinds through it.
//!
//! A panic under a pool's lock means that an invariant broke or that a driver panicked: a change stopped half-way.
//! `parking_lot` hands such data to the next thread. Here the pool is *broken* from then on: calls that would use the
//! data return [`Error::BrokenPool`](crate::Error::BrokenPool), frees leave it alone, and what the pool held stays
//! taken until the process ends, because nobody knows which of it is in use. Blocks in callers' hands keep their
//! memory.
//!
//! Must not know: what the data says.

use std::ops::{Deref, DerefMut};
use std::thread;

use crate::error::Result;
use crate::sync::MutexGuard;

/// What owns books and can do without them.
pub(crate) trait Breakable {
    type Books;

    /// Notes that `books` cannot be trusted any more. Called while unwinding, under their lock: must not panic.
    fn break_down(&self, books: &mut Self::Books);

    /// # Errors
    /// [`Error::BrokenPool`](crate::Error::BrokenPool) if `books` cannot be trusted.
    fn check(&self, books: &Self::Books) -> Result<()>;
}

/// A guard of the books of `O`.
#[derive(Debug)]
pub(crate) struct Locked<'a, G, O>
where
    G: DerefMut,
    O: Breakable<Books = G::Target>,
    G::Target: Sized,
{
    guard: G,
    owner: &'a O,
    /// Whether a panic that unwinds now began where the books were whole: before they were locked, or while they
    /// were unlocked.
    is_outside: bool,
}

impl<'a, G, O> Locked<'a, G, O>
where
    G: DerefMut,
    O: Breakable<Books = G::Target>,
    G::Target: Sized,
{
    /// Watches over books that were locked just now.
    #[inline]
    pub(crate) fn new(guard: G, owner: &'a O) -> Self {
        Self {
            guard,
            owner,
            is_outside: thread::panicking(),
        }
    }
}

impl<T, O: Breakable<Books = T>> Locked<'_, MutexGuard<'_, T>, O> {
    /// Calls `with` while the books are unlocked. If that panics, the books are none the worse.
    ///
    /// # Errors
    /// [`Error::BrokenPool`](crate::Error::BrokenPool) if another thread has broken them meanwhile.
    pub(crate) fn unlocked<R>(&mut self, with: impl FnOnce() -> R) -> Result<R> {
        let before = std::mem::replace(&mut self.is_outside, true);
        let result = MutexGuard::unlocked(&mut self.guard, with);
        self.is_outside = before;
        self.owner.check(&self.guard)?;
        Ok(result)
    }
}

impl<G, O> Deref for Locked<'_, G, O>
where
    G: DerefMut,
    O: Breakable<Books = G::Target>,
    G::Target: Sized,
{
    type Target = G::Target;

    #[inline]
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G, O> DerefMut for Locked<'_, G, O>
where
    G: DerefMut,
    O: Breakable<Books = G::Target>,
    G::Target: Sized,
{
    #[inline]
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

impl<G, O> Drop for Locked<'_, G, O>
where
    G: DerefMut,
    O: Breakable<Books = G::Target>,
    G::Target: Sized,
{
    #[inline]
    fn drop(&mut self) {
        if !self.is_outside && thread::panicking() {
            self.owner.break_down(&mut self.guard);
        }
    }
}
