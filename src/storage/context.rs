//! Contexts: a stream, and where its memory comes from.

use std::sync::Arc;

use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::{Allocate, Pool, PoolConfig};

/// One stream and where its memory comes from. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    allocator: Arc<dyn Allocate>,
    stream: Stream,
    /// cudarc's handle of the stream, if it is shared with cudarc.
    #[cfg(feature = "cuda")]
    pub(super) shared: Option<Arc<super::device_buffer::Shared>>,
}

impl Context {
    /// A context on a new stream of `device`, with a new pool in default settings.
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
                "the pool and the stream belong to different devices",
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

    /// The allocator that memory comes from.
    #[must_use]
    pub fn allocator(&self) -> &Arc<dyn Allocate> {
        &self.allocator
    }

    /// The pool below the allocator.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        self.allocator.pool()
    }

    /// The stream that work is enqueued on.
    #[must_use]
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The device of the stream and the allocator.
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
