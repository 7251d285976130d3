//! What a pool counts, under PyTorch's names.
//!
//! Every quantity is a [`Stat`]. The pool updates plain numbers under its lock; exporting them is another
//! layer's work.

/// One quantity over time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Stat {
    /// Value now.
    pub current: u64,
    /// Highest value since the start or since the peaks were reset.
    pub peak: u64,
    /// Sum of all increases.
    pub allocated: u64,
    /// Sum of all decreases.
    pub freed: u64,
}

/// A [`Stat`] in the making. Counters of several threads are kept apart and folded later, so a part may
/// have seen more frees than allocations: the value is signed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gauge {
    current: i64,
    /// The highest value before the last decrease: what it rose to since then is looked at when it falls, or
    /// when somebody asks.
    peak: i64,
    increases: u64,
}

impl Gauge {
    #[inline]
    pub(super) fn current(&self) -> i64 {
        self.current
    }

    #[inline]
    fn peak(&self) -> i64 {
        self.peak.max(self.current)
    }

    #[inline]
    pub(super) fn increase(&mut self, amount: u64) {
        self.current += amount.cast_signed();
        self.increases += amount;
    }

    #[inline]
    pub(super) fn decrease(&mut self, amount: u64) {
        if self.current > self.peak {
            self.peak = self.current;
        }
        self.current -= amount.cast_signed();
    }

    /// Moves the value to `value`, as one increase or decrease.
    pub(super) fn set(&mut self, value: u64) {
        let now = self.current().cast_unsigned();
        if value >= now {
            self.increase(value - now)
        } else {
            self.decrease(now - value)
        }
    }

    /// Takes over what `part` has counted since it was folded last. The peak of the sum is exact if nothing
    /// else changed meanwhile, and otherwise not more than the parts' own peaks apart.
    pub(super) fn fold(&mut self, part: &Self) {
        self.peak = self.peak().max(self.current + part.peak());
        self.current += part.current;
        self.increases += part.increases;
    }

    pub(super) fn reset_peak(&mut self) {
        self.peak = self.current;
    }

    /// The peak, which starts anew from the present value.
    pub(super) fn take_peak(&mut self) -> i64 {
        let peak = self.peak();
        self.reset_peak();
        peak
    }

    pub(super) fn raise_peak(&mut self, peak: i64) {
        self.peak = self.peak().max(peak);
    }

    pub(super) fn increases(&self) -> u64 {
        self.increases
    }

    /// As the public sees it.
    pub(super) fn stat(&self) -> Stat {
        let clamp = |value: i64| value.max(0).cast_unsigned();
        Stat {
            current: clamp(self.current()),
            peak: clamp(self.peak()),
            allocated: self.increases,
            freed: self.increases.wrapping_sub(self.current.cast_unsigned()),
        }
    }
}

/// What callers hold, counted where they get it and give it back.
// In this order, so that what an allocation adds to does not lie side by side: the compiler would put a vector together
// to add, in three times the instructions.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Usage {
    pub(super) blocks: Gauge,
    /// Blocks that callers hold or that wait for other streams. A lane leaves these and `active` alone: what
    /// it counts as allocated or freed is folded into them too.
    pub(super) active_blocks: Gauge,
    pub(super) requested: Gauge,
    /// Bytes of the active blocks.
    pub(super) active: Gauge,
    pub(super) allocated: Gauge,
}

impl Usage {
    #[inline]
    pub(super) fn allocate(&mut self, requested: u64, allocated: u64) {
        self.blocks.increase(1);
        self.requested.increase(requested);
        self.allocated.increase(allocated);
    }

    #[inline]
    pub(super) fn free(&mut self, requested: u64, allocated: u64) {
        self.blocks.decrease(1);
        self.requested.decrease(requested);
        self.allocated.decrease(allocated);
    }

    pub(super) fn reset_peaks(&mut self) {
        let Self {
            blocks,
            requested,
            allocated,
            active_blocks,
            active,
            ..
        } = self;
        for gauge in [blocks, requested, allocated, active_blocks, active] {
            gauge.reset_peak();
        }
    }

    /// Whether nothing was counted.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.increases == 0 && self.blocks.current == 0
    }

    /// Takes over what a thread's lanes have counted since they were folded last.
    pub(super) fn fold(&mut self, part: &mut Self) {
        self.blocks.fold(&part.blocks);
        self.requested.fold(&part.requested);
        self.allocated.fold(&part.allocated);
        self.active_blocks.fold(&part.blocks);
        self.active.fold(&part.allocated);
        *part = Self::default();
    }
}

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
    /// are gone; what it leaves is ordinary memory.
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
    /// [deterministic](super::PoolConfig::deterministic) mode too. Waits of [`Pool::trim`](super::Pool::trim) and
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
