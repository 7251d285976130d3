//! Everything that is asked of a device, and nothing more.
//!
//! [`Driver`] is the one seam between this crate and a device: above it, the same code runs on the host
//! device and on CUDA. A port is one implementation of this trait.
//!
//! Words. A *stream* is a queue of work that runs in order; work of two streams is ordered only through
//! *events*. An *event* marks a point in a stream: it completes when the work enqueued before its record
//! has. *Enqueue* means that the call returns before the work ran. A *page* is physical memory without an
//! address; *mapping* gives it one, and may be done at several addresses at once.
//!
//! Handles ([`RawStream`], [`RawEvent`], [`PageHandle`], [`RawGraph`]) are plain numbers that belong to the
//! driver that made them; [`Stream`], [`Event`] and [`Graph`] own them. The layers above use the owners.
//!
//! Must not know: blocks, pools, tensors, element types.

#![allow(
    unsafe_code,
    reason = "device addresses are plain numbers; their users promise what they stand for"
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
/// Addresses are unified: pinned host memory and the memory of every device of one driver have different
/// addresses, and a copy finds out by itself where its operands lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// The address `bytes` further on.
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
    /// Its name, for people.
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
    /// Bytes that nobody holds.
    pub free: u64,
    /// Bytes the device has.
    pub total: u64,
}

/// A device, as this crate sees it. Object safe; all methods may be called from any thread.
///
/// # Ordering
/// Work enqueued on one stream runs in the order in which the enqueuing calls returned (for calls from
/// different threads the callers must order them). Work of different streams is ordered only by
/// [`record`](Self::record) and [`stream_wait`](Self::stream_wait).
///
/// # Errors
/// Every fallible method returns [`Error::Driver`](crate::Error::Driver) with the name of the method when
/// the device refuses. After a kernel failed, its stream reports that failure from every later call that
/// waits for it. Kernels, and what is dropped with them, must not wait: calls that block are refused to them.
/// Calls that a capture forbids return [`Error::Capturing`](crate::Error::Capturing).
///
/// # Safety
/// Safe code in the layers above reads and writes where a driver points, and reuses memory when a driver says that
/// its work has run. An implementation promises:
///
/// - **Memory.** The bytes that [`allocate`](Self::allocate), [`allocate_on`](Self::allocate_on) and
///   [`allocate_pinned`](Self::allocate_pinned) return are as many as were asked for, start at a multiple of 512,
///   overlap no other live memory, and are readable and writable by the device, pinned ones by the host too, until
///   they are given back. A range of [`reserve`](Self::reserve) overlaps no other live range. After
///   [`map`](Self::map), its addresses reach the pages in the order given and nothing else, until they are
///   unmapped. A call that takes memory away and fails has not taken it.
/// - **Order.** Work of a stream runs once, in order, and after what the stream waits for. A query answers `true`,
///   and a wait returns `Ok`, only when the work it asks about has run.
/// - **The host's memory.** [`copy_from_host`](Self::copy_from_host) reads `src` only before it returns.
///   [`copy_to_host`](Self::copy_to_host) writes `dst` only before it returns, with an error too, and has filled all
///   of it when it returns `Ok`.
/// - **Identity.** A handle names one object until that is destroyed. Two drivers report one
///   [`platform`](Self::platform) only if each understands the other's streams, events and addresses.
///   [`properties`](Self::properties) never change.
///
/// A wrapper that passes each call on to another driver, or refuses it, keeps these promises if that driver does.
pub unsafe trait Driver: Debug + Send + Sync {
    /// What the device is and can do.
    fn properties(&self) -> &DeviceProperties;

    /// Free and total memory now.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn memory_info(&self) -> Result<MemoryInfo>;

    /// Identifies the group of devices that understand each other's streams, events and addresses.
    fn platform(&self) -> u64;

    // Plain memory.

    /// Takes `bytes` (not 0) of device memory; contents are undefined. Aligned to 512 bytes at least.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) also when there is no room: the pool makes the report.
    fn allocate(&self, bytes: u64) -> Result<DevicePtr>;

    /// Gives back what [`allocate`](Self::allocate) returned.
    ///
    /// # Errors
    /// As [`Driver`] says, and for an address that `allocate` did not return.
    ///
    /// # Safety
    /// No enqueued work may still touch the memory: whether this waits for work in flight is up to the driver.
    unsafe fn free(&self, ptr: DevicePtr) -> Result<()>;

