//! The locks, queues and thread locals that threads share a pool through.
//!
//! A build with `--cfg loom` replaces them with loom's, which runs a test once for every order in which threads can
//! reach them (`tests/loom/main.rs`). Both have the same interface, that of `parking_lot` and `crossbeam`. Code below
//! the pool uses its own locks directly: none is held at a point where loom can switch threads.

#[cfg(not(loom))]
pub(crate) use crossbeam::queue::SegQueue;
#[cfg(not(loom))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use plain::UnsafeCell;
#[cfg(not(loom))]
pub(crate) use std::{hint, sync::atomic, thread, thread_local};

#[cfg(loom)]
pub(crate) use checked::{Mutex, MutexGuard, PerThread, SegQueue, UnsafeCell, thread_local};
#[cfg(loom)]
pub(crate) use loom::{hint, sync::atomic, thread};

/// The standard library's types, adapted to loom's interface where the two differ.
#[cfg(not(loom))]
mod plain {
    /// A cell that lends out its address for the duration of a call.
    #[derive(Debug)]
    pub(crate) struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) const fn new(value: T) -> Self {
            Self(std::cell::UnsafeCell::new(value))
        }

        #[inline]
        pub(crate) fn with_mut<R>(&self, with: impl FnOnce(*mut T) -> R) -> R {
            with(self.0.get())
        }
    }
}

/// The same types on top of loom.
#[cfg(loom)]
mod checked {
    use std::collections::VecDeque;
    use std::ops::{Deref, DerefMut};

    #[derive(Debug)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    #[derive(Debug)]
    pub(crate) struct MutexGuard<'a, T> {
        mutex: &'a Mutex<T>,
        /// `None` only inside [`unlocked`](Self::unlocked).
        guard: Option<loom::sync::MutexGuard<'a, T>>,
    }

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            let guard = self.0.lock().expect("no model goes on after a panic");
            MutexGuard {
                mutex: self,
                guard: Some(guard),
            }
        }

        pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
            let guard = self.0.try_lock().ok()?;
            Some(MutexGuard {
                mutex: self,
                guard: Some(guard),
            })
        }
    }

    impl<T: Default> Default for Mutex<T> {
        fn default() -> Self {
            Self::new(T::default())
        }
    }

    impl<T> MutexGuard<'_, T> {
        pub(crate) fn unlocked<R>(guard: &mut Self, with: impl FnOnce() -> R) -> R {
            guard.guard = None;
            let result = with();
            guard.guard = guard.mutex.lock().guard;
            result
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.guard.as_ref().expect("the mutex is locked")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.guard.as_mut().expect("the mutex is locked")
        }
    }

    /// A queue that many threads push to and pop from.
    #[derive(Debug)]
    pub(crate) struct SegQueue<T>(Mutex<VecDeque<T>>);

    impl<T> SegQueue<T> {
        pub(crate) fn new() -> Self {
            Self(Mutex::default())
        }

        pub(crate) fn push(&self, value: T) {
            self.0.lock().push_back(value);
        }

        pub(crate) fn pop(&self) -> Option<T> {
            self.0.lock().pop_front()
        }
    }

    impl<T> Default for SegQueue<T> {
        fn default() -> Self {
            Self::new()
        }
    }

    /// A cell whose accesses loom orders.
    #[derive(Debug)]
    pub(crate) struct UnsafeCell<T>(loom::cell::UnsafeCell<T>);

    impl<T> UnsafeCell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::cell::UnsafeCell::new(value))
        }

        #[track_caller]
        pub(crate) fn with_mut<R>(&self, with: impl FnOnce(*mut T) -> R) -> R {
            self.0.with_mut(with)
        }
    }

    /// A thread-local value of the model.
    #[derive(Debug)]
    pub(crate) struct PerThread<T: 'static>(pub(crate) loom::thread::LocalKey<T>);

    impl<T> PerThread<T> {
        pub(crate) fn try_with<R>(
            &'static self,
            with: impl FnOnce(&T) -> R,
        ) -> Result<R, loom::thread::AccessError> {
            self.0.try_with(with)
        }

        /// For values without a destructor, which the standard library keeps until the thread ends. Loom removes
        /// them earlier, so a fresh initial value stands in.
        pub(crate) fn with<R>(&'static self, with: impl Fn(&T) -> R) -> R {
            let outcome = self.0.try_with(&with);
            outcome.unwrap_or_else(|_| with(&(self.0.init)()))
        }
    }

    /// `std::thread_local!` for the threads of a model.
    macro_rules! local_to_thread {
        ($($(#[$doc:meta])* $vis:vis static $name:ident: $type:ty = const $init:block $(;)?)*) => {
            $($(#[$doc])* $vis static $name: $crate::sync::PerThread<$type> =
                $crate::sync::PerThread(loom::thread::LocalKey {
                    init: || $init,
                    _p: std::marker::PhantomData,
                });)*
        };
    }
    pub(crate) use local_to_thread as thread_local;
}
