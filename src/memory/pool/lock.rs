//! The lock of a pool: who may change its core, who may only read counters, and the queues of what waits for the lock.

use super::core::Core;
use super::shared::{Record, Shared};
use super::threads;
use crate::driver::Stream;
use crate::error::{Error, Result};
use crate::memory::guard::{Breakable, Locked};
use crate::memory::types::{Counted, Fence, HeapId};
use crate::sync::MutexGuard;
use crate::sync::atomic::Ordering;

/// The core, locked.
pub(crate) type CoreGuard<'a> = Locked<'a, MutexGuard<'a, Core>, Shared>;

/// What a call on a broken pool returns.
pub(super) const BROKEN: Error = Error::BrokenPool {
    pool: "memory pool",
};

impl Breakable for Shared {
    type Books = Core;

    fn break_down(&self, _: &mut Core) {
        self.stop();
    }

    #[inline]
    fn check(&self, _: &Core) -> Result<()> {
        // The routing is closed under the lock, which orders this load after it.
        if self.routing.are_closed() {
            return Err(BROKEN);
        }
        Ok(())
    }
}

/// Breaks the pool when it is dropped. Only a panic drops it: every other way out [defuses](Self::defuse) it. The paths
/// of most allocations and frees use it instead of [`Locked`]: it is one pointer and reads nothing, so it costs no
/// instruction.
#[derive(Debug)]
pub(crate) struct Fuse<'a>(&'a Shared);

impl Fuse<'_> {
    /// Says that the core is consistent.
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
    /// Breaks the pool: from now on nobody uses its core.
    #[cold]
    fn stop(&self) {
        self.mark_queued();
        self.routing.close();
    }

    /// The core, with every queued block taken back.
    ///
    /// # Errors
    /// [`Error::BrokenPool`] if a panic has unwound through the lock.
    pub(crate) fn lock(&self) -> Result<CoreGuard<'_>> {
        let mut core = Locked::new(self.core.lock(), self);
        self.check(&core)?;
        self.take_in_queued(&mut core);
        Ok(core)
    }

    /// As [`lock`](Self::lock), for the path of most allocations that no stream cache serves. Drop the fuse before the
    /// guard. The queues of a broken pool count as filled for ever, so one load checks for both.
    #[inline(always)]
    pub(super) fn lock_with_fuse(&self) -> Result<(MutexGuard<'_, Core>, Fuse<'_>)> {
        let mut core = self.core.lock();
        let fuse = Fuse(self);
        if self.has_queued() {
            self.take_in_queues(&mut core);
            if self.routing.are_closed() {
                fuse.defuse();
                return Err(BROKEN);
            }
        }
        Ok((core, fuse))
    }

    /// As [`lock_with_fuse`](Self::lock_with_fuse), unless another thread has the lock or the pool is broken.
    #[inline(always)]
    pub(super) fn try_lock_with_fuse(&self) -> Option<(MutexGuard<'_, Core>, Fuse<'_>)> {
        let mut core = self.core.try_lock()?;
        let fuse = Fuse(self);
        if self.has_queued() {
            self.take_in_queues(&mut core);
            if self.routing.are_closed() {
                fuse.defuse();
                return None;
            }
        }
        Some((core, fuse))
    }

    /// The core as it is, unless another thread has the lock or the pool is broken.
    pub(super) fn try_lock(&self) -> Option<CoreGuard<'_>> {
        let core = Locked::new(self.core.try_lock()?, self);
        self.check(&core).is_ok().then_some(core)
    }

    /// As [`lock`](Self::lock), unless another thread has the lock or the pool is broken.
    pub(super) fn lock_if_free(&self) -> Option<CoreGuard<'_>> {
        let mut core = self.try_lock()?;
        self.take_in_queued(&mut core);
        Some(core)
    }

    /// The core, for its counters alone: as [`lock`](Self::lock), or as it is if the pool is broken.
    pub(crate) fn look(&self) -> CoreGuard<'_> {
        self.lock().unwrap_or_else(|_| {
            let mut core = Locked::new(self.core.lock(), self);
            core.is_broken = true;
            core
        })
    }

    /// As [`look`](Self::look), with the counters of every cache folded in. Separate caches are joined.
    pub(super) fn lock_and_fold(&self) -> CoreGuard<'_> {
        let mut core = self.look();
        if !core.is_broken {
            self.join_caches(&mut core);
            self.fold_caches(&mut core);
        }
        core
    }

    /// Takes back what is queued, unless another thread has the lock: that thread or the next one will.
    pub(super) fn take_in_if_free(&self) {
        drop(self.lock_if_free());
    }

    /// Takes back what was queued while another thread had the lock. Not from inside a cache.
    #[inline]
    pub(super) fn take_in_queued(&self, core: &mut Core) {
        if self.has_queued() {
            self.take_in_queues(core);
        }
    }

    /// Whether the queues may hold something.
    #[inline(always)]
    pub(super) fn has_queued(&self) -> bool {
        // Relaxed: the next thread takes back what this one does not see yet.
        self.has_queued.load(Ordering::Relaxed)
    }

    /// Takes back what the queues hold, unless the pool is broken.
    #[inline(never)]
    pub(super) fn take_in_queues(&self, core: &mut Core) {
        if self.routing.are_closed() {
            return;
        }
        // Acquire: a thread fills the queues before it marks them. Whoever comes later marks them again.
        self.has_queued.swap(false, Ordering::AcqRel);
        // Fold first, so that frees that are not counted yet come after what this thread has counted.
        threads::fold_of_thread(self, core);
        while let Some((record, counted)) = self.freed.pop() {
            drop(core.free(record, counted));
        }
        while let Some(heap) = self.released.pop() {
            core.release_memory(heap);
        }
    }

    /// Queues a block for the next thread that has the lock.
    pub(super) fn leave(&self, record: Record, counted: Counted) {
        self.freed.push((record, counted));
        self.mark_queued();
    }

    pub(super) fn mark_queued(&self) {
        self.has_queued.store(true, Ordering::Release);
    }

    /// The present end of `stream`, marked with an event, if one can be recorded.
    pub(crate) fn mark(&self, stream: &Stream) -> Option<Fence> {
        self.lock().ok()?.fences.mark(stream)
    }

    /// Releases a private heap. Never blocks: a graph may be dropped while its thread has the lock, in a driver call
    /// that runs work.
    pub(crate) fn release_memory(&self, heap: HeapId) {
        self.released.push(heap);
        self.mark_queued();
        self.take_in_if_free();
    }
}
