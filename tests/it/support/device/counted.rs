//! A device that notes each launch, with the bytes that its kernel says it moves, and each copy.

use std::sync::Arc;

use kitsune::driver::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream, Traffic,
};
use kitsune::{Device, Result};
use parking_lot::Mutex;

/// What was enqueued, in order: entry points, and `copy`, `upload`, `download`, `fill`.
pub type Log = Mutex<Vec<(&'static str, Option<Traffic>)>>;

/// `inner`, which notes in `log` what it is given.
pub fn device(inner: &Device, log: &Arc<Log>) -> Device {
    Device::from_driver(Arc::new(Counted {
        inner: Arc::clone(inner.driver()),
        log: Arc::clone(log),
    }))
}

/// Bytes of all that is noted in `log`.
///
/// # Panics
/// If a kernel does not tell what it moves.
pub fn bytes(log: &Log) -> u64 {
    let log = log.lock();
    let moved = |(entry, traffic): &(&str, Option<Traffic>)| {
        let traffic = traffic.unwrap_or_else(|| panic!("{entry} does not tell what it moves"));
        traffic.read + traffic.written
    };
    log.iter().map(moved).sum()
}

/// Names of what is noted in `log`.
pub fn names(log: &Log) -> Vec<&'static str> {
    log.lock().iter().map(|(name, _)| *name).collect()
}

#[derive(Debug)]
struct Counted {
    inner: Arc<dyn Driver>,
    log: Arc<Log>,
}

impl Counted {
    fn note(&self, name: &'static str, read: u64, written: u64) {
        let traffic = Traffic { read, written };
        self.log.lock().push((name, Some(traffic)));
    }
}

// SAFETY: each call is passed on.
unsafe impl Driver for Counted {
    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        self.log.lock().push((kernel.entry(), kernel.traffic()));
        // SAFETY: the caller promises the same.
        unsafe { self.inner.launch(kernel, stream) }
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()> {
        self.note("copy", bytes, bytes);
        // SAFETY: the caller promises the same.
        unsafe { self.inner.copy(dst, src, bytes, stream) }
    }

    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()> {
        self.note("upload", 0, src.len() as u64);
        // SAFETY: the caller promises the same.
        unsafe { self.inner.copy_from_host(dst, src, stream) }
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()> {
        self.note("download", dst.len() as u64, 0);
        // SAFETY: the caller promises the same.
        unsafe { self.inner.copy_to_host(dst, src, stream) }
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()> {
        self.note("fill", 0, bytes);
        // SAFETY: the caller promises the same.
        unsafe { self.inner.fill(dst, value, bytes, stream) }
    }

    pass_on! {
        fn properties() -> &DeviceProperties;
        fn memory_info() -> Result<MemoryInfo>;
        fn platform() -> u64;
        fn allocate(bytes: u64) -> Result<DevicePtr>;
        fn allocate_on(bytes: u64, stream: RawStream) -> Result<DevicePtr>;
        fn allocate_pinned(bytes: u64) -> Result<DevicePtr>;
        fn reserve(bytes: u64) -> Result<DevicePtr>;
        fn release(ptr: DevicePtr, bytes: u64) -> Result<()>;
        fn create_page(bytes: u64) -> Result<PageHandle>;
        fn destroy_page(page: PageHandle) -> Result<()>;
        fn map(ptr: DevicePtr, pages: &[PageHandle]) -> Result<()>;
        fn prefault(ptr: DevicePtr, bytes: u64) -> ();
        fn create_stream() -> Result<RawStream>;
        fn destroy_stream(stream: RawStream) -> Result<()>;
        fn synchronize_stream(stream: RawStream) -> Result<()>;
        fn query_stream(stream: RawStream) -> Result<bool>;
        fn create_event() -> Result<RawEvent>;
        fn destroy_event(event: RawEvent) -> Result<()>;
        fn record(event: RawEvent, stream: RawStream) -> Result<()>;
        fn query_event(event: RawEvent) -> Result<bool>;
        fn synchronize_event(event: RawEvent) -> Result<()>;
        fn stream_wait(stream: RawStream, event: RawEvent) -> Result<()>;
        fn begin_capture(stream: RawStream) -> Result<()>;
        fn end_capture(stream: RawStream) -> Result<RawGraph>;
        fn is_capturing(stream: RawStream) -> Result<bool>;
        fn destroy_graph(graph: RawGraph) -> Result<()>;
    }

    pass_on! {
        unsafe fn free(ptr: DevicePtr) -> Result<()>;
        unsafe fn free_on(ptr: DevicePtr, stream: RawStream) -> Result<()>;
        unsafe fn free_pinned(ptr: DevicePtr) -> Result<()>;
        unsafe fn unmap(ptr: DevicePtr, bytes: u64) -> Result<()>;
        unsafe fn launch_graph(graph: RawGraph, stream: RawStream) -> Result<()>;
    }
}
