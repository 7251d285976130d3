//! Whether a master weight still belongs to its parameter.
//!
//! Both keep a [version](Tensor::version), and both have the same one after each step, and after a restoration that
//! wrote both. If only the parameter was written since, the master is stale and is made anew before the next step. If
//! only the master was, someone restores a state, and the parameter will follow from it. If both were, one by one, an f32
//! master is kept if the parameter is its nearest value, and made anew if not.
//!
//! Launches of a graph that captured a step do not look at versions: nothing on the host is asked.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::storage::Tensor;

/// The master of a 16-bit parameter: f32, or u32 words of lower halves.
#[derive(Debug)]
pub(super) struct Master {
    tensor: Tensor,
    /// The version that both had when they last agreed. Atomic so that a reload needs no exclusive access; nothing is
    /// published through it.
    agreed: AtomicU64,
}

/// What the versions of a master and its parameter tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Staleness {
    /// They belong together.
    Fresh,
    /// The parameter was written since.
    Stale,
    /// Both were written since, one by one.
    Unclear,
}

impl Master {
    /// `tensor`, just made from `value`.
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

    /// Says that both agree now.
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

    /// Enqueues making the master equal to `value`.
    pub(super) fn reload(&self, value: &Tensor) -> Result<()> {
        let before = self.tensor.version();
        let made = match self.tensor.dtype() {
            DType::U32 => self.tensor.fill(0.0),
            _ => self.tensor.copy_from(value),
        };
        match (&made, before) {
            (Ok(()), _) => self.agrees_with(value),
            // It was not written, and is as stale as it was.
            (Err(_), Some(before)) => self.tensor.set_version(before),
            (Err(_), None) => {}
        }
        made
    }

    /// [`reload`](Self::reload), if nothing but the parameter was written since both agreed. For who reads the master
    /// between steps: what fails here fails again in the next step.
    pub(super) fn reload_if_stale(&self, value: &Tensor) -> Result<()> {
        let stream = value.context().stream();
        if self.staleness(value) == Staleness::Stale
            && !stream.driver().is_capturing(stream.raw())?
        {
            self.reload(value)?;
        }
        Ok(())
    }

    /// Sees to it that the master belongs to `value`, before a step.
    ///
    /// # Errors
    /// [`Error::Capturing`] if it does not, and what is enqueued now would run again at each launch of a graph.
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
        // Lower halves do not tell whose they are. With those of a restored state the parameter keeps its value.
        let belongs = staleness == Staleness::Unclear
            && (self.tensor.dtype() == DType::U32 || self.rounds_to(value)?);
        if belongs {
            self.agrees_with(value);
            return Ok(());
        }
        self.reload(value)
    }

    /// Whether `value` is the nearest of its type to the master, to the bit. Waits for the device.
    fn rounds_to(&self, value: &Tensor) -> Result<bool> {
        let rounded = self.tensor.cast(value.dtype())?;
        Ok(rounded.to_host()? == value.to_host()?)
    }
}
