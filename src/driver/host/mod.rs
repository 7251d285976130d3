//! The host device: the CPU and its memory, behind the same interface as any other device.
//!
//! It is a device, not a mock: streams run asynchronously and independently, only events order them, and physical
//! pages can be mapped at several addresses. A program with a missing wait fails here too, and fails reproducibly under
//! [`HostSchedule::Seeded`].
//!
//! Terms. A *platform* is a group of host devices that share streams and events. An *executor* runs enqueued work. A
//! *mark* is a point that a stream passes once; recording an event makes one.
//!
//! Code map, bottom up: `system` (system calls for memory), `machine` (how much host memory is left), `areas` (how many
//! mappings are left), `runs` and `pages` (virtual memory), `memory` (all memory of one device); `landing`, `mark`,
//! `operation`, `queue` (one stream), `executor` with its implementations `threads` and `seeded`, `capture`; `platform`
//! (the tables); this file (the driver).
//!
//! Dropping the last driver does not wait. Queues keep the memory that their work may touch alive; it is freed when
//! the last queue is empty.

mod areas;
mod capture;
mod config;
mod errno;
mod executor;
mod landing;
mod machine;
mod mark;
mod memory;
mod operation;
mod pages;
mod platform;
mod queue;
mod runs;
mod seeded;
#[cfg(asan)]
mod shadow;
mod system;
mod threads;

use std::sync::Arc;

pub use config::{HostConfig, HostSchedule, PAGE_GRANULARITY};

use self::errno::{EINVAL, refuse};
use self::landing::Lent;
use self::memory::Memory;
use self::operation::Work;
use self::platform::Platform;
use super::{
    DeviceKind, DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent,
    RawGraph, RawStream,
};
use crate::error::{Error, Result};
use crate::units::DeviceOrdinal;

/// One host device.
#[derive(Debug)]
pub(crate) struct HostDriver {
    properties: DeviceProperties,
    memory: Arc<Memory>,
    platform: Arc<Platform>,
}

impl HostDriver {
    /// The only device of a new platform.
    pub(crate) fn new(config: HostConfig) -> Result<Self> {
        config.validate()?;
        Self::open(&config, Arc::new(Platform::new(config.schedule)), 0)
    }

    /// `count` devices that share streams and events, each with memory of its own.
    pub(crate) fn platform(config: HostConfig, count: u32) -> Result<Vec<Self>> {
        config.validate()?;
        if count == 0 {
            return Err(Error::config(
                "count",
                "a platform needs at least one device",
            ));
        }
        let platform = Arc::new(Platform::new(config.schedule));
        (0..count)
            .map(|ordinal| Self::open(&config, Arc::clone(&platform), ordinal))
            .collect()
    }

    fn open(config: &HostConfig, platform: Arc<Platform>, ordinal: u32) -> Result<Self> {
        let name = format!("kitsune-{}-{ordinal}", platform.id());
        let memory = Memory::new(config, &name)?;
        let properties = DeviceProperties {
            kind: DeviceKind::Host,
            name: "host".to_owned(),
            ordinal: DeviceOrdinal(ordinal),
            total_memory: config.capacity,
            virtual_memory: memory.has_pages(),
            page_granularity: PAGE_GRANULARITY,
            compute_capability: None,
        };
        Ok(Self {
            properties,
            memory: Arc::new(memory),
            platform,
        })
    }
}

impl Drop for HostDriver {
    fn drop(&mut self) {
        self.platform.destroy_streams_of(self.properties.ordinal.0);
    }
}

/// Refuses ranges that cannot exist, so that a null address is an error here and not a segmentation fault later.
fn check_range(call: &'static str, ptr: DevicePtr, bytes: u64) -> Result<()> {
    // The upper half of the address space belongs to the kernel.
    let inside = ptr.0.checked_add(bytes).is_some_and(|end| end <= 1 << 63);
    if inside && (bytes == 0 || ptr.0 != 0) {
        return Ok(());
    }
    let reason = format!("{bytes} bytes at {:#x} are not a valid range", ptr.0);
    Err(refuse(call, EINVAL, reason))
}

