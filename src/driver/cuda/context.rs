//! One device of the library, and its primary context made current on the thread that calls.
//!
//! The primary context is retained once for each device and kept until the process ends: it is the one that
//! other CUDA code of the process uses, so its memory and streams mix with ours.
//!
//! Other code may make its own context current on any thread at any time, so that is asked before each call
//! (the library answers from thread-local storage), and a context of theirs is put back afterwards.

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

/// A pointer of the library's that stands for something in the device.
#[derive(Debug)]
pub(super) struct Raw<T>(pub(super) *mut T);

impl<T> Clone for Raw<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Raw<T> {}

// SAFETY: such pointers are opaque here, and the library allows every thread to use them.
unsafe impl<T> Send for Raw<T> {}
// SAFETY: as above; the library locks what it has to.
unsafe impl<T> Sync for Raw<T> {}

/// What a device says about itself beyond [`DeviceProperties`].
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    /// Whether memory can be taken and given back in stream order.
    pub(super) memory_pools: bool,
    pub(super) multiprocessors: u32,
    /// Whether the device can reach ordinary memory of the host.
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
    /// Events that nobody uses, to be handed out again.
    pub(super) idle_events: Mutex<Vec<Raw<CUevent_st>>>,
    /// What copies from ordinary memory go through, where the device can reach that.
    pub(super) uploads: Uploads,
}

/// Devices in the library.
pub(super) fn count(library: &'static Library) -> Result<u32> {
    let mut count: c_int = 0;
    // SAFETY: `count` takes the answer.
    unsafe { ask!(library, "open", cuDeviceGetCount(&raw mut count)) }?;
    Ok(count.unsigned_abs())
}

impl Context {
    /// Opens the device with this number, for good.
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
        // SAFETY: `device` takes the answer.
        unsafe { ask!(library, "open", cuDeviceGet(&raw mut device, index)) }?;
        let (properties, abilities) = describe(library, device, ordinal)?;
        let mut raw = null_mut();
        // SAFETY: `device` is the library's own; `raw` takes the answer. Never released: see the module.
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

    /// Makes this context current on the calling thread until the guard goes.
    pub(super) fn bind(&self, call: &'static str) -> Result<Bound> {
        let mut before = null_mut();
        // SAFETY: `before` takes the answer.
        unsafe { ask!(self.library, call, cuCtxGetCurrent(&raw mut before)) }?;
        let mut restore = None;
        if before != self.raw.0 {
            // SAFETY: the context is retained for good.
            unsafe { ask!(self.library, call, cuCtxSetCurrent(self.raw.0)) }?;
            restore = (!before.is_null()).then_some((self.library, before));
        }
        Ok(Bound { restore })
    }
}

/// While it lives, a context is current on this thread.
pub(super) struct Bound {
    /// The context to put back. There is none to put back on a thread that had none.
    restore: Option<(&'static Library, CUcontext)>,
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Some((library, context)) = self.restore {
            // SAFETY: the context was current on this thread when the guard was made. Should its owner have
            // destroyed it meanwhile, the library says so, and there is nothing to put back.
            let _ = unsafe { ask!(library, "restore", cuCtxSetCurrent(context)) };
        }
    }
}

fn attribute(library: &Library, device: CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    let mut value: c_int = 0;
    // SAFETY: the device is the library's own; `value` takes the answer.
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
    // SAFETY: `name` takes at most the 256 bytes it has.
    unsafe {
        ask!(
            library,
            "open",
            cuDeviceGetName(name.as_mut_ptr(), 256, device)
        )
    }?;
    let mut total = 0;
    // SAFETY: `total` takes the answer.
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
