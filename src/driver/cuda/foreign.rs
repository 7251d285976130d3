//! Streams shared with other CUDA code of the process, such as cudarc's.
//!
//! A stream is ours ([`Device::create_stream`]), shared with cudarc, which keeps it alive
//! ([`share_stream`]), or lent by a raw handle ([`borrow_stream`]).
//!
//! Two handles of CUDA's stand for no stream that somebody made. The *legacy* default stream (0 or 1) is one
//! stream of the context. Work on it runs behind the work that every *blocking* stream of the context was given
//! before, and theirs behind it; the streams made here and by cudarc are non-blocking and not ordered with it.
//! The *per-thread* default stream (2) is another stream on each thread, and has no other handle by which a
//! second thread could name it. Memory may be given back by any thread, and whoever is short of it asks how far the
//! stream is: no thread but one could tell, so it is refused as a home. As a stream of use it is fine: each
//! thread marks its own uses of a [`DeviceBuffer`](crate::storage::DeviceBuffer).
//!
//! Sharing a stream twice gives two streams to a pool, which orders them by events like any two.

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

/// What stands for the default stream of the calling thread: another stream on each thread.
const PER_THREAD: usize = 2;

/// A stream of cudarc's, for work and memory of ours in order with its work. The returned stream keeps
/// `stream` alive, as does what remembers it.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `share_stream` if `device` is no CUDA device, if `stream`
/// does not belong to its primary context (the one of `CudaContext::new`), and for the per-thread default
/// stream, which is another stream on each thread.
pub fn share_stream(device: &Device, stream: &Arc<CudaStream>) -> Result<Stream> {
    const CALL: &str = "share_stream";
    let driver = open(CALL, device, stream.cu_stream())?;
    if !driver.context.is(stream.context().cu_ctx()) {
        let reason = format!(
            "the stream belongs to another context than the primary one of {}",
            device.properties().name
        );
        return Err(refuse(CALL, code::INVALID_VALUE, reason));
    }
    let entry = StreamEntry::shared(driver.context, Arc::clone(stream));
    Ok(register(device, entry))
}

/// A stream that other code made, for work and memory of ours in order with its work. It stays theirs to
/// destroy.
///
/// The handles 0 and 1 mean the legacy default stream, which other streams of ours are not ordered with.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `borrow_stream` if `device` is no CUDA device, and for the
/// per-thread default stream (handle 2), which is another stream on each thread.
///
/// # Safety
/// The stream belongs to the primary context of `device` and outlives the returned one, its clones, and what
/// remembers it: a pool until all blocks that were used on the stream are gone.
pub unsafe fn borrow_stream(device: &Device, stream: CUstream) -> Result<Stream> {
    let driver = open("borrow_stream", device, stream)?;
    Ok(register(
        device,
        StreamEntry::borrowed(driver.context, stream),
    ))
}

/// The driver of `device`, if it can have a stream of this handle.
fn open(call: &'static str, device: &Device, stream: CUstream) -> Result<Arc<CudaDriver>> {
    let properties = device.properties();
    if properties.kind != DeviceKind::Cuda {
        let reason = format!("{} is no CUDA device", properties.name);
        return Err(refuse(call, code::INVALID_DEVICE, reason));
    }
    if stream.addr() == PER_THREAD {
        let reason = "the per-thread default stream is another stream on each thread: make one of your own, as CudaContext::new_stream does";
        return Err(refuse(call, code::INVALID_VALUE, reason));
    }
    CudaDriver::get(properties.ordinal.0)
}

fn register(device: &Device, entry: StreamEntry) -> Stream {
    Stream::from_raw(device, RawStream(TABLES.streams.insert(entry)))
}

/// The driver's handle of a stream of a CUDA device, to pass to other code. Valid while `stream` lives.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) with call `stream_handle` if the stream is not one of a CUDA device.
pub fn stream_handle(stream: &Stream) -> Result<CUstream> {
    const CALL: &str = "stream_handle";
    if stream.device().properties().kind != DeviceKind::Cuda {
        let reason = "the stream is not one of a CUDA device";
        return Err(refuse(CALL, code::INVALID_VALUE, reason));
    }
    let entry: Arc<StreamEntry> = TABLES.streams.get(CALL, stream.raw().0)?;
    Ok(entry.raw())
}

/// A stream whose device is current on this thread, for a library that enqueues work on it.
pub(crate) struct Entered {
    pub(crate) handle: CUstream,
    /// The number of the device.
    pub(crate) ordinal: u32,
    _bound: Bound,
}

/// Makes the device of `stream` current on this thread until the guard goes; `None` if it is no CUDA device.
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

/// Whether libraries that look for the driver by its usual name find the one that is used here.
pub(crate) fn is_found_by_others() -> bool {
    Library::get().is_ok_and(Library::is_found_by_others)
}
