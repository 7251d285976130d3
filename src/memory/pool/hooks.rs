//! Callbacks of the program: called when memory is short, and when an allocation has failed.
//!
//! They run without any lock of the pool, so they may use it: free, allocate, drop its handles. While one runs, its
//! thread calls no other, of whatever pool.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::error::OutOfMemory;

/// Called with the bytes that are wanted.
pub(crate) type OnShortage = dyn Fn(u64) + Send + Sync;
/// Called with the report.
pub(crate) type OnFailure = dyn Fn(&OutOfMemory) + Send + Sync;

thread_local! {
    static IS_CALLING: Cell<bool> = const { Cell::new(false) };
}

/// A pool's callbacks, each list in order of registration.
#[derive(Default)]
pub(crate) struct Hooks {
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    next: u64,
    on_shortage: Vec<(u64, Arc<OnShortage>)>,
    on_failure: Vec<(u64, Arc<OnFailure>)>,
}

impl Lists {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

impl Hooks {
    pub(super) fn add_on_shortage(self: &Arc<Self>, callback: Arc<OnShortage>) -> Registration {
        let mut lists = self.lists.lock();
        let number = lists.number();
        lists.on_shortage.push((number, callback));
        Registration::new(self, number)
    }

    pub(super) fn add_on_failure(self: &Arc<Self>, callback: Arc<OnFailure>) -> Registration {
        let mut lists = self.lists.lock();
        let number = lists.number();
        lists.on_failure.push((number, callback));
        Registration::new(self, number)
    }

    /// Who is to be asked now, in order.
    pub(super) fn on_shortage(&self) -> Vec<Arc<OnShortage>> {
        if IS_CALLING.get() {
            return Vec::new();
        }
        let lists = self.lists.lock();
        lists.on_shortage.iter().map(|(_, f)| f.clone()).collect()
    }

    /// Tells everyone who wants to know, without any lock of the pool.
    pub(super) fn tell_failure(&self, report: &OutOfMemory) {
        if IS_CALLING.get() {
            return;
        }
        let lists = self.lists.lock();
        let told: Vec<_> = lists.on_failure.iter().map(|(_, f)| f.clone()).collect();
        drop(lists);
        for callback in told {
            call(|| callback(report));
        }
    }
}

/// Runs a callback, in which no other is called.
pub(crate) fn call(callback: impl FnOnce()) {
    struct Over;
    impl Drop for Over {
        fn drop(&mut self) {
            IS_CALLING.set(false);
        }
    }
    IS_CALLING.set(true);
    // Also where the callback panics.
    let _over = Over;
    callback();
}

/// A registered callback; dropping it takes the callback out of its pool. A call that is under way on
/// another thread may still end after that.
#[must_use = "the callback is taken out again when this is dropped"]
pub struct Registration {
    hooks: Weak<Hooks>,
    number: u64,
}

impl Registration {
    fn new(hooks: &Arc<Hooks>, number: u64) -> Self {
        Self {
            hooks: Arc::downgrade(hooks),
            number,
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(hooks) = self.hooks.upgrade() else {
            return;
        };
        let mut lists = hooks.lists.lock();
        let is_this = |number: u64| number == self.number;
        let asked = lists.on_shortage.iter().position(|(n, _)| is_this(*n));
        let asked = asked.map(|at| lists.on_shortage.remove(at));
        let told = lists.on_failure.iter().position(|(n, _)| is_this(*n));
        let told = told.map(|at| lists.on_failure.remove(at));
        drop(lists);
        // Outside the lock: what a callback owns may register and deregister others as it goes.
        drop((asked, told));
    }
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({})", self.number)
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = self.lists.lock();
        let (asked, told) = (lists.on_shortage.len(), lists.on_failure.len());
        write!(f, "Hooks({asked} asked, {told} told)")
    }
}
