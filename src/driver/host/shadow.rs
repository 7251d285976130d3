//! Which memory AddressSanitizer lets this process touch. Compiled only in AddressSanitizer builds (`.ci/run asan`).
//!
//! The sanitizer keeps a shadow per address, not per page, so a page that is mapped twice has two shadows. A freed
//! block is poisoned in stream order, by an operation of its stream, because work enqueued before the free may still
//! use it. A block that is handed out is unpoisoned in the same way.
//!
//! Invariant: addresses that are returned to the system, or that get other pages, are not poisoned.

use std::ffi::c_void;

use crate::driver::DevicePtr;
use crate::units::to_usize;

/// The most bytes of one range whose shadow is changed. The shadow takes an eighth of them in memory, permanently.
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
            // SAFETY: this writes only shadow memory, which is mapped for every address of the process.
            unsafe { __asan_unpoison_memory_region(address, bytes) }
        } else {
            // SAFETY: as above.
            unsafe { __asan_poison_memory_region(address, bytes) }
        }
    }
}

/// Unpoisons a range that is returned to the system, or that gets pages.
pub(super) fn permit(address: u64, bytes: u64) {
    let shadow = Shadow {
        ptr: DevicePtr(address),
        bytes,
        is_permitted: true,
    };
    shadow.apply();
}
