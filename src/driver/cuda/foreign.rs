//! Streams shared with other CUDA code of the process, such as cudarc's.
//!
//! A stream is owned by this crate ([`Device::create_stream`]), shared with cudarc and kept alive by it
//! ([`share_stream`]), or borrowed through a raw handle ([`borrow_stream`]).
//!
//! Two CUDA handles name default streams. The *legacy* default stream (0 or 1) is one stream of the context. It is
//! ordered with every *blocking* stream of the context, in both directions. The streams made here and by cudarc are
//! non-blocking and not ordered with it. The *per-thread* default stream (2) is a different stream on each thread, and
//! no handle lets one thread name another thread's. But any thread can free memory, and a pool that is short of memory
//! queries the stream's progress from any thread. Only one thread could do that, so this stream is refused as a home.
//! As a stream of use it is fine: each thread marks its own uses of a
//! [`DeviceBuffer`](crate::storage::DeviceBuffer).
//!
//! If a stream is shared twice, a pool sees two streams, and orders them by events like any other two.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUstream;

use super::context::Bound;
use super::failure::{code, refuse};
use super::library::Library;
use super::streams::StreamEntry;
use super::{CudaDriver, TABLES};
use crate::driver::{Device, DeviceKind, RawStream, Stream};
use crate::error::Result;

/// The handle of the per-thread default stream: a different stream on each thread.
const PER_THREAD: usize = 2;

/// Shares a stream of cudarc, so that this crate can enqueue work and allocate memory in order with cudarc's work. The
/// returned stream keeps `stream` alive, and so do its clones and pools that remember it.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `share_stream` if `device` is not a CUDA device, if `stream`
/// does not belong to its primary context (the one of `CudaContext::new`), or if it is the per-thread default
/// stream, which is a different stream on each thread.
pub fn share_stream(device: &Device, stream: &Arc<CudaStream>) -> Result<Stream> {
    const CALL: &str = "share_stream";
    let driver = open(CALL, device, stream.cu_stream())?;
    if !driver.context.is(stream.context().cu_ctx()) {
        let reason = format!(
            "the stream does not belong to the primary context of {}",
            device.properties().name
        );
        return Err(refuse(CALL, code::INVALID_VALUE, reason));
    }
    let entry = StreamEntry::shared(driver.context, Arc::clone(stream));
    Ok(register(device, entry))
}

/// Borrows a stream that other code made, so that this crate can enqueue work and allocate memory in order with that
/// code's work. The other code remains responsible for destroying it.
///
/// Handles 0 and 1 mean the legacy default stream, which is not ordered with this crate's other streams.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `borrow_stream` if `device` is not a CUDA device, or for the
/// per-thread default stream (handle 2), which is a different stream on each thread.
///
/// # Safety
/// The stream belongs to the primary context of `device`. It outlives the returned stream, its clones, and everything
/// that remembers it: a pool remembers it until all blocks that were used on it are gone.
pub unsafe fn borrow_stream(device: &Device, stream: CUstream) -> Result<Stream> {
    let driver = open("borrow_stream", device, stream)?;
    Ok(register(
        device,
        StreamEntry::borrowed(driver.context, stream),
    ))
}

/// The driver of `device`, unless it is not a CUDA device or `stream` is the per-thread default stream.
fn open(call: &'static str, device: &Device, stream: CUstream) -> Result<Arc<CudaDriver>> {
    let properties = device.properties();
    if properties.kind != DeviceKind::Cuda {
        let reason = format!("{} is not a CUDA device", properties.name);
        return Err(refuse(call, code::INVALID_DEVICE, reason));
    }
    if stream.addr() == PER_THREAD {
        let reason = "the per-thread default stream is a different stream on each thread: \
                      make a stream with CudaContext::new_stream";
        return Err(refuse(call, code::INVALID_VALUE, reason));
    }
    CudaDriver::get(properties.ordinal.0)
}

fn register(device: &Device, entry: StreamEntry) -> Stream {
    Stream::from_raw(device, RawStream(TABLES.streams.insert(entry)))
}

/// The CUDA handle of a stream, to pass to other code. Valid while `stream` lives.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `stream_handle` if the stream is not on a CUDA device.
pub fn stream_handle(stream: &Stream) -> Result<CUstream> {
    const CALL: &str = "stream_handle";
    if stream.device().properties().kind != DeviceKind::Cuda {
        let reason = "the stream is not on a CUDA device";
        return Err(refuse(CALL, code::INVALID_VALUE, reason));
    }
    let entry: Arc<StreamEntry> = TABLES.streams.get(CALL, stream.raw().0)?;
    Ok(entry.raw())
}

/// A stream whose device is current on this thread, so that a library can enqueue work on it.
pub(crate) struct Entered {
    pub(crate) handle: CUstream,
    /// The number of the device.
    pub(crate) ordinal: u32,
    _bound: Bound,
}

/// Makes the device of `stream` current on this thread until the guard is dropped; `None` if it is not a CUDA device.
pub(crate) fn enter(call: &'static str, stream: &Stream) -> Result<Option<Entered>> {
    let properties = stream.device().properties();
    if properties.kind != DeviceKind::Cuda {
        return Ok(None);
    }
    let entry = TABLES.streams.get(call, stream.raw().0)?;
    Ok(Some(Entered {
        handle: entry.raw(),
        ordinal: properties.ordinal.0,
        _bound: entry.context.bind(call)?,
    }))
}

/// Whether libraries that look up the driver by its usual name find the one used here.
pub(crate) fn is_found_by_others() -> bool {
    Library::get().is_ok_and(Library::is_found_by_others)
}
