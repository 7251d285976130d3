//! The library, its devices and contexts.

use std::ffi::{c_char, c_int, c_uint};

use super::{exports, put};
use crate::sim::{CONTEXT, CURRENT, code};

const NAME: &[u8] = b"Simulated CUDA device\0";

/// Attributes of a device, by their numbers in CUDA.
mod attribute {
    pub(super) const WARP_SIZE: i32 = 10;
    pub(super) const MULTIPROCESSORS: i32 = 16;
    pub(super) const UNIFIED_ADDRESSING: i32 = 41;
    pub(super) const MAJOR: i32 = 75;
    pub(super) const MINOR: i32 = 76;
    pub(super) const PAGEABLE_ACCESS: i32 = 88;
    pub(super) const VIRTUAL_MEMORY: i32 = 102;
    pub(super) const MEMORY_POOLS: i32 = 115;
}

exports! {
    fn cuInit(sim, _flags: c_uint) {
        sim.is_initialized = true;
        Ok(())
    }

    fn cuDriverGetVersion(sim, version: *mut c_int) {
        put(version, sim.config.version)
    }

    fn cuDeviceGetCount(sim, count: *mut c_int) {
        put(count, sim.config.devices)
    }

    fn cuDeviceGet(sim, device: *mut c_int, ordinal: c_int) {
        if !(0..sim.config.devices).contains(&ordinal) {
            return Err(code::INVALID_DEVICE);
        }
        put(device, ordinal)
    }

    fn cuDeviceGetName(_sim, name: *mut c_char, len: c_int, _device: c_int) {
        let bytes = NAME.len().min(usize::try_from(len).unwrap_or(0));
        // SAFETY: the caller has `len` bytes there.
        unsafe { name.cast::<u8>().copy_from_nonoverlapping(NAME.as_ptr(), bytes) };
        Ok(())
    }

    fn cuDeviceGetAttribute(sim, value: *mut c_int, wanted: c_int, _device: c_int) {
        let config = &sim.config;
        put(value, match wanted {
            attribute::WARP_SIZE => 32,
            attribute::MULTIPROCESSORS => 4,
            attribute::UNIFIED_ADDRESSING => 1,
            attribute::MAJOR => config.capability / 10,
            attribute::MINOR => config.capability % 10,
            attribute::PAGEABLE_ACCESS => config.pageable,
            attribute::VIRTUAL_MEMORY => config.virtual_memory,
            attribute::MEMORY_POOLS => config.pools,
            _ => 0,
        })
    }

    fn cuDeviceTotalMem_v2(sim, bytes: *mut usize, _device: c_int) {
        put(bytes, sim.config.memory)
    }

    fn cuDevicePrimaryCtxRetain(sim, context: *mut usize, device: c_int) {
        if !(0..sim.config.devices).contains(&device) {
            return Err(code::INVALID_DEVICE);
        }
        put(context, CONTEXT + usize::try_from(device).unwrap_or(0))
    }

    fn cuDevicePrimaryCtxRelease_v2(_sim, _device: c_int) {
        Ok(())
    }

    fn cuCtxGetCurrent(_sim, context: *mut usize) {
        put(context, CURRENT.get())
    }

    fn cuCtxSetCurrent(_sim, context: usize) {
        CURRENT.set(context);
        Ok(())
    }

    fn cuCtxSynchronize(sim) {
        sim.device()?;
        sim.drain_all()
    }
}

/// `cuGetErrorName` of CUDA's driver API.
///
/// # Safety
/// As NVIDIA's documentation says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: c_int, text: *mut *const c_char) -> c_int {
    let name = match error {
        code::INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        code::OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        34 => c"CUDA_ERROR_STUB_LIBRARY",
        100 => c"CUDA_ERROR_NO_DEVICE",
        code::INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        code::UNSUPPORTED_PTX_VERSION => c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        code::NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        code::ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        code::CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        code::CAPTURE_UNJOINED => c"CUDA_ERROR_STREAM_CAPTURE_UNJOINED",
        // A code that this library has no name for, as an old driver has none for some.
        9999 => return code::INVALID_VALUE,
        _ => c"CUDA_ERROR_SIMULATED",
    };
    put(text, name.as_ptr()).map_or(1, |()| 0)
}

/// `cuGetErrorString` of CUDA's driver API.
///
/// # Safety
/// As NVIDIA's documentation says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: c_int, text: *mut *const c_char) -> c_int {
    if error == 9999 {
        return code::INVALID_VALUE;
    }
    put(text, c"simulated".as_ptr()).map_or(1, |()| 0)
}
