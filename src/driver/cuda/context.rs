//! One device of the library, and making its primary context current on the calling thread.
//!
//! The primary context is retained once per device and kept until the process ends. Other CUDA code in the process
//! uses the same context, so its memory and streams can be combined with ours.
//!
//! Other code can make its own context current on any thread at any time. So each call first queries the current
//! context (the library reads it from thread-local storage) and restores a foreign one afterwards.

use std::ffi::{CStr, c_int};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUcontext, CUctx_st, CUdevice, CUdevice_attribute, CUevent_st};
use parking_lot::Mutex;

use super::failure::{code, refuse};
use super::kernels::Code;
use super::library::{Library, ask};
use super::pages;
use super::uploads::Uploads;
use crate::driver::{DeviceKind, DeviceProperties};
use crate::error::Result;
use crate::units::DeviceOrdinal;

/// An opaque handle of the library, such as a `CUstream`.
#[derive(Debug)]
pub(super) struct Raw<T>(pub(super) *mut T);

impl<T> Clone for Raw<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Raw<T> {}

// SAFETY: these pointers are never dereferenced here, and the library accepts them from every thread.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above; the library does its own locking.
unsafe impl<T> Sync for Raw<T> {}

/// Device attributes beyond [`DeviceProperties`].
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    /// Whether the driver has a stream-ordered allocator for the device.
    pub(super) memory_pools: bool,
    pub(super) multiprocessors: u32,
    /// Whether the device can access pageable host memory.
    pub(super) pageable_access: bool,
}

/// An opened device.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) library: &'static Library,
    pub(super) device: CUdevice,
    pub(super) properties: DeviceProperties,
    pub(super) abilities: Abilities,
    pub(super) code: Code,
    raw: Raw<CUctx_st>,
    /// Unused events, for reuse.
    pub(super) idle_events: Mutex<Vec<Raw<CUevent_st>>>,
    /// Stages copies from pageable memory if the device can access that.
    pub(super) uploads: Uploads,
}

/// The number of devices.
pub(super) fn count(library: &'static Library) -> Result<u32> {
    let mut count: c_int = 0;
    // SAFETY: `count` receives the result.
    unsafe { ask!(library, "open", cuDeviceGetCount(&raw mut count)) }?;
    Ok(count.unsigned_abs())
}

impl Context {
    /// Opens the device with this number. It is never closed.
    pub(super) fn open(ordinal: u32) -> Result<&'static Self> {
        let context = Self::retain(Library::get()?, ordinal)?;
        Ok(Box::leak(Box::new(context)))
    }

    fn retain(library: &'static Library, ordinal: u32) -> Result<Self> {
        let count = count(library)?;
        if count == 0 {
            return Err(refuse(
                "open",
                code::NO_DEVICE,
                "the driver has no CUDA device",
            ));
        }
        let index = c_int::try_from(ordinal).ok().filter(|_| ordinal < count);
        let Some(index) = index else {
            let reason = format!("there is no CUDA device {ordinal}: the driver has {count}");
            return Err(refuse("open", code::INVALID_DEVICE, reason));
        };
        let mut device = 0;
        // SAFETY: `device` receives the result.
        unsafe { ask!(library, "open", cuDeviceGet(&raw mut device, index)) }?;
        let (properties, abilities) = describe(library, device, ordinal)?;
        let mut raw = null_mut();
        // SAFETY: `device` came from the library; `raw` receives the result. Never released: see the module.
        unsafe {
            ask!(
                library,
                "open",
                cuDevicePrimaryCtxRetain(&raw mut raw, device)
            )
        }?;
        Ok(Self {
            library,
            device,
            properties,
            abilities,
            code: Code::default(),
            raw: Raw(raw),
            idle_events: Mutex::default(),
            uploads: Uploads::default(),
        })
    }

    /// The library's handle.
    pub(super) fn raw(&self) -> CUcontext {
        self.raw.0
    }

    /// Whether `other` is this context.
    pub(super) fn is(&self, other: CUcontext) -> bool {
        self.raw.0 == other
    }

    /// Makes this context current on the calling thread until the guard is dropped.
    pub(super) fn bind(&self, call: &'static str) -> Result<Bound> {
        let mut before = null_mut();
        // SAFETY: `before` receives the result.
        unsafe { ask!(self.library, call, cuCtxGetCurrent(&raw mut before)) }?;
        let mut restore = None;
        if before != self.raw.0 {
            // SAFETY: the context is never released.
            unsafe { ask!(self.library, call, cuCtxSetCurrent(self.raw.0)) }?;
            restore = (!before.is_null()).then_some((self.library, before));
        }
        Ok(Bound { restore })
    }
}

/// A guard: while it lives, a context is current on this thread.
pub(super) struct Bound {
    /// The context to restore, if the thread had another one before.
    restore: Option<(&'static Library, CUcontext)>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some((library, context)) = self.restore {
            // SAFETY: the context was current on this thread when the guard was made. If its owner has since
            // destroyed it, the library reports that, and there is nothing to restore.
            let _ = unsafe { ask!(library, "restore", cuCtxSetCurrent(context)) };
        }
    }
}

fn attribute(library: &Library, device: CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    let mut value: c_int = 0;
    // SAFETY: `device` came from the library; `value` receives the result.
    unsafe {
        ask!(
            library,
            "open",
            cuDeviceGetAttribute(&raw mut value, attribute, device)
        )
    }?;
    Ok(value.unsigned_abs())
}

fn describe(
    library: &'static Library,
    device: CUdevice,
    ordinal: u32,
) -> Result<(DeviceProperties, Abilities)> {
    use CUdevice_attribute::{
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED as MEMORY_POOLS,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as MULTIPROCESSORS,
        CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS as PAGEABLE_ACCESS,
        CU_DEVICE_ATTRIBUTE_VIRTUAL_ADDRESS_MANAGEMENT_SUPPORTED as VIRTUAL_MEMORY,
    };
    let attribute = |wanted| attribute(library, device, wanted);
    let mut name = [0; 256];
    // SAFETY: the library writes at most the 256 bytes that `name` has.
    unsafe {
        ask!(
            library,
            "open",
            cuDeviceGetName(name.as_mut_ptr(), 256, device)
        )
    }?;
    let mut total = 0;
    // SAFETY: `total` receives the result.
    unsafe { ask!(library, "open", cuDeviceTotalMem_v2(&raw mut total, device)) }?;
    let virtual_memory = attribute(VIRTUAL_MEMORY)? != 0;
    let granularity = if virtual_memory {
        pages::granularity(library, device)?
    } else {
        pages::USUAL_GRANULARITY
    };
    let properties = DeviceProperties {
        kind: DeviceKind::Cuda,
        name: text(&name),
        ordinal: DeviceOrdinal(ordinal),
        total_memory: total as u64,
        virtual_memory,
        page_granularity: granularity,
        compute_capability: Some((attribute(MAJOR)?, attribute(MINOR)?)),
    };
    let abilities = Abilities {
        memory_pools: attribute(MEMORY_POOLS)? != 0,
        multiprocessors: attribute(MULTIPROCESSORS)?,
        pageable_access: attribute(PAGEABLE_ACCESS)? != 0,
    };
    Ok((properties, abilities))
}

/// The text up to the first zero.
fn text(chars: &[std::ffi::c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().map(|c| c.to_ne_bytes()[0]).collect();
    let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    text.to_string_lossy().into_owned()
}
