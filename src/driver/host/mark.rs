//! Points in a stream.
//!
//! Every record of an event makes a new mark. A wait keeps the mark that was current when the wait was enqueued, so
//! later records of the event do not affect it, whatever their stream.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use super::errno::{EIO, refuse};
use crate::error::Result;

/// A message that says why work failed. Shared by every mark after the failure.
pub(super) type Failure = Arc<str>;

/// A point that a stream passes once.
#[derive(Debug, Default)]
pub(super) struct Mark {
    /// `None` until passed; then the outcome of the work before the mark.
    passed: Mutex<Option<Result<(), Failure>>>,
    changed: Condvar,
}

impl Mark {
    /// Releases the waiters. A failed stream passes its marks too, so that waiters do not hang.
    pub(super) fn pass(&self, failure: Option<Failure>) {
        *self.passed.lock() = Some(failure.map_or(Ok(()), Err));
        self.changed.notify_all();
    }

    /// Whether the stream has passed this mark.
    pub(super) fn is_passed(&self) -> bool {
        self.passed.lock().is_some()
    }

    /// Whether the stream has passed this mark without a failure, so that a wait for it would have no effect.
    pub(super) fn is_clear(&self) -> bool {
        matches!(*self.passed.lock(), Some(Ok(())))
    }

    /// Blocks until the stream has passed this mark. The error is the failure before the mark, if there was one.
    pub(super) fn wait(&self) -> Result<(), Failure> {
        let mut passed = self.passed.lock();
        loop {
            if let Some(outcome) = passed.clone() {
                return outcome;
            }
            self.changed.wait(&mut passed);
        }
    }

    /// Whether the stream has passed this mark, or an error of `call` if work before the mark failed.
    pub(super) fn query(&self, call: &'static str) -> Result<bool> {
        match &*self.passed.lock() {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(failure)) => Err(refuse(call, EIO, &**failure)),
        }
    }
}
