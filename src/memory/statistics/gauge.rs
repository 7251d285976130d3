//! Gauges: the current value, the peak and the sums of a quantity, counted in parts that are folded together.

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
pub(crate) struct Gauge {
    current: i64,
    /// The highest value before the last decrease: what it rose to since then is looked at when it falls, or
    /// when somebody asks.
    peak: i64,
    increases: u64,
}

impl Gauge {
    #[inline]
    pub(crate) fn current(&self) -> i64 {
        self.current
    }

    #[inline]
    fn peak(&self) -> i64 {
        self.peak.max(self.current)
    }

    #[inline]
    pub(crate) fn increase(&mut self, amount: u64) {
        self.current += amount.cast_signed();
        self.increases += amount;
    }

    #[inline]
    pub(crate) fn decrease(&mut self, amount: u64) {
        if self.current > self.peak {
            self.peak = self.current;
        }
        self.current -= amount.cast_signed();
    }

    /// Moves the value to `value`, as one increase or decrease.
    pub(crate) fn set(&mut self, value: u64) {
        let now = self.current().cast_unsigned();
        if value >= now {
            self.increase(value - now)
        } else {
            self.decrease(now - value)
        }
    }

    /// Takes over what `part` has counted since it was folded last. The peak of the sum is exact if nothing
    /// else changed meanwhile, and otherwise not more than the parts' own peaks apart.
    pub(crate) fn fold(&mut self, part: &Self) {
        self.peak = self.peak().max(self.current + part.peak());
        self.current += part.current;
        self.increases += part.increases;
    }

    pub(crate) fn reset_peak(&mut self) {
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

    pub(crate) fn increases(&self) -> u64 {
        self.increases
    }

    /// As the public sees it.
    pub(crate) fn stat(&self) -> Stat {
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
pub(crate) struct Usage {
    pub(crate) blocks: Gauge,
    /// Blocks that callers hold or that wait for other streams. A stream cache leaves these and `active` alone: what
    /// it counts as allocated or freed is folded into them too.
    pub(crate) active_blocks: Gauge,
    pub(crate) requested: Gauge,
    /// Bytes of the active blocks.
    pub(crate) active: Gauge,
    pub(crate) allocated: Gauge,
}

impl Usage {
    #[inline]
    pub(crate) fn allocate(&mut self, requested: u64, allocated: u64) {
        self.blocks.increase(1);
        self.requested.increase(requested);
        self.allocated.increase(allocated);
    }

    #[inline]
    pub(crate) fn free(&mut self, requested: u64, allocated: u64) {
        self.blocks.decrease(1);
        self.requested.decrease(requested);
        self.allocated.decrease(allocated);
    }

    pub(crate) fn reset_peaks(&mut self) {
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

    /// Allocations and frees.
    pub(super) fn calls(&self) -> u64 {
        let allocations = self.blocks.increases;
        let frees = allocations.saturating_add_signed(-self.blocks.current);
        allocations + frees
    }

    /// Whether nothing was counted.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks.increases == 0 && self.blocks.current == 0
    }

    /// Takes over what a thread's stream caches have counted since they were folded last.
    pub(crate) fn fold(&mut self, part: &mut Self) {
        self.blocks.fold(&part.blocks);
        self.requested.fold(&part.requested);
        self.allocated.fold(&part.allocated);
        self.active_blocks.fold(&part.blocks);
        self.active.fold(&part.allocated);
        *part = Self::default();
    }
}
