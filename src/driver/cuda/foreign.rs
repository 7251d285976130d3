//! Streams shared with other CUDA code of the process, such as cudarc's.

use std::sync::Arc;

use cudarc::driver::sys::CUstream;

use super::failure::{code, refuse};
use super::streams::StreamEntry;
use super::{CudaDriver, TABLES};
use crate::driver::{Device, DeviceKind, RawStream, Stream};
use crate::error::Result;

/// What stands for the default stream of the calling thread: another stream on each thread.
const PER_THREAD: usize = 2;

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
    const CALL: &str = "borrow_stream";
    let properties = device.properties();
    if properties.kind != DeviceKind::Cuda {
        let reason = format!("{} is no CUDA device", properties.name);
        return Err(refuse(CALL, code::INVALID_DEVICE, reason));
    }
    if stream.addr() == PER_THREAD {
        let reason =
            "the per-thread default stream is another stream on each thread: make one of your own";
        return Err(refuse(CALL, code::INVALID_VALUE, reason));
    }
    let driver = CudaDriver::get(properties.ordinal.0)?;
    let entry = StreamEntry::borrowed(driver.context, stream);
    Ok(Stream::from_raw(
        device,
        RawStream(TABLES.streams.insert(entry)),
    ))
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
