//! The locks, queues and thread locals by which threads share a pool: the one place that chooses them.
//!
//! A build with `--cfg loom` exchanges them for those of loom, which runs a test once for every order in
//! which threads may reach them (`tests/loom_lanes.rs`). Both have the same interface, that of
//! `parking_lot` and `crossbeam`. Code below the pool keeps its own locks: none is held where loom may
//! switch threads.

#[cfg(not(loom))]
pub(crate) use crossbeam::queue::SegQueue;
#[cfg(not(loom))]
pub(crate) use parking_lot::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::thread_local;

#[cfg(loom)]
pub(crate) use checked::{Mutex, MutexGuard, SegQueue, thread_local};

/// The same on top of loom.
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

    /// `std::thread_local!` for a thread of the model.
    macro_rules! local_to_thread {
        (static $name:ident: $type:ty = const $init:block $(;)?) => {
            loom::thread_local! {
                static $name: $type = $init;
            }
        };
    }
    pub(crate) use local_to_thread as thread_local;
}
