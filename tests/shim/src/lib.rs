//! The device kernels of `kernels/`, compiled for the host, for tests.
//!
//! What runs is the text that the PTX is made from; `cuda_shim.h` says how, and what that cannot show.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

/// The same code as a shared library that exports `kitsune_host_launch`.
pub const LIBRARY: &str = env!("KITSUNE_SHIM_LIBRARY");

unsafe extern "C" {
    fn kitsune_host_launch(
        entry: *const c_char,
        blocks: c_uint,
        threads: c_uint,
        shared: c_uint,
        arguments: *const c_void,
    ) -> c_int;
    fn kitsune_host_reverse(reverse: c_int);
    fn kitsune_host_traffic(bytes: *mut u64);
    fn kitsune_host_entry(index: c_uint) -> *const c_char;
}

/// Why a launch failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no such entry point.
    UnknownEntry,
    /// The launch shape is impossible, or a thread waited for others that never came.
    Kernel,
}

/// Runs an entry point to its end on the calling thread. `grid` is blocks, threads, bytes of shared memory.
///
/// # Errors
/// As [`Failure`] says.
///
/// # Safety
/// `arguments` is the struct that the entry point takes, aligned to 8 bytes, and what its addresses stand
/// for is as the kernel expects, untouched by others meanwhile.
pub unsafe fn launch(entry: &str, grid: [u32; 3], arguments: &[u8]) -> Result<(), Failure> {
    let entry = CString::new(entry).map_err(|_| Failure::UnknownEntry)?;
    let [blocks, threads, shared] = grid;
    // SAFETY: the name ends with a NUL; the caller promises the rest.
    let code = unsafe {
        kitsune_host_launch(
            entry.as_ptr(),
            blocks,
            threads,
            shared,
            arguments.as_ptr().cast(),
        )
    };
    match code {
        0 => Ok(()),
        1 => Err(Failure::UnknownEntry),
        _ => Err(Failure::Kernel),
    }
}

/// Runs blocks and threads last to first from now on, or first to last.
pub fn reverse(reverse: bool) {
    // SAFETY: the function sets an atomic flag.
    unsafe { kitsune_host_reverse(c_int::from(reverse)) }
}

/// Bytes of array elements that the calling thread's last launch read, and wrote: counted where they are moved.
#[must_use]
pub fn traffic() -> [u64; 2] {
    let mut bytes = [0; 2];
    // SAFETY: the function writes two numbers.
    unsafe { kitsune_host_traffic(bytes.as_mut_ptr()) };
    bytes
}

/// The names of all entry points, in alphabetical order.
pub fn entries() -> impl Iterator<Item = &'static str> {
    // SAFETY: any index may be asked for.
    (0..)
        .map(|index| unsafe { kitsune_host_entry(index) })
        .take_while(|name| !name.is_null())
        .map(|name| {
            // SAFETY: not null; names are literals of the library.
            let name = unsafe { CStr::from_ptr(name) };
            name.to_str().expect("names of entry points are ASCII")
        })
}
