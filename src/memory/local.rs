//! What the fast path reads of the calling thread, in one variable: each thread-local variable costs a call
//! where this crate is part of a shared library.

use std::cell::Cell;
use std::ptr;

use super::cache::ThreadCache;
use super::tags::TagId;
use crate::sync::thread_local;

/// A thread's part in the pools it uses.
pub(super) struct Local {
    /// The cache used last, which the thread's list of caches holds; null if that holds none.
    pub(super) cache: Cell<*const ThreadCache>,
    /// The innermost tag scope.
    pub(super) tag: Cell<TagId>,
}

thread_local! {
    // Without a destructor, so that it can be read for as long as the thread runs.
    pub(super) static LOCAL: Local = const {
        Local {
            cache: Cell::new(ptr::null()),
            tag: Cell::new(TagId::NONE),
        }
    };
}
