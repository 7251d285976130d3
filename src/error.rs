//! The crate's error type: one enum, whose variants tell a caller what it can do.
//!
//! A violated internal invariant is a panic, never an [`Error`]. If such a panic leaves a pool broken, later calls on
//! that pool return [`Error::BrokenPool`].

use std::fmt;
use std::path::PathBuf;

use crate::dtype::DType;
use crate::units::{Bytes, StreamId};

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither the pool nor the device has room. Free something, or ask for less.
    #[error(transparent)]
    OutOfMemory(Box<OutOfMemory>),

    /// The driver refused `call`. `code` is the driver's error number, `reason` its name and message.
    #[error("{call} failed: {reason} (code {code})")]
    Driver {
        /// The driver call that failed, by its name in [`Driver`](crate::driver::Driver).
        call: &'static str,
        /// The driver's number for the error (an errno on the host).
        code: i32,
        /// The driver's name and message for the error.
        reason: String,
    },

    /// A setting has a value that cannot work. Nothing was changed.
    #[error("invalid configuration: {key}: {reason}")]
    InvalidConfig {
        /// The field, by its name in the configuration struct.
        key: &'static str,
        /// What is wrong with the value, and what is allowed.
        reason: String,
    },

    /// The arguments of an operation do not fit each other. Nothing was enqueued.
    #[error("{op}: {reason}")]
    InvalidArgument {
        /// The operation, by its public name.
        op: &'static str,
        /// What does not fit, with the shapes or values given.
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

    /// A call on this pool panicked while it changed the pool's state, so the pool no longer knows which memory is
    /// free. Blocks already allocated stay valid; the pool hands out no others. Make a new pool.
    #[error(
        "the {pool} is broken: a call panicked while holding its lock, so it no longer hands out or takes back memory"
    )]
    BrokenPool {
        /// Which kind of pool: `memory pool` or `pinned pool`.
        pool: &'static str,
    },

    /// A gradient scaler's methods were called out of order: `unscale`, `step`, `update` have a fixed sequence.
    #[error("{0}")]
    Scaler(#[from] ScalerMisuse),

    /// Steps keep being skipped, and a smaller scale will not help.
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

    /// A file could not be read or written. An existing file is unchanged unless the system's message says that the new
    /// one is in place.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried: `read` or `write`.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
}

/// How a gradient scaler's methods were called out of order (the state machine of PyTorch's `GradScaler`).
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScalerMisuse {
    /// `unscale` was called twice for one optimizer without an `update` in between.
    #[error("unscale() has already been called on this optimizer since the last update()")]
    AlreadyUnscaled,
    /// `unscale` was called after `step`.
    #[error("unscale() is being called after step()")]
    UnscaleAfterStep,
    /// `step` was called twice for one optimizer without an `update` in between.
    #[error("step() has already been called on this optimizer since the last update()")]
    AlreadyStepped,
    /// `step` or `unscale` was called on an optimizer none of whose parameters has a gradient.
    #[error("no parameter of this optimizer has a gradient, so nothing was checked for inf or NaN")]
    NothingChecked,
    /// `update` was called, but no optimizer was unscaled, clipped or stepped since the last `update`.
    #[error(
        "update() is being called, but no optimizer was unscaled, clipped or stepped since the last update()"
    )]
    NothingToUpdate,
    /// `unscale` or `step` was called before any loss was scaled.
    #[error("{call}() is being called before scale(): no loss was scaled yet")]
    NotScaled {
        /// The call that came too early.
        call: &'static str,
    },
    /// The state was read between `step` and `update`.
    #[error(
        "the state of a scaler cannot be read between step() and update(): call update() first"
    )]
    MidIteration,
    /// The optimizer was used with another scaler, which is still alive.
    #[error("another gradient scaler drives the optimizer of {parameters}; drop that one first")]
    OtherScaler {
        /// What the optimizer updates: the name of its first parameter, and how many more there are.
        parameters: String,
    },
    /// Steps are skipped all together or not at all, but some were enqueued before this optimizer was checked.
    #[error(
        "{call}() is being called after another optimizer's step(); to skip all steps or none, check all \
         optimizers first, or use step_all()"
    )]
    CheckedTooLate {
        /// The call that came too late.
        call: &'static str,
    },
}

