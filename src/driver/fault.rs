//! A wrapper that makes driver calls fail.
//!
//! Code above the driver has an error branch for every call that can fail. With [`FaultDriver`] a test reaches all of
//! them: it fails the first call, then the second, and so on until no fault fires any more. [`FaultDriver`] also counts
//! calls, so that a test can assert that a path makes none. A call that is made to fail never reaches the wrapped
//! driver.
//!
//! Must not know: which driver is wrapped.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};
use crate::error::{Error, Result};

/// Which call fails, and how. A fault fires once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The method of [`Driver`] that fails; `None` for any fallible method.
    pub call: Option<&'static str>,
    /// Which of the calls from now on fails, counted from 1.
    pub nth: u64,
    /// The error it fails with.
    pub kind: FaultKind,
}

/// The errors that drivers return.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Out of memory.
    OutOfMemory,
    /// An argument is invalid.
    InvalidValue,
    /// The caller may not do this.
    NotPermitted,
    /// A capture is under way, which forbids the call.
    Capturing,
    /// Work enqueued earlier has failed.
    LaunchFailure,
    /// Any other error.
    Other {
        /// The code of the error.
        code: i32,
        /// The reason in the error.
        reason: String,
    },
}

impl FaultKind {
    /// Every kind that has no fields.
    pub const ALL: [Self; 5] = [
        Self::OutOfMemory,
        Self::InvalidValue,
        Self::NotPermitted,
        Self::Capturing,
        Self::LaunchFailure,
    ];

    /// The error of `call`, with the codes of the host device.
    fn error(self, call: &'static str) -> Error {
        let (code, reason) = match self {
            Self::OutOfMemory => (12, "injected: out of memory".to_owned()),
            Self::InvalidValue => (22, "injected: invalid value".to_owned()),
            Self::NotPermitted => (1, "injected: not permitted".to_owned()),
            Self::LaunchFailure => (5, "injected: launch failure".to_owned()),
            Self::Other { code, reason } => (code, reason),
            Self::Capturing => return Error::Capturing { call },
        };
        Error::Driver { call, code, reason }
    }
}

/// A driver whose calls fail on demand. All other calls are forwarded to the wrapped driver.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use kitsune::driver::fault::FaultDriver;
/// use kitsune::{Device, HostConfig};
///
/// let inner = Device::host(HostConfig::default())?;
/// let faults = Arc::new(FaultDriver::new(inner.driver().clone()));
/// let device = Device::from_driver(faults.clone());
/// faults.fail_nth(Some("create_stream"), 2);
/// assert!(device.create_stream().is_ok());
/// assert!(device.create_stream().is_err());
/// assert_eq!(faults.calls("create_stream"), 2);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Debug)]
pub struct FaultDriver {
    inner: Arc<dyn Driver>,
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct Plan {
    /// Faults that have not fired. `nth` counts down.
    armed: Vec<Fault>,
    calls: BTreeMap<&'static str, u64>,
}

impl FaultDriver {
    /// A wrapper around `inner` that forwards every call.
    #[must_use]
    pub fn new(inner: Arc<dyn Driver>) -> Self {
        Self {
            inner,
            plan: Mutex::default(),
        }
    }

    /// Arms `fault`, in addition to those already armed. When several are due at the same call, one fires there and
    /// the others at the next calls that they match.
    ///
    /// # Panics
    /// If `fault.nth` is 0, or [`Driver`] has no fallible method called `fault.call`: such a fault would never fire,
    /// and its test would pass without testing anything.
    pub fn arm(&self, fault: Fault) {
        assert!(fault.nth > 0, "calls are counted from 1");
        if let Some(call) = fault.call {
            check_name(call);
        }
        self.plan.lock().armed.push(fault);
    }

    /// Makes the `nth` call from now on, of method `call` or of any, fail with an I/O error (code 5).
    ///
    /// # Panics
    /// As [`arm`](Self::arm).
    pub fn fail_nth(&self, call: Option<&'static str>, nth: u64) {
        self.arm(Fault {
            call,
            nth,
            kind: FaultKind::Other {
                code: 5,
                reason: "injected fault".to_owned(),
            },
        });
    }

    /// Disarms all faults that have not fired and returns how many there were. A test that tries every `nth` is
    /// finished when its fault is still armed at the end.
    pub fn disarm(&self) -> usize {
        std::mem::take(&mut self.plan.lock().armed).len()
    }

    /// How often method `call` was called since the last [`reset_calls`](Self::reset_calls), including failed calls.
    ///
    /// # Panics
    /// If [`Driver`] has no fallible method of that name.
    #[must_use]
    pub fn calls(&self, call: &'static str) -> u64 {
        check_name(call);
        self.plan.lock().calls.get(call).copied().unwrap_or(0)
    }

    /// How often any fallible method was called since the last [`reset_calls`](Self::reset_calls).
    #[must_use]
    pub fn total_calls(&self) -> u64 {
        self.plan.lock().calls.values().sum()
    }

    /// Resets the call counts to 0. Armed faults stay armed.
    pub fn reset_calls(&self) {
        self.plan.lock().calls.clear();
    }

