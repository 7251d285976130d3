//! A thread cache behind its biased lock.

use super::{BiasedLock, Home, ThreadCache};
use crate::memory::thread_locals;
use crate::memory::types::PoolId;

/// The cache of one thread for one pool. Its thread enters without an atomic read-modify-write, other threads at the
/// cost of a system call.
#[derive(Debug)]
pub(crate) struct OwnedCache<H: Home> {
    pub(crate) pool: PoolId,
    cache: BiasedLock<ThreadCache<H>>,
}

impl<H: Home> OwnedCache<H> {
    pub(crate) fn new(pool: PoolId) -> Self {
        Self {
            pool,
            cache: BiasedLock::new(ThreadCache::new()),
        }
    }

    /// Enters as the owner.
    ///
    /// # Safety
    /// The calling thread is the owner: all calls of this and of [`if_alone`](Self::if_alone) for this cache come from
    /// one thread. `with` does not call `if_alone` for this cache.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    pub(crate) unsafe fn with_owner<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> R {
        // SAFETY: the caller promises what the lock requires: one owner thread, no `if_alone` inside.
        thread_locals::inside(|| unsafe { self.cache.with_owner(with) })
    }

    /// As [`with_owner`](Self::with_owner), unless another thread has requested entry: then returns `input`.
    ///
    /// # Safety
    /// As for `with_owner`; in addition, the owner is not inside.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    pub(crate) unsafe fn if_alone<I, R>(
        &self,
        input: I,
        with: impl FnOnce(&mut ThreadCache<H>, I) -> R,
    ) -> Result<R, I> {
        // SAFETY: the caller promises what the lock requires: one owner thread, which is not inside.
        thread_locals::inside(|| unsafe { self.cache.try_with_owner(input, with) })
    }

    /// Enters from any thread, except from an owner that is inside: it would wait for itself. `with` must not enter
    /// again.
    pub(crate) fn with_any<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> R {
        self.cache.with(with)
    }
}
