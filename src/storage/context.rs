//! Where work goes.

use std::sync::Arc;

use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::{Allocate, Pool, PoolConfig};

/// One stream and where its memory comes from. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    allocator: Arc<dyn Allocate>,
    stream: Stream,
    /// The same stream as cudarc has it, if it is shared with cudarc.
    #[cfg(feature = "cuda")]
    pub(super) shared: Option<Arc<super::device_buffer::Shared>>,
}

impl Context {
    /// A context on a new stream of `device`, with a pool of its own in default settings.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device refuses a stream.
    pub fn new(device: &Device) -> Result<Self> {
        Self::with_pool(&Pool::new(device, PoolConfig::default())?)
    }

    /// A context on a new stream, with memory from `pool`.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device refuses a stream.
    pub fn with_pool(pool: &Pool) -> Result<Self> {
        Self::with_allocator(Arc::new(pool.clone()))
    }

    /// A context on a new stream, with memory from `allocator`: a pool, or wrappers around one.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device refuses a stream.
    pub fn with_allocator(allocator: Arc<dyn Allocate>) -> Result<Self> {
        let stream = allocator.device().create_stream()?;
        Ok(Self::of(allocator, stream))
    }

    /// A context on `stream`, with memory from `pool`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if they belong to different devices.
    pub fn on_stream(pool: &Pool, stream: &Stream) -> Result<Self> {
        if !pool.device().is_same(stream.device()) {
            return Err(Error::argument(
                "Context::on_stream",
                "pool and stream differ in device",
            ));
        }
        Ok(Self::of(Arc::new(pool.clone()), stream.clone()))
    }

    fn of(allocator: Arc<dyn Allocate>, stream: Stream) -> Self {
        Self {
            allocator,
            stream,
            #[cfg(feature = "cuda")]
            shared: None,
        }
    }

    /// Where memory comes from.
    #[must_use]
    pub fn allocator(&self) -> &Arc<dyn Allocate> {
        &self.allocator
    }

    /// The pool that memory comes from in the end.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        self.allocator.pool()
    }

    /// Where work is enqueued.
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The device of both.
    #[must_use]
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    /// Blocks until all work enqueued on the stream so far has run.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of this stream failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize()
    }
}
