//! Physical pages and their mappings.
//!
//! The pages of a device are runs of one anonymous file. Mapping a page maps its run, so one page can be mapped at
//! several addresses. A *range* is reserved addresses; a *mapping* is a page in a range.
//!
//! Invariants: mappings are disjoint, and each is within one range. A page's count of mappings is the number of
//! mappings that name it. A page is in the table as long as it has its handle or a mapping; exactly that long, its
//! bytes count against the capacity and its run is taken. A refused call changes nothing: system calls come before
//! table updates.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;

use super::areas;
use super::config::PAGE_GRANULARITY;
use super::errno::{EBUSY, EINVAL, ENOMEM, refuse};
use super::memory::Capacity;
use super::runs::Runs;
use super::system::{self, PageFile};
use crate::driver::{DevicePtr, PageHandle};
use crate::error::Result;

/// The page file of a device and everything mapped from it.
#[derive(Debug)]
pub(super) struct Pages {
    file: PageFile,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Length of the file in bytes. It never shrinks: free parts use no memory.
    file_bytes: u64,
    runs: Runs,
    pages: HashMap<PageHandle, Page>,
    last_handle: u64,
    /// Reserved ranges: address to bytes.
    ranges: BTreeMap<u64, u64>,
    /// Mappings by address.
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Debug)]
struct Page {
    offset: u64,
    bytes: u64,
    mappings: u64,
    has_handle: bool,
    /// Whether huge pages were already requested for it.
    is_prefaulted: bool,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    bytes: u64,
    /// The page's offset in the file.
    offset: u64,
    page: PageHandle,
}

impl Pages {
    pub(super) fn new(name: &str) -> Result<Self> {
        Ok(Self {
            file: PageFile::new("open", name)?,
            state: Mutex::default(),
        })
    }

    pub(super) fn reserve(&self, bytes: u64) -> Result<DevicePtr> {
        const CALL: &str = "reserve";
        check_length(CALL, bytes)?;
        let address = system::reserve(CALL, bytes, PAGE_GRANULARITY)?;
        self.state.lock().ranges.insert(address, bytes);
        Ok(DevicePtr(address))
    }

    pub(super) fn release(&self, ptr: DevicePtr, bytes: u64) -> Result<()> {
        const CALL: &str = "release";
        let mut state = self.state.lock();
        if state.ranges.get(&ptr.0) != Some(&bytes) {
            let reason = format!("{bytes} bytes at {:#x} are not one reserved range", ptr.0);
            return Err(refuse(CALL, EINVAL, reason));
        }
        if let Some((address, _)) = state.mappings.range(ptr.0..ptr.0 + bytes).next() {
            let reason = format!("a page is still mapped at {address:#x}");
            return Err(refuse(CALL, EBUSY, reason));
        }
        // SAFETY: the range is in the table, so it is ours, and no page is mapped in it.
        unsafe { system::release(CALL, ptr.0, bytes) }?;
        state.ranges.remove(&ptr.0);
        Ok(())
    }

    pub(super) fn create(&self, capacity: &Capacity, bytes: u64) -> Result<PageHandle> {
        const CALL: &str = "create_page";
        check_length(CALL, bytes)?;
        capacity.take(CALL, bytes)?;
        let mut state = self.state.lock();
        let taken = self.take_run(CALL, &mut state, bytes);
        let offset = taken.inspect_err(|_| capacity.give(bytes))?;
        state.last_handle += 1;
        let handle = PageHandle(state.last_handle);
        let page = Page {
            offset,
            bytes,
            mappings: 0,
            has_handle: true,
            is_prefaulted: false,
        };
        state.pages.insert(handle, page);
        Ok(handle)
    }

    /// Takes a run of the file, growing the file if needed.
    fn take_run(&self, call: &'static str, state: &mut State, bytes: u64) -> Result<u64> {
        let offset = state
            .runs
            .take(bytes)
            .ok_or_else(|| refuse(call, ENOMEM, "the page file cannot grow that far"))?;
        let end = state.runs.end();
        if end > state.file_bytes {
            if let Err(error) = self.file.resize(call, end) {
                state.runs.give(offset, bytes);
                return Err(error);
            }
            state.file_bytes = end;
        }
        Ok(offset)
    }

    pub(super) fn destroy(&self, capacity: &Capacity, handle: PageHandle) -> Result<()> {
        let mut state = self.state.lock();
        let page = state.live_page("destroy_page", handle)?;
        page.has_handle = false;
        self.collect(capacity, &mut state, handle);
        Ok(())
    }

