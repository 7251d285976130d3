//! The interface to a device: memory, streams, events, kernels and graphs.
//!
//! [`Driver`] is the only boundary between this crate and a device: everything above it is the same code on the host
//! device and on CUDA. Porting the crate to another device means implementing this trait.
//!
//! Terms. A *stream* is a queue of work that runs in order; only *events* order the work of different streams. An
//! *event* marks a point in a stream: it completes when the work enqueued before the point was recorded has run. A call
//! that *enqueues* work does not wait for it to run. A *page* is physical memory without an address; *mapping* gives it
//! an address. A page can be mapped at several addresses at once.
//!
//! Handles ([`RawStream`], [`RawEvent`], [`PageHandle`], [`RawGraph`]) are plain numbers that belong to the
//! driver that made them. [`Stream`], [`Event`] and [`Graph`] own handles; the layers above use these owners.
//!
//! Must not know: blocks, pools, tensors, element types.

#![allow(
    unsafe_code,
    reason = "device addresses are plain numbers; callers promise that they are valid"
)]

#[cfg(feature = "cuda")]
pub mod cuda;
mod device;
mod event;
pub mod fault;
mod graph;
pub mod host;
mod kernel;
mod stream;

use std::fmt::Debug;

pub use device::Device;
pub use event::Event;
pub use graph::Graph;
pub use host::{HostConfig, HostSchedule};
pub use kernel::{Arguments, Grid, Kernel, Traffic};
pub use stream::Stream;

use crate::error::Result;
use crate::units::DeviceOrdinal;

/// An address in device memory. Zero is never a valid address.
///
/// Addresses are unified: pinned host memory and the memory of all devices of one driver share one address space, so a
/// copy can tell from the addresses where its operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` bytes after this one.
    ///
    /// # Panics
    /// If the address does not fit in 64 bits.
    #[must_use]
    pub const fn offset(self, bytes: u64) -> Self {
        Self(
            self.0
                .checked_add(bytes)
                .expect("an address inside a mapped range"),
        )
    }
}

/// A driver's handle of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawStream(pub u64);
/// A driver's handle of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawEvent(pub u64);
/// A driver's handle of a run of physical memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageHandle(pub u64);
/// A driver's handle of a captured, replayable sequence of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RawGraph(pub u64);

/// What kind of device a driver drives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The processor and its memory.
    Host,
    /// A CUDA device.
    Cuda,
}

/// What a device is and can do. Fixed for the life of the driver.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceProperties {
    /// What kind of device it is.
    pub kind: DeviceKind,
    /// Its name, for display.
    pub name: String,
    /// Its place among the devices of its driver.
    pub ordinal: DeviceOrdinal,
    /// Bytes of memory it has.
    pub total_memory: u64,
    /// Whether [`reserve`](Driver::reserve), [`create_page`](Driver::create_page) and
    /// [`map`](Driver::map) work.
    pub virtual_memory: bool,
    /// The unit of page sizes, mapping addresses and mapping lengths, in bytes; a power of two.
    pub page_granularity: u64,
    /// CUDA compute capability (major, minor); `None` on the host.
    pub compute_capability: Option<(u32, u32)>,
}

/// Memory of a device at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Free bytes.
    pub free: u64,
    /// Bytes in total.
    pub total: u64,
}

