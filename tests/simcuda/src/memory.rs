//! Plain and pinned memory, and whether addresses are good.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::ptr::{null_mut, with_exposed_provenance_mut};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::sim::{Code, code};

/// Sizes are counted in units of this many bytes.
const UNIT: usize = 512;

/// What is allocated, by address.
#[derive(Default)]
pub(crate) struct Memory {
    /// Bytes on devices, pages included. All devices share one capacity.
    pub(crate) used: usize,
    device: BTreeMap<usize, usize>,
    /// The device of each piece.
    homes: BTreeMap<usize, c_int>,
    pinned: BTreeMap<usize, usize>,
}

impl Memory {
    /// Counts `bytes` more, unless the device has no room.
    pub(crate) fn take(&mut self, bytes: usize, capacity: usize) -> Result<(), Code> {
        let used = self
            .used
            .checked_add(bytes)
            .filter(|used| *used <= capacity);
        self.used = used.ok_or(code::OUT_OF_MEMORY)?;
        Ok(())
    }

    pub(crate) fn allocate(
        &mut self,
        bytes: usize,
        capacity: usize,
        device: c_int,
    ) -> Result<usize, Code> {
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        let rounded = bytes
            .checked_next_multiple_of(UNIT)
            .ok_or(code::OUT_OF_MEMORY)?;
        self.take(rounded, capacity)?;
        let address = map(rounded).inspect_err(|_| self.used -= rounded)?;
        self.device.insert(address, rounded);
        self.homes.insert(address, device);
        Ok(address)
    }

    pub(crate) fn free(&mut self, address: usize) -> Result<(), Code> {
        let bytes = self.device.remove(&address).ok_or(code::INVALID_VALUE)?;
        self.homes.remove(&address);
        self.used -= bytes;
        unmap(address, bytes)
    }

    pub(crate) fn allocate_pinned(&mut self, bytes: usize) -> Result<usize, Code> {
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        let address = map(bytes)?;
        self.pinned.insert(address, bytes);
        Ok(address)
    }

    pub(crate) fn free_pinned(&mut self, address: usize) -> Result<(), Code> {
        let bytes = self.pinned.remove(&address).ok_or(code::INVALID_VALUE)?;
        unmap(address, bytes)
    }

    /// The device that an address is of.
    pub(crate) fn home(&self, address: usize) -> Option<c_int> {
        let (_, home) = self.homes.range(..=address).next_back()?;
        self.holds_device(address, 1).then_some(*home)
    }

    pub(crate) fn holds_device(&self, address: usize, bytes: usize) -> bool {
        holds(&self.device, address, bytes)
    }

    pub(crate) fn holds_pinned(&self, address: usize, bytes: usize) -> bool {
        holds(&self.pinned, address, bytes)
    }

    pub(crate) fn pinned_count(&self) -> usize {
        self.pinned.len()
    }
}

/// Whether one piece of `table` holds the whole range.
pub(crate) fn holds(table: &BTreeMap<usize, usize>, address: usize, bytes: usize) -> bool {
    let before = table.range(..=address).next_back();
    before.is_some_and(|(start, length)| address.saturating_add(bytes) <= start + length)
}

pub(crate) fn pointer(address: usize) -> *mut c_void {
    with_exposed_provenance_mut(address)
}

fn map(bytes: usize) -> Result<usize, Code> {
    let (protection, flags) = (
        ProtFlags::READ | ProtFlags::WRITE,
        MapFlags::PRIVATE | MapFlags::NORESERVE,
    );
    // SAFETY: without a fixed address the system picks one that nobody uses.
    let mapped = unsafe { mmap_anonymous(null_mut(), bytes, protection, flags) };
    mapped
        .map(|address| address.expose_provenance())
        .map_err(|_| code::OUT_OF_MEMORY)
}

fn unmap(address: usize, bytes: usize) -> Result<(), Code> {
    // SAFETY: a mapping of ours that was just taken out of its table.
    unsafe { munmap(pointer(address), bytes) }.map_err(|_| code::INVALID_VALUE)
}
