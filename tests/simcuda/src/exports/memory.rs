//! Plain, pinned, stream-ordered and virtual memory.

use std::ffi::{c_int, c_uint, c_ulonglong};

use super::{exports, get, put};
use crate::pages::GRANULARITY;
use crate::sim::{Code, Sim, code};
use crate::streams::{Op, queue};

/// The head of `CUmemAllocationProp`: what kind of memory, and where.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AllocationProp {
    kind: c_int,
    handle_types: c_int,
    location: Location,
}

/// `CUmemLocation`, which is 8 bytes long in every version.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Location {
    kind: c_int,
    id: c_int,
}

/// `CUmemAccessDesc`.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct AccessDesc {
    location: Location,
    flags: c_int,
}

/// The handle of every device's own pool. Its attributes can be set and change nothing.
const DEFAULT_POOL: usize = 0x9001;

const KIND_PINNED: c_int = 1;
const LOCATION_DEVICE: c_int = 1;
const READ_WRITE: c_int = 3;
const MEMORY_TYPE: c_int = 2;
const DEVICE_ORDINAL: c_int = 9;
const TYPE_HOST: c_uint = 1;
const TYPE_DEVICE: c_uint = 2;

fn check_location(sim: &Sim, location: Location) -> Result<(), Code> {
    let is_device =
        location.kind == LOCATION_DEVICE && (0..sim.config.devices).contains(&location.id);
    if is_device {
        Ok(())
    } else {
        Err(code::INVALID_VALUE)
    }
}

fn check_properties(sim: &Sim, properties: *const AllocationProp) -> Result<(), Code> {
    if sim.config.virtual_memory == 0 {
        return Err(code::NOT_SUPPORTED);
    }
    let properties = get(properties);
    if properties.kind != KIND_PINNED || properties.handle_types != 0 {
        return Err(code::INVALID_VALUE);
    }
    check_location(sim, properties.location)
}

exports! {
    fn cuMemGetInfo_v2(sim, free: *mut usize, total: *mut usize) {
        sim.device()?;
        put(free, sim.config.memory.saturating_sub(sim.memory.used))?;
        put(total, sim.config.memory)
    }

    fn cuMemAlloc_v2(sim, ptr: *mut usize, bytes: usize) {
        let device = sim.device()?;
        put(ptr, sim.memory.allocate(bytes, sim.config.memory, device)?)
    }

    // Waits for all work, as the real one does. What is being captured is not work yet.
    fn cuMemFree_v2(sim, ptr: usize) {
        sim.device()?;
        sim.drain_all()?;
        if ptr == 0 { Ok(()) } else { sim.memory.free(ptr) }
    }

    fn cuMemAllocAsync(sim, ptr: *mut usize, bytes: usize, stream: usize) {
        let device = sim.device()?;
        if sim.config.pools == 0 {
            return Err(code::NOT_SUPPORTED);
        }
        sim.stream(queue(stream))?;
        let capacity = sim.config.memory;
        let address = match sim.memory.allocate(bytes, capacity, device) {
            Err(code::OUT_OF_MEMORY) => {
                // What was given back on this stream may be taken again.
                sim.drain(queue(stream))?;
                sim.memory.allocate(bytes, capacity, device)?
            }
            outcome => outcome?,
        };
        put(ptr, address)
    }

    fn cuMemFreeAsync(sim, ptr: usize, stream: usize) {
        sim.device()?;
        if !sim.memory.holds_device(ptr, 1) {
            return Err(code::INVALID_VALUE);
        }
        sim.push(queue(stream), Op::Free(ptr))
    }

    fn cuDeviceGetDefaultMemPool(sim, pool: *mut usize, _device: c_int) {
        if sim.config.pools == 0 {
            return Err(code::NOT_SUPPORTED);
        }
        put(pool, DEFAULT_POOL)
    }

    fn cuMemPoolSetAttribute(_sim, pool: usize, _attribute: c_int, _value: *const c_ulonglong) {
        if pool == DEFAULT_POOL { Ok(()) } else { Err(code::INVALID_VALUE) }
    }

    fn cuMemHostAlloc(sim, ptr: *mut usize, bytes: usize, _flags: c_uint) {
        sim.device()?;
        put(ptr, sim.memory.allocate_pinned(bytes)?)
    }

    fn cuMemFreeHost(sim, ptr: usize) {
        sim.device()?;
        sim.memory.free_pinned(ptr)
    }

    fn cuPointerGetAttribute(sim, data: *mut c_uint, attribute: c_int, ptr: usize) {
        if attribute == DEVICE_ORDINAL {
            let home = sim.memory.home(ptr).or_else(|| sim.pages.home(ptr));
            return put(data, home.ok_or(code::INVALID_VALUE)?.unsigned_abs());
        }
        if attribute != MEMORY_TYPE {
            return Err(code::INVALID_VALUE);
        }
        if sim.memory.holds_pinned(ptr, 1) {
            put(data, TYPE_HOST)
        } else if sim.is_reachable(ptr, 1) {
            put(data, TYPE_DEVICE)
        } else {
            Err(code::INVALID_VALUE)
        }
    }

    fn cuMemGetAllocationGranularity(sim, bytes: *mut usize, properties: *const AllocationProp, _option: c_int) {
        check_properties(sim, properties)?;
        put(bytes, GRANULARITY)
    }

    fn cuMemAddressReserve(sim, ptr: *mut usize, bytes: usize, _alignment: usize, _wanted: usize, _flags: c_ulonglong) {
        put(ptr, sim.pages.reserve(bytes)?)
    }

    fn cuMemAddressFree(sim, ptr: usize, bytes: usize) {
        sim.pages.release_range(ptr, bytes)
    }

    fn cuMemCreate(sim, handle: *mut u64, bytes: usize, properties: *const AllocationProp, _flags: c_ulonglong) {
        check_properties(sim, properties)?;
        sim.memory.take(bytes, sim.config.memory)?;
        let number = sim.handle();
        sim.pages.create(number, bytes).inspect_err(|_| sim.memory.used -= bytes)?;
        put(handle, number as u64)
    }

    fn cuMemRelease(sim, handle: u64) {
        sim.memory.used -= sim.pages.release(usize::try_from(handle).unwrap_or(0))?;
        Ok(())
    }

    fn cuMemMap(sim, ptr: usize, bytes: usize, offset: usize, handle: u64, _flags: c_ulonglong) {
        sim.pages.map(ptr, bytes, offset, usize::try_from(handle).unwrap_or(0))
    }

    fn cuMemSetAccess(sim, ptr: usize, bytes: usize, access: *const AccessDesc, count: usize) {
        let access = get(access);
        check_location(sim, access.location)?;
        if count != 1 || access.flags != READ_WRITE {
            return Err(code::INVALID_VALUE);
        }
        sim.pages.set_access(ptr, bytes, access.location.id)
    }

    // Does not wait, as the real one does not: work that comes after finds nothing there.
    fn cuMemUnmap(sim, ptr: usize, bytes: usize) {
        sim.memory.used -= sim.pages.unmap(ptr, bytes)?;
        Ok(())
    }
}
