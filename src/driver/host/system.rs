//! The system calls for memory. No other module makes them.
//!
//! Callers pass lengths that are multiples of the granularity in question. This module keeps no records of allocations
//! and mappings. On Unix, untouched bytes cost nothing, whether of anonymous memory or of a file.

use super::errno::refuse;
use crate::error::Result;

#[cfg(target_os = "linux")]
pub(super) use linux::{PageFile, release, reserve};
#[cfg(not(target_os = "linux"))]
pub(super) use other_file::{PageFile, release, reserve};
#[cfg(not(unix))]
pub(super) use other_memory::{allocate, free};
#[cfg(unix)]
pub(super) use unix::{allocate, free};

#[cfg(unix)]
mod unix {
    use std::ffi::c_void;
    use std::ptr::{null_mut, with_exposed_provenance_mut};

    use rustix::io::Errno;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::{Result, refuse};
    use crate::error::Error;
    use crate::units::to_usize;

    #[cfg(target_os = "linux")]
    pub(super) const UNCOMMITTED: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);
    #[cfg(not(target_os = "linux"))]
    pub(super) const UNCOMMITTED: MapFlags = MapFlags::PRIVATE;

    /// Zeroed memory, aligned to the system's page.
    pub(in super::super) fn allocate(call: &'static str, bytes: u64) -> Result<u64> {
        map_anywhere(call, bytes, ProtFlags::READ.union(ProtFlags::WRITE))
    }

    /// Frees memory that [`allocate`] returned.
    ///
    /// # Safety
    /// `bytes` bytes at `address` came from [`allocate`] and nothing touches them any more.
    pub(in super::super) unsafe fn free(
        call: &'static str,
        address: u64,
        bytes: u64,
    ) -> Result<()> {
        // SAFETY: the caller gives up its mapping.
        unsafe { unmap(call, address, bytes) }
    }

    /// Maps fresh bytes with `protection` wherever there is room.
    pub(super) fn map_anywhere(
        call: &'static str,
        bytes: u64,
        protection: ProtFlags,
    ) -> Result<u64> {
        // SAFETY: without a fixed address the system picks an unused one.
        let mapped =
            unsafe { mmap_anonymous(null_mut(), to_usize(bytes), protection, UNCOMMITTED) };
        mapped
            .map(|address| address.expose_provenance() as u64)
            .map_err(|errno| error(call, errno))
    }

    /// Removes a mapping.
    ///
    /// # Safety
    /// `bytes` bytes at `address` are a mapping of the caller, and nothing touches them any more.
    pub(super) unsafe fn unmap(call: &'static str, address: u64, bytes: u64) -> Result<()> {
        // SAFETY: the caller gives up its mapping.
        let outcome = unsafe { munmap(pointer(address), to_usize(bytes)) };
        outcome.map_err(|errno| error(call, errno))
    }

    pub(super) fn pointer(address: u64) -> *mut c_void {
        with_exposed_provenance_mut(to_usize(address))
    }

    pub(super) fn error(call: &'static str, errno: Errno) -> Error {
        refuse(call, errno.raw_os_error(), errno.to_string())
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::os::fd::OwnedFd;
    use std::ptr::null_mut;
    use std::sync::atomic::{AtomicU32, Ordering};

    use parking_lot::Mutex;
    use rustix::fs::{
        FallocateFlags, MemfdFlags, SeekFrom, fallocate, ftruncate, memfd_create, seek,
    };
    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

    use super::unix::{UNCOMMITTED, error, map_anywhere, pointer, unmap};
    use super::{Result, refuse};
    use crate::driver::host::config::PAGE_GRANULARITY;
    use crate::driver::host::errno::ENOMEM;
    use crate::units::{align_up, to_usize};

    /// A range of addresses without memory, aligned to `alignment`.
    pub(in super::super) fn reserve(call: &'static str, bytes: u64, alignment: u64) -> Result<u64> {
        let span = bytes
            .checked_add(alignment)
            .ok_or_else(|| refuse(call, ENOMEM, "the request exceeds the address space"))?;
        let start = map_anywhere(call, span, ProtFlags::empty())?;
        let aligned = align_up(start, alignment).expect("the aligned range lies in the mapping");
        let mut kept = start;
        for (from, to) in [(start, aligned), (aligned + bytes, start + span)] {
            if from < to {
                // SAFETY: nothing uses this end of the mapping just made.
                let trimmed = unsafe { unmap(call, from, to - from) };
                if trimmed.is_err() {
                    // SAFETY: nothing uses the rest of it either. If this fails too, addresses are leaked, but no
                    // memory.
                    let _ = unsafe { unmap(call, kept, start + span - kept) };
                    return trimmed.map(|()| aligned);
                }
            }
            kept = aligned;
        }
        Ok(aligned)
    }

    /// Releases a range that [`reserve`] returned, with whatever is mapped in it.
    ///
    /// # Safety
    /// `bytes` bytes at `address` came from [`reserve`] and nothing touches them any more.
    pub(in super::super) unsafe fn release(
        call: &'static str,
        address: u64,
        bytes: u64,
    ) -> Result<()> {
        // SAFETY: the caller gives up its range.
        unsafe { unmap(call, address, bytes) }
    }

    /// Spare mappings. At the system's limit of mappings (`vm.max_map_count`), even *removing* a mapping can fail:
    /// reserved addresses are a mapping themselves, so removing one from the middle of another makes two more. Giving
    /// up the spare mappings makes room for these.
    const SPARE_MAPPINGS: usize = 4;

    /// Defined here because not every libc has it.
    const MADV_COLLAPSE: libc::c_int = 25;

    /// After this many consecutive refusals of huge pages, the system is not asked again. A single refusal may be due
    /// to a page that is in use at that moment. A system without huge pages refuses quickly, but one that is short of
    /// contiguous memory searches for it each time.
    const REFUSALS_MAX: u32 = 8;

    /// Length of a spare mapping. The system rounds it up to a page.
    const SPARE_BYTES: u64 = 1;

    /// The physical memory of a device: an anonymous file (memfd) that uses memory only where it was written.
    #[derive(Debug)]
    pub(in super::super) struct PageFile {
        file: OwnedFd,
        /// Addresses of the spare mappings.
        spare: Mutex<Vec<u64>>,
        /// Consecutive refusals of huge pages.
        refusals: AtomicU32,
    }

    impl PageFile {
        /// An empty file. `name` appears in the process's list of mappings.
        pub(in super::super) fn new(call: &'static str, name: &str) -> Result<Self> {
            let file =
                memfd_create(name, MemfdFlags::CLOEXEC).map_err(|errno| error(call, errno))?;
            let file = Self {
                file,
                spare: Mutex::default(),
                refusals: AtomicU32::new(0),
            };
            file.keep_spare();
            Ok(file)
        }

        /// Makes as many spare mappings as are missing and the system allows. All map the same part of the file, so
        /// that the system cannot merge them.
        fn keep_spare(&self) {
            let mut spare = self.spare.lock();
            while spare.len() < SPARE_MAPPINGS {
                let (len, protection) = (to_usize(SPARE_BYTES), ProtFlags::empty());
                // SAFETY: without a fixed address the system picks an unused one.
                let mapped =
                    unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, &self.file, 0) };
                let Ok(address) = mapped else { return };
                spare.push(address.expose_provenance() as u64);
            }
        }

        fn give_spare_up(&self) {
            for address in self.spare.lock().drain(..) {
                // SAFETY: the mapping is ours, and nothing else has its address.
                let outcome = unsafe { unmap("unmap", address, SPARE_BYTES) };
                debug_assert!(outcome.is_ok(), "{outcome:?}");
            }
        }

        /// Makes the file `bytes` long.
        pub(in super::super) fn resize(&self, call: &'static str, bytes: u64) -> Result<()> {
            ftruncate(&self.file, bytes).map_err(|errno| error(call, errno))
        }

        /// Returns the memory behind a part of the file to the system. The part then reads as zeros.
        pub(in super::super) fn discard(
            &self,
            call: &'static str,
            offset: u64,
            bytes: u64,
        ) -> Result<()> {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, offset, bytes).map_err(|errno| error(call, errno))
        }

        /// Backs a part of the file, mapped at `address`, with huge pages, if it has no memory yet and the system
        /// supports it (Linux 6.1 or later, unless huge pages are disabled for shared memory). One page fault per 2 MiB
        /// instead of 512 makes the first touch ten times cheaper, and fewer TLB misses make every pass over the memory
        /// faster. Contents do not change. After a refusal, the part is faulted in on first touch; after several, the
        /// system is [no longer asked](Self::may_prefault).
        pub(in super::super) fn prefault(&self, address: u64, offset: u64, bytes: u64) {
            if !self.may_prefault() {
                return;
            }
            let next = seek(&self.file, SeekFrom::Data(offset));
            if next.is_ok_and(|next| next < offset + bytes) {
                // Collapsing existing small pages copies them, which takes longer than it saves.
                return;
            }
            // Relaxed: the count only decides whether to try.
            if collapse(address, bytes) {
                self.refusals.store(0, Ordering::Relaxed);
            } else {
                self.refusals.fetch_add(1, Ordering::Relaxed);
            }
        }

        /// Whether the system is still asked for huge pages.
        pub(in super::super) fn may_prefault(&self) -> bool {
            self.refusals.load(Ordering::Relaxed) < REFUSALS_MAX
        }

        /// Maps a part of the file at `address`.
        ///
        /// # Safety
        /// `bytes` bytes at `address` are reserved by the caller and nothing touches them.
        pub(in super::super) unsafe fn map(
            &self,
            call: &'static str,
            address: u64,
            offset: u64,
            bytes: u64,
        ) -> Result<()> {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            let (at, len) = (pointer(address), to_usize(bytes));
            // SAFETY: the mapping replaces the caller's own reservation.
            let outcome = unsafe { mmap(at, len, protection, flags, &self.file, offset) };
            outcome.map(drop).map_err(|errno| error(call, errno))
        }

        /// Removes the mappings in a range of addresses, which stay reserved.
        ///
        /// # Safety
        /// `bytes` bytes at `address` are reserved by the caller and nothing touches them any more.
        pub(in super::super) unsafe fn unmap(
            &self,
            call: &'static str,
            address: u64,
            bytes: u64,
        ) -> Result<()> {
            let empty = || {
                let (at, len) = (pointer(address), to_usize(bytes));
                let flags = UNCOMMITTED | MapFlags::FIXED;
                // SAFETY: the mapping replaces the caller's own reservation.
                unsafe { mmap_anonymous(at, len, ProtFlags::empty(), flags) }
            };
            let outcome = empty().or_else(|_| {
                self.give_spare_up();
                empty()
            });
            self.keep_spare();
            outcome.map(drop).map_err(|errno| error(call, errno))
        }
    }

    /// Backs an unpopulated mapping with huge pages; returns whether all of it now has them.
    fn collapse(address: u64, bytes: u64) -> bool {
        // The system collapses a range into a huge page only if at least one of its pages is populated.
        let touched = (address..address + bytes)
            .step_by(to_usize(PAGE_GRANULARITY))
            // SAFETY: the advice does not change contents.
            .all(|piece| unsafe { madvise(pointer(piece), 1, Advice::LinuxPopulateRead) }.is_ok());
        // SAFETY: as above.
        touched && unsafe { libc::madvise(pointer(address), to_usize(bytes), MADV_COLLAPSE) } == 0
    }

    impl Drop for PageFile {
        fn drop(&mut self) {
            self.give_spare_up();
        }
    }
}

