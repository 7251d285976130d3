//! An owned event.

use super::{Device, RawEvent, Stream};
use crate::error::Result;

/// A mark in a stream. Destroyed on drop; waits already enqueued on it stay valid.
#[derive(Debug)]
pub struct Event {
    device: Device,
    raw: RawEvent,
}

impl Event {
    /// An event that marks nothing yet, and therefore counts as complete.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver cannot make another event.
    pub fn new(device: &Device) -> Result<Self> {
        let raw = device.driver().create_event()?;
        Ok(Self {
            device: device.clone(),
            raw,
        })
    }

    /// The device that the event was made on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The driver's handle, valid while this event lives.
    #[must_use]
    pub fn raw(&self) -> RawEvent {
        self.raw
    }

    /// Marks the current end of `stream`, replacing an earlier mark.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream of another platform;
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.device.expect_platform("record", stream.device())?;
        self.device.driver().record(self.raw, stream.raw())
    }

    /// Whether the marked point has been passed; never blocks.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if work before the mark failed.
    pub fn is_complete(&self) -> Result<bool> {
        self.device.driver().query_event(self.raw)
    }

    /// Blocks until the marked point has been passed.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if work before the mark failed.
    pub fn synchronize(&self) -> Result<()> {
        self.device.driver().synchronize_event(self.raw)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // There is nothing to do if the driver refuses.
        let _ = self.device.driver().destroy_event(self.raw);
    }
}
