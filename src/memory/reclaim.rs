//! The ladder an allocation climbs: each rung finds memory in a dearer way, and the search starts anew.
//!
//! ```text
//! what is free for the stream       the pool's lock, no driver call
//! other streams' memory, new pages  events, waits on the device, driver allocations
//! the threads' caches               emptied into the pool
//! the program's callbacks           without the lock
//! returning idle memory             where only that makes it another stream's
//! waiting on the host               stream by stream, while that can help
//! everything once more              in one go, under the lock: nothing fails beside a block that fits
//! ```
//!
//! A request that the device or the limit could never hold is refused before anyone is asked or waited for.

use std::time::Instant;

use parking_lot::MutexGuard;

use super::backing::Refusal;
use super::block::BlockRecord;
use super::cache::{self, Close};
use super::hooks;
use super::pool::{Shared, rounded};
use super::report::report;
use super::state::{Counted, Found, State, Wanted};
use super::waits::{wait_for_room, wait_for_streams};
use crate::driver::Stream;
use crate::error::{OutOfMemory, Result};

/// Finds memory for `requested` bytes (not 0) on `stream`, after taking back the block `hot`, whose record
/// is left there. A failure is told to the program's observers.
pub(super) fn allocate(
    shared: &Shared,
    requested: u64,
    stream: &Stream,
    hot: &mut Option<Box<BlockRecord>>,
) -> Result<Found> {
    climb(shared, requested, stream, hot).map_err(|report| {
        shared.hooks.tell_failure(&report);
        report.into()
    })
}

fn climb(
    shared: &Shared,
    requested: u64,
    stream: &Stream,
    hot: &mut Option<Box<BlockRecord>>,
) -> Result<Found, Box<OutOfMemory>> {
    let mut state = shared.lock();
    cache::fold_of_thread(shared.id(), &mut state);
    if let Some(record) = hot.take() {
        *hot = state.free(record, Counted::Yes);
    }
    let bytes = rounded(requested).unwrap_or(u64::MAX);
    let wanted = Wanted {
        requested,
        bytes,
        stream,
    };
    if state.decay.is_on() && state.decay.is_due(Instant::now()) {
        decay(shared, &mut state);
    }
    if let Some(found) = state.place(wanted) {
        state.counters.cache_hits += 1;
        return Ok(found);
    }
    if let Some(refusal) = state.never_holds(bytes) {
        return Err(fail(shared, &mut state, wanted, Some(refusal), Vec::new()));
    }
    state.poll_pending();
    let allocations = state.device_allocs();
    if let Ok(found) = state.find(wanted) {
        state.counters.cache_hits += u64::from(state.device_allocs() == allocations);
        return Ok(found);
    }
    climb_when_short(shared, state, wanted)
}

/// The rungs above: neither the cache nor the driver had room at once.
fn climb_when_short(
    shared: &Shared,
    mut state: MutexGuard<'_, State>,
    wanted: Wanted<'_>,
) -> Result<Found, Box<OutOfMemory>> {
    state.counters.alloc_retries += 1;
    let mut tried = vec!["cached blocks", "other streams' blocks", "the driver"];
    shared.empty_caches(&mut state, Close::No);
    let mut refusal = match search(&mut state, wanted) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    for callback in shared.hooks.on_shortage() {
        if tried.len() == 3 {
            tried.push("the program's callbacks");
        }
        MutexGuard::unlocked(&mut state, || hooks::call(|| callback(wanted.bytes)));
        // What was freed may lie in this thread's cache.
        shared.empty_caches(&mut state, Close::No);
        match search(&mut state, wanted) {
            Ok(found) => return Ok(found),
            Err(again) => refusal = again,
        }
    }
    tried.extend(["waiting for streams", "returning idle memory"]);
    state.counters.syncs += 1;
    let found = wait_for_room(shared, &mut state, wanted, |state| {
        search(state, wanted).ok()
    });
    if let Some(found) = found {
        return Ok(found);
    }
    // The driver may lack something else than memory (addresses, mappings), which only idle memory that is
    // known to be complete can give back.
    if matches!(refusal, Refusal::Driver(_)) && shared.config.wait_deadline.is_none() {
        wait_for_streams(shared, &mut state);
    }
    shared.empty_caches(&mut state, Close::No);
    if let Ok(found) = search(&mut state, wanted) {
        return Ok(found);
    }
    // What the driver does not take back stays in the pool.
    drop(state.release_idle(0));
    state
        .find(wanted)
        .map_err(|refusal| fail(shared, &mut state, wanted, Some(refusal), tried))
}

/// Looks everywhere without waiting on the host, and returns idle memory where that may help.
fn search(state: &mut State, wanted: Wanted<'_>) -> Result<Found, Refusal> {
    state.poll_pending();
    state.settle();
    let refusal = match state.find(wanted) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    if !state.returning_helps() {
        return Err(refusal);
    }
    // What the driver does not take back stays in the pool.
    drop(state.release_idle(0));
    state.find(wanted)
}

fn fail(
    shared: &Shared,
    state: &mut State,
    wanted: Wanted<'_>,
    refusal: Option<Refusal>,
    tried: Vec<&'static str>,
) -> Box<OutOfMemory> {
    state.counters.ooms += 1;
    Box::new(report(shared, state, wanted, refusal, tried))
}

/// Returns what was idle for a whole period, as far as it is known to be complete; the period ends.
pub(super) fn decay(shared: &Shared, state: &mut State) {
    shared.empty_caches(state, Close::No);
    state.poll_pending();
    let keep = state.decay.end_period(Instant::now());
    // What the driver does not take back now is offered again after the next period.
    drop(state.release_idle(keep));
}

/// Returns idle memory until the pool holds at most `target` bytes or has nothing left to return; waits on
/// the host where it must.
pub(super) fn trim(shared: &Shared, state: &mut MutexGuard<'_, State>, target: u64) -> Result<()> {
    if state.bytes_held() <= target {
        return Ok(());
    }
    shared.empty_caches(state, Close::No);
    // Tried again after the wait, whose outcome counts.
    let _ = state.release_idle(target);
    if state.bytes_held() <= target {
        return Ok(());
    }
    wait_for_streams(shared, state);
    state.release_idle(target)
}
