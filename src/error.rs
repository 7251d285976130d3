//! What can go wrong, told so that a caller can act on it.
//!
//! One enum for the whole crate. A broken invariant of our own is a panic, never an [`Error`]; that a pool has been
//! broken by one is an error of the calls that come later.

use std::fmt;
use std::path::PathBuf;

use crate::dtype::DType;
use crate::units::{Bytes, StreamId};

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

    /// A call on this pool panicked while it changed the pool's books, so nobody knows any more which memory is free.
    /// Blocks that are out stay valid; the pool hands out no others. Make a new pool.
    #[error(
        "the {pool} is broken: a call panicked while it held the lock, and nothing more is taken from it or returned"
    )]
    BrokenPool {
        /// Which kind of pool: `memory pool` or `pinned pool`.
        pool: &'static str,
    },

    /// A gradient scaler was driven out of order: `unscale`, `step` and `update` have a sequence.
    #[error("{0}")]
    Scaler(#[from] ScalerMisuse),

    /// Steps go on being skipped, and a smaller scale will not help.
    #[error("{0}")]
    ScalerAlarm(Box<ScalerAlarm>),

    /// A saved state cannot be restored. Nothing was changed.
    #[error("invalid saved state: {key}: {reason}")]
    InvalidState {
        /// The key in the saved state, or the tensor.
        key: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A file could not be read or written. One that was there before is as it was, unless the system's answer says that
    /// the new one is in place.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried: `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// How a gradient scaler was driven out of order (the state machine of PyTorch's `GradScaler`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
    /// Another scaler that is still there has been used with the optimizer.
    #[error("another gradient scaler drives the optimizer of {parameters}; drop that one first")]
    OtherScaler {
        /// What the optimizer moves: the name of its first parameter, and how many more there are.
        parameters: String,
    },
    /// All steps are to be skipped or none, and some were enqueued before this optimizer was checked.
    #[error(
        "{call}() is being called after another optimizer's step(); to skip all steps or none, check all \
         optimizers first, or use step_all()"
    )]
    CheckedTooLate {
        /// The call that came too late.
        call: &'static str,
    },
}

/// Steps go on being skipped. What to look at, and where it was well last.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ScalerAlarm {
    /// What was noticed.
    pub kind: AlarmKind,
    /// The scale when it was noticed.
    pub scale: f64,
    /// The scale of the last step that was applied, if any was since the scaler was made or its state was loaded.
    pub last_good_scale: Option<f64>,
    /// Optimizer steps so far, skipped or not.
    pub steps: u64,
    /// Steps skipped since the last one that was applied, or since the scaler's state was loaded.
    pub skipped_in_a_row: u64,
}

/// What a [`ScalerAlarm`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AlarmKind {
    /// Gradients overflow although the scale is at its floor.
    AtFloor,
    /// So many of the last steps were skipped.
    SkipStorm {
        /// Skipped steps.
        skipped: u32,
        /// Among the last so many.
        of: u32,
    },
    /// Gradients of so many steps in a row had NaN.
    NaN {
        /// Steps.
        in_a_row: u64,
    },
}

impl fmt::Display for ScalerAlarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            AlarmKind::AtFloor => write!(
                f,
                "gradients overflow at the smallest scale, {}",
                self.scale
            )?,
            AlarmKind::SkipStorm { skipped, of } => write!(
                f,
                "{skipped} of the last {of} steps were skipped, at scale {}",
                self.scale
            )?,
            AlarmKind::NaN { in_a_row } => {
                write!(f, "gradients have NaN for {in_a_row} steps in a row")?;
            }
        }
        match self.last_good_scale {
            Some(scale) => write!(f, "; the last applied step had scale {scale}"),
            None => f.write_str("; no step was applied since the start or the last restore"),
        }
    }
}

