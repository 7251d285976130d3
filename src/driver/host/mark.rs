//! Points in a stream.
//!
//! Every record of an event makes a new mark. A wait holds the mark that was current when the wait was
//! enqueued, so later records of the event do not concern it, whatever stream they are made on.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::errno::{EIO, refuse};
use crate::error::Result;

/// Why work failed, for people. Shared by every mark behind the failure.
pub(super) type Failure = Arc<str>;

/// A point that a stream passes once.
#[derive(Debug, Default)]
pub(super) struct Mark {
    /// `None` until passed; then whether work before it failed.
    passed: Mutex<Option<Result<(), Failure>>>,
    changed: Condvar,
}

impl Mark {
    /// Lets the waiters go on. A stream that failed passes its marks nevertheless, so that nobody hangs.
    pub(super) fn pass(&self, failure: Option<Failure>) {
        *self.passed.lock() = Some(failure.map_or(Ok(()), Err));
        self.changed.notify_all();
    }

    /// Whether the stream has been here.
    pub(super) fn is_passed(&self) -> bool {
        self.passed.lock().is_some()
    }

    /// Whether the stream has been here and all was well: a wait for this mark has no effect.
    pub(super) fn is_clear(&self) -> bool {
        matches!(*self.passed.lock(), Some(Ok(())))
    }

    /// Blocks until the stream has been here; gives the failure before the mark, if there was one.
    pub(super) fn wait(&self) -> Result<(), Failure> {
        let mut passed = self.passed.lock();
        loop {
            if let Some(outcome) = passed.clone() {
                return outcome;
            }
            self.changed.wait(&mut passed);
        }
    }

    /// Whether the stream has been here, or the error of `call` if work before the mark failed.
    pub(super) fn query(&self, call: &'static str) -> Result<bool> {
        match &*self.passed.lock() {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(failure)) => Err(refuse(call, EIO, &**failure)),
        }
    }
}
