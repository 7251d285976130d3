//! Error codes of the host device: Linux's errno values, on every system.

use crate::error::Error;

/// Work failed.
pub(super) const EIO: i32 = 5;
/// Out of memory.
pub(super) const ENOMEM: i32 = 12;
/// Still in use.
pub(super) const EBUSY: i32 = 16;
/// Invalid argument.
pub(super) const EINVAL: i32 = 22;
/// The wait would never end.
pub(super) const EDEADLK: i32 = 35;
/// The device cannot do this.
pub(super) const ENOTSUP: i32 = 95;
/// The work was cancelled.
pub(super) const ECANCELED: i32 = 125;

/// Makes the error of a refused `call`.
pub(super) fn refuse(call: &'static str, code: i32, reason: impl Into<String>) -> Error {
    Error::Driver {
        call,
        code,
        reason: reason.into(),
    }
}
