//! The codes in a host device's errors: Linux's numbers, on every system.

use crate::error::Error;

/// Work failed.
pub(super) const EIO: i32 = 5;
/// No room.
pub(super) const ENOMEM: i32 = 12;
/// Still in use.
pub(super) const EBUSY: i32 = 16;
/// The arguments make no sense.
pub(super) const EINVAL: i32 = 22;
/// Waiting would never end.
pub(super) const EDEADLK: i32 = 35;
/// The device cannot do this.
pub(super) const ENOTSUP: i32 = 95;
/// The work was given up.
pub(super) const ECANCELED: i32 = 125;

/// The error with which the device refuses `call`.
pub(super) fn refuse(call: &'static str, code: i32, reason: impl Into<String>) -> Error {
    Error::Driver {
        call,
        code,
        reason: reason.into(),
    }
}
