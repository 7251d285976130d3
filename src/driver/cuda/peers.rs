//! Copies between devices.
//!
//! Mapped memory is accessible only to the device it was mapped for, and the plain copy can access only what its
//! stream's device can. So when several devices are open, the device of each end is looked up. If either is not the
//! stream's device, the copy uses the call that names both devices. Programs with one device pay nothing.
//!
//! Must not know: what is copied.

use std::ffi::c_uint;

use cudarc::driver::sys::{CUmemorytype, CUpointer_attribute};
use parking_lot::RwLock;

use super::context::Context;
use super::library::ask;
use super::memory;
use super::pages::Pages;
use super::streams::StreamEntry;
use crate::driver::DevicePtr;
use crate::error::Result;
use crate::units::to_usize;

/// The open devices, in the order in which they were opened.
#[derive(Debug, Default)]
pub(super) struct Peers(RwLock<Vec<&'static Context>>);

impl Peers {
    pub(super) fn add(&self, context: &'static Context) {
        self.0.write().push(context);
    }

    /// The devices of two addresses, if a copy between them must name both.
    pub(super) fn between(
        &self,
        pages: &Pages,
        stream: &Context,
        addresses: [DevicePtr; 2],
    ) -> Result<Option<[&'static Context; 2]>> {
        if self.0.read().len() < 2 {
            return Ok(None);
        }
        let [dst, src] = addresses.map(|ptr| match pages.device_of(ptr) {
            Some(context) => Ok(Some(context)),
            None => self.of_plain(stream, ptr),
        });
        let (Some(dst), Some(src)) = (dst?, src?) else {
            return Ok(None);
        };
        let is_near = [dst, src].iter().all(|end| stream.is(end.raw()));
        Ok((!is_near).then_some([dst, src]))
    }

    /// The device of an address outside all reserved ranges; `None` for host memory.
    fn of_plain(&self, asking: &Context, ptr: DevicePtr) -> Result<Option<&'static Context>> {
        let _bound = asking.bind("copy")?;
        let kind = CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE;
        let device = CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
        if memory::attribute(asking, kind, ptr)
            != Some(CUmemorytype::CU_MEMORYTYPE_DEVICE as c_uint)
        {
            return Ok(None);
        }
        let ordinal = memory::attribute(asking, device, ptr);
        let opened = self.0.read();
        let found = opened
            .iter()
            .find(|context| Some(context.properties.ordinal.0) == ordinal);
        Ok(found.copied())
    }
}

/// Enqueues a copy that names the devices of both ends.
///
/// # Safety
/// As [`Driver::copy`](crate::driver::Driver::copy).
pub(super) unsafe fn copy(
    stream: &StreamEntry,
    [to, from]: [&Context; 2],
    [dst, src]: [DevicePtr; 2],
    bytes: u64,
) -> Result<()> {
    const CALL: &str = "copy";
    let _bound = stream.context.bind(CALL)?;
    // SAFETY: the caller promises both ranges; the contexts are never released.
    unsafe {
        ask!(
            stream.context.library,
            CALL,
            cuMemcpyPeerAsync(
                dst.0,
                to.raw(),
                src.0,
                from.raw(),
                to_usize(bytes),
                stream.raw()
            )
        )
    }
}