    /// Takes `bytes` (not 0) of device memory in stream order: the address is there at once, for work enqueued
    /// on `stream` behind this call. A driver without an allocator of its own gives plain memory.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    fn allocate_on(&self, bytes: u64, stream: RawStream) -> Result<DevicePtr> {
        let _ = stream;
        self.allocate(bytes)
    }

    /// Gives back what [`allocate_on`](Self::allocate_on) returned, when `stream` has passed here. A driver
    /// without an allocator of its own waits for the stream.
    ///
    /// # Errors
    /// As [`free`](Self::free).
    ///
    /// # Safety
    /// Work that touches the memory is enqueued on `stream` before this call, or is waited for by it.
    unsafe fn free_on(&self, ptr: DevicePtr, stream: RawStream) -> Result<()> {
        self.synchronize_stream(stream)?;
        // SAFETY: all work that touches the memory has run.
        unsafe { self.free(ptr) }
    }

    /// Takes `bytes` (not 0) of pinned host memory, readable by the host and by the device at one address.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr>;

    /// Gives back what [`allocate_pinned`](Self::allocate_pinned) returned.
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

    /// Gives a reserved range back; everything in it must have been unmapped.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;

    /// Takes `bytes` of physical memory without an address.
    ///
    /// # Errors
    /// As [`Driver`] says; also when there is no room.
    fn create_page(&self, bytes: u64) -> Result<PageHandle>;

    /// Gives physical memory back. It lives on until its last mapping is gone.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_page(&self, page: PageHandle) -> Result<()>;

    /// Maps `pages`, each as a whole, side by side from `ptr` on, readable and writable by this device. A
    /// page may be mapped at several addresses; they then show the same bytes.
    ///
    /// # Errors
    /// As [`Driver`] says; nothing is mapped then.
    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()>;

    /// Removes the mappings in a range. Mapped pages must lie in the range as a whole.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// No enqueued work may still touch the range: unmapping does not wait.
    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()>;

    /// Says that the work enqueued next uses all of a range that the caller holds: memory that would come piece
    /// by piece with the first touch may come now, all at once. Cheap where it has come. A hint, which changes
    /// no contents; the default ignores it.
    fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        let _ = (ptr, bytes);
    }

    // Streams and events.

    /// Makes a stream that is ordered with no other.
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

    /// Marks the present end of `stream` with `event`, replacing an earlier mark.
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

    /// Makes work enqueued on `stream` from now on wait for the point that `event` marks now. Does not
    /// block the host. The event may belong to another device of the same [`platform`](Self::platform).
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()>;

    // Work.

    /// Enqueues a copy of `bytes` bytes between any two places with an address: this device, another
    /// device of the platform, pinned memory. The ranges must not overlap.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// Both ranges stay mapped, and nothing else writes them or reads `dst`, until `stream` has passed here.
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
    /// `src.len()` bytes at `dst` stay mapped and untouched by others until `stream` has passed here.
    unsafe fn copy_from_host(&self, dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()>;

    /// Copies to ordinary host memory and blocks until `dst` is filled. The copy is work of `stream`: it comes before
    /// what other threads enqueue there afterwards. With an error, `dst` has any contents.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// `dst.len()` bytes at `src` stay mapped until the call returns. Until then, only work of `stream` writes them,
    /// and work that `stream` waits for or that waits for it.
    unsafe fn copy_to_host(&self, dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()>;

    /// Enqueues writing `value` to each of `bytes` bytes at `dst`.
    ///
    /// # Errors
    /// As [`Driver`] says.
    ///
    /// # Safety
    /// The range stays mapped and untouched by others until `stream` has passed here.
    unsafe fn fill(&self, dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()>;

    /// Enqueues a kernel.
    ///
    /// # Errors
    /// As [`Driver`] says; also when the device has no code for it.
    ///
    /// # Safety
    /// What [`Kernel::run`] asks for must hold from now until `stream` has passed here.
    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()>;

    /// Tells AddressSanitizer, in order with `stream`, whether a range may be touched. Only in builds for it; a driver
    /// whose memory is none of the process's does nothing.
    #[cfg(asan)]
    fn permit(&self, ptr: DevicePtr, bytes: u64, is_permitted: bool, stream: RawStream) {
        let _ = (ptr, bytes, is_permitted, stream);
    }

    // Capture.

    /// Begins to record work enqueued on `stream` instead of running it. A stream that waits for an event
    /// recorded in the capture joins it.
    ///
    /// Only what would wait for a captured stream, or for an event recorded on one, is forbidden meanwhile.
    /// Taking and mapping memory is no work of a stream: any thread may do it.
    ///
    /// # Errors
    /// As [`Driver`] says; also when `stream` is already being captured.
    fn begin_capture(&self, stream: RawStream) -> Result<()>;

    /// Ends the capture begun on `stream`.
    ///
    /// # Errors
    /// As [`Driver`] says; also when a stream that joined was not joined back, or the capture was
    /// invalidated by a forbidden call. The capture is over in any case.
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
    /// What was asked for when the work was captured must hold again until `stream` has passed here.
    unsafe fn launch_graph(&self, graph: RawGraph, stream: RawStream) -> Result<()>;

    /// Destroys a graph. Launches already enqueued still run.
    ///
    /// # Errors
    /// As [`Driver`] says.
    fn destroy_graph(&self, graph: RawGraph) -> Result<()>;
}
