//! A biased lock: its owner enters without an atomic read-modify-write and without a hardware fence.
//!
//! One thread, the *owner*, enters all the time; other threads hardly ever do. To enter, the owner marks itself busy
//! and checks whether another thread has requested entry. Entering and leaving takes two plain stores and a load.
//! Another thread requests entry, makes every running thread execute a memory barrier, and waits until the owner is not
//! busy.
//!
//! ```text
//! owner:  busy = true;       (light fence)  if requested: busy = false, take the slow lock
//! other:  requested = true;  (heavy fence)  wait until not busy
//! ```
//!
//! This is Dekker's entry protocol: with a fence between the store and the load on both sides, at least one of the two
//! sees the other. The *heavy* fence is Linux's `membarrier`, which executes a fence on every processor that runs a
//! thread of this process. The *light* fence therefore only has to stop the compiler from reordering. On systems
//! without such a call, every thread takes the slow lock, including the owner.
//!
//! Another thread can also *revoke* the bias: the owner then enters neither way until it has restored the bias. That
//! is how one value among several becomes the only one in use.
//!
//! Must not know: blocks, pools.

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, UnsafeCell, hint, thread};
use std::fmt;

/// How often a waiting thread checks the owner's busy flag before it yields.
const SPINS: u32 = 64;

/// A value that its owner enters cheaply, and any other thread at the cost of a system call.
pub(crate) struct BiasedLock<T> {
    is_busy: AtomicBool,
    is_requested: AtomicBool,
    /// Whether the owner always takes the slow lock, because there is no heavy fence.
    is_slow: bool,
    /// The slow lock. Held by every thread that is inside, except an owner that entered on the fast path. It guards
    /// whether the bias is revoked.
    slow: Mutex<bool>,
    value: UnsafeCell<T>,
}

#[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
// SAFETY: one thread at a time reaches `value`: the owner, while it is marked busy and saw no request after that; or a
// thread that holds `slow`, while the owner is not inside by the fast path. `T: Send` suffices, because the value is
// never shared, only handed from thread to thread.
unsafe impl<T: Send> Sync for BiasedLock<T> {}

impl<T> BiasedLock<T> {
    pub(crate) fn new(value: T) -> Self {
        Self {
            is_busy: AtomicBool::new(false),
            is_requested: AtomicBool::new(!heavy::is_supported()),
            is_slow: !heavy::is_supported(),
            slow: Mutex::new(false),
            value: UnsafeCell::new(value),
        }
    }

    /// Enters as the owner. Calls `restore` if the bias is revoked; that has to [restore](Self::restore) it.
    ///
    /// # Panics
    /// If the owner is inside already.
    ///
    /// # Safety
    /// All calls for this value, of this, of [`try_with_owner`](Self::try_with_owner) and of
    /// [`restore`](Self::restore), come from one thread. `with` does not call the other two for it.
    #[inline]
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    pub(crate) unsafe fn with_owner<R>(
        &self,
        restore: impl FnMut(),
        with: impl FnOnce(&mut T) -> R,
    ) -> R {
        assert!(!self.is_busy.load(Ordering::Relaxed), "entered twice");
        // Both paths end in a guard, so that `with` has a single call site and can be inlined.
        let inside = self.enter().map(Inside::Busy);
        let _inside = inside.unwrap_or_else(|| self.lock(restore));
        // SAFETY: this thread is the owner and was not inside, or the assertion above would have failed. Either it is
        // marked busy and saw no request after that, or it holds the slow lock, which other threads need to enter.
        self.value.with_mut(|value| with(unsafe { &mut *value }))
    }

