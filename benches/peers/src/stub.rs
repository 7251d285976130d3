//! A driver over the harness's stand-in for CUDA: memory, streams and events, nothing that runs.
//!
//! The other allocators of the table pay the stand-in's calls, a few nanoseconds each, so Kitsune pays the
//! same: the host device's streams and events are real and would be timed as well.
//!
//! Must not know: the pool.

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::Arc;

use kitsune::driver::{
    DeviceKind, DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent,
    RawGraph, RawStream,
};
use kitsune::{Device, Error, HostConfig, Result};

const OUT_OF_MEMORY: c_int = 2;
const UNSUPPORTED: c_int = 801;
const NOT_READY: c_int = 600;
const EVENT_WITHOUT_TIMING: c_uint = 2;
const STREAM_WITHOUT_BARRIER: c_uint = 1;

// The stand-in's own functions. Its memory calls have the signatures of the real libraries; properties and
// access rights, which it ignores, are null here.
unsafe extern "C" {
    fn cudaMalloc(out: *mut u64, bytes: usize) -> c_int;
    fn cudaFree(ptr: u64) -> c_int;
    fn cudaMemGetInfo(free: *mut usize, total: *mut usize) -> c_int;
    pub(crate) safe fn cudaDeviceSynchronize() -> c_int;
    fn cudaStreamCreateWithFlags(out: *mut u64, flags: c_uint) -> c_int;
    fn cudaStreamDestroy(stream: u64) -> c_int;
    fn cudaStreamSynchronize(stream: u64) -> c_int;
    fn cudaStreamQuery(stream: u64) -> c_int;
    fn cudaStreamWaitEvent(stream: u64, event: u64, flags: c_uint) -> c_int;
    fn cudaStreamIsCapturing(stream: u64, out: *mut c_int) -> c_int;
    fn cudaEventCreateWithFlags(out: *mut u64, flags: c_uint) -> c_int;
    fn cudaEventDestroy(event: u64) -> c_int;
    fn cudaEventRecord(event: u64, stream: u64) -> c_int;
    fn cudaEventQuery(event: u64) -> c_int;
    fn cudaEventSynchronize(event: u64) -> c_int;
    fn cuMemAddressReserve(out: *mut u64, bytes: usize, align: usize, at: u64, flags: u64)
    -> c_int;
    fn cuMemAddressFree(ptr: u64, bytes: usize) -> c_int;
    fn cuMemCreate(out: *mut u64, bytes: usize, properties: *const c_void, flags: u64) -> c_int;
    fn cuMemRelease(handle: u64) -> c_int;
    fn cuMemMap(ptr: u64, bytes: usize, offset: usize, handle: u64, flags: u64) -> c_int;
    fn cuMemSetAccess(ptr: u64, bytes: usize, access: *const c_void, count: usize) -> c_int;
    fn cuMemUnmap(ptr: u64, bytes: usize) -> c_int;
}

/// The stand-in, as a device.
#[derive(Debug)]
pub(crate) struct StubDriver {
    properties: DeviceProperties,
}

/// The device that the harness says has `bytes` of memory.
pub(crate) fn device(bytes: u64) -> Result<Device> {
    // Properties cannot be made outside the crate; those of a host device with little memory serve.
    let host = Device::host(HostConfig {
        capacity: 1 << 20,
        ..HostConfig::default()
    })?;
    let mut properties = host.properties().clone();
    properties.kind = DeviceKind::Cuda;
    "stub".clone_into(&mut properties.name);
    properties.total_memory = bytes;
    Ok(Device::from_driver(Arc::new(StubDriver { properties })))
}

fn check(call: &'static str, code: c_int) -> Result<()> {
    if code == 0 {
        return Ok(());
    }
    let reason = match code {
        OUT_OF_MEMORY => "out of memory",
        _ => "the stand-in refused",
    };
    Err(error(call, code, reason))
}

fn unsupported<T>(call: &'static str) -> Result<T> {
    Err(error(call, UNSUPPORTED, "the stand-in has no such call"))
}

fn error(call: &'static str, code: c_int, reason: &str) -> Error {
    Error::Driver {
        call,
        code,
        reason: reason.to_owned(),
    }
}

/// What `fill_in` writes through the pointer it is given.
fn made(call: &'static str, fill_in: impl FnOnce(*mut u64) -> c_int) -> Result<u64> {
    let mut out = 0;
    check(call, fill_in(&raw mut out))?;
    Ok(out)
}

/// Lengths on a 64-bit machine.
const fn length(bytes: u64) -> usize {
    bytes as usize
}

// SAFETY: the stand-in's memory calls give out disjoint ranges, and nothing is enqueued, so all work has run.
unsafe impl Driver for StubDriver {
    fn properties(&self) -> &DeviceProperties {
        &self.properties
    }

