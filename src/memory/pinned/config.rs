//! How a pool of pinned memory behaves.

use std::time::Duration;

use super::cache::GRANULARITY;
use crate::error::{Error, Result};

/// Settings of a [`PinnedPool`](super::PinnedPool). Checked once, when the pool is made.
///
/// ```
/// use kitsune::memory::{PinnedConfig, PinnedPool};
/// use kitsune::{Device, Error, HostConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let config = PinnedConfig { limit: Some(64 << 20), ..PinnedConfig::default() };
/// let pool = PinnedPool::with_config(&device, config)?;
/// let block = pool.allocate(40 << 20)?;
/// match pool.allocate(40 << 20) {
///     Err(Error::OutOfMemory(report)) => assert!(report.limited && report.limit == Some(64 << 20)),
///     other => panic!("{other:?}"),
/// }
/// # drop(block);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PinnedConfig {
    /// Most bytes the pool may hold, at least 4 KiB; `None` leaves it to the driver.
    pub limit: Option<u64>,
    /// Returns memory that has been idle this long to the driver, at the first
    /// [`allocate`](super::PinnedPool::allocate) after that; `None` keeps it. What counts is how much callers held at
    /// the peak of a period of this length, so memory goes back after one to two periods; an eighth of that peak is
    /// held on to beside it. No thread watches the clock: see [`decay_now`](super::PinnedPool::decay_now).
    pub decay: Option<Duration>,
}

impl PinnedConfig {
    /// Refuses settings that cannot work.
    pub(super) fn check(&self) -> Result<()> {
        check_limit(self.limit)
    }
}

/// Refuses a limit that leaves no room for a block.
pub(super) fn check_limit(limit: Option<u64>) -> Result<()> {
    match limit {
        Some(limit) if limit < GRANULARITY => {
            let reason = format!("{limit} bytes; at least {GRANULARITY} are needed");
            Err(Error::config("limit", reason))
        }
        _ => Ok(()),
    }
}
