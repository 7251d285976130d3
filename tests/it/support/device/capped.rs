//! A device that seems to have less memory than it has, so that tests of full devices need not fill a real one.

use std::collections::HashMap;
use std::sync::Arc;

use kitsune::driver::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};
use kitsune::{Device, Error, Result};
use parking_lot::Mutex;

/// The code of `CUDA_ERROR_OUT_OF_MEMORY`.
const OUT_OF_MEMORY: i32 = 2;

/// `inner` with `capacity` bytes, if it has more.
pub(super) fn device(inner: &Device, capacity: u64) -> Device {
    let mut properties = inner.properties().clone();
    properties.total_memory = properties.total_memory.min(capacity);
    Device::from_driver(Arc::new(Capped {
        inner: Arc::clone(inner.driver()),
        properties,
        taken: Mutex::default(),
    }))
}

/// Refuses memory beyond the total that `properties` states.
#[derive(Debug)]
struct Capped {
    inner: Arc<dyn Driver>,
    properties: DeviceProperties,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: u64,
    by_address: HashMap<DevicePtr, u64>,
    by_page: HashMap<PageHandle, u64>,
}

impl Capped {
    /// Counts `bytes` and calls `take`, or refuses.
    fn take<T>(
        &self,
        call: &'static str,
        bytes: u64,
        take: impl FnOnce() -> Result<T>,
        note: impl FnOnce(&mut Taken, &T),
    ) -> Result<T> {
        let mut taken = self.taken.lock();
        if bytes > self.properties.total_memory - taken.bytes {
            return Err(Error::Driver {
                call,
                code: OUT_OF_MEMORY,
                reason: "out of memory under test".to_owned(),
            });
        }
        let made = take()?;
        taken.bytes += bytes;
        note(&mut taken, &made);
        Ok(made)
    }
}

// SAFETY: each call is passed on or refused.
unsafe impl Driver for Capped {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        let mut info = self.inner.memory_info()?;
        info.total = self.properties.total_memory;
        info.free = info.free.min(info.total - self.taken.lock().bytes);
        Ok(info)
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        let take = || self.inner.allocate(bytes);
        self.take("allocate", bytes, take, |taken, ptr| {
            taken.by_address.insert(*ptr, bytes);
        })
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller promises the same.
        unsafe { self.inner.free(ptr) }?;
        let mut taken = self.taken.lock();
        taken.bytes -= taken.by_address.remove(&ptr).unwrap_or(0);
        Ok(())
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        let take = || self.inner.create_page(bytes);
        self.take("create_page", bytes, take, |taken, page| {
            taken.by_page.insert(*page, bytes);
        })
    }

    // Bytes of a page that is still mapped count as free a little early.
    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        self.inner.destroy_page(page)?;
        let mut taken = self.taken.lock();
        taken.bytes -= taken.by_page.remove(&page).unwrap_or(0);
        Ok(())
    }

    unsafe fn free_on(&self, ptr: DevicePtr, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises the same.
        unsafe { self.inner.free_on(ptr, stream) }
    }

    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises the same.
        unsafe { self.inner.launch(kernel, stream) }
    }

    pass_on! {
        fn platform() -> u64;
        fn allocate_on(bytes: u64, stream: RawStream) -> Result<DevicePtr>;
        fn allocate_pinned(bytes: u64) -> Result<DevicePtr>;
        fn reserve(bytes: u64) -> Result<DevicePtr>;
        fn release(ptr: DevicePtr, bytes: u64) -> Result<()>;
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
        unsafe fn free_pinned(ptr: DevicePtr) -> Result<()>;
        unsafe fn unmap(ptr: DevicePtr, bytes: u64) -> Result<()>;
        unsafe fn copy(dst: DevicePtr, src: DevicePtr, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn copy_from_host(dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()>;
        unsafe fn copy_to_host(dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()>;
        unsafe fn fill(dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn launch_graph(graph: RawGraph, stream: RawStream) -> Result<()>;
    }
}