/// A device, as this crate sees it. The trait is object safe; all methods can be called from any thread.
///
/// # Ordering
/// Work enqueued on one stream runs in the order in which the enqueuing calls returned (callers on different threads
/// must order their calls themselves). Work of different streams is ordered only by
/// [`record`](Self::record) and [`stream_wait`](Self::stream_wait).
///
/// # Errors
/// Every fallible method returns [`Error::Driver`](crate::Error::Driver) with the name of the method when
/// the device refuses. After a kernel fails, every later call that waits for its stream reports that failure.
/// Kernels, and the destructors of what they own, must not wait: blocking calls from them are refused.
/// Calls that a capture forbids return [`Error::Capturing`](crate::Error::Capturing).
///
/// # Safety
/// Safe code in the layers above reads and writes the addresses that a driver returns, and reuses memory once the
/// driver reports that work has run. An implementation promises:
///
/// - **Memory.** Memory from [`allocate`](Self::allocate), [`allocate_on`](Self::allocate_on) and
///   [`allocate_pinned`](Self::allocate_pinned) is at least as large as requested, starts at a multiple of 512,
///   overlaps no other live memory, and stays readable and writable by the device (pinned memory by the host, too)
///   until it is freed. A range from [`reserve`](Self::reserve) overlaps no other live range. After
///   [`map`](Self::map), its addresses reach the pages in the order given and nothing else, until they are
///   unmapped. If a call that takes memory away fails, the memory is still there.
/// - **Order.** The work of a stream runs once, in order, and after everything the stream waits for. A query returns
///   `true`, and a wait returns `Ok`, only when the work in question has run.
/// - **Host memory.** [`copy_from_host`](Self::copy_from_host) reads `src` only before it returns.
///   [`copy_to_host`](Self::copy_to_host) writes `dst` only before it returns, even with an error, and has filled all
///   of it when it returns `Ok`.
/// - **Identity.** A handle names one object until that object is destroyed. Two drivers report the same
///   [`platform`](Self::platform) only if each accepts the other's streams, events and addresses.
///   [`properties`](Self::properties) never change.
///
/// A wrapper that forwards each call to another driver, or refuses it, keeps these promises if that driver does.
pub unsafe trait Driver: Debug + Send + Sync {
    /// What the device is and can do.
    fn properties(&self) -> &DeviceProperties;

    /// Free and total memory now.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn memory_info(&self) -> Result<MemoryInfo>;

    /// Identifies the group of devices that accept each other's streams, events and addresses.
    fn platform(&self) -> u64;

    // Plain memory.

    /// Allocates `bytes` (not 0) of device memory, aligned to at least 512 bytes. The contents are undefined.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver), also when the device is out of memory: the out-of-memory report is the
    /// pool's task.
    fn allocate(&self, bytes: u64) -> Result<DevicePtr>;

    /// Frees memory that [`allocate`](Self::allocate) returned.
    ///
    /// # Errors
    /// As [`Driver`] says, and for an address that `allocate` did not return.
    ///
    /// # Safety
    /// No enqueued work may still touch the memory: the driver need not wait for work in flight.
    unsafe fn free(&self, ptr: DevicePtr) -> Result<()>;

