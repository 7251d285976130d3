//! Routing: which allocations go to a private heap.
//!
//! There are two kinds of routes, and a capture takes precedence:
//!
//! - A *capture* routes by stream: it takes every allocation for the stream that it began on and for streams that
//!   joined it, whichever thread allocates. The driver knows which streams joined. Otherwise the captured work would
//!   use memory that can be handed to others. Other streams still get memory from the default heap, also on the
//!   capturing thread.
//! - A *warm-up* before the capture routes by thread: it takes every allocation of the thread that runs it. No driver
//!   knows of it.
//!
//! A pool has at most one capture at a time, so being captured determines a stream's heap.
//!
//! Must not know: the pool's lock, graphs.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::RwLock;

use crate::driver::Stream;
use crate::error::{Error, Result};
use crate::memory::types::{HeapId, PoolId};
use crate::units::StreamId;

/// The routes of a pool.
#[derive(Debug, Default)]
pub(crate) struct Routing {
    /// Number of routes of both kinds. While it is zero, routing costs an allocation a single load.
    active: AtomicUsize,
    /// Whether the pool no longer allocates.
    is_closed: AtomicBool,
    capture: RwLock<Option<Capture>>,
}

#[derive(Clone, Copy, Debug)]
struct Capture {
    origin: StreamId,
    heap: HeapId,
}

thread_local! {
    /// The warm-ups of this thread, the innermost last.
    static WARM_UPS: RefCell<Vec<(PoolId, HeapId)>> = const { RefCell::new(Vec::new()) };
}

impl Routing {
    /// Whether there is no route: every allocation goes to the default heap.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        // Relaxed: a thread can enqueue work on a captured stream only if it knows of the capture. The synchronization
        // through which it learned of it orders this load after the store.
        self.active.load(Ordering::Relaxed) == 0
    }

    /// Stops all allocation, for good. Counts as a route that never ends, so that the fast path, which checks only
    /// [`is_idle`](Self::is_idle), is not taken again.
    pub(crate) fn close(&self) {
        // Relaxed, here and below: a thread that does not see this yet allocates from its own cache, as if it had come
        // earlier. The lock guards the pool's bookkeeping.
        if !self.is_closed.swap(true, Ordering::Relaxed) {
            self.active.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether [`close`](Self::close) was called.
    pub(crate) fn are_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    /// The heap that serves an allocation for `stream` in `pool`.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver cannot tell whether the stream is being captured.
    pub(crate) fn find(&self, pool: PoolId, stream: &Stream) -> Result<HeapId> {
        if self.is_idle() {
            return Ok(HeapId::DEFAULT);
        }
        if let Some(heap) = self.captured(stream)? {
            return Ok(heap);
        }
        let warm_up = WARM_UPS.try_with(|warm_ups| {
            let warm_ups = warm_ups.borrow();
            warm_ups.iter().rev().find(|(of, _)| *of == pool).copied()
        });
        // A thread that is being torn down runs no warm-up.
        Ok(warm_up
            .ok()
            .flatten()
            .map_or(HeapId::DEFAULT, |(_, heap)| heap))
    }

    /// The heap of the capture that `stream` is part of, if it is part of one.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    fn captured(&self, stream: &Stream) -> Result<Option<HeapId>> {
        let Some(capture) = *self.capture.read() else {
            return Ok(None);
        };
        let is_part =
            capture.origin == stream.id() || stream.driver().is_capturing(stream.raw())?;
        Ok(is_part.then_some(capture.heap))
    }

    /// The heap of the capture that began on `stream`, if one did.
    pub(crate) fn captured_from(&self, stream: &Stream) -> Option<HeapId> {
        let capture = (*self.capture.read())?;
        (capture.origin == stream.id()).then_some(capture.heap)
    }

    /// Whether a capture is in progress.
    pub(crate) fn is_capturing(&self) -> bool {
        self.capture.read().is_some()
    }

    /// Routes a capture that begins on `origin` to `heap`, until the scope ends.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while another capture with memory of this pool is in progress.
    pub(crate) fn begin_capture(&self, origin: &Stream, heap: HeapId) -> Result<CaptureScope<'_>> {
        let mut capture = self.capture.write();
        if capture.is_some() {
            let reason = "another capture with memory of this pool is under way";
            return Err(Error::argument("capture", reason));
        }
        *capture = Some(Capture {
            origin: origin.id(),
            heap,
        });
        self.active.fetch_add(1, Ordering::Relaxed);
        Ok(CaptureScope { routing: self })
    }

    /// Routes the calling thread's allocations from `pool` to `heap`, until the scope ends.
    pub(crate) fn begin_warm_up(&self, pool: PoolId, heap: HeapId) -> WarmUpScope<'_> {
        WARM_UPS.with_borrow_mut(|warm_ups| warm_ups.push((pool, heap)));
        self.active.fetch_add(1, Ordering::Relaxed);
        WarmUpScope {
            routing: self,
            not_send: PhantomData,
        }
    }
}

/// The extent of a capture.
#[derive(Debug)]
pub(crate) struct CaptureScope<'a> {
    routing: &'a Routing,
}

impl Drop for CaptureScope<'_> {
    fn drop(&mut self) {
        *self.routing.capture.write() = None;
        self.routing.active.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The extent of a warm-up, on one thread.
#[derive(Debug)]
pub(crate) struct WarmUpScope<'a> {
    routing: &'a Routing,
    not_send: PhantomData<*const ()>,
}

impl Drop for WarmUpScope<'_> {
    fn drop(&mut self) {
        // A warm-up is one call of a closure, so the one that ends is the one that began last.
        WARM_UPS.with_borrow_mut(Vec::pop);
        self.routing.active.fetch_sub(1, Ordering::Relaxed);
    }
}
