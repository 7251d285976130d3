//! The ladder an allocation climbs: each rung finds memory in a dearer way, and the search starts anew.
//!
//! ```text
//! what is free for the stream       the pool's lock, no driver call
//! other streams' memory, new pages  events, waits on the device, driver allocations; before those, what private
//!                                   pools left when they went
//! the threads' caches               emptied into the pool
//! the program's callbacks           without the lock
//! returning idle memory             where only that makes it another's
//! waiting on the host               stream by stream, while that can help
//! everything once more              in one go, under the lock: nothing fails beside a block that fits
//! ```
//!
//! A request that the device or the limit could never hold is refused before anyone is asked or waited for.
//! In a capture nothing may wait, be unmapped or be called back: its private memory has the first two rungs.

use std::time::Instant;

use super::backing::Refusal;
use super::cache::Close;
use super::hooks;
use super::lock::StateGuard;
use super::memories::MemoryIndex;
use super::pool::Shared;
use super::report::report;
use super::state::State;
use super::waits::{self, Patience};
use super::wanted::{Found, Wanted};
use crate::driver::Stream;
use crate::error::{Error, OutOfMemory, Result};

/// Does what is due before memory is looked for: lets go of streams that are gone when a new one comes, and
/// returns what was idle for long.
// Always: for the stream that was served last it is two comparisons.
#[inline(always)]
pub(super) fn prepare(shared: &Shared, state: &mut State, stream: &Stream) {
    if !state.fences.served_last(stream) || state.decay.is_on() {
        prepare_further(shared, state, stream);
    }
}

#[inline(never)]
fn prepare_further(shared: &Shared, state: &mut State, stream: &Stream) {
    if !state.fences.knows(stream) && !shared.routes.is_capturing() {
        shared.fold_before_returns(state);
        state.let_go();
    }
    if state.decay.is_on() && state.decay.is_due(Instant::now()) && !shared.routes.is_capturing() {
        decay(shared, state);
    }
}

/// Finds memory by all means, where none lies ready. A failure is told to the program's observers.
pub(super) fn allocate(
    shared: &Shared,
    state: StateGuard<'_>,
    wanted: Wanted<'_>,
) -> Result<Found> {
    let is_private = wanted.memory != MemoryIndex::ORDINARY;
    let wanted = Wanted {
        is_captured: is_private && shared.routes.is_capturing(),
        ..wanted
    };
    climb(shared, state, wanted).map_err(|failure| match failure {
        Failure::Short(report) => {
            if !wanted.is_captured {
                shared.hooks.tell_failure(&report);
            }
            report.into()
        }
        Failure::Broken(error) => error,
    })
}

/// Why the ladder ended without memory.
enum Failure {
    /// There is none.
    Short(Box<OutOfMemory>),
    /// Another thread broke the pool while this one had unlocked it.
    Broken(Error),
}

