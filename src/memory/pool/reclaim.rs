//! The steps that find memory when none lies ready, each dearer than the one before. The search starts again after
//! each.
//!
//! ```text
//! other streams' memory, new pages  events, waits on the device, driver allocations; before those, what private pools left
//! the threads' caches               emptied into the pool
//! the program's callbacks           without the lock
//! returning idle memory             where another heap needs it
//! waiting on the host               stream by stream, while that can help
//! everything once more              in one go, under the lock: nothing fails beside a block that fits
//! ```
//!
//! A request that the device or the limit could never hold is refused before anybody is called or waited for. Nothing
//! may wait, be unmapped or be called back in a capture, so its private heap has the first step only.

use std::thread;
use std::time::Instant;

use super::core::Core;
use super::hooks;
use super::lock::CoreGuard;
use super::report::report;
use super::shared::{Handle, Shared};
use super::threads::Close;
use super::wait::{self as wait, Patience};
use crate::driver::Stream;
use crate::error::{Error, OutOfMemory, Result};
use crate::memory::thread_locals;
use crate::memory::types::{HeapId, Placement, Refusal, Request};

/// Does what is due before memory is looked for: lets go of streams that are gone when a new one comes, and
/// returns what was idle for long.
// Always: for the stream that was served last it is two comparisons.
#[inline(always)]
pub(super) fn prepare(shared: &Shared, core: &mut Core, stream: &Stream) {
    if !core.fences.served_last(stream) || core.decay.is_on() {
        prepare_further(shared, core, stream);
    }
}

#[inline(never)]
fn prepare_further(shared: &Shared, core: &mut Core, stream: &Stream) {
    if !core.fences.knows(stream) && !shared.routing.is_capturing() {
        shared.fold_before_returns(core);
        core.retire_idle_streams();
    }
    if core.decay.is_on() && core.decay.is_due(Instant::now()) && !shared.routing.is_capturing() {
        decay(shared, core);
    }
}

