//! The ladder an allocation climbs: each rung finds memory in a dearer way, and the search starts anew.

use super::block::BlockRecord;
use super::cache::{self, Close};
use super::config::ReusePolicy;
use super::fences::{Fence, is_free_to_wait};
use super::pool::{Shared, rounded};
use super::state::{Counted, Found, State, Wanted};
use crate::driver::Stream;
use crate::error::Result;
use crate::sync::MutexGuard;

/// Finds memory for `requested` bytes (not 0) on `stream`, after taking back the block `hot`, whose record
/// is left there.
pub(super) fn allocate(
    shared: &Shared,
    requested: u64,
    stream: &Stream,
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
            .report(&mut state, requested, stream, None, Vec::new())
            .into());
    };
    let wanted = Wanted {
        requested,
        bytes,
        stream,
    };
    if let Some(found) = state.place(wanted) {
        state.counters.cache_hits += 1;
        return Ok(found);
    }
    let reuse = shared.config.reuse;
    // Blocks recorded on other streams come back to their own stream under any policy; what the policy
    // decides is whether to wait for them on the device.
    state.poll_pending(if reuse == ReusePolicy::Wait {
        reuse
    } else {
        ReusePolicy::OnlyComplete
    });
    let allocations = state.device_allocs();
    if let Ok(found) = state.find(wanted) {
        state.counters.cache_hits += u64::from(state.device_allocs() == allocations);
        return Ok(found);
    }
    allocate_when_short(shared, state, wanted)
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
            state.counters.ooms += 1;
            let tried = vec![
                "cached blocks",
                "other streams' blocks",
                "the driver",
                "waiting for streams",
                "returning idle memory",
            ];
            let Wanted {
                requested, stream, ..
            } = wanted;
            Err(shared
                .report(&mut state, requested, stream, Some(refusal), tried)
                .into())
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
