//! Versions: numbers that change when memory is written, so that stale copies can be detected.
//!
//! Memory has a version only on request, which parameters make. A version covers the byte range of the tensor that
//! requested it. So weights that are views of one flat buffer have a version each, and writing one does not change the
//! versions of the others. All versions come from one process-wide clock: every write gets a new version, whatever its
//! address, and the larger of two versions is the later write.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Tensor;

/// The next tick of the version clock, larger than all before.
pub(crate) fn moment() -> u64 {
    static CLOCK: AtomicU64 = AtomicU64::new(1);
    // Relaxed: handing a tensor or parameter to another thread already orders earlier operations on it.
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

/// The versions kept for a buffer.
#[derive(Debug, Default)]
pub(super) struct Version {
    /// Whether there are any. Most buffers have none; a write to those costs one load.
    is_kept: AtomicBool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// The version of the whole buffer, for views without a version of their own.
    whole: u64,
    /// The versions of byte ranges.
    parts: BTreeMap<Bytes, u64>,
    /// Whether two of the parts share bytes.
    overlap: bool,
}

/// Start and end of a range of bytes.
type Bytes = (u64, u64);

impl Kept {
    fn add(&mut self, bytes: Bytes) {
        if self.parts.contains_key(&bytes) {
            // Keep the existing version: nothing was written.
            return;
        }
        let version = moment();
        if self.whole == 0 {
            self.whole = version;
        }
        let before = self.parts.range(..bytes).next_back();
        let after = self.parts.range(bytes..).next();
        self.overlap |= before.is_some_and(|((_, end), _)| *end > bytes.0)
            || after.is_some_and(|((start, _), _)| *start < bytes.1);
        self.parts.insert(bytes, version);
    }

    fn advance(&mut self, bytes: Bytes) {
        let version = moment();
        self.whole = version;
        // Includes an empty part, which the search for overlaps below would miss.
        if let Some(part) = self.parts.get_mut(&bytes) {
            *part = version;
        }
        if bytes.0 == bytes.1 {
            return;
        }
        // If the parts are disjoint, only the last one that starts before `bytes` can reach into it.
        let before = self.parts.range(..(bytes.0, 0)).next_back();
        let first = match before {
            _ if self.overlap => (0, 0),
            Some((before, _)) => *before,
            None => (bytes.0, 0),
        };
        let reached = self.parts.range_mut(first..(bytes.1, 0));
        for (_, part) in reached.filter(|((_, end), _)| *end > bytes.0) {
            *part = version;
        }
    }
}

impl Version {
    /// Called for every write through this crate, with the range that may be written.
    pub(super) fn advance(&self, bytes: &Range<u64>) {
        // Relaxed: see `moment`.
        if self.is_kept.load(Ordering::Relaxed) {
            self.kept.lock().advance((bytes.start, bytes.end));
        }
    }

    fn keep(&self, bytes: &Range<u64>) {
        self.kept.lock().add((bytes.start, bytes.end));
        self.is_kept.store(true, Ordering::Relaxed);
    }

    fn get(&self, bytes: &Range<u64>) -> Option<u64> {
        if !self.is_kept.load(Ordering::Relaxed) {
            return None;
        }
        let kept = self.kept.lock();
        let part = kept.parts.get(&(bytes.start, bytes.end)).copied();
        Some(part.unwrap_or(kept.whole))
    }

    fn set(&self, bytes: &Range<u64>, version: u64) {
        let mut kept = self.kept.lock();
        if let Some(part) = kept.parts.get_mut(&(bytes.start, bytes.end)) {
            *part = version;
        }
    }
}

impl Tensor {
    /// The version of this tensor's memory: a number that changes with each write, or `None` if no version is kept.
    /// Only parameters and optimizer state have one. Writes by optimizers and through tensors count when they are
    /// enqueued.
    #[must_use]
    pub fn version(&self) -> Option<u64> {
        self.buffer().version().get(&self.reach())
    }

    /// Tells this crate that the caller's own work, a kernel or a captured graph, has written this tensor's memory.
    /// Cached copies of a weight, such as those of autocast scopes and of optimizers with master weights, are then
    /// refreshed.
    pub fn mark_written(&self) {
        self.buffer().version().advance(&self.reach());
    }

    /// Starts keeping a version for this tensor.
    pub(crate) fn keep_version(&self) {
        self.buffer().version().keep(&self.reach());
    }

    /// Sets the version, if one is kept for exactly these bytes: to restore the earlier version with the earlier
    /// elements, or to give the same version to tensors that belong together.
    pub(crate) fn set_version(&self, version: u64) {
        self.buffer().version().set(&self.reach(), version);
    }

    /// The bytes from the first element to the last.
    fn reach(&self) -> Range<u64> {
        let start = self.start_byte();
        start..start + self.layout().extent() as u64 * (self.dtype().bits() / 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};
    use crate::dtype::DType;
    use crate::storage::Context;

    #[test]
    fn a_write_counts_for_the_views_it_touches_and_for_no_other() {
        let host = Device::host(HostConfig::default()).expect("the machine has memory");
        let context = Context::new(&host).expect("a context");
        let flat = Tensor::zeros(&context, [12], DType::F32).expect("memory");
        assert_eq!(flat.version(), None);
        let views: Vec<_> = (0..3)
            .map(|index| flat.narrow(0, index * 4, 4).expect("it is long enough"))
            .collect();
        views.iter().for_each(Tensor::keep_version);
        let versions = || views.iter().map(Tensor::version).collect::<Vec<_>>();
        // Each step: what is written, and which of the views it touches.
        let steps: [(Tensor, [bool; 3]); 5] = [
            (views[1].clone(), [false, true, false]),
            (flat.narrow(0, 3, 2).expect("inside"), [true, true, false]),
            (flat.narrow(0, 11, 1).expect("inside"), [false, false, true]),
            (
                views[0].reshape([2, 2]).expect("four"),
                [true, false, false],
            ),
            (flat.clone(), [true, true, true]),
        ];
        for (written, expected) in steps {
            let before = versions();
            written.fill(1.0).expect("the device works");
            let pairs = before.iter().zip(versions());
            let touched: Vec<_> = pairs.map(|(before, after)| *before != after).collect();
            assert_eq!(touched, expected, "{written:?}");
        }
        // A view without a version of its own uses that of the whole buffer.
        let other = flat.narrow(0, 1, 1).expect("inside");
        let before = other.version();
        views[2].mark_written();
        assert_ne!(other.version(), before);
        // Overlapping views have versions, too.
        other.keep_version();
        let (before, whole) = (other.version(), versions());
        other.mark_written();
        assert_ne!(other.version(), before);
        assert_ne!(versions()[0], whole[0]);
        assert_eq!(versions()[1..], whole[1..]);
    }
}
