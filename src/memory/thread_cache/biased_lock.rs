//! A lock that costs its owner neither an atomic read-modify-write nor a fence.
//!
//! One thread, the *owner*, enters all the time; other threads hardly ever do. The owner marks itself busy and checks
//! whether another thread wants to enter: two plain stores and a load. The other thread announces itself, makes every
//! running thread pass a memory barrier, and waits until the owner is not busy.
//!
//! ```text
//! owner:  busy = true;       (light fence)  if requested: busy = false, take the slow lock
//! other:  requested = true;  (heavy fence)  wait until not busy
//! ```
//!
//! This is Dekker's protocol: with a fence between store and load on both sides, at least one of the two sees the
//! other. The *heavy* fence is the kernel's `membarrier`, which runs a fence on every processor that runs a thread of
//! this process. So the *light* one only has to stop the compiler from reordering. Where the system has no such call,
//! everybody takes the slow lock, the owner included.
//!
//! Must not know: blocks, pools.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, UnsafeCell, hint, thread};
use std::fmt;

/// Checks of the owner's mark before the waiting thread yields.
const SPINS: u32 = 64;

/// A value that its owner enters cheaply and everybody else at the price of a system call.
pub(crate) struct BiasedLock<T> {
    is_busy: AtomicBool,
    is_requested: AtomicBool,
    /// Whether the owner always takes the slow lock, because no heavy fence reaches it.
    is_slow: bool,
    /// The slow lock: held by whoever is inside, except the owner on its fast path.
    others: Mutex<()>,
    value: UnsafeCell<T>,
}

#[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
// SAFETY: `value` is reached by the owner while it is busy and nobody wants in, or under `others` while the
// owner is not busy: by one thread at a time.
unsafe impl<T: Send> Sync for BiasedLock<T> {}

impl<T> BiasedLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            is_busy: AtomicBool::new(false),
            is_requested: AtomicBool::new(!heavy::is_supported()),
            is_slow: !heavy::is_supported(),
            others: Mutex::new(()),
            value: UnsafeCell::new(value),
        }
    }

    /// Enters as the owner.
    ///
    /// # Panics
    /// If the owner is inside already.
    ///
    /// # Safety
    /// All calls for this value, of this and of [`try_with_owner`](Self::try_with_owner), come from one thread. `with`
    /// does not call `try_with_owner` for it.
    #[inline]
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    pub(crate) unsafe fn with_owner<R>(&self, with: impl FnOnce(&mut T) -> R) -> R {
        assert!(!self.is_busy.load(Ordering::Relaxed), "entered twice");
        // Both ways end here, so that `with` is called in one place and can be inlined.
        let inside = self.enter().map(Inside::Busy);
        let _inside = inside.unwrap_or_else(|| self.lock());
        // SAFETY: this thread is the owner, and was not inside: it would have been marked busy, as it is now. Nobody
        // wanted in after that, or others need the lock that is held.
        self.value.with_mut(|value| with(unsafe { &mut *value }))
    }

    /// Enters as the owner when no other thread is inside or wants in.
    #[cold]
    #[inline(never)]
    fn lock(&self) -> Inside<'_> {
        let guard = self.others.lock();
        // Relaxed: a thread that waits for the mark holds the lock.
        self.is_busy.store(true, Ordering::Relaxed);
        Inside::Locked(Busy(&self.is_busy), guard)
    }

    /// Marks the owner busy, unless another thread wants in.
    #[inline]
    fn enter(&self) -> Option<Busy<'_>> {
        debug_assert!(!self.is_busy.load(Ordering::Relaxed), "entered twice");
        self.is_busy.store(true, Ordering::Relaxed);
        let busy = Busy(&self.is_busy);
        heavy::light_fence();
        // Acquire: what another thread did inside is visible once it has withdrawn its request.
        (!self.is_requested.load(Ordering::Acquire)).then_some(busy)
    }

    /// Enters as the owner on the fast path only: returns `input` if another thread wants to enter. Only debug builds
    /// check that the owner is not inside already.
    ///
    /// # Safety
    /// As [`with_owner`](Self::with_owner); and the owner is not inside.
    #[inline]
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    pub(super) unsafe fn try_with_owner<I, R>(
        &self,
        input: I,
        with: impl FnOnce(&mut T, I) -> R,
    ) -> Result<R, I> {
        let Some(busy) = self.enter() else {
            return Err(input);
        };
        // SAFETY: this thread is the owner, was not inside and is marked busy, and nobody wanted in after that.
        let outcome = self
            .value
            .with_mut(|value| with(unsafe { &mut *value }, input));
        drop(busy);
        Ok(outcome)
    }

    /// Enters from any thread except an owner that is inside, which would wait for itself. `with` must not enter again.
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    pub(crate) fn with<R>(&self, with: impl FnOnce(&mut T) -> R) -> R {
        let _guard = self.others.lock();
        self.is_requested.store(true, Ordering::Relaxed);
        let _wanted = Intent(self);
        heavy::fence();
        let mut looks = 0;
        // Acquire: what the owner did inside is seen.
        while self.is_busy.load(Ordering::Acquire) {
            looks += 1;
            if looks < SPINS {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        // SAFETY: the owner was not busy after everyone could see the wish, and will not enter past it;
        // others need the lock that is held.
        self.value.with_mut(|value| with(unsafe { &mut *value }))
    }
}

/// The owner is inside. Dropped on unwinding too, so that nobody waits for a thread that panicked.
#[expect(dead_code, reason = "held to be dropped")]
enum Inside<'a> {
    Busy(Busy<'a>),
    /// The mark is reset first.
    Locked(Busy<'a>, MutexGuard<'a, ()>),
}

/// Resets the owner's mark.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: what was done inside is visible to whoever finds the mark reset.
        self.0.store(false, Ordering::Release);
    }
}