    /// Counts a call, and fails it if a fault is due.
    fn pass(&self, call: &'static str) -> Result<&dyn Driver> {
        debug_assert!(FALLIBLE.contains(&call), "{call} is missing in FALLIBLE");
        let mut plan = self.plan.lock();
        *plan.calls.entry(call).or_default() += 1;
        let concerned = |fault: &&mut Fault| fault.call.is_none_or(|named| named == call);
        for fault in plan.armed.iter_mut().filter(concerned) {
            fault.nth = fault.nth.saturating_sub(1);
        }
        let due = |fault: &Fault| fault.nth == 0 && fault.call.is_none_or(|named| named == call);
        match plan.armed.iter().position(due) {
            None => Ok(&*self.inner),
            Some(index) => Err(plan.armed.remove(index).kind.error(call)),
        }
    }
}

/// The fallible methods of [`Driver`].
const FALLIBLE: [&str; 33] = [
    "memory_info",
    "allocate",
    "free",
    "allocate_on",
    "free_on",
    "allocate_pinned",
    "free_pinned",
    "reserve",
    "release",
    "create_page",
    "destroy_page",
    "map",
    "unmap",
    "create_stream",
    "destroy_stream",
    "synchronize_stream",
    "query_stream",
    "create_event",
    "destroy_event",
    "record",
    "query_event",
    "synchronize_event",
    "stream_wait",
    "copy",
    "copy_from_host",
    "copy_to_host",
    "fill",
    "launch",
    "begin_capture",
    "end_capture",
    "is_capturing",
    "launch_graph",
    "destroy_graph",
];

fn check_name(call: &str) {
    assert!(
        FALLIBLE.contains(&call),
        "no fallible method of Driver is called `{call}`"
    );
}

// SAFETY: each call is forwarded or refused.
unsafe impl Driver for FaultDriver {
    fn properties(&self) -> &DeviceProperties {
        self.inner.properties()
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        self.pass("memory_info")?.memory_info()
    }

    fn platform(&self) -> u64 {
        self.inner.platform()
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        self.pass("allocate")?.allocate(bytes)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        let inner = self.pass("free")?;
        // SAFETY: the caller makes the same promise, here and in every method below.
        unsafe { inner.free(ptr) }
    }

    fn allocate_on(&self, bytes: u64, stream: RawStream) -> Result<DevicePtr> {
        self.pass("allocate_on")?.allocate_on(bytes, stream)
    }

    unsafe fn free_on(&self, ptr: DevicePtr, stream: RawStream) -> Result<()> {
        let inner = self.pass("free_on")?;
        // SAFETY: as in `free`.
        unsafe { inner.free_on(ptr, stream) }
    }

    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr> {
        self.pass("allocate_pinned")?.allocate_pinned(bytes)
    }

    unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        let inner = self.pass("free_pinned")?;
        // SAFETY: as in `free`.
        unsafe { inner.free_pinned(ptr) }
    }

    fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        self.pass("reserve")?.reserve(bytes)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        self.pass("release")?.release(ptr, bytes)
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        self.pass("create_page")?.create_page(bytes)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        self.pass("destroy_page")?.destroy_page(page)
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        self.pass("map")?.map(ptr, pages)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        let inner = self.pass("unmap")?;
        // SAFETY: as in `free`.
        unsafe { inner.unmap(ptr, bytes) }
    }

    fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        self.inner.prefault(ptr, bytes);
    }

    fn create_stream(&self) -> Result<RawStream> {
        self.pass("create_stream")?.create_stream()
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        self.pass("destroy_stream")?.destroy_stream(stream)
    }

    fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        self.pass("synchronize_stream")?.synchronize_stream(stream)
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        self.pass("query_stream")?.query_stream(stream)
    }

    fn create_event(&self) -> Result<RawEvent> {
        self.pass("create_event")?.create_event()
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        self.pass("destroy_event")?.destroy_event(event)
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        self.pass("record")?.record(event, stream)
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        self.pass("query_event")?.query_event(event)
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        self.pass("synchronize_event")?.synchronize_event(event)
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        self.pass("stream_wait")?.stream_wait(stream, event)
    }

    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()> {
        let inner = self.pass("copy")?;
        // SAFETY: as in `free`.
        unsafe { inner.copy(dst, src, bytes, stream) }
    }

    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()> {
        let inner = self.pass("copy_from_host")?;
        // SAFETY: as in `free`.
        unsafe { inner.copy_from_host(dst, src, stream) }
    }

    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()> {
        let inner = self.pass("copy_to_host")?;
        // SAFETY: as in `free`.
        unsafe { inner.copy_to_host(dst, src, stream) }
    }

    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()> {
        let inner = self.pass("fill")?;
        // SAFETY: as in `free`.
        unsafe { inner.fill(dst, value, bytes, stream) }
    }

    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        let inner = self.pass("launch")?;
        // SAFETY: as in `free`.
        unsafe { inner.launch(kernel, stream) }
    }

    #[cfg(asan)]
    fn permit(&self, ptr: DevicePtr, bytes: u64, is_permitted: bool, stream: RawStream) {
        self.inner.permit(ptr, bytes, is_permitted, stream);
    }

    fn begin_capture(&self, stream: RawStream) -> Result<()> {
        self.pass("begin_capture")?.begin_capture(stream)
    }

    fn end_capture(&self, stream: RawStream) -> Result<RawGraph> {
        self.pass("end_capture")?.end_capture(stream)
    }

    fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        self.pass("is_capturing")?.is_capturing(stream)
    }

    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()> {
        let inner = self.pass("launch_graph")?;
        // SAFETY: as in `free`.
        unsafe { inner.launch_graph(graph, stream) }
    }

    fn destroy_graph(&self, graph: RawGraph) -> Result<()> {
        self.pass("destroy_graph")?.destroy_graph(graph)
    }
}