    /// Maps `handles` next to each other from `ptr` on. Maps all or none.
    pub(super) fn map(&self, ptr: DevicePtr, handles: &[PageHandle]) -> Result<()> {
        const CALL: &str = "map";
        let mut state = self.state.lock();
        let mut end = ptr.0;
        let mut placed = Vec::with_capacity(handles.len());
        for &handle in handles {
            let page = state.live_page(CALL, handle)?;
            let (at, bytes) = (end, page.bytes);
            placed.push((
                at,
                Mapping {
                    bytes,
                    offset: page.offset,
                    page: handle,
                },
            ));
            end = at
                .checked_add(bytes)
                .ok_or_else(|| refuse(CALL, EINVAL, "the range exceeds the address space"))?;
        }
        state.check_reserved(CALL, ptr, end - ptr.0)?;
        if let Some((at, mapping)) = state.mappings.range(..end).next_back()
            && at + mapping.bytes > ptr.0
        {
            let reason = format!("a page is already mapped at {at:#x}");
            return Err(refuse(CALL, EBUSY, reason));
        }
        let follows = |one: &(u64, Mapping), next: &(u64, Mapping)| {
            one.1.offset + one.1.bytes == next.1.offset
        };
        // An upper bound on the areas: those of the pages, and the empty ones before and after them.
        let most = placed.chunk_by(follows).count() + 2;
        if !areas::take(most) {
            return Err(refuse(
                CALL,
                ENOMEM,
                "the process has reached its limit of memory mappings",
            ));
        }
        let before = state.areas(ptr.0, end);
        self.show(CALL, &placed)
            .inspect_err(|_| areas::give(most))?;
        for (at, mapping) in placed {
            #[cfg(asan)]
            super::shadow::permit(at, mapping.bytes);
            state.mappings.insert(at, mapping);
            state.live_page(CALL, mapping.page)?.mappings += 1;
        }
        state.settle_areas(before + most, ptr.0, end);
        Ok(())
    }

