//! The path of a free, from the caller's drop down to the heap.
//!
//! ```text
//! whoever watches the block    called before the memory can be handed out again
//! the thread's cache           without a lock
//! the pool                     if its lock is free
//! the pool's queue             otherwise: the next thread that has the lock takes the block back
//! ```

use super::block::{Block, Watcher};
use super::poison;
use super::shared::{BlockRecord, Record};
use super::threads;
use crate::memory::types::{CacheKey, Counted, Place};

impl Drop for Block {
    #[inline]
    #[expect(unsafe_code, reason = "the block gives up its record")]
    fn drop(&mut self) {
        // SAFETY: the block is gone after this.
        let record = unsafe { self.take_record() };
        if let Some(record) = record {
            #[cfg(asan)]
            forbid_freed(&record);
            free(record);
        }
    }
}

/// Takes a block back without ever blocking on another thread's allocation: the calling thread's stream cache keeps
/// it, or the pool takes it in, or, while another thread has the pool's lock, finds it in its queue.
#[inline]
fn free(record: Record) {
    if let Some(record) = threads::keep(record) {
        free_anywhere(record);
    }
}

/// Takes a block back that others are to be told of, or that other streams used.
#[inline(never)]
fn free_with_extras(record: Record) {
    // Before the memory can be handed out again: nobody is told of two live blocks at one address.
    let record = tell_freed(record);
    // A stream cache may keep it now.
    if record.is_plain() {
        return free(record);
    }
    let extras = record.extras.as_ref();
    if extras.is_some_and(|extras| extras.users.is_empty()) {
        poison_private(&record);
    }
    drop(free_in_pool(record, Counted::No));
}

/// Takes a block back that the stream cache in front is not for.
#[inline(never)]
fn free_anywhere(mut record: Record) {
    if !record.is_plain() {
        return free_with_extras(record);
    }
    // What is lent goes back to its lender, who waits for the borrower.
    if matches!(record.location.place(), Place::Lent { .. }) {
        return drop(free_in_pool(record, Counted::No));
    }
    let shared = record.shared();
    let key = CacheKey::new(shared.id, record.home.id());
    if shared.config.poison {
        poison::in_default_heap(&record, record.heap());
    } else {
        record.key = key;
    }
    if let Some(record) = threads::keep_anywhere(key, record) {
        drop(free_in_pool(record, Counted::No));
    }
}

/// Takes a block back into the pool itself. What is left of it is its record, to be reused.
#[must_use]
fn free_in_pool(mut record: Record, counted: Counted) -> Option<Record> {
    // Inside the pool a block must not keep the pool alive.
    let shared = record
        .shared
        .take()
        .expect("a block outside the pool knows its pool");
    // A thread without a cache would have to fold the counters of all others.
    threads::make_current(&shared);
    let Some((mut core, fuse)) = shared.try_lock_with_fuse() else {
        shared.leave(record, counted);
        shared.take_in_if_free();
        return None;
    };
    if counted == Counted::No || shared.caches.is_separate() {
        threads::fold_of_thread(&shared, &mut core);
    }
    let record = core.free(record, counted);
    fuse.defuse();
    drop(core);
    let mut record = record?;
    record.shared = Some(shared);
    Some(record)
}

/// Tells the watchers of a block, if it has any, that it is freed.
fn tell_freed(mut record: Record) -> Record {
    let Some(extras) = record.extras.as_mut() else {
        return record;
    };
    if extras.watchers.is_empty() {
        return record;
    }
    let watchers = std::mem::take(&mut extras.watchers);
    let block = Block::new(Some(record));
    for Watcher { watch, key } in watchers.iter().rev() {
        watch.freed(*key, &block);
    }
    block.into_record().expect("the block was made above")
}

/// Poisons a private block if that becomes part of the graph that is being captured with its memory: any
/// later, it could hit what a graph is using. Only the stream that the capture was begun on can take work at
/// any time in it; another may have been joined for the last time.
fn poison_private(record: &BlockRecord) {
    let Some(shared) = &record.shared else {
        return;
    };
    if shared.config.poison && shared.routing.captured_from(&record.home) == Some(record.heap()) {
        poison::overwrite(record);
    }
}

/// Forbids a block that its caller has just freed. In poison mode that happens behind the overwriting; where other
/// streams used the block, when they are done with it.
#[cfg(asan)]
fn forbid_freed(record: &BlockRecord) {
    let has_users = record
        .extras
        .as_ref()
        .is_some_and(|extras| !extras.users.is_empty());
    let is_overwritten = record.shared().config.poison;
    if !has_users && !is_overwritten {
        poison::forbid(record, record.heap());
    }
}
