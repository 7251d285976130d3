//! The cache of one thread for one pool, and who may enter it.

use super::{BiasedLock, Home, ThreadCache};
use crate::memory::thread_locals;
use crate::memory::types::PoolId;

/// A cache that its thread enters without an atomic read-modify-write, and other threads at the price of a system call.
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
    /// The calling thread is the owner: all calls for this cache, of this and of [`if_alone`](Self::if_alone), come
    /// from one thread. `with` does not call `if_alone` for it.
    #[inline]
    #[expect(unsafe_code, reason = "the owner is known by where it found the cache")]
    pub(crate) unsafe fn with_owner<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> R {
        // SAFETY: the caller promises the same.
        thread_locals::inside(|| unsafe { self.cache.with_owner(with) })
    }

    /// As [`with_owner`](Self::with_owner), unless another thread wants in: then `input` comes back.
    ///
    /// # Safety
    /// As `with_owner`; and the owner is not inside.
    #[inline]
    #[expect(unsafe_code, reason = "the owner is known by where it found the cache")]
    pub(crate) unsafe fn if_alone<I, R>(
        &self,
        input: I,
        with: impl FnOnce(&mut ThreadCache<H>, I) -> R,
    ) -> Result<R, I> {
        // SAFETY: the caller promises the same.
        thread_locals::inside(|| unsafe { self.cache.try_with_owner(input, with) })
    }

    /// Enters from any thread but an owner that is inside, which would wait for itself. `with` must not enter again.
    pub(crate) fn with_any<R>(&self, with: impl FnOnce(&mut ThreadCache<H>) -> R) -> R {
        self.cache.with(with)
    }
}
