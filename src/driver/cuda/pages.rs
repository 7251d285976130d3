//! Physical pages and their mappings.
//!
//! The library unmaps a mapping only as a whole, releases a reserved range without checking that it is empty, and
//! allows access to a mapping only once access was set. So this module tracks ranges and mappings itself: it unmaps one
//! mapping at a time, and refuses invalid calls before they do damage.

use std::collections::BTreeMap;
use std::ffi::c_int;

use cudarc::driver::sys::{
    CUdevice, CUmemAccess_flags, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationProp, CUmemAllocationType, CUmemGenericAllocationHandle, CUmemLocation,
    CUmemLocationType,
};
use parking_lot::Mutex;

use super::context::Context;
use super::failure::{code, refuse};
use super::library::{Library, ask};
use super::table::{Close, Table};
use crate::driver::{DevicePtr, PageHandle};
use crate::error::{Error, Result};
use crate::units::{MIB, to_usize};

/// The granularity of every device so far. Reported for devices without virtual memory.
pub(super) const USUAL_GRANULARITY: u64 = 2 * MIB;

/// The device as a place for memory.
///
/// Since CUDA 13.2 the device number is in an anonymous union, at the same offset as before.
fn location(device: CUdevice) -> CUmemLocation {
    const NUMBER_AT: usize = 4;
    const _: () = assert!(size_of::<CUmemLocation>() == NUMBER_AT + size_of::<c_int>());
    // SAFETY: all fields are numbers, and zero is a valid location type.
    let mut location: CUmemLocation = unsafe { std::mem::zeroed() };
    location.type_ = CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
    let number = (&raw mut location)
        .wrapping_byte_add(NUMBER_AT)
        .cast::<c_int>();
    // SAFETY: inside `location`, as the assertion above checks.
    unsafe { number.write(device) };
    location
}

fn page_properties(device: CUdevice) -> CUmemAllocationProp {
    // SAFETY: numbers and a nullable pointer. Zero is not a valid allocation type, but is replaced below.
    let mut properties: CUmemAllocationProp = unsafe { std::mem::zeroed() };
    properties.type_ = CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = location(device);
    properties
}

/// The unit of pages on `device`.
pub(super) fn granularity(library: &Library, device: CUdevice) -> Result<u64> {
    let mut bytes = 0;
    let properties = page_properties(device);
    let option = CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_MINIMUM;
    let place = &raw mut bytes;
    // SAFETY: `properties` is complete, `bytes` receives the result.
    unsafe {
        ask!(
            library,
            "open",
            cuMemGetAllocationGranularity(place, &raw const properties, option)
        )
    }?;
    Ok(bytes as u64)
}

/// A run of physical memory.
#[derive(Debug)]
pub(super) struct PageEntry {
    context: &'static Context,
    handle: CUmemGenericAllocationHandle,
    bytes: u64,
}

impl Close for PageEntry {
    const NAME: &'static str = "page";

    fn close(&self, call: &'static str) -> Result<()> {
        let _bound = self.context.bind(call)?;
        // SAFETY: the handle is ours. The memory stays allocated until its last mapping is gone.
        unsafe { ask!(self.context.library, call, cuMemRelease(self.handle)) }
    }
}

impl Drop for PageEntry {
    fn drop(&mut self) {
        let _ = self.close("destroy_page");
    }
}

/// All ranges, pages and mappings. All devices share one address space, so one table is enough.
#[derive(Debug)]
pub(super) struct Pages {
    pages: Table<PageEntry>,
    addresses: Mutex<Addresses>,
}

#[derive(Debug, Default)]
struct Addresses {
    /// Reserved ranges by address.
    ranges: BTreeMap<u64, ReservedRange>,
    /// Mappings: address to bytes. They are disjoint, and each lies in one range.
    mappings: BTreeMap<u64, u64>,
}

/// A range of addresses, and the device that can access what is mapped there.
#[derive(Debug)]
struct ReservedRange {
    bytes: u64,
    context: &'static Context,
}

impl Pages {
    pub(super) fn new() -> Self {
        Self {
            pages: Table::new(),
            addresses: Mutex::default(),
        }
    }

