//! Which allocations go to a private heap.
//!
//! There are two kinds of route, and the first that applies decides. A *capture* takes every allocation for a stream
//! that it captures, whichever thread asks: for the stream that it began on and, as the driver knows, for streams that
//! joined it. Otherwise captured work would use memory that others may get. All other streams get memory of the default
//! heap meanwhile, also from the capturing thread. No driver knows of a *warm-up* before a capture: it takes every
//! allocation of the thread that runs it.
//!
//! A pool follows one capture at a time, so a captured stream determines the heap.

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
    /// Routes of both kinds: while there is none, an allocation costs one look at this.
    under_way: AtomicUsize,
    /// Whether no allocation goes anywhere any more.
    is_closed: AtomicBool,
    capture: RwLock<Option<Capture>>,
}

#[derive(Clone, Copy, Debug)]
struct Capture {
    origin: StreamId,
    heap: HeapId,
}

thread_local! {
    /// The passes of this thread as (pool number, memory), the innermost last.
    static WARM_UPS: RefCell<Vec<(PoolId, HeapId)>> = const { RefCell::new(Vec::new()) };
}

impl Routing {
    /// Whether every allocation is ordinary.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        // Relaxed: a thread that gives work to a captured stream was told of the capture by other means, and
        // those order its load after the store.
        self.under_way.load(Ordering::Relaxed) == 0
    }

    /// Says that nothing is allocated any more. Counts as a route for ever, so that the fast way, which looks at these
    /// alone, is not taken again.
    pub(crate) fn close(&self) {
        // Relaxed, here and below: a thread that does not see it yet allocates as if it had come earlier, out of what
        // it keeps itself. The books are guarded by their lock.
        if !self.is_closed.swap(true, Ordering::Relaxed) {
            self.under_way.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether nothing is allocated any more.
    pub(crate) fn are_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    /// Where an allocation for `stream` goes in pool number `pool`.
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
        let pass = WARM_UPS.try_with(|passes| {
            let passes = passes.borrow();
            passes.iter().rev().find(|(of, _)| *of == pool).copied()
        });
        // A thread that is going down runs no pass.
        Ok(pass
            .ok()
            .flatten()
            .map_or(HeapId::DEFAULT, |(_, heap)| heap))
    }

    /// The memory of the capture that `stream` is part of, if there is one.
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

    /// The memory of the capture that was begun on `stream`, if there is one.
    pub(crate) fn captured_from(&self, stream: &Stream) -> Option<HeapId> {
        let capture = (*self.capture.read())?;
        (capture.origin == stream.id()).then_some(capture.heap)
    }

    /// Whether a capture is under way.
    pub(crate) fn is_capturing(&self) -> bool {
        self.capture.read().is_some()
    }

    /// Routes a capture begun on `origin` to `memory`, until the scope ends.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while another capture of the pool is under way.
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
        self.under_way.fetch_add(1, Ordering::Relaxed);
        Ok(CaptureScope { routing: self })
    }

    /// Routes the calling thread's allocations to `memory`, until the scope ends.
    pub(crate) fn begin_warm_up(&self, pool: PoolId, heap: HeapId) -> WarmUpScope<'_> {
        WARM_UPS.with_borrow_mut(|passes| passes.push((pool, heap)));
        self.under_way.fetch_add(1, Ordering::Relaxed);
        WarmUpScope {
            routing: self,
            not_send: PhantomData,
        }
    }
}

/// The time of a capture.
#[derive(Debug)]
pub(crate) struct CaptureScope<'a> {
    routing: &'a Routing,
}

impl Drop for CaptureScope<'_> {
    fn drop(&mut self) {
        *self.routing.capture.write() = None;
        self.routing.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The time of a pass, on one thread.
#[derive(Debug)]
pub(crate) struct WarmUpScope<'a> {
    routing: &'a Routing,
    not_send: PhantomData<*const ()>,
}

impl Drop for WarmUpScope<'_> {
    fn drop(&mut self) {
        // Passes are closures, so the one that ends is the one begun last.
        WARM_UPS.with_borrow_mut(Vec::pop);
        self.routing.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}
