//! Physical pages: taken from the driver, mapped at their base addresses, returned.

use std::sync::Arc;

use super::address_space::AddressSpace;
use super::mappings::Range;
use super::paged::{PagedBackend, with_slack};
use super::{SpareMemory, Totals};
use crate::driver::{Device, DevicePtr, Driver, PageHandle};
use crate::error::{Error, Result};
use crate::memory::page_heap::FreeBlock;
use crate::memory::streams::Fences;
use crate::memory::types::{
    GRANULARITY, PAGE, PAGE_UNITS, PAGES_MAX, PageIndex, Refusal, StreamIndex,
};
use crate::units::to_usize;

/// Most pages taken at once beyond what is needed, so that one growth in ten calls the driver.
const BATCH_MAX: usize = 10;
/// A batch is at most one part in this many of what is held, so that it stays small in small programs.
const BATCH_SHARE: usize = 128;
/// The reservation of a page heap is this many times the device's memory, if the driver has that much: addresses of
/// returned pages that lie scattered need not be used again.
const HOMES: u64 = 4;

/// The oldest idle mappings are unmapped when all mappings together have more than this many times the pages held.
pub(super) const MAPPED_PER_HELD: u64 = 8;

/// The pages held from a driver, by base address.
#[derive(Debug)]
pub(crate) struct DevicePages {
    driver: Arc<dyn Driver>,
    limit: u64,
    device_bytes: u64,
    base: DevicePtr,
    reserved_pages: u64,
    held: Vec<Option<PageHandle>>,
    /// Unmapped pages that the driver refused to take back. They are offered again.
    unreturned: Vec<PageHandle>,
    /// Unmapped pages that private pools left. They are used before new ones, and count as held from the driver.
    spare: Vec<PageHandle>,
    totals: Totals,
    addresses: AddressSpace,
}

impl DevicePages {
    /// Reserves the addresses of a page heap.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver has no range that large.
    pub(crate) fn new(device: &Device, limit: Option<u64>) -> Result<Self> {
        let total = device.properties().total_memory;
        Self::with_reservation(device, limit, (total / PAGE).max(1) * HOMES)
    }

    /// As [`new`](Self::new), for a heap that returns pages only when it takes no more: each page needs one address.
    pub(crate) fn lasting(device: &Device) -> Result<Self> {
        let total = device.properties().total_memory;
        Self::with_reservation(device, None, (total / PAGE).max(1))
    }

    fn with_reservation(device: &Device, limit: Option<u64>, reserved_pages: u64) -> Result<Self> {
        let reserved_pages = reserved_pages.min(PAGES_MAX);
        let device_bytes = device.properties().total_memory;
        let base = device.driver().reserve(reserved_pages * PAGE)?;
        let driver = device.driver().clone();
        let addresses = AddressSpace::new(driver.clone());
        let limit = limit.unwrap_or(u64::MAX);
        Ok(Self {
            driver,
            limit,
            device_bytes,
            base,
            reserved_pages,
            held: Vec::new(),
            unreturned: Vec::new(),
            spare: Vec::new(),
            totals: Totals::default(),
            addresses,
        })
    }

    /// Bytes of the device's memory.
    pub(super) fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// Address of the byte at `offset` in the page heap.
    pub(crate) fn address(&self, offset: u64) -> DevicePtr {
        self.base.offset(offset)
    }

    pub(crate) fn set_limit(&mut self, bytes: u64) {
        self.limit = bytes;
    }

    /// Bytes of the mapped pages.
    pub(crate) fn bytes_held(&self) -> u64 {
        self.totals.reserved_bytes - self.bytes_spare()
    }

