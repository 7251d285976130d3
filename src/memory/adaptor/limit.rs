//! A cap on the bytes that pass through.
//!
//! Counted are *allocated* bytes, requests rounded to the granularity of 512, as that is what a block takes
//! from the pool. Bytes count from before the request is passed on until the block is dropped, so that
//! threads that allocate at once cannot exceed the cap together, and a request that is refused changes
//! nothing at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Allocate;
use crate::driver::Stream;
use crate::error::Result;
use crate::memory::pool::{Block, Pool, Watch};
use crate::memory::types::rounded;

/// An allocator whose blocks take at most so many bytes together, whatever else the pool holds.
///
/// # Examples
/// ```
/// use kitsune::memory::{Allocate, Limit};
/// use kitsune::{Device, Error, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let limit = Limit::new(Pool::new(&device, PoolConfig::default())?, 4096);
/// let stream = device.create_stream()?;
/// let block = limit.allocate(3000, &stream)?;
/// assert_eq!(limit.used(), 3072);
/// assert!(matches!(limit.allocate(1025, &stream), Err(Error::OutOfMemory(_))));
/// drop(block);
/// assert_eq!(limit.used(), 0);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Debug)]
pub struct Limit<A> {
    inner: A,
    limit: u64,
    used: Arc<Used>,
}

/// Bytes of blocks that are live or being made.
#[derive(Debug, Default)]
struct Used(AtomicU64);

impl<A: Allocate> Limit<A> {
    /// At most `limit` allocated bytes from `inner`.
    #[must_use]
    pub fn new(inner: A, limit: u64) -> Self {
        Self {
            inner,
            limit,
            used: Arc::default(),
        }
    }

    /// Most allocated bytes at a time.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// Allocated bytes now.
    #[must_use]
    pub fn used(&self) -> u64 {
        // Relaxed, as everywhere here: the number guards no other memory.
        self.used.0.load(Ordering::Relaxed)
    }

    /// The allocator inside.
    #[must_use]
    pub fn inner(&self) -> &A {
        &self.inner
    }
}

impl Used {
    /// Counts `bytes`; `false`, with nothing counted, if that would exceed `limit`.
    fn add(&self, bytes: u64, limit: u64) -> bool {
        let sum = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
        let outcome = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum);
        outcome.is_ok()
    }

    fn subtract(&self, bytes: u64) {
        self.0.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Watch for Used {
    /// The key is what the block was counted as.
    fn freed(&self, key: u64, _block: &Block) {
        self.subtract(key);
    }
}

impl<A: Allocate> Allocate for Limit<A> {
    fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        let Some(counted) = rounded(bytes).filter(|counted| self.used.add(*counted, self.limit))
        else {
            return Err(self.pool().refuse(bytes, stream, (self.used(), self.limit)));
        };
        let outcome = self.inner.allocate(bytes, stream);
        match outcome {
            Ok(mut block) => {
                block.watch(self.used.clone(), counted);
                Ok(block)
            }
            Err(error) => {
                self.used.subtract(counted);
                Err(error)
            }
        }
    }

    fn pool(&self) -> &Pool {
        self.inner.pool()
    }
}
