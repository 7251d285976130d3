//! Tracks whether a master weight still belongs to its parameter.
//!
//! Both tensors keep a [version](Tensor::version). The versions are equal after each step, and after a restore that
//! wrote both. If only the parameter was written since, the master is stale and is rebuilt before the next step. If
//! only the master was written, a state is being restored, and the parameter will follow from it. If both were
//! written separately, an f32 master is kept if the parameter is its nearest value, and rebuilt if not; lower halves
//! are always kept.
//!
//! Launches of a graph that captured a step do not check versions, because they run no host code.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::storage::Tensor;

/// The master of a 16-bit parameter: f32, or u32 words of lower halves.
#[derive(Debug)]
pub(super) struct Master {
    tensor: Tensor,
    /// The version of both when they last agreed. Atomic so that a reload needs no exclusive access; it publishes
    /// nothing.
    agreed: AtomicU64,
}

/// The relation between the versions of a master and its parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Staleness {
    /// They belong together.
    Fresh,
    /// The parameter was written since.
    Stale,
    /// Both were written since, separately.
    Unclear,
}

impl Master {
    /// A master whose `tensor` was just made from `value`.
    pub(super) fn new(tensor: Tensor, value: &Tensor) -> Self {
        tensor.keep_version();
        let master = Self {
            tensor,
            agreed: AtomicU64::new(0),
        };
        master.agrees_with(value);
        master
    }

    pub(super) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Declares that master and `value` now agree.
    pub(super) fn agrees_with(&self, value: &Tensor) {
        if let Some(version) = value.version() {
            // Relaxed: see the field.
            self.agreed.store(version, Ordering::Relaxed);
            self.tensor.set_version(version);
        }
    }

    fn staleness(&self, value: &Tensor) -> Staleness {
        let (master, value) = (self.tensor.version(), value.version());
        // Relaxed: see the field.
        let agreed = Some(self.agreed.load(Ordering::Relaxed));
        if master == value || value == agreed {
            Staleness::Fresh
        } else if master == agreed {
            Staleness::Stale
        } else {
            Staleness::Unclear
        }
    }

    /// Enqueues a copy of `value` to the master.
    pub(super) fn reload(&self, value: &Tensor) -> Result<()> {
        let before = self.tensor.version();
        let made = match self.tensor.dtype() {
            DType::U32 => self.tensor.fill(0.0),
            _ => self.tensor.copy_from(value),
        };
        match (&made, before) {
            (Ok(()), _) => self.agrees_with(value),
            // Nothing was written, so the master is as stale as before.
            (Err(_), Some(before)) => self.tensor.set_version(before),
            (Err(_), None) => {}
        }
        made
    }

    /// Calls [`reload`](Self::reload) if only the parameter was written since both agreed. For reading the master
    /// between steps; a failure here recurs in the next step.
    pub(super) fn reload_if_stale(&self, value: &Tensor) -> Result<()> {
        let stream = value.context().stream();
        if self.staleness(value) == Staleness::Stale
            && !stream.driver().is_capturing(stream.raw())?
        {
            self.reload(value)?;
        }
        Ok(())
    }

    /// Makes sure, before a step, that the master belongs to `value`.
    ///
    /// # Errors
    /// [`Error::Capturing`] if it does not and a capture is active: the reload would run again at each launch of the
    /// graph.
    pub(super) fn refresh(&self, value: &Tensor) -> Result<()> {
        let staleness = self.staleness(value);
        if staleness == Staleness::Fresh {
            return Ok(());
        }
        let stream = value.context().stream();
        if stream.driver().is_capturing(stream.raw())? {
            return Err(Error::Capturing {
                call: "a step after parameters were written (call reload_master_weights before it)",
            });
        }
        // Lower halves do not reveal which value they belong to. Keeping them preserves the parameter's value, which
        // holds the upper halves.
        let belongs = staleness == Staleness::Unclear
            && (self.tensor.dtype() == DType::U32 || self.rounds_to(value)?);
        if belongs {
            self.agrees_with(value);
            return Ok(());
        }
        self.reload(value)
    }

    /// Whether the master rounds exactly to `value`. Waits for the device.
    fn rounds_to(&self, value: &Tensor) -> Result<bool> {
        let rounded = self.tensor.cast(value.dtype())?;
        Ok(rounded.to_host()? == value.to_host()?)
    }
}
