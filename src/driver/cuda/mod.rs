//! CUDA devices.
//!
//! The driver's library is loaded at run time. If it is missing, too old or damaged, or has no device, opening fails
//! with an [`Error`] that says which. Nothing panics, and [`Device::auto`] falls back to the host. The bindings are
//! cudarc's; `library` explains what this module does differently and why.
//!
//! All devices form one platform: they share the tables of streams, events, pages and graphs, and accept each other's
//! events and addresses. Handles of this driver are numbers in those tables. A device keeps its primary context until
//! the process ends; nothing is cleaned up at exit.
//!
//! Code map, bottom up: `failure` (codes), `library` (functions), `context` (one device, made current), `table`
//! (numbers for handles), `streams`, `memory`, `uploads`, `pages`, `peers` (copies between devices), `graphs`,
//! `kernels`; this file (the driver); `foreign` (streams shared with other code), `installation` and `toolkit`
//! (diagnostics).
//!
//! Tested only with a simulated library so far (`tests/simcuda`), not on a GPU.
//!
//! [`Device::auto`]: crate::Device::auto

mod context;
mod failure;
mod foreign;
mod graphs;
mod installation;
mod kernels;
mod library;
mod memory;
mod pages;
mod peers;
mod streams;
mod table;
mod toolkit;
mod uploads;

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

pub(crate) use foreign::{Entered, enter, is_found_by_others};
pub use foreign::{borrow_stream, share_stream, stream_handle};
pub use installation::{CudaDevice, Installation};
pub(crate) use kernels::check as check_kernels;
use parking_lot::Mutex;
pub use toolkit::{ToolkitLibrary, toolkit};

use self::context::Context;
use self::failure::{code, code_of};
use self::graphs::{GraphEntry, Staging};
use self::pages::Pages;
use self::peers::Peers;
use self::streams::{EventEntry, StreamEntry};
use self::table::Table;
use super::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};
use crate::error::{Error, Result};

/// The number of the CUDA platform. Host platforms are numbered from 1 up.
const PLATFORM: u64 = u64::MAX;

/// State shared by all CUDA devices. Never dropped, so that no driver call is made when the process ends.
static TABLES: LazyLock<Tables> = LazyLock::new(|| Tables {
    streams: Table::new(),
    events: Table::new(),
    graphs: Table::new(),
    pages: Pages::new(),
    staging: Staging::default(),
    peers: Peers::default(),
});

#[derive(Debug)]
struct Tables {
    streams: Table<StreamEntry>,
    events: Table<EventEntry>,
    graphs: Table<GraphEntry>,
    pages: Pages,
    staging: Staging,
    peers: Peers,
}

/// One CUDA device.
#[derive(Debug)]
pub(crate) struct CudaDriver {
    context: &'static Context,
    tables: &'static Tables,
}

impl CudaDriver {
    /// The device with this number: the same driver every time.
    pub(crate) fn get(ordinal: u32) -> Result<Arc<Self>> {
        static OPENED: Mutex<BTreeMap<u32, Arc<CudaDriver>>> = Mutex::new(BTreeMap::new());
        let mut opened = OPENED.lock();
        if let Some(driver) = opened.get(&ordinal) {
            return Ok(Arc::clone(driver));
        }
        let context = Context::open(ordinal)?;
        let driver = Arc::new(Self {
            context,
            tables: &TABLES,
        });
        driver.tables.peers.add(context);
        opened.insert(ordinal, Arc::clone(&driver));
        Ok(driver)
    }

    fn stream(&self, call: &'static str, stream: RawStream) -> Result<Arc<StreamEntry>> {
        self.tables.streams.get(call, stream.0)
    }

    fn event(&self, call: &'static str, event: RawEvent) -> Result<Arc<EventEntry>> {
        self.tables.events.get(call, event.0)
    }

    /// Translates the error of querying an event that was recorded in a capture: [`Error::Capturing`] while the capture
    /// is active, the library's own error once it is over.
    fn of_captured(&self, call: &'static str, event: &EventEntry, error: Error) -> Error {
        if code_of(&error) != Some(code::CAPTURED_EVENT) {
            return error;
        }
        let stream = event
            .recorded_on()
            .map(|number| self.stream(call, RawStream(number)));
        let captures = stream
            .and_then(Result::ok)
            .map(|stream| stream.is_capturing(call));
        match captures {
            Some(Ok(true)) => Error::Capturing { call },
            _ => error,
        }
    }
}

// SAFETY: each call maps to the CUDA driver API, which makes the same promises. Where it promises less (`uploads`,
// `streams`), the named module adds what is missing.
unsafe impl Driver for CudaDriver {
    fn properties(&self) -> &DeviceProperties {
        &self.context.properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        memory::info(self.context)
    }

    fn platform(&self) -> u64 {
        PLATFORM
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        memory::allocate(self.context, bytes)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller makes the same promise, here and in every method below.
        unsafe { memory::free(self.context, ptr) }
    }

    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr> {
        memory::allocate_pinned(self.context, bytes)
    }

    unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: as in `free`.
        unsafe { memory::free_pinned(self.context, ptr) }
    }

    fn allocate_on(&self, bytes: u64, stream: RawStream) -> Result<DevicePtr> {
        let stream = self.stream("allocate_on", stream)?;
        memory::allocate_on(&stream, bytes)
    }

    unsafe fn free_on(&self, ptr: DevicePtr, stream: RawStream) -> Result<()> {
        let stream = self.stream("free_on", stream)?;
        // SAFETY: as in `free`.
        unsafe { memory::free_on(&stream, ptr) }
    }

    fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        self.tables.pages.reserve(self.context, bytes)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.tables.pages.release(self.context, ptr, bytes)
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        self.tables.pages.create(self.context, bytes)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        self.tables.pages.destroy(page)
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        self.tables.pages.map(self.context, ptr, pages)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        // SAFETY: as in `free`.
        unsafe { self.tables.pages.unmap(self.context, ptr, bytes) }
    }

    fn create_stream(&self) -> Result<RawStream> {
        let stream = StreamEntry::create(self.context)?;
        Ok(RawStream(self.tables.streams.insert(stream)))
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        self.tables.streams.remove("destroy_stream", stream.0)
    }

    fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        const CALL: &str = "synchronize_stream";
        self.stream(CALL, stream)?.synchronize(CALL)
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        const CALL: &str = "query_stream";
        self.stream(CALL, stream)?.is_idle(CALL)
    }

    fn create_event(&self) -> Result<RawEvent> {
        let event = EventEntry::create(self.context)?;
        Ok(RawEvent(self.tables.events.insert(event)))
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.tables.events.remove("destroy_event", event.0)
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        const CALL: &str = "record";
        let event = self.event(CALL, event)?;
        event.record(CALL, &*self.stream(CALL, stream)?, stream.0)
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        const CALL: &str = "query_event";
        let event = self.event(CALL, event)?;
        if event.recorded_on().is_none() {
            return Ok(true);
        }
        let outcome = event.is_complete(CALL);
        outcome.map_err(|error| self.of_captured(CALL, &event, error))
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        const CALL: &str = "synchronize_event";
        let event = self.event(CALL, event)?;
        if event.recorded_on().is_none() {
            return Ok(());
        }
        let outcome = event.synchronize(CALL);
        outcome.map_err(|error| self.of_captured(CALL, &event, error))
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        const CALL: &str = "stream_wait";
        let (stream, event) = (self.stream(CALL, stream)?, self.event(CALL, event)?);
        if event.recorded_on().is_none() {
            return Ok(());
        }
        event.hold(CALL, &stream)
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()> {
        let stream = self.stream("copy", stream)?;
        if bytes == 0 {
            return Ok(());
        }
        let Tables { peers, pages, .. } = self.tables;
        if let Some(between) = peers.between(pages, stream.context, [dst, src])? {
            // SAFETY: as in `free`.
            return unsafe { peers::copy(&stream, between, [dst, src], bytes) };
        }
        // SAFETY: as in `free`.
        unsafe { memory::copy(&stream, dst, src, bytes) }
    }

    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()> {
        const CALL: &str = "copy_from_host";
        let number = stream.0;
        let stream = self.stream(CALL, stream)?;
        if src.is_empty() {
            return Ok(());
        }
        if stream.is_capturing(CALL)? {
            // SAFETY: as in `free`.
            return unsafe { self.tables.staging.upload(CALL, stream, dst, src) };
        }
        let context = stream.context;
        if context.abilities.pageable_access {
            // SAFETY: as in `free`.
            return unsafe { context.uploads.upload(CALL, &stream, number, (dst, src)) };
        }
        // SAFETY: as in `free`; if the library still reads the source, the wait below keeps it borrowed.
        let is_read_later = unsafe { memory::upload(CALL, &stream, dst, src) }?;
        if is_read_later {
            stream.synchronize(CALL)?;
        }
        Ok(())
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()> {
        let stream = self.stream("copy_to_host", stream)?;
        // SAFETY: as in `free`.
        unsafe { memory::download(&stream, dst, src) }
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()> {
        let stream = self.stream("fill", stream)?;
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: as in `free`.
        unsafe { memory::fill(&stream, dst, value, bytes) }
    }

    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        let stream = self.stream("launch", stream)?;
        // SAFETY: as in `free`.
        unsafe { stream.context.code.launch(&*kernel, &stream) }
    }

    fn begin_capture(&self, stream: RawStream) -> Result<()> {
        let stream = self.stream("begin_capture", stream)?;
        self.tables.staging.begin(&stream)
    }

    fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        let stream = self.stream("end_capture", stream)?;
        let graph = self.tables.staging.end(&stream)?;
        Ok(RawGraph(self.tables.graphs.insert(graph)))
    }

    fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        const CALL: &str = "is_capturing";
        self.stream(CALL, stream)?.is_capturing(CALL)
    }

    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        const CALL: &str = "launch_graph";
        let (graph, entry) = (
            self.tables.graphs.get(CALL, graph.0)?,
            self.stream(CALL, stream)?,
        );
        // SAFETY: as in `free`.
        unsafe { graph.launch(&entry, stream.0) }
    }

    fn destroy_graph(&self, graph: RawGraph) -> Result<()> {
        const CALL: &str = "destroy_graph";
        self.tables
            .staging
            .retire(&*self.tables.graphs.get(CALL, graph.0)?);
        self.tables.graphs.remove(CALL, graph.0)
    }
}