    /// Maps adjacent mappings, with one system call for each run of pages that are adjacent in the file as well. If a
    /// call fails, the addresses are empty again.
    fn show(&self, call: &'static str, placed: &[(u64, Mapping)]) -> Result<()> {
        let follows = |one: &(u64, Mapping), next: &(u64, Mapping)| {
            one.1.offset + one.1.bytes == next.1.offset
        };
        for run in placed.chunk_by(follows) {
            let (at, first) = run[0];
            let bytes = run.iter().map(|(_, mapping)| mapping.bytes).sum();
            // SAFETY: the range is reserved by us, and no page is mapped in it.
            let shown = unsafe { self.file.map(call, at, first.offset, bytes) };
            if let Err(error) = shown {
                let start = placed[0].0;
                if start < at {
                    // SAFETY: this call just mapped the range, and nothing uses it yet. If the system refuses, the
                    // range keeps unused mappings until it is mapped again or released.
                    let _ = unsafe { self.file.unmap(call, start, at - start) };
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// # Safety
    /// As [`Driver::unmap`](crate::driver::Driver::unmap).
    pub(super) unsafe fn unmap(
        &self,
        capacity: &Capacity,
        ptr: DevicePtr,
        bytes: u64,
    ) -> Result<()> {
        const CALL: &str = "unmap";
        check_length(CALL, bytes)?;
        let mut state = self.state.lock();
        let end = state.check_reserved(CALL, ptr, bytes)?;
        // From the last mapping backwards: the first one that ends before the range ends the search.
        let reaching_in = state
            .mappings
            .range(..end)
            .rev()
            .take_while(|(at, mapping)| **at + mapping.bytes > ptr.0)
            .map(|(at, mapping)| (*at, *mapping));
        let found: Vec<(u64, Mapping)> = reaching_in.collect();
        let cut = |(at, mapping): &&(u64, Mapping)| *at < ptr.0 || at + mapping.bytes > end;
        if let Some((at, mapping)) = found.iter().find(cut) {
            let reason = format!(
                "the page of {} bytes at {at:#x} is only partly in the range",
                mapping.bytes
            );
            return Err(refuse(CALL, EINVAL, reason));
        }
        if found.is_empty() {
            let reason = format!("nothing is mapped in {bytes} bytes at {:#x}", ptr.0);
            return Err(refuse(CALL, EINVAL, reason));
        }
        // SAFETY: the range is reserved by us; the caller promises that no work touches it.
        unsafe { self.file.unmap(CALL, ptr.0, bytes) }?;
        let before = state.areas(ptr.0, end);
        for (at, mapping) in found {
            #[cfg(asan)]
            super::shadow::permit(at, mapping.bytes);
            state.mappings.remove(&at);
            let page = state.pages.get_mut(&mapping.page);
            page.expect("a mapped page is in the table").mappings -= 1;
            self.collect(capacity, &mut state, mapping.page);
        }
        state.settle_areas(before, ptr.0, end);
        Ok(())
    }

    /// Backs the unpopulated part of a range with huge pages. This reaches beyond the range by less than one granule at
    /// each end.
    pub(super) fn prefault(&self, ptr: DevicePtr, bytes: u64) {
        if bytes == 0 || !self.file.may_prefault() {
            return;
        }
        // The system calls are made without the lock: the caller is about to use the memory, so it stays mapped.
        let asked = self.state.lock().ask(ptr, bytes);
        for (at, mapping) in asked {
            self.file.prefault(at, mapping.offset, mapping.bytes);
        }
    }

    /// Removes the page from the table and frees its memory if it has neither a handle nor a mapping.
    fn collect(&self, capacity: &Capacity, state: &mut State, handle: PageHandle) {
        let page = &state.pages[&handle];
        if page.has_handle || page.mappings > 0 {
            return;
        }
        let (offset, bytes) = (page.offset, page.bytes);
        state.pages.remove(&handle);
        // If the system cannot take the memory back now, the run keeps it until the next page in that place is
        // destroyed. Contents of a new page are undefined, so nothing else changes.
        let _ = self.file.discard("destroy_page", offset, bytes);
        state.runs.give(offset, bytes);
        capacity.give(bytes);
    }
}

impl State {
    /// Counts the areas due to mappings in `from..=to`. A mapping starts an area unless it continues the previous
    /// mapping both in memory and in the file. If it is not adjacent to the previous one in memory, the empty area
    /// between them counts as well.
    fn areas(&self, from: u64, to: u64) -> usize {
        let mut before = self
            .mappings
            .range(..from)
            .next_back()
            .map(|(at, mapping)| (*at, *mapping));
        let mut areas = 0;
        for (&at, &mapping) in self.mappings.range(from..=to) {
            let adjacent = before.is_some_and(|(start, before)| start + before.bytes == at);
            let continues = adjacent
                && before.is_some_and(|(_, before)| before.offset + before.bytes == mapping.offset);
            areas += usize::from(!continues) + usize::from(!adjacent);
            before = Some((at, mapping));
        }
        areas
    }

    /// Corrects the count of areas taken for the mappings in `from..=to`, which was `taken` so far.
    fn settle_areas(&self, taken: usize, from: u64, to: u64) {
        let now = self.areas(from, to);
        if now < taken {
            areas::give(taken - now);
        } else {
            // Removing a mapping can split an area in two. That counts, but is never refused.
            areas::take_anyway(now - taken);
        }
    }

    /// The mappings of a range for which huge pages were not requested yet; marks them as requested.
    fn ask(&mut self, ptr: DevicePtr, bytes: u64) -> Vec<(u64, Mapping)> {
        let end = ptr.0.saturating_add(bytes);
        let mut asked = Vec::new();
        let reaching_in = self.mappings.range(..end).rev();
        for (&at, mapping) in reaching_in.take_while(|(at, it)| **at + it.bytes > ptr.0) {
            let page = self.pages.get_mut(&mapping.page);
            let page = page.expect("a mapped page is in the table");
            let is_covered = ptr.0 <= at && at + mapping.bytes <= end;
            if !page.is_prefaulted && (is_covered || page.bytes == PAGE_GRANULARITY) {
                page.is_prefaulted = true;
                asked.push((at, *mapping));
            }
        }
        asked
    }

    /// The page, if its handle is valid.
    fn live_page(&mut self, call: &'static str, handle: PageHandle) -> Result<&mut Page> {
        self.pages
            .get_mut(&handle)
            .filter(|page| page.has_handle)
            .ok_or_else(|| refuse(call, EINVAL, format!("there is no page {}", handle.0)))
    }

    /// The end of `bytes` bytes at `ptr`. Refused unless the bytes are within one reserved range.
    fn check_reserved(&self, call: &'static str, ptr: DevicePtr, bytes: u64) -> Result<u64> {
        let end = ptr.0.checked_add(bytes).filter(|end| {
            let before = self.ranges.range(..=ptr.0).next_back();
            before.is_some_and(|(start, reserved)| *end <= start + reserved)
        });
        match end {
            Some(end) if ptr.0.is_multiple_of(PAGE_GRANULARITY) => Ok(end),
            Some(_) => {
                let reason = format!("{:#x} is not a multiple of {PAGE_GRANULARITY}", ptr.0);
                Err(refuse(call, EINVAL, reason))
            }
            None => {
                let reason = format!(
                    "{bytes} bytes at {:#x} are not in one reserved range",
                    ptr.0
                );
                Err(refuse(call, EINVAL, reason))
            }
        }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        areas::give(self.state.get_mut().areas(0, u64::MAX));
        #[cfg(asan)]
        for (&address, mapping) in &self.state.get_mut().mappings {
            super::shadow::permit(address, mapping.bytes);
        }
        for (&address, &bytes) in &self.state.get_mut().ranges {
            // SAFETY: the range is in the table, so it is ours. Queues keep the memory alive until their work
            // has run, so nothing touches it any more.
            let outcome = unsafe { system::release("release", address, bytes) };
            debug_assert!(outcome.is_ok(), "{outcome:?}");
        }
    }
}

fn check_length(call: &'static str, bytes: u64) -> Result<()> {
    if bytes > 0 && bytes.is_multiple_of(PAGE_GRANULARITY) {
        return Ok(());
    }
    let reason = format!("{bytes} bytes are not a positive multiple of {PAGE_GRANULARITY}");
    Err(refuse(call, EINVAL, reason))
}