    /// Bytes of the spare pages, which are not mapped.
    pub(super) fn bytes_spare(&self) -> u64 {
        self.spare.len() as u64 * PAGE
    }

    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// Maps pages a second time, side by side; `None` if the driver refuses.
    pub(super) fn map_range(&mut self, pages: &[PageIndex]) -> Option<DevicePtr> {
        let bytes = pages.len() as u64 * PAGE;
        let window = self.bytes_held().saturating_mul(MAPPED_PER_HELD);
        let ptr = self.addresses.take(bytes, window)?;
        let handle = |page: &PageIndex| self.held[*page].expect("a mapped page is held");
        let handles: Vec<PageHandle> = pages.iter().map(handle).collect();
        if self.driver.map(ptr, &handles).is_err() {
            self.addresses.give_back(ptr, bytes);
            return None;
        }
        Some(ptr)
    }

    /// Whether the limit leaves room for `count` more pages.
    fn allows(&self, count: usize) -> bool {
        let bytes = (count as u64).checked_mul(PAGE);
        bytes.is_some_and(|bytes| bytes <= self.limit.saturating_sub(self.totals.reserved_bytes))
    }

    /// Takes `count` pages, spare ones first, and maps them at the addresses of pages `first` and up. All or nothing.
    pub(super) fn take(&mut self, first: PageIndex, count: usize) -> Result<(), Refusal> {
        let spare = self.spare.len().min(count);
        let new = count - spare;
        if !self.allows(new) {
            return Err(Refusal::Limit);
        }
        let mut pages = self.spare.split_off(self.spare.len() - spare);
        let outcome = (0..new).try_for_each(|_| {
            pages.push(self.driver.create_page(PAGE)?);
            Ok(())
        });
        let address = self.address(first as u64 * PAGE);
        if let Err(error) = outcome.and_then(|()| self.driver.map(address, &pages)) {
            for page in pages.drain(spare..) {
                self.destroy(page);
            }
            self.spare.append(&mut pages);
            return Err(Refusal::Driver(error));
        }
        if self.held.len() < first + count {
            self.held.resize(first + count, None);
        }
        for (slot, page) in self.held[first..].iter_mut().zip(pages) {
            *slot = Some(page);
        }
        self.totals.segments += new as u64;
        self.totals.reserved_bytes += new as u64 * PAGE;
        self.totals.device_allocs += new as u64;
        Ok(())
    }

    /// Returns an unmapped page to the driver.
    fn destroy(&mut self, page: PageHandle) {
        if self.driver.destroy_page(page).is_err() {
            self.unreturned.push(page);
        }
    }

    /// Offers the driver again what it refused to take back.
    fn return_again(&mut self) {
        for page in std::mem::take(&mut self.unreturned) {
            self.destroy(page);
        }
    }

    /// Unmaps `count` pages from page `first` on.
    #[expect(
        unsafe_code,
        reason = "unmapping is a promise that nothing uses the memory"
    )]
    fn unmap(&mut self, first: PageIndex, count: usize) -> Result<Vec<PageHandle>> {
        let address = self.address(first as u64 * PAGE);
        // SAFETY: the pages were free in the page heap and the host knows that the work of every stream that used
        // them is complete; idle stitched mappings over them were unmapped before.
        unsafe { self.driver.unmap(address, count as u64 * PAGE) }?;
        let held = self.held[first..first + count].iter_mut();
        Ok(held
            .map(|slot| slot.take().expect("a mapped page is held"))
            .collect())
    }

    /// Unmaps `count` pages from page `first` on and returns them to the driver.
    fn give_back(&mut self, first: PageIndex, count: usize) -> Result<()> {
        for page in self.unmap(first, count)? {
            self.destroy(page);
        }
        self.totals.segments -= count as u64;
        self.totals.reserved_bytes -= count as u64 * PAGE;
        self.totals.device_frees += count as u64;
        Ok(())
    }

    /// Returns spare pages to the driver until at most `keep` bytes are held or none is left.
    fn release_spares(&mut self, keep: u64) -> Result<()> {
        while self.totals.reserved_bytes > keep
            && let Some(page) = self.spare.pop()
        {
            if let Err(error) = self.driver.destroy_page(page) {
                self.spare.push(page);
                return Err(error);
            }
            self.totals.returned(PAGE);
        }
        Ok(())
    }

    /// As [`Backend::take_in`](super::Backend::take_in).
    pub(super) fn take_in(&mut self, mut spares: SpareMemory) {
        self.totals.take_in(&spares);
        self.spare.append(&mut spares.pages);
        self.unreturned.append(&mut spares.unreturned);
    }

    /// As [`Backend::take_spares`](super::Backend::take_spares).
    pub(super) fn take_spares(&mut self) -> SpareMemory {
        let spares = SpareMemory {
            pages: std::mem::take(&mut self.spare),
            ..SpareMemory::default()
        };
        self.totals.give_out(&spares);
        spares
    }

    /// Removes a stitched mapping.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refuses; the mapping then stays.
    #[expect(
        unsafe_code,
        reason = "unmapping is a promise that nothing uses the memory"
    )]
    pub(super) fn unmap_range(&mut self, range: &Range) -> Result<()> {
        // SAFETY: the mapping is not live, and its fence is complete.
        unsafe { self.driver.unmap(range.ptr, range.bytes()) }?;
        self.addresses.give_back(range.ptr, range.bytes());
        Ok(())
    }
}

