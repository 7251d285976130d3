//! An owned graph: captured work that can be run repeatedly.

use super::{Device, RawGraph, Stream};
use crate::error::Result;

/// Work recorded by [`Stream::capture`], which can be launched as one unit any number of times.
#[derive(Debug)]
pub struct Graph {
    device: Device,
    raw: RawGraph,
}

impl Graph {
    pub(super) fn from_raw(device: &Device, raw: RawGraph) -> Self {
        Self {
            device: device.clone(),
            raw,
        }
    }

    /// Enqueues the captured work on `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    ///
    /// # Safety
    /// The memory that the captured work touches is still allocated, stays so, and is not touched by anything else,
    /// until `stream` has passed this point.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the caller promises exactly what the driver asks for.
        unsafe { self.device.driver().launch_graph(self.raw, stream.raw()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // There is nothing to do if the driver refuses.
        let _ = self.device.driver().destroy_graph(self.raw);
    }
}
