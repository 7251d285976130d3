//! Measures a pass from the program's side: the bytes that it holds, exactly, over all threads, and what it maps in each
//! step.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::probe::ProbeDriver;

/// The bytes that players hold, their peak, and the pages mapped when each step began.
#[derive(Debug)]
pub(crate) struct Meter {
    live: AtomicU64,
    peak: AtomicU64,
    probe: Arc<ProbeDriver>,
    mapped: Mutex<Vec<u64>>,
}

impl Meter {
    /// A meter for programs on the device behind `probe`.
    pub(crate) fn new(probe: Arc<ProbeDriver>) -> Self {
        Self {
            live: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            probe,
            mapped: Mutex::default(),
        }
    }

    /// Pages mapped per step in the second half of the steps, of which the first one counts to the first half if their
    /// number is odd. `None` without steps.
    pub(crate) fn pages_mapped_late(&self) -> Option<f64> {
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let first = mapped.len().div_ceil(2).min(mapped.len().checked_sub(1)?);
        let late = self.probe.calls().pages_mapped - mapped[first];
        Some(late as f64 / (mapped.len() - first) as f64)
    }

    /// The most bytes live at once.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

/// A meter, or none. A pass is compiled for each, so that a timed pass does no metering work.
pub(crate) trait Metering: Copy {
    fn allocated(self, bytes: u64);
    fn freed(self, bytes: u64);
    fn step(self);
}

impl Metering for () {
    fn allocated(self, _bytes: u64) {}

    fn freed(self, _bytes: u64) {}

    fn step(self) {}
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

    fn step(self) {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        mapped.push(self.probe.calls().pages_mapped);
    }
}

#[cfg(test)]
mod tests {
    use kitsune::{Device, HostConfig};

    use super::*;

    #[test]
    fn the_peak_is_what_was_live_at_once() {
        let device = Device::host(HostConfig::default()).unwrap();
        let probe = ProbeDriver::new(Arc::clone(device.driver()), 0);
        let meter = Meter::new(Arc::new(probe));
        (&meter).allocated(5);
        (&meter).freed(5);
        (&meter).allocated(3);
        (&meter).allocated(4);
        assert_eq!(meter.peak(), 7);
        assert_eq!(meter.pages_mapped_late(), None);
    }

    #[test]
    fn late_steps_are_those_of_the_second_half() {
        let device = Device::host(HostConfig::default()).unwrap();
        let probe = Arc::new(ProbeDriver::new(Arc::clone(device.driver()), 0));
        let device = Device::from_driver(Arc::clone(&probe) as _);
        let meter = Meter::new(probe);
        let driver = device.driver();
        let bytes = device.properties().page_granularity;
        let base = driver.reserve(8 * bytes).unwrap();
        // Four steps map one, two, three and four handles, each a page or a part of one.
        let mut mapped = 0;
        for step in 1..=4 {
            (&meter).step();
            for _ in 0..step.min(2) {
                let page = driver.create_page(bytes).unwrap();
                driver.map(base.offset(mapped * bytes), &[page]).unwrap();
                mapped += 1;
            }
        }
        assert_eq!(meter.pages_mapped_late(), Some(2.0));
    }
}