impl Drop for DevicePages {
    fn drop(&mut self) {
        // Empty if the pool released everything. Blocks that were never freed keep their pages.
        if self.totals.segments == 0 {
            drop(self.driver.release(self.base, self.reserved_pages * PAGE));
        }
    }
}

impl PagedBackend {
    /// Takes at least `count` new pages side by side, free for `owner`.
    pub(crate) fn grow(&mut self, count: usize, owner: StreamIndex) -> Result<(), Refusal> {
        if self.has_room_at_end(count) {
            self.append(count, owner)
        } else {
            self.remap_pages(count, owner)
        }
    }

    /// Takes as many new pages as a free block of `units` for `owner` needs: those that its free block at the end of
    /// the page heap lacks, or all.
    pub(super) fn grow_free_block(
        &mut self,
        units: u64,
        owner: StreamIndex,
    ) -> Result<(), Refusal> {
        let missing = self.missing_pages(units, owner);
        if self.has_room_at_end(missing) {
            return self.append(missing, owner);
        }
        self.remap_pages(to_usize(units.div_ceil(PAGE_UNITS)), owner)
    }

    /// Pages that the free block of `owner` at the end of the page heap lacks for `units`.
    pub(super) fn missing_pages(&self, units: u64, owner: StreamIndex) -> usize {
        let there = self.page_heap.last_free_units(owner).min(units);
        to_usize((units - there).div_ceil(PAGE_UNITS))
    }

    fn has_room_at_end(&self, count: usize) -> bool {
        (self.page_heap.pages() + count) as u64 <= self.pages.reserved_pages
    }

    /// Takes pages at the end of the page heap, where they extend its last free block: some more than asked for, if the
    /// slack allows it.
    fn append(&mut self, count: usize, owner: StreamIndex) -> Result<(), Refusal> {
        let batch = count.max(self.batch());
        let first = self.page_heap.pages();
        let mut taken = batch;
        if !self.has_room_at_end(batch) || self.pages.take(first, batch).is_err() {
            self.pages.take(first, count)?;
            taken = count;
        }
        self.page_heap.append(taken, owner);
        Ok(())
    }

    /// Pages to take at once if fewer are needed: as many as the slack allows.
    pub(super) fn batch(&self) -> usize {
        let held = self.pages.bytes_held();
        let batch = (to_usize(held / PAGE) / BATCH_SHARE).min(BATCH_MAX);
        let room = with_slack(self.live_peak.max(self.in_use)).saturating_sub(held) / PAGE;
        batch.min(to_usize(room))
    }

