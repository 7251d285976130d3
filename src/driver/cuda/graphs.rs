//! Captures and graphs.
//!
//! Captures begin in relaxed mode. Every mode refuses to wait for or query a capturing stream, which is all that
//! [`Driver`](crate::driver::Driver) forbids. The stricter modes also forbid calls unrelated to the capture, such as
//! allocating memory or querying another stream's event. Global mode forbids them to every thread of the process,
//! thread-local mode to the capturing thread, where a pool may have to grow.
//!
//! A captured copy from host memory reads its source at every launch of the graph. So the copy reads from pinned memory
//! that the graph owns, which is freed once the graph is gone and its last launch has run.

use std::ptr::null_mut;
use std::sync::Arc;

use cudarc::driver::sys::{CUgraphExec_st, CUstreamCaptureMode};
use parking_lot::Mutex;

use super::context::{Context, Raw};
use super::library::ask;
use super::memory;
use super::streams::{EventEntry, StreamEntry};
use super::table::Close;
use crate::driver::DevicePtr;
use crate::error::{Error, Result};
use crate::units::to_usize;

/// Pinned memory that a captured copy reads from.
#[derive(Debug)]
struct Staged {
    context: &'static Context,
    ptr: DevicePtr,
}

impl Staged {
    fn of(context: &'static Context, bytes: &[u8]) -> Result<Self> {
        let ptr = memory::allocate_pinned(context, bytes.len() as u64)?;
        let place = std::ptr::with_exposed_provenance_mut::<u8>(to_usize(ptr.0));
        // SAFETY: `place` was just allocated, with room for all of `bytes`.
        unsafe { place.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(Self { context, ptr })
    }

    fn as_slice(&self, len: usize) -> &[u8] {
        let start = std::ptr::with_exposed_provenance::<u8>(to_usize(self.ptr.0));
        // SAFETY: `of` wrote this many bytes, and nothing writes them again.
        unsafe { std::slice::from_raw_parts(start, len) }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // SAFETY: it is dropped only when no work reads it any more.
        let _ = unsafe { memory::free_pinned(self.context, self.ptr) };
    }
}

/// Staged memory of active captures, and of destroyed graphs whose last launch may still be running.
#[derive(Debug, Default)]
pub(super) struct Staging {
    /// Each with its capturing stream.
    captured: Mutex<Vec<(Arc<StreamEntry>, Staged)>>,
    /// By graph, with the event recorded after its last launch.
    outdated: Mutex<Vec<(EventEntry, Vec<Staged>)>>,
}

impl Staging {
    /// Enqueues a copy on a capturing stream.
    ///
    /// # Safety
    /// As [`Driver::copy_from_host`](crate::driver::Driver::copy_from_host), at every launch of the graph.
    pub(super) unsafe fn upload(
        &self,
        call: &'static str,
        stream: Arc<StreamEntry>,
        dst: DevicePtr,
        src: &[u8],
    ) -> Result<()> {
        let staged = Staged::of(stream.context, src)?;
        // SAFETY: the caller promises the destination; the source lives as long as the graph.
        unsafe { memory::upload(call, &stream, dst, staged.as_slice(src.len())) }?;
        self.captured.lock().push((stream, staged));
        Ok(())
    }

    pub(super) fn begin(&self, stream: &StreamEntry) -> Result<()> {
        const CALL: &str = "begin_capture";
        if stream.is_capturing(CALL)? {
            return Err(Error::Capturing { call: CALL });
        }
        let context = stream.context;
        let _bound = context.bind(CALL)?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive.
        unsafe {
            ask!(
                context.library,
                CALL,
                cuStreamBeginCapture_v2(stream.raw(), mode)
            )
        }
    }

