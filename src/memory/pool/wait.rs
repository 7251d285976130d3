//! Waiting on the host, for as little as possible.
//!
//! Streams are waited for one after the other, and the search starts again after each: first the stream with the least
//! memory that suffices, otherwise the one with the most. A stream is waited for at most twice, because a block that
//! was returned from other streams may have work of its own stream behind it that the first wait did not cover; and
//! again whenever blocks were returned since. The memory of streams that failed stays deferred, and so does that of
//! streams in a capture, which a wait would end.
//!
//! All waits happen without the pool's lock. If another thread breaks the pool meanwhile, the wait ends in
//! [`Error::BrokenPool`](crate::Error::BrokenPool).

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::core::Core;
use super::lock::CoreGuard;
use super::shared::Shared;
use super::threads::Close;
use crate::driver::Stream;
use crate::error;
use crate::memory::config::PoolConfig;
use crate::memory::streams::is_free_to_wait;
use crate::memory::types::{Fence, Placement, Refusal, Request, StreamIndex};

/// Waits for one stream in the ladder, between two at which blocks come back.
pub(super) const WAITS_MAX: u32 = 2;
/// How often blocks that come back make all streams worth another wait, where other threads free and allocate
/// without end meanwhile.
const RETURNS_MAX: u32 = 64;
/// Pauses between two looks at an event while there is a deadline.
const PAUSE_MIN: Duration = Duration::from_micros(20);
const PAUSE_MAX: Duration = Duration::from_millis(1);

/// How long one allocation may wait, and whether it did.
#[derive(Debug)]
pub(crate) struct Patience {
    deadline: Option<Instant>,
    has_waited: bool,
}

impl Patience {
    /// That of an allocation which begins to wait now.
    pub(crate) fn new(config: &PoolConfig) -> Self {
        let patience = config.wait_deadline;
        Self {
            deadline: patience.and_then(|patience| Instant::now().checked_add(patience)),
            has_waited: false,
        }
    }

    pub(super) fn has_waited(&self) -> bool {
        self.has_waited
    }

    /// Waits for the present end of `stream`; whether it has been passed.
    fn wait(&mut self, stream: &Stream) -> bool {
        if !is_free_to_wait(stream) {
            return false;
        }
        match self.deadline {
            Some(deadline) => self.wait_until(deadline, stream),
            None => {
                self.has_waited = true;
                stream.synchronize().is_ok()
            }
        }
    }

    /// Drivers wait for ever or not at all, so this looks again and again.
    fn wait_until(&mut self, deadline: Instant, stream: &Stream) -> bool {
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
            self.has_waited = true;
            thread::sleep(pause.min(left));
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }
}

/// Waits for streams until `search` finds a block, nothing is left to wait for, or patience is at its end.
pub(super) fn wait_for_room(
    shared: &Shared,
    core: &mut CoreGuard<'_>,
    request: Request<'_>,
    patience: &mut Patience,
    search: impl Fn(&mut Core, Request<'_>) -> Result<Placement, Refusal>,
) -> error::Result<Option<Placement>> {
    let mut wait: BTreeMap<StreamIndex, u32> = BTreeMap::new();
    let mut returns = 0;
    loop {
        let returned = core.returned;
        let mut behind = core.bytes_behind(request);
        behind.retain(|owner, _| wait.get(owner).is_none_or(|count| *count < WAITS_MAX));
        let Some(owner) = cheapest(&behind, core.missing(request)) else {
            return Ok(None);
        };
        *wait.entry(owner).or_default() += 1;
        if !wait_for(shared, core, owner, patience)? {
            continue;
        }
        // What others freed meanwhile may lie in their caches.
        shared.empty_caches(core, Close::No);
        if let Ok(found) = search(core, request) {
            return Ok(Some(found));
        }
        if core.returned != returned && returns < RETURNS_MAX {
            returns += 1;
            wait.clear();
        }
    }
}

/// The stream with the least bytes that are at least `missing`, else that with most.
fn cheapest(behind: &BTreeMap<StreamIndex, u64>, missing: u64) -> Option<StreamIndex> {
    let enough = behind.iter().filter(|(_, bytes)| **bytes >= missing);
    let least = enough.min_by_key(|(_, bytes)| **bytes);
    let most = || behind.iter().max_by_key(|(_, bytes)| **bytes);
    least.or_else(most).map(|(owner, _)| *owner)
}

/// Waits for what was freed for `owner` so far; whether that has been passed.
fn wait_for(
    shared: &Shared,
    core: &mut CoreGuard<'_>,
    owner: StreamIndex,
    patience: &mut Patience,
) -> error::Result<bool> {
    let Some((fence, stream)) = core.fences.close_epoch(owner) else {
        return Ok(false);
    };
    let has_passed = core.unlocked(|| patience.wait(&stream))?;
    // A stream is let go of only when nobody else holds it.
    drop(stream);
    shared.take_in_queued(core);
    if has_passed {
        core.take_in_passed(&[fence]);
    }
    Ok(has_passed)
}

/// Waits for every stream that idle or pending memory is behind, the requester's own included, unless there
/// is a deadline.
pub(super) fn wait_for_idle(
    shared: &Shared,
    core: &mut CoreGuard<'_>,
    patience: &mut Patience,
) -> error::Result<()> {
    if patience.deadline.is_none() {
        patience.has_waited |= wait_for_ends(shared, core, Core::ends_behind)?;
    }
    Ok(())
}

/// Waits until every stream has passed what was freed so far, and takes in what that makes free.
pub(crate) fn wait_for_streams(shared: &Shared, core: &mut CoreGuard<'_>) -> error::Result<()> {
    wait_for_ends(shared, core, |core| core.fences.close_epochs()).map(drop)
}

/// Waits for `ends`; whether there were any.
fn wait_for_ends(
    shared: &Shared,
    core: &mut CoreGuard<'_>,
    ends: impl Fn(&mut Core) -> Vec<(Fence, Stream)>,
) -> error::Result<bool> {
    // Blocks that came back from other streams are free for their own streams only; a second wait covers
    // those too.
    shared.empty_caches(core, Close::No);
    let mut has_waited = false;
    for _ in 0..WAITS_MAX {
        let ends = ends(core);
        has_waited |= !ends.is_empty();
        let passed = core.unlocked(|| reached(ends))?;
        shared.take_in_queued(core);
        if !core.take_in_passed(&passed) {
            break;
        }
    }
    core.merge_complete();
    Ok(has_waited)
}

/// Waits on the host for ends of streams; gives those that were reached.
pub(crate) fn reached(ends: Vec<(Fence, Stream)>) -> Vec<Fence> {
    let reached = ends
        .into_iter()
        .filter(|(_, stream)| is_free_to_wait(stream) && stream.synchronize().is_ok());
    reached.map(|(fence, _)| fence).collect()
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
