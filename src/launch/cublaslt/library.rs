//! Finds cuBLASLt at run time. Building does not need it, and programs run without it.
//!
//! A version that cannot be loaded, lacks a function or refuses to start (for example, because it is newer than the
//! driver) is skipped, and the next one is tried. The types are those of cudarc's bindings, and the compiler checks
//! each signature below against theirs. Codes are plain numbers, because a newer library may have other codes.
//!
//! The library uses the driver that the dynamic loader finds for it. If that is not the driver used here, the library
//! is not used.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use cudarc::cublaslt::sys::{
    cublasComputeType_t, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
    cublasLtMatmulDescAttributes_t, cublasLtMatmulHeuristicResult_t, cublasLtMatmulPreference_t,
    cublasLtMatmulPreferenceAttributes_t, cublasLtMatrixLayout_t, cublasStatus_t, cudaDataType,
    cudaStream_t,
};

/// File names of versions that have these functions, newest first.
const CANDIDATES: &[&str] = &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

pub(super) const SUCCESS: c_int = 0;

/// Declares the table of functions, and checks each signature against cudarc's bindings.
macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        /// The library functions that this crate uses, each under its own name.
        #[derive(Debug)]
        #[allow(non_snake_case, reason = "the names are the library's")]
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        impl Functions {
            /// Looks up all functions. The error is the name of the first that is missing.
            fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {$(
                    $name: {
                        let symbol = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: this is the signature in NVIDIA's header, as the check below shows.
                        *unsafe { library.get(symbol) }.map_err(|_| stringify!($name))?
                    },
                )*})
            }
        }

        $(const _: fn($($type),*) -> cublasStatus_t = |$($argument),*| {
            // SAFETY: compiled for the type check, never called.
            unsafe { cudarc::cublaslt::sys::$name($($argument),*) }
        };)*
    };
}

functions! {
    cublasLtCreate(handle: *mut cublasLtHandle_t);
    cublasLtMatmulDescCreate(
        description: *mut cublasLtMatmulDesc_t,
        compute: cublasComputeType_t,
        scale: cudaDataType
    );
    cublasLtMatmulDescSetAttribute(
        description: cublasLtMatmulDesc_t,
        attribute: cublasLtMatmulDescAttributes_t,
        value: *const c_void,
        bytes: usize
    );
    cublasLtMatmulDescDestroy(description: cublasLtMatmulDesc_t);
    cublasLtMatrixLayoutCreate(
        layout: *mut cublasLtMatrixLayout_t,
        element: cudaDataType,
        rows: u64,
        columns: u64,
        leading: i64
    );
    cublasLtMatrixLayoutDestroy(layout: cublasLtMatrixLayout_t);
    cublasLtMatmulPreferenceCreate(preference: *mut cublasLtMatmulPreference_t);
    cublasLtMatmulPreferenceSetAttribute(
        preference: cublasLtMatmulPreference_t,
        attribute: cublasLtMatmulPreferenceAttributes_t,
        value: *const c_void,
        bytes: usize
    );
    cublasLtMatmulPreferenceDestroy(preference: cublasLtMatmulPreference_t);
    cublasLtMatmulAlgoGetHeuristic(
        handle: cublasLtHandle_t,
        description: cublasLtMatmulDesc_t,
        a: cublasLtMatrixLayout_t,
        b: cublasLtMatrixLayout_t,
        c: cublasLtMatrixLayout_t,
        d: cublasLtMatrixLayout_t,
        preference: cublasLtMatmulPreference_t,
        wanted: c_int,
        results: *mut cublasLtMatmulHeuristicResult_t,
        found: *mut c_int
    );
    cublasLtMatmul(
        handle: cublasLtHandle_t,
        description: cublasLtMatmulDesc_t,
        alpha: *const c_void,
        a: *const c_void,
        a_layout: cublasLtMatrixLayout_t,
        b: *const c_void,
        b_layout: cublasLtMatrixLayout_t,
        beta: *const c_void,
        c: *const c_void,
        c_layout: cublasLtMatrixLayout_t,
        d: *mut c_void,
        d_layout: cublasLtMatrixLayout_t,
        algorithm: *const cublasLtMatmulAlgo_t,
        workspace: *mut c_void,
        workspace_bytes: usize,
        stream: cudaStream_t
    );
}

/// The open library, started on one device.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) functions: Functions,
    handle: Handle,
    // Never closed, because the library may have threads of its own.
    _library: std::mem::ManuallyDrop<libloading::Library>,
}

/// The library's state for a device.
#[derive(Clone, Copy, Debug)]
struct Handle(cublasLtHandle_t);

// SAFETY: the handle is never dereferenced here, and the library allows every thread to use it at any time.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Library {
    /// Opens and starts the library for the device that is current on this thread. The error says why it cannot be
    /// used.
    pub(super) fn open() -> Result<Self, String> {
        Self::open_first(CANDIDATES)
    }

    fn open_first(candidates: &[&str]) -> Result<Self, String> {
        let mut reason = None;
        for name in candidates {
            // SAFETY: NVIDIA's library, which is made to be loaded; loading runs its initializers.
            let Ok(library) = (unsafe { libloading::Library::new(*name) }) else {
                continue;
            };
            if !crate::driver::cuda::is_found_by_others() {
                return Err(format!("{name} would use another driver than this program"));
            }
            match Self::start(name, library) {
                Ok(library) => return Ok(library),
                Err(refused) => {
                    reason.get_or_insert(refused);
                }
            }
        }
        Err(reason.unwrap_or_else(|| format!("{} cannot be loaded", candidates.join(" or "))))
    }

    fn start(name: &str, library: libloading::Library) -> Result<Self, String> {
        let functions = Functions::find(&library)
            .map_err(|function| format!("{name} has no function {function}"))?;
        let mut handle = null_mut();
        // SAFETY: `handle` receives the result.
        match unsafe { (functions.cublasLtCreate)(&raw mut handle) } {
            SUCCESS => Ok(Self {
                functions,
                handle: Handle(handle),
                _library: std::mem::ManuallyDrop::new(library),
            }),
            code => Err(format!("{name} cannot be started (code {code})")),
        }
    }

    pub(super) fn handle(&self) -> cublasLtHandle_t {
        self.handle.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_missing_is_a_reason_and_no_panic() {
        let refused = Library::open_first(&["libkitsune-none.so.1", "libkitsune-none.so"]);
        assert_eq!(
            refused.err().as_deref(),
            Some("libkitsune-none.so.1 or libkitsune-none.so cannot be loaded")
        );
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_library_without_a_function_is_a_reason_that_names_it() {
        // SAFETY: the C library, which is already loaded.
        let library = unsafe { libloading::Library::new("libc.so.6") };
        let Ok(library) = library else { return };
        let refused = Library::start("libc.so.6", library);
        assert_eq!(
            refused.err().as_deref(),
            Some("libc.so.6 has no function cublasLtCreate")
        );
    }
}