    fn memory_info(&self) -> Result<MemoryInfo> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: both pointers are to locals of the type that the call writes.
        let code = unsafe { cudaMemGetInfo(&raw mut free, &raw mut total) };
        check("memory_info", code)?;
        Ok(MemoryInfo {
            free: free as u64,
            total: total as u64,
        })
    }

    fn platform(&self) -> u64 {
        0
    }

    fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        // SAFETY: `made` gives a pointer to a local.
        let take = |out| unsafe { cudaMalloc(out, length(bytes)) };
        made("allocate", take).map(DevicePtr)
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the stand-in checks the address itself.
        check("free", unsafe { cudaFree(ptr.0) })
    }

    fn allocate_pinned(&self, _: u64) -> Result<DevicePtr> {
        unsupported("allocate_pinned")
    }

    unsafe fn free_pinned(&self, _: DevicePtr) -> Result<()> {
        unsupported("free_pinned")
    }

    fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        // SAFETY: `made` gives a pointer to a local.
        let take = |out| unsafe { cuMemAddressReserve(out, length(bytes), 0, 0, 0) };
        made("reserve", take).map(DevicePtr)
    }

    fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        // SAFETY: the stand-in checks the address itself.
        check("release", unsafe { cuMemAddressFree(ptr.0, length(bytes)) })
    }

    fn create_page(&self, bytes: u64) -> Result<PageHandle> {
        if bytes != self.properties.page_granularity {
            // `map` takes every page to be of one size.
            return unsupported("create_page");
        }
        // SAFETY: `made` gives a pointer to a local; the stand-in does not read the properties.
        let take = |out| unsafe { cuMemCreate(out, length(bytes), ptr::null(), 0) };
        made("create_page", take).map(PageHandle)
    }

    fn destroy_page(&self, page: PageHandle) -> Result<()> {
        // SAFETY: the stand-in looks the handle up.
        check("destroy_page", unsafe { cuMemRelease(page.0) })
    }

    fn map(&self, ptr: DevicePtr, pages: &[PageHandle]) -> Result<()> {
        let bytes = self.properties.page_granularity;
        for (page, at) in pages.iter().zip(0..) {
            let at = ptr.offset(at * bytes).0;
            // SAFETY: the stand-in counts the call and touches nothing.
            let code = unsafe { cuMemMap(at, length(bytes), 0, page.0, 0) };
            check("map", code)?;
        }
        let all = length(bytes) * pages.len();
        // SAFETY: as above.
        let code = unsafe { cuMemSetAccess(ptr.0, all, ptr::null(), 1) };
        check("map", code)
    }

    unsafe fn unmap(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        // SAFETY: the stand-in counts the call and touches nothing.
        check("unmap", unsafe { cuMemUnmap(ptr.0, length(bytes)) })
    }

    fn create_stream(&self) -> Result<RawStream> {
        // SAFETY: `made` gives a pointer to a local.
        let make = |out| unsafe { cudaStreamCreateWithFlags(out, STREAM_WITHOUT_BARRIER) };
        made("create_stream", make).map(RawStream)
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<()> {
        // SAFETY: a stream is destroyed once, by its owner.
        check("destroy_stream", unsafe { cudaStreamDestroy(stream.0) })
    }

    fn synchronize_stream(&self, stream: RawStream) -> Result<()> {
        // SAFETY: the owner of the handle is alive.
        let code = unsafe { cudaStreamSynchronize(stream.0) };
        check("synchronize_stream", code)
    }

    fn query_stream(&self, stream: RawStream) -> Result<bool> {
        // SAFETY: the owner of the handle is alive.
        is_ready("query_stream", unsafe { cudaStreamQuery(stream.0) })
    }

    fn create_event(&self) -> Result<RawEvent> {
        // SAFETY: `made` gives a pointer to a local.
        let make = |out| unsafe { cudaEventCreateWithFlags(out, EVENT_WITHOUT_TIMING) };
        made("create_event", make).map(RawEvent)
    }

    fn destroy_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: an event is destroyed once, by its owner.
        check("destroy_event", unsafe { cudaEventDestroy(event.0) })
    }

    fn record(&self, event: RawEvent, stream: RawStream) -> Result<()> {
        // SAFETY: the owners of both handles are alive.
        check("record", unsafe { cudaEventRecord(event.0, stream.0) })
    }

    fn query_event(&self, event: RawEvent) -> Result<bool> {
        // SAFETY: the owner of the handle is alive.
        is_ready("query_event", unsafe { cudaEventQuery(event.0) })
    }

    fn synchronize_event(&self, event: RawEvent) -> Result<()> {
        // SAFETY: the owner of the handle is alive.
        let code = unsafe { cudaEventSynchronize(event.0) };
        check("synchronize_event", code)
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<()> {
        // SAFETY: the owners of both handles are alive.
        let code = unsafe { cudaStreamWaitEvent(stream.0, event.0, 0) };
        check("stream_wait", code)
    }

    unsafe fn copy(&self, _: DevicePtr, _: DevicePtr, _: u64, _: RawStream) -> Result<()> {
        unsupported("copy")
    }

    unsafe fn copy_from_host(&self, _: DevicePtr, _: &[u8], _: RawStream) -> Result<()> {
        unsupported("copy_from_host")
    }

    unsafe fn copy_to_host(&self, _: &mut [u8], _: DevicePtr, _: RawStream) -> Result<()> {
        unsupported("copy_to_host")
    }

    unsafe fn fill(&self, _: DevicePtr, _: u8, _: u64, _: RawStream) -> Result<()> {
        unsupported("fill")
    }

    unsafe fn launch(&self, _: Box<dyn Kernel>, _: RawStream) -> Result<()> {
        unsupported("launch")
    }

    fn begin_capture(&self, _: RawStream) -> Result<()> {
        unsupported("begin_capture")
    }

    fn end_capture(&self, _: RawStream) -> Result<RawGraph> {
        unsupported("end_capture")
    }

    fn is_capturing(&self, stream: RawStream) -> Result<bool> {
        let mut status = 0;
        // SAFETY: the pointer is to a local of the type that the call writes.
        let code = unsafe { cudaStreamIsCapturing(stream.0, &raw mut status) };
        check("is_capturing", code)?;
        Ok(status != 0)
    }

    unsafe fn launch_graph(&self, _: RawGraph, _: RawStream) -> Result<()> {
        unsupported("launch_graph")
    }

    fn destroy_graph(&self, _: RawGraph) -> Result<()> {
        unsupported("destroy_graph")
    }
}

/// Whether the stand-in's answer to a query is "done".
fn is_ready(call: &'static str, code: c_int) -> Result<bool> {
    if code == NOT_READY {
        return Ok(false);
    }
    check(call, code).map(|()| true)
}
