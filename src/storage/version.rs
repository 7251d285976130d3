//! A number that changes when memory is written: how a copy made earlier is known to be stale.
//!
//! Memory has no version until someone asks for one to be kept, as parameters do. Versions are drawn from one
//! counter, so no two writes in a process leave the same one, whatever the address.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Tensor;

/// The version of a buffer; 0 if none is kept.
#[derive(Debug, Default)]
pub(super) struct Version(AtomicU64);

impl Version {
    fn fresh() -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        // Relaxed: the number only has to be unique.
        NEXT.fetch_add(1, Ordering::Relaxed)
    }

    fn keep(&self) {
        // A version that is kept already stays: nothing was written.
        let _ = self
            .0
            .compare_exchange(0, Self::fresh(), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Called for every write that goes through this crate.
    pub(super) fn advance(&self) {
        // Relaxed, here and below: who hands a tensor to another thread orders what was done to it before.
        if self.0.load(Ordering::Relaxed) != 0 {
            self.0.store(Self::fresh(), Ordering::Relaxed);
        }
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|version| *version != 0)
    }
}

impl Tensor {
    /// A number that differs after each write to the memory below this tensor, or `None` if none is kept:
    /// only parameters keep one. Writes by optimizers and through tensors are seen when they are enqueued.
    #[must_use]
    pub fn version(&self) -> Option<u64> {
        self.buffer().version().get()
    }

    /// Says that the memory below this tensor is written by work enqueued since, in a way that this crate
    /// does not see: a kernel or a captured graph of the caller's. Copies kept of a weight, as autocast scopes
    /// do, are then made anew.
    pub fn mark_written(&self) {
        self.buffer().version().advance();
    }

    /// Begins to keep a version.
    pub(crate) fn keep_version(&self) {
        self.buffer().version().keep();
    }
}
