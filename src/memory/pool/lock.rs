//! The lock of a pool: who may change its books, who may only look at them, and what is left for the next who has it.

use super::core::Core;
use super::shared::{Record, Shared};
use super::threads;
use crate::driver::Stream;
use crate::error::{Error, Result};
use crate::memory::guard::{Breakable, Locked};
use crate::memory::types::{Counted, Fence, HeapId};
use crate::sync::MutexGuard;
use crate::sync::atomic::Ordering;

/// The state, locked.
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
        // Closed under the lock, which orders this look after it.
        if self.routing.are_closed() {
            return Err(BROKEN);
        }
        Ok(())
    }
}

/// Breaks the pool when it is dropped, which only a panic does: other ways [defuse](Self::defuse) it. For the paths of
/// most allocations and frees: unlike [`Locked`] it is one pointer and asks nothing, so it costs them no instruction.
#[derive(Debug)]
pub(crate) struct Fuse<'a>(&'a Shared);

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
        self.mark_queued();
        self.routing.close();
    }

    /// The state, with every block in it that was freed to it so far.
    ///
    /// # Errors
    /// [`Error::BrokenPool`] if it cannot be trusted.
    pub(crate) fn lock(&self) -> Result<CoreGuard<'_>> {
        let mut core = Locked::new(self.core.lock(), self);
        self.check(&core)?;
        self.take_in_queued(&mut core);
        Ok(core)
    }

    /// As [`lock`](Self::lock), for the path of most allocations that no lane serves. The fuse must be dropped before the
    /// guard. The queues of a broken pool count as filled for ever, so one look is enough for both.
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

    /// As [`lock_with_fuse`](Self::lock_with_fuse), unless another thread has the state or it cannot be trusted.
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

    /// The state as it is, unless another thread has it or it cannot be trusted.
    pub(super) fn try_lock(&self) -> Option<CoreGuard<'_>> {
        let core = Locked::new(self.core.try_lock()?, self);
        self.check(&core).is_ok().then_some(core)
    }

    /// As [`lock`](Self::lock), unless another thread has it or it cannot be trusted.
    pub(super) fn lock_if_free(&self) -> Option<CoreGuard<'_>> {
        let mut core = self.try_lock()?;
        self.take_in_queued(&mut core);
        Some(core)
    }

    /// The state, for its counters alone: as [`lock`](Self::lock), or as it is if it cannot be trusted.
    pub(crate) fn look(&self) -> CoreGuard<'_> {
        self.lock().unwrap_or_else(|_| {
            let mut core = Locked::new(self.core.lock(), self);
            core.is_broken = true;
            core
        })
    }

    /// As [`look`](Self::look), with what every cache has counted.
    pub(super) fn lock_and_fold(&self) -> CoreGuard<'_> {
        let mut core = self.look();
        if !core.is_broken {
            self.fold_caches(&mut core);
        }
        core
    }

    /// Takes in what was left, unless another thread has the lock: that one, or the next, will.
    pub(super) fn take_in_if_free(&self) {
        drop(self.lock_if_free());
    }

    /// Takes in what was left while another thread had the lock. Not from inside a cache.
    #[inline]
    pub(super) fn take_in_queued(&self, core: &mut Core) {
        if self.has_queued() {
            self.take_in_queues(core);
        }
    }

    /// Whether the queues may hold something.
    #[inline(always)]
    pub(super) fn has_queued(&self) -> bool {
        // Relaxed: what is not seen yet is taken in by the next.
        self.has_queued.load(Ordering::Relaxed)
    }

    /// Takes in what the queues hold, unless the pool is broken.
    #[inline(never)]
    pub(super) fn take_in_queues(&self, core: &mut Core) {
        if self.routing.are_closed() {
            return;
        }
        // Acquire: whoever marked the queues before has filled them before. Marked anew by whoever comes later.
        self.has_queued.swap(false, Ordering::AcqRel);
        // What was not counted yet is counted in order with what this thread has counted.
        threads::fold_of_thread(self.id(), core);
        while let Some((record, counted)) = self.freed.pop() {
            drop(core.free(record, counted));
        }
        while let Some(heap) = self.released.pop() {
            core.release_memory(heap);
        }
    }

    /// Leaves a block for the next thread that has the lock.
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

    /// Releases a private memory. Never blocks: a graph may go while its thread has the lock, in a driver call
    /// that runs work.
    pub(crate) fn release_memory(&self, heap: HeapId) {
        self.released.push(heap);
        self.mark_queued();
        self.take_in_if_free();
    }
}