/// Why an allocation failed, and where the memory is.
///
/// All byte counts were taken at the moment of failure, after every way of finding memory was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutOfMemory {
    /// Bytes the caller asked for.
    pub requested: u64,
    /// Whether it was pinned host memory, of which the device's figures say nothing.
    pub pinned: bool,
    /// Bytes in callers' hands, rounded to the allocator's granularity.
    pub allocated: u64,
    /// Bytes freed by callers that other streams may still be using.
    pub pending: u64,
    /// Those bytes by stream that they wait for, the most first; bytes that wait for several count for each.
    pub pending_by_stream: Vec<(StreamId, u64)>,
    /// Bytes held from the driver.
    pub reserved: u64,
    /// Bytes that are free in pages or segments which are partly in use: not returnable to the driver.
    pub split: u64,
    /// Largest free block of any stream.
    pub largest_free: u64,
    /// Free device memory as the driver reports it.
    pub device_free: u64,
    /// Total device memory as the driver reports it.
    pub device_total: u64,
    /// Device memory that neither is free nor belongs to this pool: other processes, other pools, and what the
    /// driver keeps for itself. `None` if the driver did not tell.
    pub held_by_others: Option<u64>,
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

/// Most bytes anyone can mean to ask for: 1 EiB.
const REQUEST_MAX: u64 = 1 << 60;

impl OutOfMemory {
    /// Share of the reserved bytes that is free but split up, from 0 to 1.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
    pub fn fragmentation(&self) -> f64 {
        match self.reserved {
            0 => 0.0,
            reserved => self.split as f64 / reserved as f64,
        }
    }

    /// Whether the request is more than the device has in all, so that freeing memory cannot help.
    #[must_use]
    pub fn exceeds_device(&self) -> bool {
        !self.pinned && self.requested > self.device_total
    }
}

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.requested > REQUEST_MAX {
            let bytes = self.requested;
            return write!(
                f,
                "out of memory: {bytes} bytes are more than 1 EiB, is this size meant?"
            );
        }
        let kind = if self.pinned {
            "pinned memory"
        } else {
            "memory"
        };
        write!(f, "out of {kind} for {}", Bytes(self.requested))?;
        if self.exceeds_device() {
            return write!(f, ": the device has {} in all", Bytes(self.device_total));
        }
        let free_in_pool = self.reserved.saturating_sub(self.allocated + self.pending);
        write!(
            f,
            ": allocated {}, waiting for streams {}, free in the pool {} (largest block {}, {:.0} % \
             fragmented), reserved {}",
            Bytes(self.allocated),
            Bytes(self.pending),
            Bytes(free_in_pool),
            Bytes(self.largest_free),
            100.0 * self.fragmentation(),
            Bytes(self.reserved),
        )?;
        if !self.pinned {
            let (free, total) = (Bytes(self.device_free), Bytes(self.device_total));
            write!(f, ", device free {free} of {total}")?;
        }
        if let Some(others) = self.held_by_others.filter(|bytes| *bytes > 0) {
            write!(f, ", held by others {}", Bytes(others))?;
        }
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
            write!(f, "; tried: {}", self.tried.join(", "))?;
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
        Box::new(report).into()
    }
}

impl From<Box<OutOfMemory>> for Error {
    fn from(report: Box<OutOfMemory>) -> Self {
        Self::OutOfMemory(report)
    }
}

/// Most names in one error.
pub(crate) const NAMES_TOLD: usize = 10;

/// The first `most` of `names`, and how many there are beside them.
pub(crate) fn listed<T: ToString>(names: impl ExactSizeIterator<Item = T>, most: usize) -> String {
    let more = names.len().saturating_sub(most);
    let told: Vec<_> = names.take(most).map(|name| name.to_string()).collect();
    let told = told.join(", ");
    match more {
        0 => told,
        more => format!("{told} and {more} more"),
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

    /// Shorthand for [`Error::InvalidState`].
    pub(crate) fn state(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::InvalidState {
            key: key.into(),
            reason: reason.into(),
        }
    }

    /// The error with `part` before the key, if it is one of a saved state.
    pub(crate) fn within(self, part: &str) -> Self {
        match self {
            Self::InvalidState { key, reason } => Self::state(format!("{part}/{key}"), reason),
            other => other,
        }
    }

    /// The error with what holds all the same, if it is the driver's.
    pub(crate) fn although(self, holds: &str) -> Self {
        match self {
            Self::Driver { call, code, reason } => Self::Driver {
                call,
                code,
                reason: format!("{reason}; {holds}"),
            },
            other => other,
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