// SAFETY: `memory` hands out disjoint memory and checks what it takes back; `queue` runs one operation at a time, in
// order, and passes a mark after the work before it; handles are numbers that are never reused.
unsafe impl Driver for HostDriver {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        Ok(self.memory.capacity().info())
    }

    fn platform(&self) -> u64 {
        self.platform.id()
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        self.memory.allocate(bytes)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.memory.free(ptr) }
    }

    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr> {
        self.memory.allocate_pinned(bytes)
    }

    unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.memory.free_pinned(ptr) }
    }

    fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        self.memory.pages("reserve")?.reserve(bytes)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.memory.pages("release")?.release(ptr, bytes)
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        let pages = self.memory.pages("create_page")?;
        pages.create(self.memory.capacity(), bytes)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        let pages = self.memory.pages("destroy_page")?;
        pages.destroy(self.memory.capacity(), page)
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        self.memory.pages("map")?.map(ptr, pages)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let pages = self.memory.pages("unmap")?;
        // SAFETY: the caller's promise is the same.
        unsafe { pages.unmap(self.memory.capacity(), ptr, bytes) }
    }

    fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        // Plain memory is not prefaulted.
        if let Ok(pages) = self.memory.pages("prefault") {
            pages.prefault(ptr, bytes);
        }
    }

    fn create_stream(&self) -> Result<RawStream> {
        let memory = Arc::clone(&self.memory);
        Ok(self
            .platform
            .create_stream(self.properties.ordinal.0, memory))
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        self.platform.destroy_stream(stream)
    }

    fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        self.platform.synchronize_stream(stream)
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        self.platform.query_stream(stream)
    }

    fn create_event(&self) -> Result<RawEvent> {
        Ok(self.platform.create_event())
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.platform.destroy_event(event)
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        self.platform.record(event, stream)
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.platform.query_event(event)
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        self.platform.synchronize_event(event)
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        self.platform.stream_wait(stream, event)
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()> {
        check_range("copy", dst, bytes)?;
        check_range("copy", src, bytes)?;
        // SAFETY: the caller's promise is the same.
        let work = unsafe { Work::copy(dst, src, bytes) };
        self.platform.enqueue("copy", stream, work)
    }

    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()> {
        check_range("copy_from_host", dst, src.len() as u64)?;
        // SAFETY: the caller's promise is the same.
        let work = unsafe { Work::upload(dst, src.into()) };
        self.platform.enqueue("copy_from_host", stream, work)
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()> {
        check_range("copy_to_host", src, dst.len() as u64)?;
        // On the stream, as on other devices: another thread may enqueue a write to `src` after this copy.
        let lent = Lent::new(dst);
        // SAFETY: the caller promises the source until this call returns, and `dst` is lent no longer than that.
        let work = unsafe { Work::download(lent.landing(), src) };
        self.platform.finish("copy_to_host", stream, work)
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()> {
        check_range("fill", dst, bytes)?;
        // SAFETY: the caller's promise is the same.
        let work = unsafe { Work::fill(dst, value, bytes) };
        self.platform.enqueue("fill", stream, work)
    }

    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        let work = unsafe { Work::kernel(kernel) };
        self.platform.enqueue("launch", stream, work)
    }

    #[cfg(asan)]
    fn permit(&self, ptr: DevicePtr, bytes: u64, is_permitted: bool, stream: RawStream) {
        let shadow = shadow::Shadow {
            ptr,
            bytes,
            is_permitted,
        };
        self.platform.change_shadow(shadow, stream);
    }

    fn begin_capture(&self, stream: RawStream) -> Result<()> {
        self.platform.begin_capture(stream)
    }

    fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        self.platform.end_capture(stream)
    }

    fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        self.platform.is_capturing(stream)
    }

    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.platform.launch_graph(graph, stream) }
    }

    fn destroy_graph(&self, graph: RawGraph) -> Result<()> {
        self.platform.destroy_graph(graph)
    }
}
