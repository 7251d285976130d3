//! Peaks of a part of a program, as callers see them.

use super::Pool;
use crate::memory::statistics::ScopeStats;

/// Counts what a pool hands out while it lives. Made by [`Pool::peak_scope`].
#[must_use = "the scope ends when it is dropped"]
#[derive(Debug)]
pub struct PeakScope {
    pool: Pool,
    key: u64,
}

impl Pool {
    /// Begins to count peaks relative to now, until the scope is dropped. Scopes may overlap in any way and
    /// end in any order: each counts for itself, so that an outer scope includes the peaks of inner ones.
    ///
    /// A scope counts all threads of the pool. Its figures are exact while one thread uses the pool, or
    /// threads take turns with scopes read in between. With several at once, `current` and `total` are
    /// exact as of some moment during the call, but a peak is joined from the peaks of the threads' caches
    /// and may be off, either way, by what other threads allocated and freed through theirs since the
    /// statistics of the pool were last looked at.
    ///
    /// # Examples
    /// ```
    /// use kitsune::{Device, HostConfig, Pool, PoolConfig};
    ///
    /// let device = Device::host(HostConfig::default())?;
    /// let pool = Pool::new(&device, PoolConfig::default())?;
    /// let stream = device.create_stream()?;
    /// let model = pool.allocate(1 << 20, &stream)?;
    /// let scope = pool.peak_scope();
    /// drop(pool.allocate(4096, &stream)?);
    /// drop(model);
    /// let stats = scope.stats();
    /// assert_eq!(stats.allocated_bytes.peak, 4096);
    /// assert_eq!(stats.allocated_bytes.current, -(1 << 20));
    /// # Ok::<(), kitsune::Error>(())
    /// ```
    pub fn peak_scope(&self) -> PeakScope {
        let mut core = self.shared().lock_and_fold();
        let core = &mut *core;
        PeakScope {
            pool: self.clone(),
            key: core.peaks.open(&mut core.usage),
        }
    }
}

impl PeakScope {
    /// The figures so far.
    #[must_use]
    pub fn stats(&self) -> ScopeStats {
        let mut core = self.pool.shared().lock_and_fold();
        let core = &mut *core;
        core.peaks.stats(self.key, &mut core.usage)
    }
}

impl Drop for PeakScope {
    fn drop(&mut self) {
        let mut core = self.pool.shared().lock_and_fold();
        let core = &mut *core;
        core.peaks.close(self.key, &mut core.usage);
    }
}