impl From<Box<OutOfMemory>> for Failure {
    fn from(report: Box<OutOfMemory>) -> Self {
        Self::Short(report)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

fn climb(shared: &Shared, mut state: StateGuard<'_>, wanted: Wanted<'_>) -> Result<Found, Failure> {
    shared.fold_among_threads(&mut state);
    shared.fold_before_returns(&mut state);
    if wanted.memory != MemoryIndex::ORDINARY {
        prepare(shared, &mut state, wanted.stream);
    }
    if let Some(refusal) = state.never_holds(wanted.bytes) {
        return Err(fail(shared, &mut state, wanted, refusal, Vec::new()).into());
    }
    if wanted.memory == MemoryIndex::ORDINARY {
        state.poll_pending();
    }
    if state.memories.has_released() && !shared.routes.is_capturing() {
        state.collect();
    }
    let allocations = state.device_allocs();
    match state.find(wanted) {
        Ok(found) => {
            state.counters.misses += u64::from(state.device_allocs() != allocations);
            Ok(found)
        }
        Err(refusal) if wanted.is_captured => {
            let tried = vec!["the private pool's blocks", "the driver"];
            Err(fail(shared, &mut state, wanted, refusal, tried).into())
        }
        Err(_) => {
            let host_waits = state.fences.host_waits();
            let mut has_waited = false;
            let outcome = climb_when_short(shared, &mut state, wanted, &mut has_waited);
            has_waited |= state.fences.host_waits() != host_waits;
            state.counters.syncs += u64::from(has_waited);
            state.counters.misses += u64::from(outcome.is_ok());
            outcome
        }
    }
}

/// The rungs above: neither the cache nor the driver had room at once.
fn climb_when_short(
    shared: &Shared,
    state: &mut StateGuard<'_>,
    wanted: Wanted<'_>,
    has_waited: &mut bool,
) -> Result<Found, Failure> {
    if state.memories.has_released() {
        state.settle();
        if let Ok(found) = state.find(wanted) {
            return Ok(found);
        }
    }
    state.counters.alloc_retries += 1;
    let mut tried = vec!["cached blocks", "other streams' blocks", "the driver"];
    shared.empty_caches(state, Close::No);
    let mut refusal = match search(state, wanted) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    let callbacks = shared.hooks.on_shortage();
    if !callbacks.is_empty() {
        tried.push("the program's callbacks");
    }
    for callback in callbacks {
        state.unlocked(|| hooks::call(|| callback(wanted.bytes)))?;
        // What was freed may lie in this thread's cache.
        shared.empty_caches(state, Close::No);
        match search(state, wanted) {
            Ok(found) => return Ok(found),
            Err(again) => refusal = again,
        }
    }
    tried.extend(["waiting for streams", "returning idle memory"]);
    let mut patience = Patience::new(&shared.config);
    let mut found = waits::wait_for_room(shared, state, wanted, &mut patience, search)?;
    // The driver may lack something else than memory (addresses, mappings), which only idle memory that is
    // known to be complete can give back.
    if found.is_none() && matches!(refusal, Refusal::Driver(_)) {
        waits::wait_for_idle(shared, state, &mut patience)?;
    }
    *has_waited = patience.has_waited();
    found = found.or_else(|| {
        shared.empty_caches(state, Close::No);
        search(state, wanted).ok()
    });
    if let Some(found) = found {
        return Ok(found);
    }
    // What the driver does not take back stays in the pool.
    drop(state.release_idle(0));
    state
        .find(wanted)
        .map_err(|refusal| fail(shared, state, wanted, refusal, tried).into())
}

/// Looks everywhere without waiting on the host, and returns idle memory where that may help.
fn search(state: &mut State, wanted: Wanted<'_>) -> Result<Found, Refusal> {
    state.poll_pending();
    state.settle();
    let refusal = match state.find(wanted) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    if !state.returning_helps(wanted.memory) {
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
    refusal: Refusal,
    tried: Vec<&'static str>,
) -> Box<OutOfMemory> {
    state.counters.ooms += 1;
    Box::new(report(shared, state, wanted, refusal, tried))
}

/// Returns what was idle for a whole period, as far as it is known to be complete; the period ends.
pub(super) fn decay(shared: &Shared, state: &mut State) {
    shared.empty_caches(state, Close::No);
    state.let_go();
    let keep = state.decay.end_period(Instant::now());
    // What the driver does not take back now is offered again after the next period.
    drop(state.release_idle(keep));
}

/// Returns idle memory until the pool holds at most `target` bytes or has nothing left to return; waits on
/// the host where it must.
pub(super) fn trim(shared: &Shared, state: &mut StateGuard<'_>, target: u64) -> Result<()> {
    if state.bytes_held() <= target {
        return Ok(());
    }
    shared.empty_caches(state, Close::No);
    // Tried again after the wait, whose outcome counts.
    let _ = state.release_idle(target);
    if state.bytes_held() <= target {
        return Ok(());
    }
    waits::wait_for_streams(shared, state)?;
    state.release_idle(target)
}

/// Returns what a pool held whose last handle and last block are gone, as far as its streams can be waited for.
pub(super) fn close(state: &mut State) {
    for _ in 0..waits::WAITS_MAX {
        let passed = waits::reached(state.fences.close_epochs());
        if !state.take_in_passed(&passed) {
            break;
        }
    }
    state.settle();
    // What the driver refuses stays, and the caller sees it.
    drop(state.release_idle(0));
}