    /// Takes pages for addresses whose pages were returned.
    fn remap_pages(&mut self, count: usize, owner: StreamIndex) -> Result<(), Refusal> {
        let Some(first) = self.page_heap.unmapped(count) else {
            let reason = format!("there are no addresses for {count} more pages of the device");
            return Err(Refusal::Driver(Error::Driver {
                call: "reserve",
                code: 0,
                reason,
            }));
        };
        self.pages.take(first, count)?;
        self.page_heap.remap(first, count, owner);
        Ok(())
    }

    /// Returns pages that are free as a whole and whose last use is known to be complete, until at most `keep` bytes
    /// are held. Those in the smallest free blocks go first, because large free blocks serve without stitching.
    pub(super) fn release_pages(&mut self, keep: u64, fences: &mut Fences) -> Result<()> {
        self.pages.return_again();
        let mut outcome = self.pages.release_spares(keep);
        let free_blocks: Vec<FreeBlock> = self.page_heap.free_blocks().collect();
        let idle = free_blocks.into_iter().filter(|free_block| {
            !free_block.whole_pages().is_empty() && fences.ask_complete(free_block.fence())
        });
        let mut runs: Vec<std::ops::Range<PageIndex>> =
            idle.map(|free_block| free_block.whole_pages()).collect();
        runs.sort_by_key(|run| (run.len(), run.start));
        for run in runs {
            let held = self.pages.totals().reserved_bytes;
            let surplus = held.saturating_sub(keep);
            let count = run.len().min(to_usize(surplus.div_ceil(PAGE)));
            if count == 0 {
                break;
            }
            let run = run.end - count..run.end;
            outcome = outcome.and(self.release_run(run, fences));
        }
        outcome
    }

    /// Returns adjacent pages, unless a stitched mapping over one of them may still be in use.
    fn release_run(&mut self, run: std::ops::Range<PageIndex>, fences: &mut Fences) -> Result<()> {
        for index in self.ranges.idle_over(|page| run.contains(&page)) {
            if !self.remove_range(index, fences)? {
                return Ok(());
            }
        }
        self.pages.give_back(run.start, run.len())?;
        self.note_unmapped(&run);
        Ok(())
    }

    /// Notes in the page heap that adjacent free pages are unmapped.
    fn note_unmapped(&mut self, run: &std::ops::Range<PageIndex>) {
        let start = run.start as u64 * PAGE_UNITS;
        let free_block = self
            .page_heap
            .free_block_over_page(run.start)
            .expect("the run was found free");
        let block = self
            .page_heap
            .take(&free_block, start, run.len() as u64 * PAGE_UNITS);
        debug_assert_eq!(
            self.page_heap.start(block) * GRANULARITY,
            run.start as u64 * PAGE
        );
        self.page_heap.unmap(block);
    }

    /// Gives up pages that are free as a whole and whose last use is found to be complete.
    pub(super) fn give_up_pages(
        &mut self,
        fences: &mut Fences,
        spares: &mut SpareMemory,
    ) -> Result<()> {
        debug_assert_eq!(
            self.ranges.pages_mapped, 0,
            "a private pool stitches nothing"
        );
        spares.unreturned.append(&mut self.pages.unreturned);
        let free_blocks: Vec<FreeBlock> = self.page_heap.free_blocks().collect();
        let whole = free_blocks
            .iter()
            .filter(|free_block| !free_block.whole_pages().is_empty());
        let mut outcome = Ok(());
        for free_block in whole.filter(|free_block| fences.passed_by_now(free_block.fence())) {
            let run = free_block.whole_pages();
            match self.pages.unmap(run.start, run.len()) {
                Ok(pages) => {
                    self.note_unmapped(&run);
                    let given = SpareMemory {
                        pages,
                        ..SpareMemory::default()
                    };
                    self.pages.totals.give_out(&given);
                    spares.pages.extend(given.pages);
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }
}
