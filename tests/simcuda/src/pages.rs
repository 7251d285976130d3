//! Virtual memory: runs of one file, shown at reserved addresses.

use std::collections::{BTreeMap, HashMap};
use std::ffi::c_int;
use std::os::fd::OwnedFd;
use std::ptr::null_mut;

use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::memory::{holds, pointer};
use crate::sim::{Code, code};

/// The unit of pages.
pub(crate) const GRANULARITY: usize = 2 << 20;

#[derive(Default)]
pub(crate) struct Pages {
    file: Option<OwnedFd>,
    file_bytes: usize,
    /// Runs of the file that nobody uses, by length.
    idle: HashMap<usize, Vec<usize>>,
    pages: HashMap<usize, Page>,
    ranges: BTreeMap<usize, usize>,
    mappings: BTreeMap<usize, Mapping>,
}

struct Page {
    offset: usize,
    bytes: usize,
    /// The handle, while it was not released, and each mapping.
    users: usize,
    is_released: bool,
}

struct Mapping {
    bytes: usize,
    page: usize,
    /// The device that may reach it.
    access: Option<c_int>,
}

/// Bytes given back to the device.
pub(crate) type Freed = usize;

impl Pages {
    pub(crate) fn reserve(&mut self, bytes: usize) -> Result<usize, Code> {
        check_length(bytes)?;
        let span = bytes.checked_add(GRANULARITY).ok_or(code::OUT_OF_MEMORY)?;
        // SAFETY: without a fixed address the system picks one that nobody uses.
        let start = unsafe {
            mmap_anonymous(
                null_mut(),
                span,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        };
        let start = start.map_err(|_| code::OUT_OF_MEMORY)?.expose_provenance();
        let aligned = start.next_multiple_of(GRANULARITY);
        for (from, to) in [(start, aligned), (aligned + bytes, start + span)] {
            if from < to {
                // SAFETY: this end of the mapping just made is in nobody's hands.
                unsafe { munmap(pointer(from), to - from) }.map_err(|_| code::OUT_OF_MEMORY)?;
            }
        }
        self.ranges.insert(aligned, bytes);
        Ok(aligned)
    }

    pub(crate) fn release_range(&mut self, address: usize, bytes: usize) -> Result<(), Code> {
        let is_empty = self
            .mappings
            .range(address..address.saturating_add(bytes))
            .next()
            .is_none();
        if self.ranges.get(&address) != Some(&bytes) || !is_empty {
            return Err(code::INVALID_VALUE);
        }
        self.ranges.remove(&address);
        // SAFETY: a reservation of ours with nothing in it.
        unsafe { munmap(pointer(address), bytes) }.map_err(|_| code::INVALID_VALUE)
    }

    pub(crate) fn create(&mut self, handle: usize, bytes: usize) -> Result<(), Code> {
        check_length(bytes)?;
        let offset = match self.idle.get_mut(&bytes).and_then(Vec::pop) {
            Some(offset) => offset,
            None => self.grow(bytes)?,
        };
        let page = Page {
            offset,
            bytes,
            users: 1,
            is_released: false,
        };
        self.pages.insert(handle, page);
        Ok(())
    }

    fn grow(&mut self, bytes: usize) -> Result<usize, Code> {
        let file = match self.file.take() {
            Some(file) => file,
            None => {
                memfd_create("simcuda", MemfdFlags::CLOEXEC).map_err(|_| code::OUT_OF_MEMORY)?
            }
        };
        let file = self.file.insert(file);
        let end = self
            .file_bytes
            .checked_add(bytes)
            .ok_or(code::OUT_OF_MEMORY)?;
        ftruncate(&*file, end as u64).map_err(|_| code::OUT_OF_MEMORY)?;
        Ok(std::mem::replace(&mut self.file_bytes, end))
    }

    pub(crate) fn release(&mut self, handle: usize) -> Result<Freed, Code> {
        let page = self.pages.get_mut(&handle).filter(|page| !page.is_released);
        page.ok_or(code::INVALID_VALUE)?.is_released = true;
        self.drop_user(handle)
    }

    /// One user of the page less; the last one gives its bytes back.
    fn drop_user(&mut self, handle: usize) -> Result<Freed, Code> {
        let page = self.pages.get_mut(&handle).ok_or(code::INVALID_VALUE)?;
        page.users -= 1;
        if page.users > 0 {
            return Ok(0);
        }
        let (offset, bytes) = (page.offset, page.bytes);
        self.pages.remove(&handle);
        self.idle.entry(bytes).or_default().push(offset);
        if let Some(file) = &self.file {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, flags, offset as u64, bytes as u64).map_err(|_| code::INVALID_VALUE)?;
        }
        Ok(bytes)
    }

