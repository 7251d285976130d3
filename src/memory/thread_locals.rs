//! What the fast path reads of the calling thread, in one variable: each thread-local variable costs a call if this
//! crate is part of a shared library.

use std::cell::Cell;
use std::ptr;

use crate::memory::types::TagId;
use crate::sync::thread_local;

/// A thread's part in the pools it uses.
pub(crate) struct Local {
    /// The thread cache used last; null if there is none. Only `pool::threads` sets it, and knows its type.
    pub(crate) cache: Cell<*const ()>,
    /// The innermost tag scope.
    pub(crate) tag: Cell<TagId>,
    /// Whether the thread is inside one of its caches.
    #[cfg(debug_assertions)]
    is_inside: Cell<bool>,
}

/// Runs `with` inside a cache of the calling thread. Debug builds note that, for [`assert_outside`].
#[inline(always)]
pub(crate) fn inside<R>(with: impl FnOnce() -> R) -> R {
    #[cfg(debug_assertions)]
    let _mark = Mark::set();
    with()
}

/// In debug builds, asserts that the calling thread is inside none of its caches: code of others may run next.
#[inline(always)]
pub(crate) fn assert_outside(what: &str) {
    #[cfg(debug_assertions)]
    LOCAL.with(|local| {
        // What unwinds was broken before.
        let is_inside = local.is_inside.get() && !std::thread::panicking();
        assert!(!is_inside, "{what} is dropped inside a cache");
    });
    #[cfg(not(debug_assertions))]
    let _ = what;
}

#[cfg(debug_assertions)]
struct Mark;

#[cfg(debug_assertions)]
impl Mark {
    fn set() -> Self {
        LOCAL.with(|local| local.is_inside.set(true));
        Self
    }
}

#[cfg(debug_assertions)]
impl Drop for Mark {
    fn drop(&mut self) {
        LOCAL.with(|local| local.is_inside.set(false));
    }
}

thread_local! {
    // Without a destructor, so that it can be read for as long as the thread runs.
    pub(crate) static LOCAL: Local = const {
        Local {
            cache: Cell::new(ptr::null()),
            tag: Cell::new(TagId::NONE),
            #[cfg(debug_assertions)]
            is_inside: Cell::new(false),
        }
    };
}
