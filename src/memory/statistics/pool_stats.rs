//! The statistics of a pool, under PyTorch's names.

use super::gauge::Stat;

/// Statistics of one pool. Bytes obey requested ≤ allocated ≤ active ≤ reserved.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct PoolStats {
    /// Blocks in callers' hands.
    pub allocation: Stat,
    /// Ranges held from the driver.
    pub segment: Stat,
    /// Blocks in callers' hands or waiting for other streams.
    pub active: Stat,
    /// Bytes callers asked for.
    pub requested_bytes: Stat,
    /// Bytes in callers' hands, rounded to the granularity.
    pub allocated_bytes: Stat,
    /// Allocated bytes plus those freed but waiting for other streams.
    pub active_bytes: Stat,
    /// Bytes held from the driver.
    pub reserved_bytes: Stat,
    /// How many of the reserved bytes are those of private pools now. A pool counts until its handles and its graphs
    /// are gone; what it leaves is the default heap.
    pub private_reserved_bytes: u64,
    /// Free blocks in segments that are partly in use.
    pub inactive_split: u64,
    /// Bytes of those blocks: free, but not returnable to the driver.
    pub inactive_split_bytes: u64,
    /// Allocations served without a driver allocation.
    pub cache_hits: u64,
    /// Allocations that had to release cached memory and try again.
    pub num_alloc_retries: u64,
    /// Allocations that failed.
    pub num_ooms: u64,
    /// Allocations for which the host waited for streams to find memory, in
    /// [deterministic](crate::PoolConfig::deterministic) mode too. Waits of [`Pool::trim`](crate::Pool::trim) and
    /// before captures do not count.
    pub num_sync_all_streams: u64,
    /// Driver allocations.
    pub num_device_alloc: u64,
    /// Driver frees.
    pub num_device_free: u64,
}

impl PoolStats {
    /// Share of the reserved bytes that is free but split up, from 0 to 1.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn fragmentation(&self) -> f64 {
        match self.reserved_bytes.current {
            0 => 0.0,
            reserved => self.inactive_split_bytes as f64 / reserved as f64,
        }
    }

    /// Every figure under the key that `torch.cuda.memory_stats` gives it, such as
    /// `allocated_bytes.all.peak`.
    pub fn entries(&self) -> impl Iterator<Item = (String, u64)> + '_ {
        let stats = [
            ("allocation", self.allocation),
            ("segment", self.segment),
            ("active", self.active),
            ("requested_bytes", self.requested_bytes),
            ("allocated_bytes", self.allocated_bytes),
            ("active_bytes", self.active_bytes),
            ("reserved_bytes", self.reserved_bytes),
        ];
        let parts = stats.into_iter().flat_map(|(name, stat)| {
            let Stat {
                current,
                peak,
                allocated,
                freed,
            } = stat;
            let parts = [
                ("current", current),
                ("peak", peak),
                ("allocated", allocated),
                ("freed", freed),
            ];
            parts.map(|(part, value)| (format!("{name}.all.{part}"), value))
        });
        let counters = [
            ("inactive_split.all.current", self.inactive_split),
            (
                "inactive_split_bytes.all.current",
                self.inactive_split_bytes,
            ),
            ("num_alloc_retries", self.num_alloc_retries),
            ("num_ooms", self.num_ooms),
            ("num_sync_all_streams", self.num_sync_all_streams),
            ("num_device_alloc", self.num_device_alloc),
            ("num_device_free", self.num_device_free),
        ];
        parts.chain(counters.map(|(name, value)| (name.to_owned(), value)))
    }
}