    /// Enters as the owner through the slow lock.
    #[cold]
    #[inline(never)]
    fn lock(&self, mut restore: impl FnMut()) -> Inside<'_> {
        loop {
            let is_revoked = self.slow.lock();
            if !*is_revoked {
                // Relaxed: a thread that waits for the flag to clear holds the lock, so none is waiting now.
                self.is_busy.store(true, Ordering::Relaxed);
                return Inside::Locked(Busy(&self.is_busy), is_revoked);
            }
            drop(is_revoked);
            restore();
        }
    }

    /// Makes the owner enter as before, after `with`. Does nothing if the bias is not revoked.
    ///
    /// # Safety
    /// As [`with_owner`](Self::with_owner); and the owner is not inside.
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    pub(super) unsafe fn restore(&self, with: impl FnOnce(&mut T)) {
        let mut is_revoked = self.slow.lock();
        if !*is_revoked {
            return;
        }
        // SAFETY: the owner is this thread and not inside, as the caller promises. Other threads need the slow lock,
        // which this thread holds.
        self.value.with_mut(|value| with(unsafe { &mut *value }));
        *is_revoked = false;
        self.is_requested.store(self.is_slow, Ordering::Release);
    }

    /// Marks the owner busy, unless another thread has requested entry.
    #[inline]
    fn enter(&self) -> Option<Busy<'_>> {
        debug_assert!(!self.is_busy.load(Ordering::Relaxed), "entered twice");
        self.is_busy.store(true, Ordering::Relaxed);
        let busy = Busy(&self.is_busy);
        heavy::light_fence();
        // Acquire: pairs with the store that withdraws a request, so this thread sees what the other one did inside.
        (!self.is_requested.load(Ordering::Acquire)).then_some(busy)
    }

    /// Enters as the owner by the fast path alone. Returns `input` if another thread has requested entry. Only debug
    /// builds check that the owner is not inside already; that makes this faster than `with_owner`.
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
        // SAFETY: this thread is the owner and was not inside, as the caller promises. It is marked busy and saw no
        // request after that, so no other thread enters.
        let outcome = self
            .value
            .with_mut(|value| with(unsafe { &mut *value }, input));
        drop(busy);
        Ok(outcome)
    }

    /// Enters from any thread, except from an owner that is inside: it would wait for itself. `with` must not enter
    /// again.
    pub(crate) fn with<R>(&self, with: impl FnOnce(&mut T) -> R) -> R {
        let is_revoked = self.slow.lock();
        self.with_locked(*is_revoked, with)
    }

    /// As [`with`](Self::with), unless the bias is revoked; and revokes it.
    pub(super) fn revoke<R>(&self, with: impl FnOnce(&mut T) -> R) -> Option<R> {
        let mut is_revoked = self.slow.lock();
        if *is_revoked {
            return None;
        }
        *is_revoked = true;
        Some(self.with_locked(true, with))
    }

    /// As [`with`](Self::with), unless the bias is revoked.
    pub(super) fn with_biased<R>(&self, with: impl FnOnce(&mut T) -> R) -> Option<R> {
        let is_revoked = self.slow.lock();
        (!*is_revoked).then(|| self.with_locked(false, with))
    }

    /// Enters with the slow lock held.
    #[expect(unsafe_code, reason = "the protocol gives out one reference at a time")]
    fn with_locked<R>(&self, is_revoked: bool, with: impl FnOnce(&mut T) -> R) -> R {
        let _request = Intent {
            lock: self,
            is_revoked,
        };
        self.is_requested.store(true, Ordering::Relaxed);
        heavy::fence();
        let mut spins = 0;
        // Acquire: this thread sees what the owner did inside.
        while self.is_busy.load(Ordering::Acquire) {
            spins += 1;
            if spins < SPINS {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
        // SAFETY: the owner was not busy after the heavy fence made the request visible to it, and does not enter by
        // the fast path while it sees the request. All other entries need the slow lock, which this thread holds.
        self.value.with_mut(|value| with(unsafe { &mut *value }))
    }
}

/// The owner's guard. It also leaves on unwinding, so that no thread waits for an owner that panicked.
#[expect(dead_code, reason = "held to be dropped")]
enum Inside<'a> {
    Busy(Busy<'a>),
    /// The busy flag is cleared before the lock is released.
    Locked(Busy<'a>, MutexGuard<'a, bool>),
}

/// Clears the busy flag when dropped.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    #[inline]
    fn drop(&mut self) {
        // Release: a thread that sees the flag cleared sees what the owner did inside.
        self.0.store(false, Ordering::Release);
    }
}

/// Withdraws the request to enter when dropped, unless the bias is revoked.
struct Intent<'a, T> {
    lock: &'a BiasedLock<T>,
    is_revoked: bool,
}

impl<T> Drop for Intent<'_, T> {
    fn drop(&mut self) {
        let remains = self.lock.is_slow || self.is_revoked;
        self.lock.is_requested.store(remains, Ordering::Release);
    }
}

