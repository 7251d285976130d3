//! Counts the bytes that programs hold, exactly, over all threads.

use std::sync::atomic::{AtomicU64, Ordering};

/// The bytes that players hold, and their peak.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    live: AtomicU64,
    peak: AtomicU64,
}

impl Meter {
    /// The most bytes live at once.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

/// A meter, or none. A pass is compiled for each, so that a timed pass does no metering work.
pub(crate) trait Metering: Copy {
    fn allocated(self, bytes: u64);
    fn freed(self, bytes: u64);
}

impl Metering for () {
    fn allocated(self, _bytes: u64) {}

    fn freed(self, _bytes: u64) {}
}

// Relaxed throughout: each sum is exact on its own, and the peak is read after the pass.
impl Metering for &Meter {
    fn allocated(self, bytes: u64) {
        let live = bytes + self.live.fetch_add(bytes, Ordering::Relaxed);
        self.peak.fetch_max(live, Ordering::Relaxed);
    }

    fn freed(self, bytes: u64) {
        self.live.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_what_was_live_at_once() {
        let meter = Meter::default();
        (&meter).allocated(5);
        (&meter).freed(5);
        (&meter).allocated(3);
        (&meter).allocated(4);
        assert_eq!(meter.peak(), 7);
    }
}
