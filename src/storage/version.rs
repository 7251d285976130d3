//! A number that changes when memory is written: how a copy made earlier is known to be stale.
//!
//! Memory has no version until someone asks for one to be kept, as parameters do. A version is kept for the range of
//! bytes of the tensor that asked: weights that are views of one flat buffer have one each, and writing one leaves those
//! of the others alone. Versions are moments of one clock, so no two writes in a process leave the same one, whatever
//! the address, and of two the larger was written later.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Tensor;

/// A moment later than all before, in the order of this process's calls.
pub(crate) fn moment() -> u64 {
    static CLOCK: AtomicU64 = AtomicU64::new(1);
    // Relaxed: who hands a tensor or a parameter to another thread orders what was done to it before.
    CLOCK.fetch_add(1, Ordering::Relaxed)
}

/// The versions kept of a buffer.
#[derive(Debug, Default)]
pub(super) struct Version {
    /// Whether there are any. Most buffers have none, and a write of them costs one load.
    is_kept: AtomicBool,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Of the whole buffer, for views that none is kept for.
    whole: u64,
    /// By where they begin and end.
    parts: BTreeMap<Bytes, u64>,
    /// Whether two of the parts share bytes.
    overlap: bool,
}

/// Where a range of bytes begins and ends.
type Bytes = (u64, u64);

impl Kept {
    fn add(&mut self, bytes: Bytes) {
        if self.parts.contains_key(&bytes) {
            // A version that is kept already stays: nothing was written.
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
        // Also a part without elements, which shares no bytes with any other.
        if let Some(part) = self.parts.get_mut(&bytes) {
            *part = version;
        }
        if bytes.0 == bytes.1 {
            return;
        }
        // Of parts that share no bytes, only the last that begins before can reach into these.
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
    /// Called for every write that goes through this crate, with the bytes that may be written.
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
    /// A number that differs after each write to the memory below this tensor, or `None` if none is kept:
    /// only parameters and what optimizers keep beside them have one. Writes by optimizers and through tensors are seen
    /// when they are enqueued.
    #[must_use]
    pub fn version(&self) -> Option<u64> {
        self.buffer().version().get(&self.reach())
    }

    /// Says that the memory below this tensor is written by work enqueued since, in a way that this crate
    /// does not see: a kernel or a captured graph of the caller's. Copies kept of a weight, as autocast scopes and
    /// optimizers with master weights do, are then made anew.
    pub fn mark_written(&self) {
        self.buffer().version().advance(&self.reach());
    }

    /// Begins to keep a version.
    pub(crate) fn keep_version(&self) {
        self.buffer().version().keep(&self.reach());
    }

    /// Gives the elements the version `version`, if one is kept for just these: they are what they were, or belong
    /// to what else has this version.
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
        // A view that none is kept for goes by the whole buffer.
        let other = flat.narrow(0, 1, 1).expect("inside");
        let before = other.version();
        views[2].mark_written();
        assert_ne!(other.version(), before);
        // Kept for overlapping views as well.
        other.keep_version();
        let (before, whole) = (other.version(), versions());
        other.mark_written();
        assert_ne!(other.version(), before);
        assert_ne!(versions()[0], whole[0]);
        assert_eq!(versions()[1..], whole[1..]);
    }
}