#[cfg(not(unix))]
mod other_memory {
    use std::alloc::{Layout, alloc_zeroed, dealloc};

    use super::{Result, refuse};
    use crate::driver::host::config::ALLOCATION_GRANULARITY;
    use crate::driver::host::errno::ENOMEM;
    use crate::units::to_usize;

    fn layout(call: &'static str, bytes: u64) -> Result<Layout> {
        Layout::from_size_align(to_usize(bytes), to_usize(ALLOCATION_GRANULARITY))
            .map_err(|_| refuse(call, ENOMEM, "the request exceeds the address space"))
    }

    /// Zeroed memory, aligned to 4 KiB.
    pub(in super::super) fn allocate(call: &'static str, bytes: u64) -> Result<u64> {
        let layout = layout(call, bytes)?;
        // SAFETY: callers never ask for 0 bytes.
        let ptr = unsafe { alloc_zeroed(layout) };
        if ptr.is_null() {
            return Err(refuse(call, ENOMEM, "the system is out of memory"));
        }
        Ok(ptr.expose_provenance() as u64)
    }

    /// Frees memory that [`allocate`] returned.
    ///
    /// # Safety
    /// `bytes` bytes at `address` came from [`allocate`] and nothing touches them any more.
    pub(in super::super) unsafe fn free(
        call: &'static str,
        address: u64,
        bytes: u64,
    ) -> Result<()> {
        let layout = layout(call, bytes)?;
        // SAFETY: the block came from `alloc_zeroed` with the same layout.
        unsafe {
            dealloc(
                std::ptr::with_exposed_provenance_mut(to_usize(address)),
                layout,
            )
        }
        Ok(())
    }
}

