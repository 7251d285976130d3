//! An owned stream.

use std::sync::Arc;

use super::{Device, Driver, Event, Graph, RawStream};
use crate::error::Result;
use crate::units::{Numbers, StreamId};

static NUMBERS: Numbers = Numbers::new("streams");

/// A queue of work on one device. Cheap to clone; destroyed with its last clone, after which work already
/// enqueued still runs.
#[derive(Clone, Debug)]
pub struct Stream {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    device: Device,
    raw: RawStream,
    id: StreamId,
}

impl Stream {
    pub(super) fn new(device: &Device) -> Result<Self> {
        Self::numbered(device, &NUMBERS)
    }

    fn numbered(device: &Device, numbers: &Numbers) -> Result<Self> {
        // Drawn first: if there is no number left, no stream is made.
        let id = StreamId(numbers.next());
        Ok(Self::with_id(device, device.driver().create_stream()?, id))
    }

    /// Takes ownership of a raw stream of the device's driver.
    #[cfg(feature = "cuda")]
    pub(super) fn from_raw(device: &Device, raw: RawStream) -> Self {
        Self::with_id(device, raw, StreamId(NUMBERS.next()))
    }

    fn with_id(device: &Device, raw: RawStream, id: StreamId) -> Self {
        Self {
            inner: Arc::new(Inner {
                device: device.clone(),
                raw,
                id,
            }),
        }
    }

    /// The device that the stream runs work on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.inner.device
    }

    /// The driver of the stream's device.
    #[must_use]
    pub fn driver(&self) -> &Arc<dyn Driver> {
        self.inner.device.driver()
    }

    /// The driver's handle, valid while this stream lives.
    #[must_use]
    pub fn raw(&self) -> RawStream {
        self.inner.raw
    }

    /// Identity of the stream, unique in the process.
    #[must_use]
    pub fn id(&self) -> StreamId {
        self.inner.id
    }

    /// Whether this is the only handle of the stream, so that nothing else can enqueue work on it.
    #[must_use]
    pub fn is_last_handle(&self) -> bool {
        Arc::strong_count(&self.inner) == 1
    }

    /// Blocks until all work enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if work of this stream failed.
    pub fn synchronize(&self) -> Result<()> {
        self.driver().synchronize_stream(self.raw())
    }

    /// Whether all work enqueued so far has run.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if work of this stream failed.
    pub fn is_idle(&self) -> Result<bool> {
        self.driver().query_stream(self.raw())
    }

    /// Marks the current end of the stream with a new event.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    pub fn record(&self) -> Result<Event> {
        let event = Event::new(self.device())?;
        event.record(self)?;
        Ok(event)
    }

    /// Makes work enqueued from now on wait for the point that `event` currently marks. The host does not wait.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an event of another platform;
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.device().expect_platform("wait", event.device())?;
        self.driver().stream_wait(self.raw(), event.raw())
    }

    /// Makes work enqueued from now on wait for everything enqueued on `other` so far.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream of another platform;
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
    pub fn wait_for(&self, other: &Self) -> Result<()> {
        if self.id() == other.id() {
            return Ok(());
        }
        self.wait(&other.record()?)
    }

    /// Records the work that `enqueue` puts on this stream instead of running it.
    ///
    /// # Errors
    /// The error of `enqueue`; [`Error::Driver`](crate::Error::Driver) if the capture was invalidated.
    /// The capture is over in any case.
    pub fn capture(&self, enqueue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.driver().begin_capture(self.raw())?;
        let guard = CaptureGuard { stream: self };
        let outcome = enqueue();
        std::mem::forget(guard);
        let raw = self.driver().end_capture(self.raw());
        match (outcome, raw) {
            (Ok(()), Ok(raw)) => Ok(Graph::from_raw(self.device(), raw)),
            (Err(error), raw) => {
                // Discard the graph of a failed capture and report the error of `enqueue`.
                if let Ok(raw) = raw {
                    drop(Graph::from_raw(self.device(), raw));
                }
                Err(error)
            }
            (Ok(()), Err(error)) => Err(error),
        }
    }
}

/// Ends a capture whose closure panicked, so that the stream is usable again.
struct CaptureGuard<'a> {
    stream: &'a Stream,
}

impl Drop for CaptureGuard<'_> {
    fn drop(&mut self) {
        if let Ok(raw) = self.stream.driver().end_capture(self.stream.raw()) {
            drop(Graph::from_raw(self.stream.device(), raw));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // There is nothing to do if the driver refuses.
        let _ = self.device.driver().destroy_stream(self.raw);
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::driver::HostConfig;

    #[test]
    fn no_stream_gets_the_number_of_another() {
        let device = Device::host(HostConfig::default()).unwrap();
        let numbers = Numbers::starting_at(u32::MAX - 2, "streams");
        let streams = [(); 2].map(|()| Stream::numbered(&device, &numbers).unwrap());
        let ids = streams.each_ref().map(Stream::id);
        assert_eq!(ids, [StreamId(u32::MAX - 2), StreamId(u32::MAX - 1)]);
        drop(streams);
        let refused = catch_unwind(AssertUnwindSafe(|| Stream::numbered(&device, &numbers)));
        let panic = refused.unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert_eq!(message, "all 4294967295 numbers of streams are used up");
        device.create_stream().unwrap().synchronize().unwrap();
    }
}
