//! The memory of one device: plain allocations, pinned allocations and pages, and what counts against the capacity.
//!
//! Plain allocations and pages share the capacity. Pinned memory belongs to the host: it does not count against the
//! capacity but is bounded by the machine's free memory. It is touched completely before it is handed out, so that the
//! next request, from any device or pool, sees it as used. Allocations still live when the device is dropped are freed
//! then.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::config::{ALLOCATION_GRANULARITY, HostConfig};
use super::errno::{EINVAL, ENOMEM, ENOTSUP, refuse};
use super::pages::Pages;
use super::{machine, system};
use crate::driver::{DevicePtr, MemoryInfo};
use crate::error::Result;
use crate::units::{Bytes, align_up, to_usize};

/// All memory of one device.
#[derive(Debug)]
pub(super) struct Memory {
    capacity: Capacity,
    plain: Allocations,
    pinned: Allocations,
    pages: Option<Pages>,
}

impl Memory {
    /// The memory of a device. `name` appears in the process's list of mappings.
    pub(super) fn new(config: &HostConfig, name: &str) -> Result<Self> {
        let virtual_memory = config.virtual_memory && cfg!(target_os = "linux");
        Ok(Self {
            capacity: Capacity {
                total: config.capacity,
                used: Mutex::new(0),
            },
            plain: Allocations::default(),
            pinned: Allocations::default(),
            pages: virtual_memory.then(|| Pages::new(name)).transpose()?,
        })
    }

    pub(super) fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    pub(super) fn has_pages(&self) -> bool {
        self.pages.is_some()
    }

    /// The pages, or the error of `call` if this device has none.
    pub(super) fn pages(&self, call: &'static str) -> Result<&Pages> {
        self.pages.as_ref().ok_or_else(|| {
            refuse(
                call,
                ENOTSUP,
                "the device was opened without virtual memory",
            )
        })
    }

    pub(super) fn allocate(&self, bytes: u64) -> Result<DevicePtr> {
        const CALL: &str = "allocate";
        let bytes = counted(CALL, bytes)?;
        self.capacity.take(CALL, bytes)?;
        self.plain
            .allocate(CALL, bytes)
            .inspect_err(|_| self.capacity.give(bytes))
    }

    /// # Safety
    /// As [`Driver::free`](crate::driver::Driver::free).
    pub(super) unsafe fn free(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        let bytes = unsafe { self.plain.free("free", ptr) }?;
        self.capacity.give(bytes);
        Ok(())
    }

    pub(super) fn allocate_pinned(&self, bytes: u64) -> Result<DevicePtr> {
        const CALL: &str = "allocate_pinned";
        /// Held from checking what is left until the memory is touched.
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let bytes = counted(CALL, bytes)?;
        let _turn = ONE_AT_A_TIME.lock();
        machine::check(CALL, bytes)?;
        let ptr = self.pinned.allocate(CALL, bytes)?;
        let start = std::ptr::with_exposed_provenance_mut::<u8>(to_usize(ptr.0));
        // SAFETY: the bytes were just mapped, readable and writable, and nothing else has their address.
        unsafe { start.write_bytes(0, to_usize(bytes)) };
        Ok(ptr)
    }

    /// # Safety
    /// As [`Driver::free_pinned`](crate::driver::Driver::free_pinned).
    pub(super) unsafe fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.pinned.free("free_pinned", ptr) }.map(drop)
    }
}

/// The bytes that an allocation of `bytes` counts for.
fn counted(call: &'static str, bytes: u64) -> Result<u64> {
    if bytes == 0 {
        return Err(refuse(call, EINVAL, "cannot allocate 0 bytes"));
    }
    align_up(bytes, ALLOCATION_GRANULARITY).ok_or_else(|| {
        refuse(
            call,
            ENOMEM,
            format!("{bytes} bytes exceed the address space"),
        )
    })
}

/// How much of the device's memory is in use.
#[derive(Debug)]
pub(super) struct Capacity {
    total: u64,
    used: Mutex<u64>,
}

impl Capacity {
    /// Counts `bytes` as used, or refuses.
    pub(super) fn take(&self, call: &'static str, bytes: u64) -> Result<()> {
        let mut used = self.used.lock();
        let free = self.total - *used;
        if bytes > free {
            let (bytes, free, total) = (Bytes(bytes), Bytes(free), Bytes(self.total));
            let reason = format!("no room for {bytes}: {free} of {total} are free");
            return Err(refuse(call, ENOMEM, reason));
        }
        *used += bytes;
        Ok(())
    }

    /// Counts `bytes` as free again.
    pub(super) fn give(&self, bytes: u64) {
        let mut used = self.used.lock();
        assert!(bytes <= *used, "{bytes} bytes given back, {used} held");
        *used -= bytes;
    }

    pub(super) fn info(&self) -> MemoryInfo {
        MemoryInfo {
            free: self.total - *self.used.lock(),
            total: self.total,
        }
    }
}

/// Live allocations of one kind, each in its own mapping.
#[derive(Debug, Default)]
struct Allocations {
    /// Address to bytes.
    live: Mutex<HashMap<u64, u64>>,
}

impl Allocations {
    fn allocate(&self, call: &'static str, bytes: u64) -> Result<DevicePtr> {
        let address = system::allocate(call, bytes)?;
        #[cfg(asan)]
        super::shadow::permit(address, bytes);
        let before = self.live.lock().insert(address, bytes);
        assert!(before.is_none(), "the system gave out {address:#x} twice");
        Ok(DevicePtr(address))
    }

    /// # Safety
    /// Nothing touches the allocation any more.
    unsafe fn free(&self, call: &'static str, ptr: DevicePtr) -> Result<u64> {
        // Locked throughout: the system may reuse the address right after the free.
        let mut live = self.live.lock();
        let Some(&bytes) = live.get(&ptr.0) else {
            let reason = format!("{:#x} is not a live allocation of this kind", ptr.0);
            return Err(refuse(call, EINVAL, reason));
        };
        #[cfg(asan)]
        super::shadow::permit(ptr.0, bytes);
        // SAFETY: the allocation is in the table, hence ours, and the caller gives it up.
        unsafe { system::free(call, ptr.0, bytes) }?;
        live.remove(&ptr.0);
        Ok(bytes)
    }
}

impl Drop for Allocations {
    fn drop(&mut self) {
        for (&address, &mut bytes) in self.live.get_mut() {
            #[cfg(asan)]
            super::shadow::permit(address, bytes);
            // SAFETY: the allocation is in the table, hence ours. Queues keep the memory alive until their
            // work has run, so nothing touches it any more.
            let outcome = unsafe { system::free("free", address, bytes) };
            debug_assert!(outcome.is_ok(), "{outcome:?}");
        }
    }
}
