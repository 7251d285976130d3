//! Error codes of the driver, and what they mean to a caller.
//!
//! Codes are plain numbers, because a driver newer than this crate can return codes that are unknown here.

use std::ffi::c_int;

use crate::error::Error;

/// The codes that this crate distinguishes, without their prefix `CUDA_ERROR_`.
pub(super) mod code {
    use std::ffi::c_int;

    pub(in super::super) const SUCCESS: c_int = 0;
    pub(in super::super) const INVALID_VALUE: c_int = 1;
    pub(in super::super) const STUB_LIBRARY: c_int = 34;
    /// A code of the runtime API: the driver API has none for a driver that is too old.
    pub(in super::super) const INSUFFICIENT_DRIVER: c_int = 35;
    pub(in super::super) const NO_DEVICE: c_int = 100;
    pub(in super::super) const INVALID_DEVICE: c_int = 101;
    pub(in super::super) const NO_BINARY_FOR_GPU: c_int = 209;
    pub(in super::super) const UNSUPPORTED_PTX_VERSION: c_int = 222;
    pub(in super::super) const SHARED_OBJECT_SYMBOL_NOT_FOUND: c_int = 302;
    pub(in super::super) const SHARED_OBJECT_INIT_FAILED: c_int = 303;
    pub(in super::super) const NOT_FOUND: c_int = 500;
    pub(in super::super) const NOT_READY: c_int = 600;
    pub(in super::super) const NOT_SUPPORTED: c_int = 801;
    pub(in super::super) const STREAM_CAPTURE_UNSUPPORTED: c_int = 900;
    pub(in super::super) const STREAM_CAPTURE_MERGE: c_int = 902;
    pub(in super::super) const STREAM_CAPTURE_ISOLATION: c_int = 905;
    pub(in super::super) const STREAM_CAPTURE_IMPLICIT: c_int = 906;
    pub(in super::super) const CAPTURED_EVENT: c_int = 907;
}

/// Whether `code` says that a capture forbids the call. An invalidated capture and an unjoined stream are errors of a
/// different kind.
pub(super) fn is_capture_refusal(code: c_int) -> bool {
    [
        code::STREAM_CAPTURE_UNSUPPORTED,
        code::STREAM_CAPTURE_MERGE,
        code::STREAM_CAPTURE_ISOLATION,
        code::STREAM_CAPTURE_IMPLICIT,
    ]
    .contains(&code)
}

pub(super) fn refuse(call: &'static str, code: c_int, reason: impl Into<String>) -> Error {
    Error::Driver {
        call,
        code,
        reason: reason.into(),
    }
}

/// The code of an [`Error::Driver`].
pub(super) fn code_of(error: &Error) -> Option<c_int> {
    match error {
        Error::Driver { code, .. } => Some(*code),
        _ => None,
    }
}
