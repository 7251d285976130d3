//! Numbers for what the driver's library hands out as pointers.
//!
//! The library trusts the handles it is given, and a handle that is gone may mean something new. A number is
//! given out once and looked up at each use, so that a stale or invented one is an error. What is in use stays
//! alive until its use is over, even when it is removed meanwhile.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::failure::{code, refuse};
use crate::error::Result;

/// Something of the library's that has to be given back once. Its `Drop` calls `close` and passes over the
/// outcome.
pub(super) trait Close: Sized {
    /// What it is called in errors.
    const NAME: &'static str;

    /// Gives it back.
    fn close(&self, call: &'static str) -> Result<()>;
}

/// Live handles by number. Zero is never one.
#[derive(Debug)]
pub(super) struct Table<T> {
    last: AtomicU64,
    live: RwLock<HashMap<u64, Arc<T>>>,
}

impl<T: Close> Table<T> {
    pub(super) fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            live: RwLock::default(),
        }
    }

    pub(super) fn insert(&self, entry: T) -> u64 {
        // Relaxed: the number only has to be unique.
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.live.write().insert(number, Arc::new(entry));
        number
    }

    pub(super) fn get(&self, call: &'static str, number: u64) -> Result<Arc<T>> {
        self.live
            .read()
            .get(&number)
            .cloned()
            .ok_or_else(|| unknown::<T>(call, number))
    }

    /// Forgets the number and gives the entry back: now, or when its last use is over.
    pub(super) fn remove(&self, call: &'static str, number: u64) -> Result<()> {
        let entry = self.live.write().remove(&number);
        match Arc::into_inner(entry.ok_or_else(|| unknown::<T>(call, number))?) {
            // Its `Drop`, which would close it again, is all that is left out: what entries own, `close` gives back.
            Some(entry) => ManuallyDrop::new(entry).close(call),
            None => Ok(()),
        }
    }
}

fn unknown<T: Close>(call: &'static str, number: u64) -> crate::error::Error {
    refuse(
        call,
        code::INVALID_VALUE,
        format!("there is no {} {number}", T::NAME),
    )
}
