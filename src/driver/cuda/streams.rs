//! Streams and events.
//!
//! Streams are non-blocking: they are not ordered with the legacy default stream. Events record no times, which makes
//! them cheap. A destroyed event goes back to a free list of its context, not to the library. A reused event still
//! carries its old mark, so each entry remembers whether the event was recorded since it was handed out.

use std::ffi::c_int;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cudarc::driver::CudaStream;
use cudarc::driver::sys::{CUevent_flags, CUevent_st, CUstream, CUstream_flags, CUstream_st};
use parking_lot::Mutex;

use super::context::{Context, Raw};
use super::failure::code;
use super::library::ask;
use super::table::Close;
use crate::error::Result;

/// The most idle events that a device keeps. More are rarely in flight at once.
const IDLE_EVENTS_MAX: usize = 256;

/// A stream of the library.
#[derive(Debug)]
pub(super) struct StreamEntry {
    pub(super) context: &'static Context,
    raw: Raw<CUstream_st>,
    owner: Owner,
}

/// Who destroys a stream.
#[derive(Debug)]
enum Owner {
    /// The entry.
    Entry,
    /// Other code, which promised to wait until the entry is gone.
    Other,
    /// cudarc, once the handle kept here is gone too.
    Shared(Mutex<Option<Arc<CudaStream>>>),
}

impl StreamEntry {
    pub(super) fn create(context: &'static Context) -> Result<Self> {
        const CALL: &str = "create_stream";
        let _bound = context.bind(CALL)?;
        let mut raw = null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `raw` receives the result.
        unsafe { ask!(context.library, CALL, cuStreamCreate(&raw mut raw, flags)) }?;
        Ok(Self {
            context,
            raw: Raw(raw),
            owner: Owner::Entry,
        })
    }

    /// A stream that other code made and will destroy.
    pub(super) fn borrowed(context: &'static Context, raw: CUstream) -> Self {
        Self {
            context,
            raw: Raw(raw),
            owner: Owner::Other,
        }
    }

    /// A cudarc stream, kept alive by the entry.
    pub(super) fn shared(context: &'static Context, stream: Arc<CudaStream>) -> Self {
        Self {
            context,
            raw: Raw(stream.cu_stream()),
            owner: Owner::Shared(Mutex::new(Some(stream))),
        }
    }

    /// The library's handle, valid while the entry lives.
    pub(super) fn raw(&self) -> CUstream {
        self.raw.0
    }

    pub(super) fn synchronize(&self, call: &'static str) -> Result<()> {
        let _bound = self.context.bind(call)?;
        // SAFETY: the stream is alive.
        unsafe { ask!(self.context.library, call, cuStreamSynchronize(self.raw())) }
    }

    pub(super) fn is_idle(&self, call: &'static str) -> Result<bool> {
        let _bound = self.context.bind(call)?;
        let library = self.context.library;
        // SAFETY: the stream is alive.
        let code = unsafe { (library.functions.cuStreamQuery)(self.raw()) };
        passed(code, || library.check(call, "cuStreamQuery", code))
    }

    pub(super) fn is_capturing(&self, call: &'static str) -> Result<bool> {
        let _bound = self.context.bind(call)?;
        // A plain number: a newer library may return a status that the bindings' enum lacks.
        let mut status = 0_u32;
        let place = (&raw mut status).cast();
        // SAFETY: the stream is alive; `status` is as large as the enum and receives the result.
        unsafe {
            ask!(
                self.context.library,
                call,
                cuStreamIsCapturing(self.raw(), place)
            )
        }?;
        Ok(status != 0)
    }
}

impl Close for StreamEntry {
    const NAME: &'static str = "stream";

    fn close(&self, call: &'static str) -> Result<()> {
        match &self.owner {
            Owner::Entry => {
                let _bound = self.context.bind(call)?;
                // SAFETY: only this entry has the stream's handle. Enqueued work still runs.
                unsafe { ask!(self.context.library, call, cuStreamDestroy_v2(self.raw())) }
            }
            Owner::Other => Ok(()),
            Owner::Shared(stream) => {
                drop(stream.lock().take());
                Ok(())
            }
        }
    }
}

