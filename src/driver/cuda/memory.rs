//! Plain memory, pinned memory, and copies.
//!
//! Pinned memory is cached, not write-combined: the host reads results from it, and reads of write-combined memory are
//! slow.

use std::ffi::{c_uint, c_void};
use std::ptr::{null_mut, with_exposed_provenance_mut};

use cudarc::driver::sys::CUpointer_attribute;

use super::context::Context;
use super::failure::{code, refuse};
use super::library::ask;
use super::streams::StreamEntry;
use crate::driver::{DevicePtr, MemoryInfo};
use crate::error::Result;
use crate::units::to_usize;

/// `CU_MEMHOSTALLOC_PORTABLE`: pinned for all devices, not only for the context's.
const PORTABLE: c_uint = 1;

pub(super) fn info(context: &Context) -> Result<MemoryInfo> {
    const CALL: &str = "memory_info";
    let _bound = context.bind(CALL)?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: both receive a result.
    unsafe {
        ask!(
            context.library,
            CALL,
            cuMemGetInfo_v2(&raw mut free, &raw mut total)
        )
    }?;
    Ok(MemoryInfo {
        free: free as u64,
        total: total as u64,
    })
}

pub(super) fn allocate(context: &Context, bytes: u64) -> Result<DevicePtr> {
    const CALL: &str = "allocate";
    let _bound = context.bind(CALL)?;
    let mut ptr = 0;
    // SAFETY: `ptr` receives the result.
    unsafe {
        ask!(
            context.library,
            CALL,
            cuMemAlloc_v2(&raw mut ptr, to_usize(bytes))
        )
    }?;
    Ok(DevicePtr(ptr))
}

/// # Safety
/// As [`Driver::free`](crate::driver::Driver::free).
pub(super) unsafe fn free(context: &Context, ptr: DevicePtr) -> Result<()> {
    const CALL: &str = "free";
    if ptr.0 == 0 {
        // The library ignores null.
        return Err(refuse(CALL, code::INVALID_VALUE, "zero is not an address"));
    }
    let _bound = context.bind(CALL)?;
    // SAFETY: the caller gives the memory up; the library waits for work in flight and refuses addresses it
    // did not return.
    unsafe { ask!(context.library, CALL, cuMemFree_v2(ptr.0)) }
}

/// Allocates from the driver's own pool in stream order, or plain memory if there is no such pool.
pub(super) fn allocate_on(stream: &StreamEntry, bytes: u64) -> Result<DevicePtr> {
    const CALL: &str = "allocate_on";
    let context = stream.context;
    if !context.abilities.memory_pools {
        return allocate(context, bytes);
    }
    let _bound = context.bind(CALL)?;
    let mut ptr = 0;
    let place = &raw mut ptr;
    // SAFETY: the stream is alive; `ptr` receives the result.
    unsafe {
        ask!(
            context.library,
            CALL,
            cuMemAllocAsync(place, to_usize(bytes), stream.raw())
        )
    }?;
    Ok(DevicePtr(ptr))
}

/// # Safety
/// As [`Driver::free_on`](crate::driver::Driver::free_on).
pub(super) unsafe fn free_on(stream: &StreamEntry, ptr: DevicePtr) -> Result<()> {
    const CALL: &str = "free_on";
    let context = stream.context;
    if !context.abilities.memory_pools {
        stream.synchronize(CALL)?;
        // SAFETY: the caller gives the memory up, and its stream has run.
        return unsafe { free(context, ptr) };
    }
    let _bound = context.bind(CALL)?;
    // SAFETY: the caller gives the memory up; the library refuses addresses it did not return.
    unsafe { ask!(context.library, CALL, cuMemFreeAsync(ptr.0, stream.raw())) }
}

pub(super) fn allocate_pinned(context: &Context, bytes: u64) -> Result<DevicePtr> {
    const CALL: &str = "allocate_pinned";
    let _bound = context.bind(CALL)?;
    let mut ptr = null_mut();
    // SAFETY: `ptr` receives the result.
    unsafe {
        ask!(
            context.library,
            CALL,
            cuMemHostAlloc(&raw mut ptr, to_usize(bytes), PORTABLE)
        )
    }?;
    Ok(DevicePtr(ptr.expose_provenance() as u64))
}

