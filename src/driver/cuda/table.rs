//! Maps unique numbers to the library's pointer handles.
//!
//! The library trusts the handles it is given, and may reuse a destroyed handle for something new. A number is given
//! out only once and looked up at each use, so a stale or invented number is an error. An entry in use stays alive
//! until the use is over, even if it is removed meanwhile.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use super::failure::{code, refuse};
use crate::error::Result;

/// A library object that must be closed exactly once. Its `Drop` calls `close` and ignores the result.
pub(super) trait Close: Sized {
    /// Its name in error messages.
    const NAME: &'static str;

    /// Returns it to the library.
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

    /// Forgets the number and closes the entry: now, or when its last use is over.
    pub(super) fn remove(&self, call: &'static str, number: u64) -> Result<()> {
        let entry = self.live.write().remove(&number);
        match Arc::into_inner(entry.ok_or_else(|| unknown::<T>(call, number))?) {
            // Skips `Drop`, which would close the entry again. `close` releases everything that an entry owns.
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