    /// The device whose reserved range contains `ptr`; `None` for other memory.
    pub(super) fn device_of(&self, ptr: DevicePtr) -> Option<&'static Context> {
        let addresses = self.addresses.lock();
        let (start, range) = addresses.ranges.range(..=ptr.0).next_back()?;
        (ptr.0 < start + range.bytes).then_some(range.context)
    }

    pub(super) fn reserve(&self, context: &'static Context, bytes: u64) -> Result<DevicePtr> {
        const CALL: &str = "reserve";
        check_length(context, CALL, bytes)?;
        let _bound = context.bind(CALL)?;
        let alignment = to_usize(context.properties.page_granularity);
        let mut ptr = 0;
        let place = &raw mut ptr;
        // SAFETY: `ptr` receives the result; no address is requested.
        unsafe {
            ask!(
                context.library,
                CALL,
                cuMemAddressReserve(place, to_usize(bytes), alignment, 0, 0)
            )
        }?;
        let range = ReservedRange { bytes, context };
        self.addresses.lock().ranges.insert(ptr, range);
        Ok(DevicePtr(ptr))
    }

    pub(super) fn release(&self, context: &Context, ptr: DevicePtr, bytes: u64) -> Result<()> {
        const CALL: &str = "release";
        let mut addresses = self.addresses.lock();
        let range = addresses.ranges.get(&ptr.0);
        if range.is_none_or(|range| range.bytes != bytes) {
            let reason = format!("{bytes} bytes at {:#x} are not one reserved range", ptr.0);
            return Err(invalid(CALL, reason));
        }
        if let Some((at, _)) = addresses.mappings.range(ptr.0..ptr.0 + bytes).next() {
            return Err(invalid(CALL, format!("a page is still mapped at {at:#x}")));
        }
        let _bound = context.bind(CALL)?;
        // SAFETY: the range is ours and empty.
        unsafe {
            ask!(
                context.library,
                CALL,
                cuMemAddressFree(ptr.0, to_usize(bytes))
            )
        }?;
        addresses.ranges.remove(&ptr.0);
        Ok(())
    }

    pub(super) fn create(&self, context: &'static Context, bytes: u64) -> Result<PageHandle> {
        const CALL: &str = "create_page";
        check_length(context, CALL, bytes)?;
        let _bound = context.bind(CALL)?;
        let properties = page_properties(context.device);
        let mut handle = 0;
        let place = &raw mut handle;
        // SAFETY: `properties` is complete, `handle` receives the result.
        unsafe {
            ask!(
                context.library,
                CALL,
                cuMemCreate(place, to_usize(bytes), &raw const properties, 0)
            )
        }?;
        let page = PageEntry {
            context,
            handle,
            bytes,
        };
        Ok(PageHandle(self.pages.insert(page)))
    }

    pub(super) fn destroy(&self, page: PageHandle) -> Result<()> {
        self.pages.remove("destroy_page", page.0)
    }

    /// Maps `handles` next to each other from `ptr` on, and sets access once for all of them. Maps all or none.
    pub(super) fn map(
        &self,
        context: &Context,
        ptr: DevicePtr,
        handles: &[PageHandle],
    ) -> Result<()> {
        const CALL: &str = "map";
        let pages: Vec<_> = handles
            .iter()
            .map(|handle| self.pages.get(CALL, handle.0))
            .collect::<Result<_>>()?;
        let mut addresses = self.addresses.lock();
        let end = pages
            .iter()
            .try_fold(ptr.0, |end, page| end.checked_add(page.bytes));
        let end = end.ok_or_else(|| invalid(CALL, "the range exceeds the address space"))?;
        addresses.check_reserved(CALL, ptr.0, end)?;
        if let Some((at, _)) = addresses.reaching_in(ptr.0, end).next() {
            return Err(invalid(
                CALL,
                format!("a page is already mapped at {at:#x}"),
            ));
        }
        if pages.is_empty() {
            return Ok(());
        }
        let _bound = context.bind(CALL)?;
        let mut at = ptr.0;
        let mut shown = Ok(());
        for page in &pages {
            // SAFETY: the page is alive, and the addresses are reserved and empty.
            shown = unsafe {
                ask!(
                    context.library,
                    CALL,
                    cuMemMap(at, to_usize(page.bytes), 0, page.handle, 0)
                )
            };
            if shown.is_err() {
                break;
            }
            addresses.mappings.insert(at, page.bytes);
            at += page.bytes;
        }
        let outcome = shown.and_then(|()| allow(context, ptr.0, end - ptr.0));
        if outcome.is_err() {
            // A mapping that cannot be unmapped stays in the table, so that a later call can try again.
            let _ = addresses.clear(context, CALL, ptr.0, at);
        }
        outcome
    }

    /// # Safety
    /// As [`Driver::unmap`](crate::driver::Driver::unmap).
    pub(super) unsafe fn unmap(&self, context: &Context, ptr: DevicePtr, bytes: u64) -> Result<()> {
        const CALL: &str = "unmap";
        check_length(context, CALL, bytes)?;
        let end = ptr.0.checked_add(bytes);
        let end = end.ok_or_else(|| invalid(CALL, "the range exceeds the address space"))?;
        let mut addresses = self.addresses.lock();
        addresses.check_reserved(CALL, ptr.0, end)?;
        if addresses.reaching_in(ptr.0, end).next().is_none() {
            let reason = format!("nothing is mapped in {bytes} bytes at {:#x}", ptr.0);
            return Err(invalid(CALL, reason));
        }
        let cut = addresses
            .reaching_in(ptr.0, end)
            .find(|(at, length)| *at < ptr.0 || at + length > end);
        if let Some((at, length)) = cut {
            let reason =
                format!("the page of {length} bytes at {at:#x} is only partly in the range");
            return Err(invalid(CALL, reason));
        }
        let _bound = context.bind(CALL)?;
        addresses.clear(context, CALL, ptr.0, end)
    }
}

