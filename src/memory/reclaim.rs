//! The ladder an allocation climbs: each rung finds memory in a dearer way, and the search starts anew.

use super::backing::Refusal;
use super::block::BlockRecord;
use super::cache::{self, Close};
use super::config::ReusePolicy;
use super::fences::{Fence, is_free_to_wait};
use super::memories::MemoryIndex;
use super::pool::{Shared, rounded};
use super::state::{Counted, Found, State, Wanted};
use crate::driver::Stream;
use crate::error::{Error, Result};
use crate::sync::MutexGuard;

/// Finds memory for `requested` bytes (not 0) on `stream` in `memory`, after taking back the block `hot`,
/// whose record is left there.
pub(super) fn allocate(
    shared: &Shared,
    requested: u64,
    (memory, stream): (MemoryIndex, &Stream),
    hot: &mut Option<Box<BlockRecord>>,
) -> Result<Found> {
    let mut state = shared.lock();
    cache::fold_of_thread(shared.id(), &mut state);
    if let Some(record) = hot.take() {
        *hot = state.free(record, Counted::Yes);
    }
    let Some(bytes) = rounded(requested) else {
        state.counters.ooms += 1;
        return Err(shared
            .report(&mut state, requested, (memory, stream), None, Vec::new())
            .into());
    };
    let wanted = Wanted {
        requested,
        bytes,
        stream,
        memory,
    };
    if let Some(found) = state.place(wanted) {
        state.counters.cache_hits += 1;
        return Ok(found);
    }
    let is_private = memory != MemoryIndex::ORDINARY;
    if !is_private {
        poll_pending(shared, &mut state);
    }
    let allocations = state.device_allocs();
    match state.find(wanted) {
        Ok(found) => {
            state.counters.cache_hits += u64::from(state.device_allocs() == allocations);
            Ok(found)
        }
        // In a capture nothing may wait or be unmapped: there are no more rungs.
        Err(refusal) if is_private && shared.routes.is_capturing() => {
            let tried = vec!["the private pool's blocks", "the driver"];
            Err(fail(shared, &mut state, wanted, refusal, tried))
        }
        Err(_) => allocate_when_short(shared, state, wanted),
    }
}

/// Takes in what other streams are done with, as far as the policy lets it find out or bring it about.
fn poll_pending(shared: &Shared, state: &mut State) {
    let reuse = shared.config.reuse;
    // Blocks recorded on other streams come back to their own stream under any policy; what the policy
    // decides is whether to wait for them on the device.
    state.poll_pending(if reuse == ReusePolicy::Wait {
        reuse
    } else {
        ReusePolicy::OnlyComplete
    });
}

/// The report of an allocation for which no rung found memory.
fn fail(
    shared: &Shared,
    state: &mut State,
    wanted: Wanted<'_>,
    refusal: Refusal,
    tried: Vec<&'static str>,
) -> Error {
    state.counters.ooms += 1;
    let Wanted {
        requested,
        stream,
        memory,
        ..
    } = wanted;
    shared
        .report(state, requested, (memory, stream), Some(refusal), tried)
        .into()
}

/// The rungs that wait on the host: neither the cache nor the driver had room at once.
fn allocate_when_short(
    shared: &Shared,
    mut state: MutexGuard<'_, State>,
    wanted: Wanted<'_>,
) -> Result<Found> {
    state.counters.alloc_retries += 1;
    state.counters.syncs += 1;
    wait_for_streams(shared, &mut state);
    if let Ok(found) = state.find(wanted) {
        return Ok(found);
    }
    // What the driver does not take back stays in the pool; the next rung decides whether it fits.
    drop(state.release_idle());
    match state.find(wanted) {
        Ok(found) => Ok(found),
        Err(refusal) => {
            let tried = vec![
                "cached blocks",
                "other streams' blocks",
                "the driver",
                "waiting for streams",
                "returning idle memory",
            ];
            Err(fail(shared, &mut state, wanted, refusal, tried))
        }
    }
}

/// Waits on the host, without the lock, until every stream has passed what was freed so far, and takes in
/// what that makes free. A stream that failed keeps its memory pending, and so does one that is part of a
/// capture, which waiting would end.
pub(super) fn wait_for_streams(shared: &Shared, state: &mut MutexGuard<'_, State>) {
    // Blocks that came back from other streams are free for their own streams only; a second wait covers
    // those too.
    shared.empty_caches(state, Close::No);
    for _ in 0..2 {
        let ends = state.fences.close_epochs();
        let passed = MutexGuard::unlocked(state, || wait_for(ends));
        shared.take_in_freed(state);
        if !state.take_in_passed(&passed) {
            break;
        }
    }
    state.settle();
}

/// Waits on the host for ends of streams; gives those that were reached.
fn wait_for(ends: Vec<(Fence, Stream)>) -> Vec<Fence> {
    let reached = ends
        .into_iter()
        .filter(|(_, stream)| is_free_to_wait(stream) && stream.synchronize().is_ok());
    reached.map(|(fence, _)| fence).collect()
}

/// Returns what a pool held whose last handle and last block are gone, as far as its streams can be waited for.
pub(super) fn close(state: &mut State) {
    for _ in 0..2 {
        let passed = wait_for(state.fences.close_epochs());
        if !state.take_in_passed(&passed) {
            break;
        }
    }
    state.settle();
    // What the driver refuses stays, and the caller sees it.
    drop(state.release_idle());
}