    /// Ends the capture begun on `stream`.
    pub(super) fn end(&self, stream: &StreamEntry) -> Result<GraphEntry> {
        const CALL: &str = "end_capture";
        self.collect();
        let context = stream.context;
        let _bound = context.bind(CALL)?;
        // Locked across the end, so that two captures ending at once cannot take each other's staged memory.
        let mut captured = self.captured.lock();
        let mut graph = null_mut();
        // SAFETY: the stream is alive; `graph` receives the result.
        let ended = unsafe {
            ask!(
                context.library,
                CALL,
                cuStreamEndCapture(stream.raw(), &raw mut graph)
            )
        };
        // A stream that is no longer capturing was part of this capture: those of earlier captures are already removed.
        let is_over = |stream: &StreamEntry| !stream.is_capturing(CALL).unwrap_or(false);
        let staged = captured.extract_if(.., |(stream, _)| is_over(stream));
        let staged: Vec<_> = staged.map(|(_, staged)| staged).collect();
        drop(captured);
        ended?;
        let mut exec = null_mut();
        // SAFETY: the graph is ours; `exec` receives the result; no flags are set.
        let made = unsafe {
            ask!(
                context.library,
                CALL,
                cuGraphInstantiateWithFlags(&raw mut exec, graph, 0)
            )
        };
        // SAFETY: the graph is ours, and the instantiated graph does not need it.
        let destroyed = unsafe { ask!(context.library, CALL, cuGraphDestroy(graph)) };
        made?;
        let entry = GraphEntry {
            context,
            exec: Raw(exec),
            parts: Mutex::new(Parts {
                staged,
                launched: None,
                nested: false,
            }),
        };
        destroyed.map(|()| entry)
    }

    /// Keeps the staged memory of a graph that is being destroyed until its last launch has run.
    pub(super) fn retire(&self, graph: &GraphEntry) {
        let Parts {
            staged,
            launched,
            nested,
        } = std::mem::take(&mut *graph.parts.lock());
        if nested {
            // The graph is part of another graph, which can be launched at any time. The leak is rare and small.
            std::mem::forget(staged);
        } else if let Some(event) = launched {
            self.outdated.lock().push((event, staged));
        }
        self.collect();
    }

    /// Frees staged memory that no launch reads any more.
    fn collect(&self) {
        let passed = |event: &EventEntry| event.is_complete("destroy_graph").unwrap_or(false);
        self.outdated.lock().retain(|(event, _)| !passed(event));
    }
}

/// A graph ready to be launched.
#[derive(Debug)]
pub(super) struct GraphEntry {
    context: &'static Context,
    exec: Raw<CUgraphExec_st>,
    parts: Mutex<Parts>,
}

#[derive(Debug, Default)]
struct Parts {
    staged: Vec<Staged>,
    /// Marks the end of the last launch, if the graph has staged memory. Launches of one graph run one after
    /// the other, so one event suffices.
    launched: Option<EventEntry>,
    /// Whether a launch of the graph was itself captured.
    nested: bool,
}

impl GraphEntry {
    /// # Safety
    /// As [`Driver::launch_graph`](crate::driver::Driver::launch_graph).
    pub(super) unsafe fn launch(&self, stream: &StreamEntry, number: u64) -> Result<()> {
        const CALL: &str = "launch_graph";
        let _bound = stream.context.bind(CALL)?;
        let mut parts = self.parts.lock();
        // SAFETY: both are alive; the caller promises the safety conditions of the captured work.
        unsafe {
            ask!(
                self.context.library,
                CALL,
                cuGraphLaunch(self.exec.0, stream.raw())
            )
        }?;
        if parts.staged.is_empty() {
            return Ok(());
        }
        if stream.is_capturing(CALL)? {
            parts.nested = true;
            return Ok(());
        }
        if parts.launched.is_none() {
            parts.launched = Some(EventEntry::create(self.context)?);
        }
        let event = parts.launched.as_ref().expect("made just now");
        event.record(CALL, stream, number)
    }
}

impl Close for GraphEntry {
    const NAME: &'static str = "graph";

    fn close(&self, call: &'static str) -> Result<()> {
        let _bound = self.context.bind(call)?;
        // SAFETY: only this entry has the graph's handle. Launches in flight still run.
        unsafe { ask!(self.context.library, call, cuGraphExecDestroy(self.exec.0)) }
    }
}

impl Drop for GraphEntry {
    fn drop(&mut self) {
        let _ = self.close("destroy_graph");
    }
}
