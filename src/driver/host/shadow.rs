//! Which memory AddressSanitizer lets this process touch. Only in builds for it (`.ci/run asan`).
//!
//! The sanitizer keeps a shadow of every address: of an address, not of the page behind it, so that a page that is
//! mapped twice has two shadows. A freed block is forbidden in stream order, by an operation of its stream, because
//! work that was enqueued before the free may still use it; a block that is handed out is permitted in the same way.
//!
//! Invariants: addresses that the system takes back, or that get other pages, are permitted.

use std::ffi::c_void;

use crate::driver::DevicePtr;
use crate::units::to_usize;

/// Most bytes of one range whose shadow changes: it takes an eighth of them in memory, which stays.
const BYTES_MAX: u64 = 1 << 30;

unsafe extern "C" {
    fn __asan_poison_memory_region(address: *const c_void, bytes: usize);
    fn __asan_unpoison_memory_region(address: *const c_void, bytes: usize);
}

/// A change of the shadow.
#[derive(Debug)]
pub(super) struct Shadow {
    pub(super) ptr: DevicePtr,
    pub(super) bytes: u64,
    pub(super) is_permitted: bool,
}

impl Shadow {
    pub(super) fn apply(&self) {
        let bytes = to_usize(self.bytes.min(BYTES_MAX));
        let address = std::ptr::with_exposed_provenance(to_usize(self.ptr.0));
        if self.is_permitted {
            // SAFETY: only shadow is written; that of every address of the process is mapped.
            unsafe { __asan_unpoison_memory_region(address, bytes) }
        } else {
            // SAFETY: as above.
            unsafe { __asan_poison_memory_region(address, bytes) }
        }
    }
}

/// Permits a range that is given back, or that gets pages.
pub(super) fn permit(address: u64, bytes: u64) {
    let shadow = Shadow {
        ptr: DevicePtr(address),
        bytes,
        is_permitted: true,
    };
    shadow.apply();
}
