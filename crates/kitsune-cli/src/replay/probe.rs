//! A driver wrapper that counts calls, tracks address ranges, and decides when events appear complete.
//!
//! The programs played here enqueue no kernels, so the real device finishes everything at once. To show how an
//! allocator copes with a device that lags behind, completion is delayed: an event is complete once a number of
//! allocations have followed its record (the *lag*), or once the host has waited for the event or its stream. With a
//! lag of 0, an event is complete when queried, so that results do not depend on a scheduler.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kitsune::Result;
use kitsune::driver::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};

use super::addresses::Ranges;

/// Counts the allocations of all threads.
#[derive(Debug, Default)]
pub(crate) struct AllocationClock(AtomicU64);

impl AllocationClock {
    /// Counts one allocation.
    pub(crate) fn tick(&self) {
        // Relaxed: nothing else is published with the count.
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Counts of driver calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Calls {
    /// Calls that allocate memory: plain allocations and physical pages.
    pub(crate) allocations: u64,
    /// All calls about memory: allocating, freeing, reserving, mapping.
    pub(crate) memory: u64,
    /// Events recorded.
    pub(crate) records: u64,
    /// Calls that block the host until a stream or an event is complete.
    pub(crate) host_syncs: u64,
}

/// The wrapper.
#[derive(Debug)]
pub(crate) struct ProbeDriver {
    inner: Arc<dyn Driver>,
    clock: Arc<AllocationClock>,
    lag: u64,
    allocations: AtomicU64,
    memory: AtomicU64,
    records: AtomicU64,
    host_syncs: AtomicU64,
    /// Recorded events that the host has not waited for, with their stream and the time of the record. Empty if the lag
    /// is 0.
    marks: Mutex<HashMap<RawEvent, (RawStream, u64)>>,
    ranges: Mutex<Ranges>,
}

impl ProbeDriver {
    /// Wraps `inner`. A `lag` other than 0 counts the ticks of [`clock`](Self::clock).
    pub(crate) fn new(inner: Arc<dyn Driver>, lag: u64) -> Self {
        Self {
            inner,
            clock: Arc::default(),
            lag,
            allocations: AtomicU64::new(0),
            memory: AtomicU64::new(0),
            records: AtomicU64::new(0),
            host_syncs: AtomicU64::new(0),
            marks: Mutex::default(),
            ranges: Mutex::default(),
        }
    }

    /// The clock that programs must tick; `None` if the lag is 0.
    pub(crate) fn clock(&self) -> Option<Arc<AllocationClock>> {
        (self.lag > 0).then(|| Arc::clone(&self.clock))
    }

    /// All calls so far.
    pub(crate) fn calls(&self) -> Calls {
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Calls {
            allocations: load(&self.allocations),
            memory: load(&self.memory),
            records: load(&self.records),
            host_syncs: load(&self.host_syncs),
        }
    }

    /// Locates an address, like [`Ranges::find`].
    pub(crate) fn place(&self, ptr: DevicePtr) -> Option<(u64, u64)> {
        self.ranges().find(ptr)
    }

    fn ranges(&self) -> MutexGuard<'_, Ranges> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn marks(&self) -> MutexGuard<'_, HashMap<RawEvent, (RawStream, u64)>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lags(&self, event: RawEvent) -> bool {
        if self.lag == 0 {
            return false;
        }
        let mark = self.marks().get(&event).copied();
        mark.is_some_and(|(_, recorded)| self.clock.now() < recorded.saturating_add(self.lag))
    }

    /// Records that the host has waited for the marks that `passed` selects.
    fn waited_for(&self, passed: impl Fn(RawEvent, RawStream) -> bool) {
        if self.lag > 0 {
            self.marks()
                .retain(|event, (stream, _)| !passed(*event, *stream));
        }
    }
}

fn count(counter: &AtomicU64) {
    // Relaxed: the counts are read between passes, which a barrier orders.
    counter.fetch_add(1, Ordering::Relaxed);
}

#[expect(
    unsafe_code,
    reason = "calls are forwarded unchanged, with their promises"
)]
// SAFETY: each call is forwarded. A query may return `false` for work that has run, but never the reverse.
unsafe impl Driver for ProbeDriver {
    fn properties(&self) -> &DeviceProperties {
        self.inner.properties()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.inner.memory_info()
    }