impl Addresses {
    /// Refuses a range that does not lie in one reserved range.
    fn check_reserved(&self, call: &'static str, from: u64, to: u64) -> Result<()> {
        let before = self.ranges.range(..=from).next_back();
        if before.is_some_and(|(start, range)| to <= start + range.bytes) {
            return Ok(());
        }
        let reason = format!(
            "{} bytes at {from:#x} are not in one reserved range",
            to - from
        );
        Err(invalid(call, reason))
    }

    /// The mappings that overlap the range, from last to first.
    fn reaching_in(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
        // Disjoint mappings end in the order in which they begin, so the first one that ends before the range ends
        // the search.
        let below = self.mappings.range(..to).rev();
        below
            .map(|(at, bytes)| (*at, *bytes))
            .take_while(move |(at, bytes)| at + bytes > from)
    }

    /// Unmaps everything in the range, one mapping after the other.
    fn clear(&mut self, context: &Context, call: &'static str, from: u64, to: u64) -> Result<()> {
        while let Some((&at, &bytes)) = self.mappings.range(from..to).next() {
            // SAFETY: the mapping is ours; the caller promises that no work touches it.
            unsafe { ask!(context.library, call, cuMemUnmap(at, to_usize(bytes))) }?;
            self.mappings.remove(&at);
        }
        Ok(())
    }
}

/// Makes mapped memory readable and writable by the device.
fn allow(context: &Context, ptr: u64, bytes: u64) -> Result<()> {
    let access = CUmemAccessDesc {
        location: location(context.device),
        flags: CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    };
    // SAFETY: the whole range was just mapped; `access` is one descriptor.
    unsafe {
        ask!(
            context.library,
            "map",
            cuMemSetAccess(ptr, to_usize(bytes), &raw const access, 1)
        )
    }
}

fn check_length(context: &Context, call: &'static str, bytes: u64) -> Result<()> {
    let properties = &context.properties;
    if !properties.virtual_memory {
        let reason = format!("{} has no virtual memory management", properties.name);
        return Err(refuse(call, code::NOT_SUPPORTED, reason));
    }
    let unit = properties.page_granularity;
    if bytes > 0 && bytes.is_multiple_of(unit) {
        return Ok(());
    }
    Err(invalid(
        call,
        format!("{bytes} bytes are not a positive multiple of {unit}"),
    ))
}

fn invalid(call: &'static str, reason: impl Into<String>) -> Error {
    refuse(call, code::INVALID_VALUE, reason)
}