/// # Safety
/// As [`Driver::free_pinned`](crate::driver::Driver::free_pinned).
pub(super) unsafe fn free_pinned(context: &Context, ptr: DevicePtr) -> Result<()> {
    const CALL: &str = "free_pinned";
    let _bound = context.bind(CALL)?;
    let ptr = with_exposed_provenance_mut::<c_void>(to_usize(ptr.0));
    // SAFETY: the caller gives the memory up; the library refuses addresses it did not return.
    unsafe { ask!(context.library, CALL, cuMemFreeHost(ptr)) }
}

/// # Safety
/// As [`Driver::copy`](crate::driver::Driver::copy).
pub(super) unsafe fn copy(
    stream: &StreamEntry,
    dst: DevicePtr,
    src: DevicePtr,
    bytes: u64,
) -> Result<()> {
    const CALL: &str = "copy";
    let _bound = stream.context.bind(CALL)?;
    let bytes = to_usize(bytes);
    // SAFETY: the caller promises both ranges. The library tells from the addresses where they are.
    unsafe {
        ask!(
            stream.context.library,
            CALL,
            cuMemcpyAsync(dst.0, src.0, bytes, stream.raw())
        )
    }
}

/// Enqueues a copy from host memory, and returns whether the library may still read `src` afterwards.
///
/// The library reads pageable memory before the call returns, unless the device can access it; it reads pinned memory
/// when the stream reaches the copy.
///
/// # Safety
/// As [`Driver::copy_from_host`](crate::driver::Driver::copy_from_host). If this returns `true`, `src` also stays
/// unchanged until the stream has passed this point.
pub(super) unsafe fn upload(
    call: &'static str,
    stream: &StreamEntry,
    dst: DevicePtr,
    src: &[u8],
) -> Result<bool> {
    let library = stream.context.library;
    let _bound = stream.context.bind(call)?;
    let (start, bytes) = (src.as_ptr().cast::<c_void>(), src.len());
    // SAFETY: the caller promises the destination; the source is borrowed.
    unsafe {
        ask!(
            library,
            call,
            cuMemcpyHtoDAsync_v2(dst.0, start, bytes, stream.raw())
        )
    }?;
    let kind = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
    // The attribute query fails for pageable memory.
    Ok(attribute(
        stream.context,
        kind,
        DevicePtr(start.expose_provenance() as u64),
    )
    .is_some())
}

/// A 32-bit attribute of an address; `None` if the library does not know the address. The context must be current.
pub(super) fn attribute(
    context: &Context,
    attribute: CUpointer_attribute,
    ptr: DevicePtr,
) -> Option<c_uint> {
    let mut value: c_uint = 0;
    let place = (&raw mut value).cast();
    let ask = context.library.functions.cuPointerGetAttribute;
    // SAFETY: `value` receives the result; any address may be queried.
    let known = unsafe { ask(place, attribute, ptr.0) };
    (known == code::SUCCESS).then_some(value)
}

/// # Safety
/// As [`Driver::copy_to_host`](crate::driver::Driver::copy_to_host).
pub(super) unsafe fn download(stream: &StreamEntry, dst: &mut [u8], src: DevicePtr) -> Result<()> {
    const CALL: &str = "copy_to_host";
    if !dst.is_empty() {
        let _bound = stream.context.bind(CALL)?;
        let (start, bytes) = (dst.as_mut_ptr().cast::<c_void>(), dst.len());
        // SAFETY: the caller promises the source. The destination is borrowed until the wait below is over.
        // If the wait fails, the context or the capture is lost, and nothing writes the destination any more.
        unsafe {
            ask!(
                stream.context.library,
                CALL,
                cuMemcpyDtoHAsync_v2(start, src.0, bytes, stream.raw())
            )
        }?;
    }
    stream.synchronize(CALL)
}

/// # Safety
/// As [`Driver::fill`](crate::driver::Driver::fill).
pub(super) unsafe fn fill(
    stream: &StreamEntry,
    dst: DevicePtr,
    value: u8,
    bytes: u64,
) -> Result<()> {
    const CALL: &str = "fill";
    let _bound = stream.context.bind(CALL)?;
    let bytes = to_usize(bytes);
    // SAFETY: the caller promises the range.
    unsafe {
        ask!(
            stream.context.library,
            CALL,
            cuMemsetD8Async(dst.0, value, bytes, stream.raw())
        )
    }
}