#[cfg(not(target_os = "linux"))]
mod other_file {
    use super::{Result, refuse};
    use crate::driver::host::errno::ENOTSUP;

    /// Cannot exist on this system: mapping one page at two addresses needs Linux.
    #[derive(Debug)]
    pub(in super::super) enum PageFile {}

    impl PageFile {
        pub(in super::super) fn new(call: &'static str, _name: &str) -> Result<Self> {
            Err(refuse(call, ENOTSUP, "virtual memory needs Linux"))
        }

        pub(in super::super) fn resize(&self, _: &'static str, _: u64) -> Result<()> {
            match *self {}
        }

        pub(in super::super) fn discard(&self, _: &'static str, _: u64, _: u64) -> Result<()> {
            match *self {}
        }

        pub(in super::super) fn prefault(&self, _: u64, _: u64, _: u64) {
            match *self {}
        }

        pub(in super::super) fn may_prefault(&self) -> bool {
            match *self {}
        }

        /// # Safety
        /// None: there is no value to call it on.
        pub(in super::super) unsafe fn map(
            &self,
            _: &'static str,
            _: u64,
            _: u64,
            _: u64,
        ) -> Result<()> {
            match *self {}
        }

        /// # Safety
        /// None: there is no value to call it on.
        pub(in super::super) unsafe fn unmap(&self, _: &'static str, _: u64, _: u64) -> Result<()> {
            match *self {}
        }
    }

    pub(in super::super) fn reserve(call: &'static str, _: u64, _: u64) -> Result<u64> {
        Err(refuse(call, ENOTSUP, "virtual memory needs Linux"))
    }

    /// # Safety
    /// None: nothing is touched.
    pub(in super::super) unsafe fn release(call: &'static str, _: u64, _: u64) -> Result<()> {
        Err(refuse(call, ENOTSUP, "virtual memory needs Linux"))
    }
}