impl Drop for StreamEntry {
    fn drop(&mut self) {
        let _ = self.close("destroy_stream");
    }
}

/// An event of the library.
#[derive(Debug)]
pub(super) struct EventEntry {
    context: &'static Context,
    raw: Raw<CUevent_st>,
    /// The number of the stream it was last recorded on; 0 if it was never recorded.
    recorded_on: AtomicU64,
}

impl EventEntry {
    pub(super) fn create(context: &'static Context) -> Result<Self> {
        const CALL: &str = "create_event";
        let idle = context.idle_events.lock().pop();
        let raw = match idle {
            Some(raw) => raw,
            None => {
                let _bound = context.bind(CALL)?;
                let mut raw = null_mut();
                let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: `raw` receives the result.
                unsafe { ask!(context.library, CALL, cuEventCreate(&raw mut raw, flags)) }?;
                Raw(raw)
            }
        };
        Ok(Self {
            context,
            raw,
            recorded_on: AtomicU64::new(0),
        })
    }

    /// The number of the stream it was last recorded on.
    pub(super) fn recorded_on(&self) -> Option<u64> {
        // Relaxed: a caller that queries a mark must be ordered after its record in any case.
        Some(self.recorded_on.load(Ordering::Relaxed)).filter(|stream| *stream != 0)
    }

    pub(super) fn record(
        &self,
        call: &'static str,
        stream: &StreamEntry,
        number: u64,
    ) -> Result<()> {
        // The library requires event and stream to belong to the current context.
        let _bound = stream.context.bind(call)?;
        // SAFETY: both are alive.
        unsafe {
            ask!(
                self.context.library,
                call,
                cuEventRecord(self.raw.0, stream.raw())
            )
        }?;
        self.recorded_on.store(number, Ordering::Relaxed);
        Ok(())
    }

    pub(super) fn is_complete(&self, call: &'static str) -> Result<bool> {
        let _bound = self.context.bind(call)?;
        let library = self.context.library;
        // SAFETY: the event is alive.
        let code = unsafe { (library.functions.cuEventQuery)(self.raw.0) };
        passed(code, || library.check(call, "cuEventQuery", code))
    }

    pub(super) fn synchronize(&self, call: &'static str) -> Result<()> {
        let _bound = self.context.bind(call)?;
        // SAFETY: the event is alive.
        unsafe { ask!(self.context.library, call, cuEventSynchronize(self.raw.0)) }
    }

    pub(super) fn hold(&self, call: &'static str, stream: &StreamEntry) -> Result<()> {
        let _bound = stream.context.bind(call)?;
        // SAFETY: both are alive; no flags are set.
        unsafe {
            ask!(
                self.context.library,
                call,
                cuStreamWaitEvent(stream.raw(), self.raw.0, 0)
            )
        }
    }
}

impl Close for EventEntry {
    const NAME: &'static str = "event";

    /// Waits already enqueued on the event refer to its mark at that time, so the event can be reused at once.
    fn close(&self, call: &'static str) -> Result<()> {
        let mut idle = self.context.idle_events.lock();
        if idle.len() < IDLE_EVENTS_MAX {
            idle.push(self.raw);
            return Ok(());
        }
        drop(idle);
        let _bound = self.context.bind(call)?;
        // SAFETY: only this entry has the event's handle.
        unsafe { ask!(self.context.library, call, cuEventDestroy_v2(self.raw.0)) }
    }
}

impl Drop for EventEntry {
    fn drop(&mut self) {
        let _ = self.close("destroy_event");
    }
}

/// The result of a query. "Not ready" is a valid answer, not an error.
fn passed(code: c_int, check: impl FnOnce() -> Result<()>) -> Result<bool> {
    if code == code::NOT_READY {
        return Ok(false);
    }
    check().map(|()| true)
}