    pub(crate) fn map(
        &mut self,
        address: usize,
        bytes: usize,
        offset: usize,
        handle: usize,
    ) -> Result<(), Code> {
        let page = self.pages.get_mut(&handle).filter(|page| !page.is_released);
        let page = page.ok_or(code::INVALID_VALUE)?;
        let end = address.checked_add(bytes).ok_or(code::INVALID_VALUE)?;
        let before = self.mappings.range(..end).next_back();
        let is_taken = before.is_some_and(|(at, mapping)| at + mapping.bytes > address);
        let fits = page.bytes == bytes && offset == 0 && address.is_multiple_of(GRANULARITY);
        if is_taken || !fits || !holds(&self.ranges, address, bytes) {
            return Err(code::INVALID_VALUE);
        }
        let file = self.file.as_ref().ok_or(code::INVALID_VALUE)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: the range that is replaced is an empty reservation of ours.
        unsafe {
            mmap(
                pointer(address),
                bytes,
                ProtFlags::empty(),
                flags,
                file,
                page.offset as u64,
            )
        }
        .map_err(|_| code::OUT_OF_MEMORY)?;
        page.users += 1;
        let mapping = Mapping {
            bytes,
            page: handle,
            access: None,
        };
        self.mappings.insert(address, mapping);
        Ok(())
    }

    /// Gives access to mappings that cover the range exactly.
    pub(crate) fn set_access(
        &mut self,
        address: usize,
        bytes: usize,
        device: c_int,
    ) -> Result<(), Code> {
        let end = address.checked_add(bytes).ok_or(code::INVALID_VALUE)?;
        let mut at = address;
        for (start, mapping) in self.mappings.range(address..end) {
            if *start != at {
                return Err(code::INVALID_VALUE);
            }
            at += mapping.bytes;
        }
        if at != end || bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: mappings of ours.
        unsafe {
            mprotect(
                pointer(address),
                bytes,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        }
        .map_err(|_| code::OUT_OF_MEMORY)?;
        for (_, mapping) in self.mappings.range_mut(address..end) {
            mapping.access = Some(device);
        }
        Ok(())
    }

    /// Takes one mapping away, as the whole it was made as.
    pub(crate) fn unmap(&mut self, address: usize, bytes: usize) -> Result<Freed, Code> {
        let found = self
            .mappings
            .get(&address)
            .filter(|mapping| mapping.bytes == bytes);
        let page = found.ok_or(code::INVALID_VALUE)?.page;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the range that is replaced is a mapping of ours.
        unsafe { mmap_anonymous(pointer(address), bytes, ProtFlags::empty(), flags) }
            .map_err(|_| code::OUT_OF_MEMORY)?;
        self.mappings.remove(&address);
        self.drop_user(page)
    }

    /// Whether the whole range is mapped with access.
    pub(crate) fn hold(&self, address: usize, bytes: usize) -> bool {
        let end = address.saturating_add(bytes);
        let mut at = address;
        let first = self
            .mappings
            .range(..=address)
            .next_back()
            .map_or(address, |(start, _)| *start);
        for (start, mapping) in self.mappings.range(first..end) {
            if *start > at || mapping.access.is_none() {
                return false;
            }
            at = at.max(start + mapping.bytes);
        }
        at >= end && first <= address && self.mappings.contains_key(&first)
    }

    /// The device that may reach what is mapped at an address.
    pub(crate) fn home(&self, address: usize) -> Option<c_int> {
        let (start, mapping) = self.mappings.range(..=address).next_back()?;
        mapping.access.filter(|_| address < start + mapping.bytes)
    }

    pub(crate) fn live(&self) -> usize {
        self.pages.len()
    }

    pub(crate) fn reserved(&self) -> usize {
        self.ranges.len()
    }
}

fn check_length(bytes: usize) -> Result<(), Code> {
    if bytes > 0 && bytes.is_multiple_of(GRANULARITY) {
        return Ok(());
    }
    Err(code::INVALID_VALUE)
}