impl<T> fmt::Debug for BiasedLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BiasedLock").finish_non_exhaustive()
    }
}

/// The asymmetric fence: light for the owner, heavy for other threads.
#[cfg(all(target_os = "linux", not(miri), not(loom)))]
mod heavy {
    use std::sync::OnceLock;

    use rustix::thread::{MembarrierCommand, membarrier, membarrier_query};

    use super::Ordering;

    #[inline]
    pub(super) fn light_fence() {
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }

    /// Whether [`fence`] reaches every thread. Registers the process, so it must run before the first owner enters.
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
        // This fails only in a process that was forked from the registered one. It has a single thread then, so an
        // ordinary fence suffices until it has registered as well.
        if membarrier(MembarrierCommand::PrivateExpedited).is_err() {
            register();
            std::sync::atomic::fence(Ordering::SeqCst);
        }
    }
}

/// Loom models full fences only, so both are full.
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

/// No asymmetric fence on this system.
#[cfg(not(any(loom, all(target_os = "linux", not(miri)))))]
mod heavy {
    pub(super) fn is_supported() -> bool {
        false
    }

    pub(super) fn light_fence() {}

    pub(crate) fn fence() {}
}

/// All interleavings of two or three threads under loom's memory model: `.ci/run loom`.
#[cfg(all(test, loom))]
mod loom_tests {
    use std::sync::Arc;

    use super::*;

    /// Loom's cell panics if two threads are inside at once, or if one does not see what an earlier one did.
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
                biased.with_owner(|| unreachable!("nobody revokes"), |value| *value += 1);
            }
        }
        let total = entries + others.len() as u64;
        for other in others {
            other.join().expect("no panic");
        }
        assert_eq!(biased.with(|value| *value), total);
    }

    /// Two locks, of which one is in use: its value moves to the owner that enters.
    struct Pair {
        locks: [BiasedLock<u64>; 2],
        moves: Mutex<()>,
    }

    impl Pair {
        fn enter(&self, mine: usize) {
            let (lock, other) = (&self.locks[mine], &self.locks[1 - mine]);
            let take_over = || {
                let _moves = self.moves.lock();
                #[expect(unsafe_code, reason = "each thread is the owner of one lock")]
                // SAFETY: only this thread enters `mine` as the owner.
                unsafe {
                    lock.restore(|value| {
                        other.revoke(|other| std::mem::swap(value, other));
                    });
                }
            };
            #[expect(unsafe_code, reason = "each thread is the owner of one lock")]
            // SAFETY: only this thread enters `mine` as the owner.
            unsafe {
                lock.with_owner(take_over, |value| *value += 1);
            }
        }
    }

    #[test]
    fn loom_a_value_moves_from_owner_to_owner() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let pair = Arc::new(Pair {
                locks: [BiasedLock::new(0), BiasedLock::new(0)],
                moves: Mutex::new(()),
            });
            pair.locks[1].revoke(|_| {});
            let other = {
                let pair = pair.clone();
                thread::spawn(move || (0..2).for_each(|_| pair.enter(1)))
            };
            (0..2).for_each(|_| pair.enter(0));
            other.join().expect("no panic");
            let values = [0, 1].map(|lock| pair.locks[lock].with(|value| *value));
            assert!(values == [4, 0] || values == [0, 4], "{values:?}");
        });
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
            unsafe {
                shared
                    .0
                    .with_owner(|| unreachable!("nobody revokes"), |value| *value += 1)
            };
        }
        for other in others {
            other.join().expect("no panic");
        }
        assert_eq!(shared.0.with(|value| *value), ROUNDS + 2 * (ROUNDS / 10));
    }

    /// In release builds too, and also when the owner entered through the slow lock.
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
                unsafe { biased.with_owner(|| unreachable!("nobody revokes"), |value| *value += 1) }
            };
            let try_again = std::panic::AssertUnwindSafe(enter_again);
            // SAFETY: as above.
            let entered = unsafe {
                biased.with_owner(
                    || unreachable!("nobody revokes"),
                    |_| std::panic::catch_unwind(try_again),
                )
            };
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
            unsafe { biased.with_owner(|| unreachable!("nobody revokes"), |_| panic!("inside")) }
        }));
        assert!(panicked.is_err());
        assert_eq!(biased.with(|value| *value), 0);
    }
}