/// Withdraws the request to enter.
struct Intent<'a, T>(&'a BiasedLock<T>);

impl<T> Drop for Intent<'_, T> {
    fn drop(&mut self) {
        self.0.is_requested.store(self.0.is_slow, Ordering::Release);
    }
}

impl<T> fmt::Debug for BiasedLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Biased").finish_non_exhaustive()
    }
}

/// The heavy fence, and the light one that it pays for.
#[cfg(all(target_os = "linux", not(miri), not(loom)))]
mod heavy {
    use std::sync::OnceLock;

    use rustix::thread::{MembarrierCommand, membarrier, membarrier_query};

    use super::Ordering;

    #[inline]
    pub(super) fn light_fence() {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    /// Whether [`fence`] reaches every thread. Called before the first owner enters.
    pub(super) fn is_supported() -> bool {
        static IS_SUPPORTED: OnceLock<bool> = OnceLock::new();
        *IS_SUPPORTED.get_or_init(|| {
            membarrier_query().contains_command(MembarrierCommand::PrivateExpedited) && register()
        })
    }

    fn register() -> bool {
        membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok()
    }

    pub(crate) fn fence() {
        // Only a process forked from the one that registered is refused. It has one thread, so an ordinary fence will
        // do until it has registered too.
        if membarrier(MembarrierCommand::PrivateExpedited).is_err() {
            register();
            std::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

/// For loom: both are full fences.
#[cfg(loom)]
mod heavy {
    use super::Ordering;
    use crate::sync::atomic;

    pub(super) fn is_supported() -> bool {
        true
    }

    pub(super) fn light_fence() {
        atomic::fence(Ordering::SeqCst);
    }

    pub(crate) fn fence() {
        atomic::fence(Ordering::SeqCst);
    }
}

/// For systems without `membarrier`.
#[cfg(not(any(loom, all(target_os = "linux", not(miri)))))]
mod heavy {
    pub(super) fn is_supported() -> bool {
        false
    }

    pub(super) fn light_fence() {}

    pub(crate) fn fence() {}
}

/// Every order of two or three threads, as loom sees memory: `.ci/run loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use std::sync::Arc;

    use super::*;

    /// The cell panics if two are inside at once, or if one does not see what another did there before.
    fn enter_from(others: usize, entries: u64) {
        let biased = Arc::new(BiasedLock::new(0_u64));
        let others: Vec<_> = (0..others)
            .map(|_| {
                let biased = biased.clone();
                thread::spawn(move || biased.with(|value| *value += 1))
            })
            .collect();
        for _ in 0..entries {
            #[expect(unsafe_code, reason = "the test is the owner")]
            // SAFETY: only this thread enters as the owner.
            unsafe {
                biased.with_owner(|value| *value += 1);
            }
        }
        let total = entries + others.len() as u64;
        for other in others {
            other.join().expect("no panic");
        }
        assert_eq!(biased.with(|value| *value), total);
    }

    #[test]
    fn loom_nobody_meets_the_owner_inside() {
        loom::model(|| enter_from(1, 2));
    }

    #[test]
    fn loom_nobody_meets_another_inside() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| enter_from(2, 1));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use super::*;

    #[test]
    #[expect(unsafe_code, reason = "the test is the owner")]
    fn nobody_meets_another_inside() {
        const ROUNDS: u64 = 20_000;
        let shared = Arc::new((BiasedLock::new(0_u64), AtomicU64::new(0)));
        let others: Vec<_> = (0..2)
            .map(|_| {
                let shared = shared.clone();
                thread::spawn(move || {
                    for _ in 0..ROUNDS / 10 {
                        shared.0.with(|value| *value += 1);
                    }
                })
            })
            .collect();
        for _ in 0..ROUNDS {
            // SAFETY: only this thread enters as the owner.
            unsafe { shared.0.with_owner(|value| *value += 1) };
        }
        for other in others {
            other.join().expect("no panic");
        }
        assert_eq!(shared.0.with(|value| *value), ROUNDS + 2 * (ROUNDS / 10));
    }

    /// Also in release builds, and also where the owner holds the lock because others want in.
    #[test]
    #[expect(unsafe_code, reason = "the test is the owner")]
    fn an_owner_that_is_inside_cannot_enter_again() {
        for is_slow in [false, true] {
            let mut biased = BiasedLock::new(1);
            if is_slow {
                biased.is_slow = true;
                biased.is_requested = AtomicBool::new(true);
            }
            let enter_again = || {
                // SAFETY: only this thread enters as the owner.
                unsafe { biased.with_owner(|value| *value += 1) }
            };
            let try_again = std::panic::AssertUnwindSafe(enter_again);
            // SAFETY: as above.
            let entered = unsafe { biased.with_owner(|_| std::panic::catch_unwind(try_again)) };
            let panic = entered.unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"entered twice"));
            assert_eq!(biased.with(|value| *value), 1, "nobody is inside any more");
        }
    }

    #[test]
    #[expect(unsafe_code, reason = "the test is the owner")]
    fn an_owner_that_panics_locks_nobody_out() {
        let biased = BiasedLock::new(0);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // SAFETY: only this thread enters as the owner.
            unsafe { biased.with_owner(|_| panic!("inside")) }
        }));
        assert!(panicked.is_err());
        assert_eq!(biased.with(|value| *value), 0);
    }
}
