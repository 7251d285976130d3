//! What can go wrong, told so that a caller can act on it.
//!
//! One enum for the whole crate. A broken invariant of our own is a panic, never an [`Error`].

use std::fmt;

use crate::dtype::DType;
use crate::units::Bytes;

/// Result of everything fallible in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither the pool nor the device has room. Free something, or ask for less.
    #[error(transparent)]
    OutOfMemory(Box<OutOfMemory>),

    /// The driver refused `call`. `code` is the driver's own number, `reason` its name and text.
    #[error("{call} failed: {reason} (code {code})")]
    Driver {
        /// The driver call that failed, by its name in [`Driver`](crate::driver::Driver).
        call: &'static str,
        /// The driver's number for the error (an errno on the host).
        code: i32,
        /// The driver's name and text for it.
        reason: String,
    },

    /// A setting has a value that cannot work. Nothing was changed.
    #[error("invalid configuration: {key}: {reason}")]
    InvalidConfig {
        /// The field, by its name in the configuration struct.
        key: &'static str,
        /// What is wrong with the value, and what would be right.
        reason: String,
    },

    /// The arguments of an operation do not fit each other. Nothing was enqueued.
    #[error("{op}: {reason}")]
    InvalidArgument {
        /// The operation, by its public name.
        op: &'static str,
        /// What does not fit, with the shapes or values that were given.
        reason: String,
    },

    /// The operation exists, but not for elements of this type.
    #[error("{op} does not support {dtype}")]
    UnsupportedDtype {
        /// The operation, by its public name.
        op: &'static str,
        /// The element type that was given.
        dtype: DType,
    },

    /// The call is not allowed while a stream is being captured.
    #[error("{call} is not allowed while a capture is under way")]
    Capturing {
        /// The call that was refused.
        call: &'static str,
    },

    /// A gradient scaler was driven out of order: `unscale`, `step` and `update` have a sequence.
    #[error("{0}")]
    Scaler(#[from] ScalerMisuse),

    /// A saved state cannot be restored. Nothing was changed.
    #[error("invalid saved state: {key}: {reason}")]
    InvalidState {
        /// The key in the saved state.
        key: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// How a gradient scaler was driven out of order (the state machine of PyTorch's `GradScaler`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScalerMisuse {
    /// `unscale` twice for one optimizer without an `update` between.
    #[error("unscale() has already been called on this optimizer since the last update()")]
    AlreadyUnscaled,
    /// `unscale` after `step`.
    #[error("unscale() is being called after step()")]
    UnscaleAfterStep,
    /// `step` twice for one optimizer without an `update` between.
    #[error("step() has already been called on this optimizer since the last update()")]
    AlreadyStepped,
    /// `step` or `unscale` on an optimizer none of whose parameters has a gradient.
    #[error("no parameter of this optimizer has a gradient, so nothing was checked for inf or NaN")]
    NothingChecked,
    /// `update` although no optimizer was unscaled, clipped or stepped since the last one.
    #[error(
        "update() is being called although no optimizer was unscaled, clipped or stepped since the last one"
    )]
    NothingToUpdate,
    /// `unscale` or `step` before any loss was scaled.
    #[error("{call}() is being called before scale(): no loss was scaled yet")]
    NotScaled {
        /// The call that came too early.
        call: &'static str,
    },
    /// The state was read between `step` and `update`.
    #[error("the state of a scaler must be taken after update(), and one is due: call it first")]
    MidIteration,
}

/// Why an allocation failed, and where the memory is.
///
/// All byte counts were taken at the moment of failure, after every way of finding memory was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutOfMemory {
    /// Bytes the caller asked for.
    pub requested: u64,
    /// Bytes in callers' hands, rounded to the allocator's granularity.
    pub allocated: u64,
    /// Bytes freed by callers that other streams may still be using.
    pub pending: u64,
    /// Bytes held from the driver.
    pub reserved: u64,
    /// Largest free block the stream could use.
    pub largest_free: u64,
    /// Free device memory as the driver reports it.
    pub device_free: u64,
    /// Total device memory as the driver reports it.
    pub device_total: u64,
    /// The byte limit of the pool or of the wrapper that refused, if one is set.
    pub limit: Option<u64>,
    /// Bytes that count against a wrapper's limit. What counts against a pool's is what it reserved.
    pub limit_used: Option<u64>,
    /// Whether the limit, and not the device, refused.
    pub limited: bool,
    /// What the driver said when it was asked last, if it refused.
    pub driver_error: Option<String>,
    /// What was tried, in order.
    pub tried: Vec<&'static str>,
    /// Components that hold most, as (tag, allocated bytes), largest first.
    pub largest_tags: Vec<(String, u64)>,
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let free_in_pool = self.reserved.saturating_sub(self.allocated + self.pending);
        write!(
            f,
            "out of memory for {}: allocated {}, waiting for streams {}, free in the pool {} \
             (largest block {}), reserved {}, device free {} of {}",
            Bytes(self.requested),
            Bytes(self.allocated),
            Bytes(self.pending),
            Bytes(free_in_pool),
            Bytes(self.largest_free),
            Bytes(self.reserved),
            Bytes(self.device_free),
            Bytes(self.device_total),
        )?;
        if let Some(limit) = self.limit {
            let verdict = if self.limited { ", which refused" } else { "" };
            write!(f, ", limit {}", Bytes(limit))?;
            if let Some(used) = self.limit_used {
                write!(f, " with {} in use", Bytes(used))?;
            }
            f.write_str(verdict)?;
        }
        if let Some(error) = &self.driver_error {
            write!(f, "; {error}")?;
        }
        if !self.tried.is_empty() {
            write!(f, "; tried {}", self.tried.join(", "))?;
        }
        for (index, (tag, bytes)) in self.largest_tags.iter().enumerate() {
            let lead = if index == 0 { "; most by tag: " } else { ", " };
            write!(f, "{lead}{tag} {}", Bytes(*bytes))?;
        }
        Ok(())
    }
}

impl std::error::Error for OutOfMemory {}

impl From<OutOfMemory> for Error {
    fn from(report: OutOfMemory) -> Self {
        Self::OutOfMemory(Box::new(report))
    }
}

impl Error {
    /// Shorthand for [`Error::InvalidArgument`].
    pub(crate) fn argument(op: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidArgument {
            op,
            reason: reason.into(),
        }
    }

    /// Shorthand for [`Error::InvalidConfig`].
    pub(crate) fn config(key: &'static str, reason: impl Into<String>) -> Self {
        Self::InvalidConfig {
            key,
            reason: reason.into(),
        }
    }
}
