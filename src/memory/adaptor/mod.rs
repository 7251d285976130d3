//! Allocators around allocators.
//!
//! Everything that hands out [`Block`]s is an [`Allocate`]: the pool, and each wrapper around one, in any
//! order. The pool itself knows nothing of limits, logs or tables.
//!
//! # The protocol
//! A wrapper asks the allocator inside, and puts a [`Watch`] on the block it passes on. The block tells its
//! watches when it is freed, whichever thread drops it: the outermost first, and all before the memory can
//! be handed out again. A block without watches pays one comparison for this.
//!
//! A watch is shared by blocks, and a *key* of the wrapper's choice tells them apart. It should not hold the
//! allocator inside, lest a forgotten block keeps the pool's caches alive.
//!
//! A block of zero bytes holds no memory: no wrapper counts, logs or tracks it.
//!
//! Must not know: what is done with a log or a report.

mod limit;
mod log;
mod track;

use std::fmt::Debug;
use std::sync::Arc;

pub use limit::Limit;
pub use log::{Log, LogAction, LogError, LogEvent, LogSink};
pub use track::{Track, TrackReport, TrackedBlock};

use crate::driver::{Device, Stream};
use crate::error::Result;
use crate::memory::pool::{Block, Pool};

/// Hands out device memory. Implemented by [`Pool`] and by the wrappers around it.
///
/// The trait is safe to implement. What uses a block through safe code, as [`Buffer`](crate::storage::Buffer)
/// does, checks that it has the bytes and the home stream that were asked for, and refuses another one with
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument). A block's memory is its home stream's device's: a
/// [`Pool`], which all blocks come from, serves no other.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use kitsune::memory::{Allocate, Limit, Track};
/// use kitsune::{Context, Device, HostConfig, Pool, PoolConfig, Tensor};
///
/// let device = Device::host(HostConfig::default())?;
/// let pool = Pool::new(&device, PoolConfig::default())?;
/// let tracked = Arc::new(Track::new(Limit::new(pool.clone(), 1 << 20)));
/// let context = Context::with_allocator(tracked.clone())?;
/// let tensor = Tensor::zeros(&context, [1000], kitsune::DType::F32)?;
/// assert_eq!(tracked.report().requested_bytes(), 4000);
/// drop(tensor);
/// assert!(tracked.report().blocks.is_empty());
/// # Ok::<(), kitsune::Error>(())
/// ```
pub trait Allocate: Debug + Send + Sync {
    /// Memory for `bytes` bytes, for use on `stream` from now on; its contents are undefined. Zero bytes
    /// give a block without memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) if a limit or the device leaves no room;
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a stream of another device.
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block>;

    /// The pool at the bottom, which all blocks come from.
    fn pool(&self) -> &Pool;

    /// The device whose memory this is.
    fn device(&self) -> &Device {
        self.pool().device()
    }
}

impl Allocate for Pool {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        Self::allocate(self, bytes, stream)
    }

    fn pool(&self) -> &Pool {
        self
    }
}

impl<A: Allocate + ?Sized> Allocate for Arc<A> {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        (**self).allocate(bytes, stream)
    }

    fn pool(&self) -> &Pool {
        (**self).pool()
    }
}
