//! Where work goes.

use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::{Pool, PoolConfig};

/// One stream and the pool its memory comes from. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Context {
    pool: Pool,
    stream: Stream,
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
        let stream = pool.device().create_stream()?;
        Ok(Self {
            pool: pool.clone(),
            stream,
        })
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
        Ok(Self {
            pool: pool.clone(),
            stream: stream.clone(),
        })
    }

    /// Where memory comes from.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
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
