//! Addresses for mappings, reserved in advance.
//!
//! One reservation of the driver has the addresses of many mappings; those of a removed mapping are used again. So a
//! new mapping costs one driver call, which maps it. Reservations go back to the driver with the pool.
//!
//! Invariants: free parts lie in reservations, and no two of one reservation touch. Must not know: pages, what is
//! mapped.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::driver::{DevicePtr, Driver};

/// Reserved addresses that nothing is mapped at, and the reservations they lie in.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    driver: Arc<dyn Driver>,
    /// Bytes by start.
    windows: BTreeMap<u64, u64>,
    free: Parts,
}

/// Parts of reservations.
#[derive(Debug, Default)]
struct Parts {
    /// Bytes by start.
    by_start: BTreeMap<u64, u64>,
    /// Bytes and start.
    by_size: BTreeSet<(u64, u64)>,
}

impl Parts {
    fn insert(&mut self, start: u64, bytes: u64) {
        self.by_start.insert(start, bytes);
        self.by_size.insert((bytes, start));
    }

    fn remove(&mut self, start: u64) {
        if let Some(bytes) = self.by_start.remove(&start) {
            self.by_size.remove(&(bytes, start));
        }
    }

    /// Start and bytes of the smallest part of at least `bytes`.
    fn best_fit(&self, bytes: u64) -> Option<(u64, u64)> {
        let (bytes, start) = self.by_size.range((bytes, 0)..).next()?;
        Some((*start, *bytes))
    }
}

impl AddressSpace {
    /// None so far.
    pub(crate) fn new(driver: Arc<dyn Driver>) -> Self {
        Self {
            driver,
            windows: BTreeMap::new(),
            free: Parts::default(),
        }
    }

    /// `bytes` of addresses (not 0, a multiple of the page size), out of a new reservation of `reservation` bytes if
    /// there are none; `None` if the driver has no range that large.
    pub(crate) fn take(&mut self, bytes: u64, window: u64) -> Option<DevicePtr> {
        let (start, free) = match self.free.best_fit(bytes) {
            Some(part) => part,
            None => self.reserve(bytes, window)?,
        };
        self.free.remove(start);
        if free > bytes {
            self.free.insert(start + bytes, free - bytes);
        }
        Some(DevicePtr(start))
    }

    /// A new reservation: its start and its bytes.
    fn reserve(&mut self, bytes: u64, window: u64) -> Option<(u64, u64)> {
        let sizes = [window.max(bytes), bytes];
        let (ptr, bytes) = sizes
            .into_iter()
            .find_map(|bytes| Some((self.driver.reserve(bytes).ok()?, bytes)))?;
        self.windows.insert(ptr.0, bytes);
        Some((ptr.0, bytes))
    }

    /// Takes back addresses that nothing is mapped at any more.
    pub(crate) fn give_back(&mut self, ptr: DevicePtr, bytes: u64) {
        let (mut start, mut bytes) = (ptr.0, bytes);
        // Reservations may touch; a mapping in two of them would be none to the driver.
        let end = start + bytes;
        if let Some(after) = self.free.by_start.get(&end).copied()
            && !self.windows.contains_key(&end)
        {
            self.free.remove(end);
            bytes += after;
        }
        let before = self.free.by_start.range(..start).next_back();
        if let Some((&before, &length)) = before
            && before + length == start
            && !self.windows.contains_key(&start)
        {
            self.free.remove(before);
            start = before;
            bytes += length;
        }
        self.free.insert(start, bytes);
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        for (start, bytes) in &self.windows {
            // Where something is still mapped the addresses are lost.
            if self.free.by_start.get(start) == Some(bytes) {
                drop(self.driver.release(DevicePtr(*start), *bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};
    use crate::units::MIB;

    const PAGE: u64 = 2 * MIB;

    fn addresses() -> AddressSpace {
        let device = Device::host(HostConfig::default()).unwrap();
        AddressSpace::new(device.driver().clone())
    }

    #[test]
    fn one_window_serves_many_ranges_and_what_comes_back_is_cut_again() {
        let mut addresses = addresses();
        let [a, b, c] = [1, 2, 3].map(|pages| addresses.take(pages * PAGE, 6 * PAGE).unwrap());
        assert_eq!((b.0 - a.0, c.0 - a.0), (PAGE, 3 * PAGE));
        assert_eq!(addresses.windows.len(), 1);
        assert_eq!(addresses.free.best_fit(1), None);
        addresses.give_back(a, PAGE);
        addresses.give_back(c, 3 * PAGE);
        addresses.give_back(b, 2 * PAGE);
        assert_eq!(
            addresses.free.by_start, addresses.windows,
            "all parts merged"
        );
        assert_eq!(addresses.free.best_fit(1), Some((a.0, 6 * PAGE)));
        assert_eq!(addresses.take(6 * PAGE, PAGE), Some(a));
        assert!(addresses.take(PAGE, PAGE).is_some());
        assert_eq!(addresses.windows.len(), 2);
    }

    #[test]
    fn parts_of_two_windows_do_not_merge() {
        let mut addresses = addresses();
        let (start, bytes) = (1 << 40, 4 * PAGE);
        addresses.windows = BTreeMap::from([(start, bytes), (start + bytes, bytes)]);
        addresses.give_back(DevicePtr(start), bytes);
        addresses.give_back(DevicePtr(start + bytes), bytes);
        assert_eq!(addresses.free.by_start, addresses.windows);
        addresses.free = Parts::default();
        addresses.give_back(DevicePtr(start + bytes), bytes);
        addresses.give_back(DevicePtr(start), bytes);
        assert_eq!(addresses.free.by_start, addresses.windows);
        // Nothing to release: the driver never reserved these.
        addresses.windows.clear();
    }

    #[test]
    fn a_window_that_is_refused_is_made_as_small_as_it_must_be() {
        let mut addresses = addresses();
        assert!(addresses.take(PAGE, 1 << 60).is_some());
        assert_eq!(addresses.windows.values().sum::<u64>(), PAGE);
        assert_eq!(addresses.take(1 << 60, PAGE), None);
    }
}
