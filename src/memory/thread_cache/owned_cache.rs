//! A thread cache behind its biased lock.

use super::registry::RegistryRef;
use super::{BiasedLock, Home, ThreadCache};
use crate::memory::thread_locals;
use crate::memory::types::PoolId;

/// The cache of one thread for one pool. Its thread enters without an atomic read-modify-write, other threads at the
/// cost of a system call.
#[derive(Debug)]
pub(crate) struct OwnedCache<H: Home> {
    pub(crate) pool: PoolId,
    cache: BiasedLock<ThreadCache<H>>,
    registry: RegistryRef<H>,
}

impl<H: Home> OwnedCache<H> {
    /// A cache that its thread has to take into use first.
    pub(super) fn new(pool: PoolId, registry: RegistryRef<H>, is_closed: bool) -> Self {
        let cache = BiasedLock::new(ThreadCache::new(is_closed));
        cache.revoke(|_| {});
        Self {
            pool,
            cache,
            registry,
        }
    }

    /// Puts the cache in use.
    ///
    /// # Safety
    /// As for [`with_owner`](Self::with_owner); in addition, the owner is not inside.
    #[cold]
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    unsafe fn take_over(&self) {
        match self.registry.upgrade() {
            // SAFETY: the caller is the owner, and not inside.
            Some(registry) => unsafe { registry.take_over(self) },
            // SAFETY: as above. The pool is gone, and with it the other caches' contents.
            None => unsafe { self.restore(|_| {}) },
        }
    }

    /// Makes the owner enter as before, after `with`. Does nothing if the cache is in use.
    ///
    /// # Safety
    /// As for `take_over`.
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    pub(super) unsafe fn restore(&self, with: impl FnOnce(&mut ThreadCache<H>)) {
        // SAFETY: the caller promises what the lock requires: one owner thread, which is not inside.
        unsafe { self.cache.restore(with) }
    }

    /// Takes the cache out of use: its owner has to take it over before it enters again. `None` if it is not in use.
    pub(super) fn revoke<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> Option<R> {
        self.cache.revoke(with)
    }

    /// As [`with_any`](Self::with_any), if the cache is in use. An owner that ends does not take the contents over.
    pub(crate) fn if_in_use<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> Option<R> {
        self.cache.with_biased(with)
    }

    /// Enters as the owner.
    ///
    /// # Safety
    /// The calling thread is the owner: all calls of this and of [`if_alone`](Self::if_alone) for this cache come from
    /// one thread. `with` does not call either for this cache.
    #[inline]
    #[expect(
        unsafe_code,
        reason = "only the caller can know that its thread is the owner"
    )]
    pub(crate) unsafe fn with_owner<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> R {
        // SAFETY: the caller is the owner. The lock calls this before the owner is inside.
        let restore = || unsafe { self.take_over() };
        // SAFETY: the caller promises what the lock requires: one owner thread, no other entry from inside.
        thread_locals::inside(|| unsafe { self.cache.with_owner(restore, with) })
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
