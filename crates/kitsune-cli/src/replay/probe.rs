//! A driver wrapper that counts calls, tracks address ranges, and decides when events appear complete.
//!
//! The programs played here enqueue no kernels, so the real device finishes everything at once. To show how an
//! allocator copes with a device that lags behind, completion is delayed: an event is complete once a number of
//! allocations have followed its record (the *lag*), or once the host has waited for the event or its stream. With a
//! lag of 0, an event is complete when queried, so that results do not depend on a scheduler.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kitsune::Result;
use kitsune::driver::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};
use kitsune::units::MIB;

use super::addresses::Ranges;

/// The unit in which mappings are counted.
const PAGE: u64 = 2 * MIB;

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
    /// Handles of physical memory created.
    pub(crate) creates: u64,
    /// Their bytes.
    pub(crate) created_bytes: u64,
    /// Calls that map handles.
    pub(crate) map_calls: u64,
    /// Handles mapped by them.
    pub(crate) handles_mapped: u64,
    /// Bytes mapped by them, in pages of 2 MiB, whatever the size of the handles.
    pub(crate) pages_mapped: u64,
    /// Handles unmapped.
    pub(crate) handles_unmapped: u64,
    /// Handles destroyed.
    pub(crate) destroys: u64,
    /// Plain allocations.
    pub(crate) mallocs: u64,
    /// Events created.
    pub(crate) event_creates: u64,
    /// Queries of events.
    pub(crate) event_queries: u64,
    /// Waits of a stream for an event.
    pub(crate) event_waits: u64,
}

impl Calls {
    /// The calls since `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        Self {
            allocations: self.allocations - earlier.allocations,
            memory: self.memory - earlier.memory,
            records: self.records - earlier.records,
            host_syncs: self.host_syncs - earlier.host_syncs,
            creates: self.creates - earlier.creates,
            created_bytes: self.created_bytes - earlier.created_bytes,
            map_calls: self.map_calls - earlier.map_calls,
            handles_mapped: self.handles_mapped - earlier.handles_mapped,
            pages_mapped: self.pages_mapped - earlier.pages_mapped,
            handles_unmapped: self.handles_unmapped - earlier.handles_unmapped,
            destroys: self.destroys - earlier.destroys,
            mallocs: self.mallocs - earlier.mallocs,
            event_creates: self.event_creates - earlier.event_creates,
            event_queries: self.event_queries - earlier.event_queries,
            event_waits: self.event_waits - earlier.event_waits,
        }
    }
}

/// Physical memory of the device.
#[derive(Debug, Default)]
struct Handles {
    bytes: HashMap<PageHandle, u64>,
    mapped: BTreeMap<u64, PageHandle>,
}

/// The wrapper.
#[derive(Debug)]
pub(crate) struct ProbeDriver {
    inner: Arc<dyn Driver>,
    clock: Arc<AllocationClock>,
    lag: u64,
    calls: Mutex<Calls>,
    /// The bytes of each handle, and the handles that are mapped, by address.
    handles: Mutex<Handles>,
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
            calls: Mutex::default(),
            handles: Mutex::default(),
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
        *self.counts()
    }

    fn counts(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut counts = self.counts();
        counts.allocations += 1;
        counts.memory += 1;
        counts.mallocs += 1;
        drop(counts);
        let ptr = self.inner.allocate(bytes)?;
        self.ranges().take(ptr);
        Ok(ptr)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        self.counts().memory += 1;
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
        self.counts().memory += 1;
        let ptr = self.inner.reserve(bytes)?;
        self.ranges().take(ptr);
        Ok(ptr)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.counts().memory += 1;
        self.inner.release(ptr, bytes)?;
        self.ranges().give_back(ptr);
        Ok(())
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        let mut counts = self.counts();
        counts.allocations += 1;
        counts.memory += 1;
        drop(counts);
        let handle = self.inner.create_page(bytes)?;
        self.handles().bytes.insert(handle, bytes);
        let mut counts = self.counts();
        counts.creates += 1;
        counts.created_bytes += bytes;
        Ok(handle)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        let mut counts = self.counts();
        counts.memory += 1;
        counts.destroys += 1;
        drop(counts);
        self.inner.destroy_page(page)?;
        self.handles().bytes.remove(&page);
        Ok(())
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        self.counts().memory += 1;
        self.inner.map(ptr, pages)?;
        let mut handles = self.handles();
        let (mut end, mut mapped) = (ptr.0, 0);
        for page in pages {
            handles.mapped.insert(end, *page);
            let bytes = handles.bytes.get(page).copied().unwrap_or(0);
            end += bytes;
            mapped += bytes.div_ceil(PAGE);
        }
        let mut counts = self.counts();
        counts.map_calls += 1;
        counts.handles_mapped += pages.len() as u64;
        counts.pages_mapped += mapped;
        Ok(())
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.counts().memory += 1;
        // SAFETY: the caller promises what the inner driver asks for.
        unsafe { self.inner.unmap(ptr, bytes) }?;
        let mut handles = self.handles();
        let range = handles.mapped.range(ptr.0..ptr.0 + bytes);
        let gone: Vec<u64> = range.map(|(address, _)| *address).collect();
        for address in &gone {
            handles.mapped.remove(address);
        }
        self.counts().handles_unmapped += gone.len() as u64;
        Ok(())
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
        self.counts().host_syncs += 1;
        self.inner.synchronize_stream(stream)?;
        self.waited_for(|_, marked| marked == stream);
        Ok(())
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        self.inner.query_stream(stream)
    }

    fn create_event(&self) -> Result<RawEvent> {
        self.counts().event_creates += 1;
        self.inner.create_event()
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.waited_for(|marked, _| marked == event);
        self.inner.destroy_event(event)
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        self.counts().records += 1;
        self.inner.record(event, stream)?;
        if self.lag > 0 {
            self.marks().insert(event, (stream, self.clock.now()));
        }
        Ok(())
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.counts().event_queries += 1;
        if self.lags(event) {
            return Ok(false);
        }
        // Wait, so that the real device's delay does not add to the simulated lag. This wait is the probe's own and is
        // not counted.
        self.inner.synchronize_event(event)?;
        Ok(true)
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        self.counts().host_syncs += 1;
        self.inner.synchronize_event(event)?;
        self.waited_for(|marked, _| marked == event);
        Ok(())
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        self.counts().event_waits += 1;
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
                event_creates: 3,
                event_queries: 6,
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
        driver.map(range, &[page]).unwrap();
        // SAFETY: nothing was enqueued on the memory.
        #[expect(unsafe_code, reason = "the test unmaps its own memory")]
        unsafe { driver.unmap(range, pages) }.unwrap();
        driver.destroy_page(page).unwrap();
        driver.release(range, pages).unwrap();
        let calls = probe.calls();
        assert_eq!((calls.allocations, calls.memory), (2, 8));
        let handles = (calls.creates, calls.handles_mapped, calls.handles_unmapped);
        assert_eq!((handles, calls.destroys), ((1, 1, 1), 1));
        assert_eq!((calls.mallocs, calls.map_calls), (1, 1));
        assert_eq!(calls.pages_mapped, pages.div_ceil(PAGE));
        assert_eq!(calls.created_bytes, pages);
        assert_eq!(calls.since(&calls), Calls::default());
    }
}