/// Steps keep being skipped: why, and the scale at which a step was last applied.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ScalerAlarm {
    /// What triggered the alarm.
    pub kind: AlarmKind,
    /// The scale when the alarm was raised.
    pub scale: f64,
    /// The scale of the last applied step; `None` if none was applied since the scaler was made or its state loaded.
    pub last_good_scale: Option<f64>,
    /// Optimizer steps so far, skipped or not.
    pub steps: u64,
    /// Steps skipped since the last applied one, or since the scaler's state was loaded.
    pub skipped_in_a_row: u64,
}

/// What triggered a [`ScalerAlarm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AlarmKind {
    /// Gradients overflow although the scale is at its floor.
    AtFloor,
    /// Too many recent steps were skipped.
    SkipStorm {
        /// Skipped steps among the last `of`.
        skipped: u32,
        /// Length of the window, in steps.
        of: u32,
    },
    /// Gradients contained NaN in several consecutive steps.
    NaN {
        /// The number of consecutive steps.
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
                write!(f, "gradients contained NaN in {in_a_row} steps in a row")?;
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
/// All byte counts were taken at the moment of failure, after everything in `tried` had been tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutOfMemory {
    /// Bytes the caller asked for.
    pub requested: u64,
    /// Whether it was pinned host memory, which the device's figures do not cover.
    pub pinned: bool,
    /// Bytes in blocks that callers hold, rounded to the allocator's granularity.
    pub allocated: u64,
    /// Bytes freed by callers that other streams may still be using.
    pub pending: u64,
    /// The pending bytes by the stream they wait for, largest first; bytes that wait for several count for each.
    pub pending_by_stream: Vec<(StreamId, u64)>,
    /// Bytes held from the driver.
    pub reserved: u64,
    /// Free bytes in pages or segments that are partly in use, so they cannot be returned to the driver.
    pub split: u64,
    /// Largest free block of any stream.
    pub largest_free: u64,
    /// Free device memory as the driver reports it.
    pub device_free: u64,
    /// Total device memory as the driver reports it.
    pub device_total: u64,
    /// Device memory that is neither free nor part of this pool: other processes, other pools, and the driver's own.
    /// `None` if the driver did not report it.
    pub held_by_others: Option<u64>,
    /// The byte limit of the pool or of the wrapper that refused, if one is set.
    pub limit: Option<u64>,
    /// Bytes that count against a wrapper's limit. A pool's limit applies to its reserved bytes.
    pub limit_used: Option<u64>,
    /// Whether the limit refused the request, rather than the device.
    pub limited: bool,
    /// The driver's last error, if it refused.
    pub driver_error: Option<String>,
    /// What was tried, in order.
    pub tried: Vec<&'static str>,
    /// The components that hold the most, as (tag, allocated bytes), largest first.
    pub largest_tags: Vec<(String, u64)>,
}

/// The largest plausible request, 1 EiB. A larger one is a bug in the caller.
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

    /// Whether the request exceeds the device's total memory, so that freeing memory cannot help.
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
                "out of memory: {bytes} bytes is more than 1 EiB; is the size right?"
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
            let verdict = if self.limited { " (exceeded)" } else { "" };
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

/// The most names listed in one error.
pub(crate) const NAMES_TOLD: usize = 10;

/// Joins the first `most` of `names`, followed by the number of names left out.
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

    /// Prefixes the key of an [`Error::InvalidState`] with `part`.
    pub(crate) fn within(self, part: &str) -> Self {
        match self {
            Self::InvalidState { key, reason } => Self::state(format!("{part}/{key}"), reason),
            other => other,
        }
    }

    /// Appends `holds`, what is true despite the failure, to the reason of an [`Error::Driver`].
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
