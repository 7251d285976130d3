//! Waiting on the host, for as little as will do.
//!
//! Streams are waited for one after the other, and the search starts anew after each: first the stream with
//! the least memory that suffices, else the one with most. A stream is waited for twice at most, because a
//! block that came back from other streams may have work of its own stream behind it that the first wait did
//! not cover. Streams that failed keep their memory pending, and so do those that are part of a capture,
//! which waiting would end.
//!
//! All waits happen without the pool's lock.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::cache::Close;
use super::fences::{Fence, is_free_to_wait};
use super::pool::Shared;
use super::state::{Found, State, Wanted};
use super::territory::Owner;
use crate::driver::Stream;

/// Waits for one stream in the ladder.
const WAITS_MAX: u32 = 2;
/// Pauses between two looks at an event while there is a deadline.
const PAUSE_MIN: Duration = Duration::from_micros(20);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// Waits for streams until `search` finds a block, nothing is left to wait for, or the deadline has passed.
pub(super) fn wait_for_room(
    shared: &Shared,
    state: &mut MutexGuard<'_, State>,
    wanted: Wanted<'_>,
    mut search: impl FnMut(&mut State) -> Option<Found>,
) -> Option<Found> {
    let patience = shared.config.wait_deadline;
    let deadline = patience.and_then(|patience| Instant::now().checked_add(patience));
    if shared.config.deterministic {
        // What is left to wait for depends on the device's pace; everything does not.
        wait_for_streams(shared, state);
        return search(state);
    }
    let mut waits: BTreeMap<Owner, u32> = BTreeMap::new();
    loop {
        let mut behind = state.bytes_behind(wanted);
        behind.retain(|owner, _| waits.get(owner).is_none_or(|count| *count < WAITS_MAX));
        let owner = cheapest(&behind, state.missing(wanted))?;
        *waits.entry(owner).or_default() += 1;
        if !wait_for(shared, state, owner, deadline) {
            continue;
        }
        // What others freed meanwhile may lie in their caches.
        shared.empty_caches(state, Close::No);
        if let Some(found) = search(state) {
            return Some(found);
        }
    }
}

/// The stream with the least bytes that are at least `missing`, else that with most.
fn cheapest(behind: &BTreeMap<Owner, u64>, missing: u64) -> Option<Owner> {
    let enough = behind.iter().filter(|(_, bytes)| **bytes >= missing);
    let least = enough.min_by_key(|(_, bytes)| **bytes);
    let most = || behind.iter().max_by_key(|(_, bytes)| **bytes);
    least.or_else(most).map(|(owner, _)| *owner)
}

/// Waits for what was freed for `owner` so far; whether that has been passed.
fn wait_for(
    shared: &Shared,
    state: &mut MutexGuard<'_, State>,
    owner: Owner,
    deadline: Option<Instant>,
) -> bool {
    let Some((fence, stream)) = state.fences.close_epoch(owner) else {
        return false;
    };
    let has_passed = MutexGuard::unlocked(state, || match deadline {
        None => is_free_to_wait(&stream) && stream.synchronize().is_ok(),
        Some(deadline) => is_free_to_wait(&stream) && has_passed_by(deadline, &stream),
    });
    shared.take_in_freed(state);
    if has_passed {
        state.take_in_passed(&[fence]);
    }
    has_passed
}

/// Whether `stream` passes its present end by `deadline`. Drivers wait for ever or not at all, so this looks
/// again and again.
fn has_passed_by(deadline: Instant, stream: &Stream) -> bool {
    let Ok(end) = stream.record() else {
        return false;
    };
    let mut pause = PAUSE_MIN;
    loop {
        match end.is_complete() {
            Ok(true) => return true,
            Ok(false) => {}
            Err(_) => return false,
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        thread::sleep(pause.min(left));
        pause = (2 * pause).min(PAUSE_MAX);
    }
}

/// Waits until every stream has passed what was freed so far, and takes in what that makes free.
pub(super) fn wait_for_streams(shared: &Shared, state: &mut MutexGuard<'_, State>) {
    // Blocks that came back from other streams are free for their own streams only; a second wait covers
    // those too.
    shared.empty_caches(state, Close::No);
    for _ in 0..WAITS_MAX {
        let ends = state.fences.close_epochs();
        let passed: Vec<Fence> = MutexGuard::unlocked(state, || {
            let passed = ends
                .into_iter()
                .filter(|(_, stream)| is_free_to_wait(stream) && stream.synchronize().is_ok());
            passed.map(|(fence, _)| fence).collect()
        });
        shared.take_in_freed(state);
        if !state.take_in_passed(&passed) {
            break;
        }
    }
    state.settle();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_that_suffices_is_waited_for_and_else_the_most() {
        let behind = BTreeMap::from([(1, 50), (2, 20), (3, 30)]);
        assert_eq!(cheapest(&behind, 25), Some(3));
        assert_eq!(cheapest(&behind, 1), Some(2));
        assert_eq!(cheapest(&behind, 51), Some(1));
        assert_eq!(cheapest(&BTreeMap::new(), 1), None);
    }
}
