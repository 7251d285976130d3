//! An owned graph: captured work that can be run again.

use super::{Device, RawGraph, Stream};
use crate::error::Result;

/// Work recorded by [`Stream::capture`], to be run as one unit as often as wanted.
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
    /// Memory that the captured work touches is still allocated, and stays so, untouched by others, until
    /// `stream` has passed this point.
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        // SAFETY: the caller promises exactly what the driver asks for.
        unsafe { self.device.driver().launch_graph(self.raw, stream.raw()) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // A driver that refuses to destroy a graph leaves nothing to be done about it.
        let _ = self.device.driver().destroy_graph(self.raw);
    }
}