    /// Allocates `bytes` (not 0) of device memory in stream order: the address is returned at once, for work enqueued
    /// on `stream` after this call. A driver without a stream-ordered allocator returns plain memory.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    fn allocate_on(&self, bytes: u64, stream: RawStream) -> Result<DevicePtr> {
        let _ = stream;
        self.allocate(bytes)
    }

    /// Frees memory that [`allocate_on`](Self::allocate_on) returned, once `stream` reaches this point. A driver
    /// without a stream-ordered allocator waits for the stream.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    ///
    /// # Safety
    /// All work that touches the memory was enqueued on `stream` before this call, or `stream` waits for it.
    unsafe fn free_on(&self, ptr: DevicePtr, stream: RawStream) -> Result<()> {
        self.synchronize_stream(stream)?;
        // SAFETY: all work that touches the memory has run.
        unsafe { self.free(ptr) }
    }

    /// Allocates `bytes` (not 0) of pinned host memory, which host and device access at the same address.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr>;

    /// Frees memory that [`allocate_pinned`](Self::allocate_pinned) returned.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// No enqueued work may still touch the memory.
    unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()>;

    // Virtual memory. Sizes and addresses are multiples of `page_granularity`.

    /// Reserves a range of addresses without memory behind it.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn reserve(&self, bytes: u64) -> Result<DevicePtr>;

    /// Releases a reserved range. Everything in it must have been unmapped.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;

    /// Allocates `bytes` of physical memory without an address.
    ///
    /// # Errors
    /// As [`Driver`] says; also when the device is out of memory.
    fn create_page(&self, bytes: u64) -> Result<PageHandle>;

    /// Destroys a page. Its memory is freed once its last mapping is gone.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_page(&self, page: PageHandle) -> Result<()>;

    /// Maps all of `pages` next to each other, starting at `ptr`, readable and writable by this device. A page can be
    /// mapped at several addresses, which then reach the same bytes.
    ///
    /// # Errors
    /// As [`Driver`] says; nothing is mapped then.
    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()>;

    /// Removes the mappings in a range. Pages must not be mapped across its ends.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// No enqueued work may still touch the range: unmapping does not wait.
    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;

    /// Hints that the work enqueued next uses all of a range that the caller owns, so that a driver whose memory is
    /// faulted in on first touch can populate the range at once. Cheap if the range is already populated. Changes no
    /// contents; the default does nothing.
    fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        let _ = (ptr, bytes);
    }

    // Streams and events.

    /// Makes a stream that is not ordered with any other.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn create_stream(&self) -> Result<RawStream>;

    /// Destroys a stream. Work already enqueued still runs.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_stream(&self, stream: RawStream) -> Result<()>;

    /// Blocks the calling thread until all work of `stream` so far has run.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn synchronize_stream(&self, stream: RawStream) -> Result<()>;

    /// Whether all work of `stream` so far has run; never blocks.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn query_stream(&self, stream: RawStream) -> Result<bool>;

    /// Makes an event. Until it is recorded it counts as complete.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn create_event(&self) -> Result<RawEvent>;

    /// Destroys an event. Waits that were enqueued on it stay valid.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_event(&self, event: RawEvent) -> Result<()>;

    /// Marks the current end of `stream` with `event`, replacing an earlier mark.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()>;

    /// Whether the point that `event` marks has been passed; never blocks.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn query_event(&self, event: RawEvent) -> Result<bool>;

    /// Blocks the calling thread until the point that `event` marks has been passed.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn synchronize_event(&self, event: RawEvent) -> Result<()>;

    /// Makes work enqueued on `stream` from now on wait for the point that `event` currently marks. Does not
    /// block the host. The event can belong to another device of the same [`platform`](Self::platform).
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()>;

    // Work.

    /// Enqueues a copy of `bytes` bytes. Each address can be on this device, on another device of the platform, or in
    /// pinned memory. The ranges must not overlap.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// Both ranges stay mapped, and nothing else writes them or reads `dst`, until `stream` has passed this point.
    unsafe fn copy(
        &self,
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
        stream: RawStream,
    ) -> Result<()>;

    /// Enqueues a copy from ordinary host memory. `src` may be reused as soon as the call returns.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// `src.len()` bytes at `dst` stay mapped, and nothing else touches them, until `stream` has passed this point.
    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()>;

    /// Copies to ordinary host memory and blocks until `dst` is filled. The copy is work of `stream`: it runs before
    /// anything that other threads enqueue there afterwards. After an error, the contents of `dst` are undefined.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// `dst.len()` bytes at `src` stay mapped until the call returns. Until then, all work that writes them is on
    /// `stream` or ordered with it by events.
    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()>;

    /// Enqueues writing `value` to each of `bytes` bytes at `dst`.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// The range stays mapped, and nothing else touches it, until `stream` has passed this point.
    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()>;

    /// Enqueues a kernel.
    ///
    /// # Errors
    /// As [`Driver`] says; also when the device has no code for it.
    ///
    /// # Safety
    /// The safety conditions of [`Kernel::run`] hold from now until `stream` has passed this point.
    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()>;

    /// Tells AddressSanitizer, in order with `stream`, whether a range may be touched. Exists only in AddressSanitizer
    /// builds. Does nothing in drivers whose memory is outside the process's address space.
    #[cfg(asan)]
    fn permit(&self, ptr: DevicePtr, bytes: u64, is_permitted: bool, stream: RawStream) {
        let _ = (ptr, bytes, is_permitted, stream);
    }

    // Capture.

    /// Begins to record work enqueued on `stream` instead of running it. A stream that waits for an event
    /// recorded in the capture joins the capture.
    ///
    /// During a capture, the only forbidden calls are those that would wait for a captured stream or for an event
    /// recorded on one. Allocating and mapping memory is not stream work: any thread may do it.
    ///
    /// # Errors
    /// As [`Driver`] says; also when `stream` is already being captured.
    fn begin_capture(&self, stream: RawStream) -> Result<()>;

    /// Ends the capture begun on `stream`.
    ///
    /// # Errors
    /// As [`Driver`] says; also when a stream that joined the capture was not joined back, or a forbidden call
    /// invalidated the capture. The capture is over in any case.
    fn end_capture(&self, stream: RawStream) -> Result<RawGraph>;

    /// Whether `stream` is part of a capture.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn is_capturing(&self, stream: RawStream) -> Result<bool>;

    /// Enqueues the captured work on `stream` as one unit.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// The safety conditions of the captured calls hold again until `stream` has passed this point.
    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()>;

    /// Destroys a graph. Launches already enqueued still run.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_graph(&self, graph: RawGraph) -> Result<()>;
}