/// Finds memory by all means, where none lies ready. A failure is told to the program's observers.
pub(crate) fn allocate(
    shared: &Shared,
    core: CoreGuard<'_>,
    request: Request<'_>,
) -> Result<Placement> {
    let is_private = request.heap != HeapId::DEFAULT;
    let request = Request {
        is_captured: is_private && shared.routing.is_capturing(),
        ..request
    };
    climb(shared, core, request).map_err(|failure| match failure {
        Failure::Short(report) => {
            if !request.is_captured {
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

fn climb(
    shared: &Shared,
    mut core: CoreGuard<'_>,
    request: Request<'_>,
) -> Result<Placement, Failure> {
    if shared.caches.is_separate() && shared.caches.is_emptying_due() {
        // Other threads have blocks that may serve.
        shared.empty_caches(&mut core, Close::No);
    }
    shared.fold_before_returns(&mut core);
    if request.heap != HeapId::DEFAULT {
        prepare(shared, &mut core, request.stream);
    }
    if let Some(refusal) = core.never_holds(request.bytes) {
        return Err(fail(shared, &mut core, request, refusal, Vec::new()).into());
    }
    if request.heap == HeapId::DEFAULT {
        core.poll_deferred();
    }
    if core.heaps.has_released() && !shared.routing.is_capturing() {
        core.collect();
    }
    let allocations = core.device_allocs();
    match core.find(request) {
        Ok(found) => {
            core.counters.misses += u64::from(core.device_allocs() != allocations);
            Ok(found)
        }
        Err(refusal) if request.is_captured => {
            let tried = vec!["the private pool's blocks", "the driver"];
            Err(fail(shared, &mut core, request, refusal, tried).into())
        }
        Err(_) => {
            let host_waits = core.fences.host_waits();
            let mut has_waited = false;
            let outcome = climb_when_short(shared, &mut core, request, &mut has_waited);
            has_waited |= core.fences.host_waits() != host_waits;
            core.counters.syncs += u64::from(has_waited);
            core.counters.misses += u64::from(outcome.is_ok());
            outcome
        }
    }
}

/// The rungs above: neither the cache nor the driver had room at once.
fn climb_when_short(
    shared: &Shared,
    core: &mut CoreGuard<'_>,
    request: Request<'_>,
    has_waited: &mut bool,
) -> Result<Placement, Failure> {
    if core.heaps.has_released() {
        core.merge_complete();
        if let Ok(found) = core.find(request) {
            return Ok(found);
        }
    }
    core.counters.alloc_retries += 1;
    let mut tried = vec!["cached blocks", "other streams' blocks", "the driver"];
    shared.empty_caches(core, Close::No);
    let mut refusal = match search(core, request) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    let callbacks = shared.hooks.on_shortage();
    if !callbacks.is_empty() {
        tried.push("the program's callbacks");
    }
    for callback in callbacks {
        core.unlocked(|| hooks::call(|| callback(request.bytes)))?;
        // What was freed may lie in this thread's cache.
        shared.empty_caches(core, Close::No);
        match search(core, request) {
            Ok(found) => return Ok(found),
            Err(again) => refusal = again,
        }
    }
    tried.extend(["waiting for streams", "returning idle memory"]);
    let mut patience = Patience::new(&shared.config);
    let mut found = wait::wait_for_room(shared, core, request, &mut patience, search)?;
    // The driver may lack something else than memory (addresses, mappings), which only idle memory that is
    // known to be complete can give back.
    if found.is_none() && matches!(refusal, Refusal::Driver(_)) {
        wait::wait_for_idle(shared, core, &mut patience)?;
    }
    *has_waited = patience.has_waited();
    found = found.or_else(|| {
        shared.empty_caches(core, Close::No);
        search(core, request).ok()
    });
    if let Some(found) = found {
        return Ok(found);
    }
    // What the driver does not take back stays in the pool.
    drop(core.release_idle(0));
    core.find(request)
        .map_err(|refusal| fail(shared, core, request, refusal, tried).into())
}

/// Looks everywhere without waiting on the host, and returns idle memory where that may help.
fn search(core: &mut Core, request: Request<'_>) -> Result<Placement, Refusal> {
    core.poll_deferred();
    core.merge_complete();
    let refusal = match core.find(request) {
        Ok(found) => return Ok(found),
        Err(refusal) => refusal,
    };
    if !core.returning_helps(request.heap) {
        return Err(refusal);
    }
    // What the driver does not take back stays in the pool.
    drop(core.release_idle(0));
    core.find(request)
}

fn fail(
    shared: &Shared,
    core: &mut Core,
    request: Request<'_>,
    refusal: Refusal,
    tried: Vec<&'static str>,
) -> Box<OutOfMemory> {
    core.counters.ooms += 1;
    Box::new(report(shared, core, request, refusal, tried))
}

/// Returns what was idle for a whole period, as far as it is known to be complete; the period ends.
pub(crate) fn decay(shared: &Shared, core: &mut Core) {
    shared.empty_caches(core, Close::No);
    core.retire_idle_streams();
    let keep = core.decay.end_period(Instant::now());
    // What the driver does not take back now is offered again after the next period.
    drop(core.release_idle(keep));
}

/// Returns idle memory until the pool holds at most `target` bytes or has nothing left to return; waits on
/// the host where it must.
pub(crate) fn trim(shared: &Shared, core: &mut CoreGuard<'_>, target: u64) -> Result<()> {
    if core.bytes_held() <= target {
        return Ok(());
    }
    shared.empty_caches(core, Close::No);
    // Tried again after the wait, whose outcome counts.
    let _ = core.release_idle(target);
    if core.bytes_held() <= target {
        return Ok(());
    }
    wait::wait_for_streams(shared, core)?;
    core.release_idle(target)
}

/// Returns what a pool held whose last handle and last block are gone, as far as its streams can be waited for.
pub(crate) fn close(core: &mut Core) {
    for _ in 0..wait::WAITS_MAX {
        let passed = wait::reached(core.fences.close_epochs());
        if !core.take_in_passed(&passed) {
            break;
        }
    }
    core.merge_complete();
    // What the driver refuses stays, and the caller sees it.
    drop(core.release_idle(0));
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Blocks in caches keep the pool alive: without this, its memory would stay until their threads end.
        match self.shared.lock() {
            Ok(mut core) => self.shared.empty_caches(&mut core, Close::Yes),
            Err(_) => self.shared.abandon_caches(),
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        thread_locals::assert_outside("a pool");
        let mut core = match self.lock() {
            Ok(mut core) => core.take(),
            Err(_) => {
                // Which of the memory is in use, nobody knows: it stays taken.
                let books = self.core.lock().take();
                return std::mem::forget(books);
            }
        };
        close(&mut core);
        if core.bytes_held() > 0 {
            // A kernel that owned the last block may not wait, least of all for its own stream. What another
            // thread does not get returned, or where there is none, is lost with the pool.
            let close = move || close(&mut core);
            let thread = thread::Builder::new().name("kitsune-pool".to_owned());
            drop(thread.spawn(close));
        }
    }
}