    fn platform(&self) -> u64 {
        self.inner.platform()
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        count(&self.allocations);
        count(&self.memory);
        let ptr = self.inner.allocate(bytes)?;
        self.ranges().take(ptr);
        Ok(ptr)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        count(&self.memory);
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.free(ptr) }?;
        self.ranges().give_back(ptr);
        Ok(())
    }

    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr> {
        self.inner.allocate_pinned(bytes)
    }

    unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.free_pinned(ptr) }
    }

    fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        count(&self.memory);
        let ptr = self.inner.reserve(bytes)?;
        self.ranges().take(ptr);
        Ok(ptr)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        count(&self.memory);
        self.inner.release(ptr, bytes)?;
        self.ranges().give_back(ptr);
        Ok(())
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        count(&self.allocations);
        count(&self.memory);
        self.inner.create_page(bytes)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        count(&self.memory);
        self.inner.destroy_page(page)
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        count(&self.memory);
        self.inner.map(ptr, pages)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        count(&self.memory);
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.unmap(ptr, bytes) }
    }

    fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        self.inner.prefault(ptr, bytes);
    }

    fn create_stream(&self) -> Result<RawStream> {
        self.inner.create_stream()
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        self.inner.destroy_stream(stream)
    }

    fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        count(&self.host_syncs);
        self.inner.synchronize_stream(stream)?;
        self.waited_for(|_, marked| marked == stream);
        Ok(())
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        self.inner.query_stream(stream)
    }

    fn create_event(&self) -> Result<RawEvent> {
        self.inner.create_event()
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.waited_for(|marked, _| marked == event);
        self.inner.destroy_event(event)
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        count(&self.records);
        self.inner.record(event, stream)?;
        if self.lag > 0 {
            self.marks().insert(event, (stream, self.clock.now()));
        }
        Ok(())
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        if self.lags(event) {
            return Ok(false);
        }
        // Wait, so that the real device's delay does not add to the simulated lag. This wait is the probe's own and is
        // not counted.
        self.inner.synchronize_event(event)?;
        Ok(true)
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        count(&self.host_syncs);
        self.inner.synchronize_event(event)?;
        self.waited_for(|marked, _| marked == event);
        Ok(())
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        self.inner.stream_wait(stream, event)
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.copy(dst, src, bytes, stream) }
    }

    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.copy_from_host(dst, src, stream) }
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.copy_to_host(dst, src, stream) }
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.fill(dst, value, bytes, stream) }
    }

    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.launch(kernel, stream) }
    }

    fn begin_capture(&self, stream: RawStream) -> Result<()> {
        self.inner.begin_capture(stream)
    }

    fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        self.inner.end_capture(stream)
    }

    fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        self.inner.is_capturing(stream)
    }

    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.launch_graph(graph, stream) }
    }

    fn destroy_graph(&self, graph: RawGraph) -> Result<()> {
        self.inner.destroy_graph(graph)
    }
}

#[cfg(test)]
mod tests {
    use kitsune::{Device, HostConfig, HostSchedule};

    use super::*;

    fn probed(lag: u64) -> (Arc<ProbeDriver>, Device) {
        let config = HostConfig {
            schedule: HostSchedule::Seeded(1),
            ..HostConfig::default()
        };
        let host = Device::host(config).unwrap();
        let probe = Arc::new(ProbeDriver::new(Arc::clone(host.driver()), lag));
        (Arc::clone(&probe), Device::from_driver(probe))
    }

    #[test]
    fn events_lag_by_allocations_or_until_the_host_waits() {
        let (probe, device) = probed(2);
        let clock = probe.clock().unwrap();
        let stream = device.create_stream().unwrap();
        let event = stream.record().unwrap();
        assert!(!event.is_complete().unwrap());
        clock.tick();
        assert!(!event.is_complete().unwrap());
        clock.tick();
        assert!(event.is_complete().unwrap());
        let [event, other] = [stream.record().unwrap(), stream.record().unwrap()];
        event.synchronize().unwrap();
        assert!(event.is_complete().unwrap() && !other.is_complete().unwrap());
        stream.synchronize().unwrap();
        assert!(other.is_complete().unwrap());
        assert_eq!(
            probe.calls(),
            Calls {
                records: 3,
                host_syncs: 2,
                ..Calls::default()
            }
        );
    }

    #[test]
    fn without_a_lag_events_are_complete_at_once() {
        let (probe, device) = probed(0);
        assert!(probe.clock().is_none());
        let stream = device.create_stream().unwrap();
        assert!(stream.record().unwrap().is_complete().unwrap());
        assert_eq!(
            probe.calls().host_syncs,
            0,
            "the probe's own wait is not counted"
        );
    }

    #[test]
    fn memory_calls_are_counted() {
        let (probe, device) = probed(0);
        let pages = device.properties().page_granularity;
        let driver = device.driver();
        let ptr = driver.allocate(4096).unwrap();
        // SAFETY: nothing was enqueued on the memory.
        #[expect(unsafe_code, reason = "the test frees its own memory")]
        unsafe { driver.free(ptr) }.unwrap();
        let range = driver.reserve(pages).unwrap();
        let page = driver.create_page(pages).unwrap();
        driver.destroy_page(page).unwrap();
        driver.release(range, pages).unwrap();
        let calls = probe.calls();
        assert_eq!((calls.allocations, calls.memory), (2, 6));
    }
}
