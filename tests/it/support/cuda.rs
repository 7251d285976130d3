//! A simulated CUDA driver in this process, for the tests of the CUDA device.
//!
//! The library is one for the whole process. Every test takes it for itself first, so that tests may share a
//! process; cargo-nextest gives each a process of its own.

#![allow(dead_code, reason = "a program takes the suites it needs")]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a test helper calls a driver with plain addresses, and fails by panicking"
)]

use std::ffi::CString;
use std::ffi::{c_char, c_int};
use std::path::PathBuf;
use std::sync::OnceLock;

use kitsune::Device;
use libloading::{Library, Symbol};
use parking_lot::{Mutex, MutexGuard};

/// Where cargo puts the simulated library: beside the tests.
pub(crate) fn library_path() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.with_file_name("libsimcuda.so")
}

/// The library, which the first test of the process loads.
fn library() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let path = library_path();
        // SAFETY: our own library, without initializers. It has the name that a driver has, and whoever
        // asks for that gets it from now on.
        unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{path:?}: {error}"))
    })
}

fn function<T>(name: &str) -> Symbol<'static, T> {
    // SAFETY: the callers below name functions of tests/simcuda/src/control.rs with their types.
    unsafe { library().get(name.as_bytes()) }.unwrap()
}

/// Changes a setting. For tests that have taken the driver.
pub(crate) fn set(key: &str, value: &str) {
    let set =
        function::<unsafe extern "C" fn(*const c_char, *const c_char) -> c_int>("simcuda_set");
    let (key, value) = (CString::new(key).unwrap(), CString::new(value).unwrap());
    // SAFETY: both texts end with zero.
    let code = unsafe { set(key.as_ptr(), value.as_ptr()) };
    assert_eq!(code, 0, "{key:?} is understood");
}

/// How often a function of the library was called.
pub(crate) fn calls(name: &str) -> u64 {
    let calls = function::<unsafe extern "C" fn(*const c_char) -> u64>("simcuda_calls");
    let name = CString::new(name).unwrap();
    // SAFETY: the text ends with zero.
    unsafe { calls(name.as_ptr()) }
}

/// The calls so far, each with its code, and what work complained about.
pub(crate) fn log() -> String {
    let log = function::<unsafe extern "C" fn(*mut u8, usize) -> usize>("simcuda_log");
    // SAFETY: nothing is written to no bytes.
    let len = unsafe { log(std::ptr::null_mut(), 0) };
    let mut bytes = vec![0; len];
    // SAFETY: `len` bytes are there.
    unsafe { log(bytes.as_mut_ptr(), len) };
    String::from_utf8(bytes).unwrap()
}

/// The simulated driver, held by one test.
pub(crate) struct Sim {
    _alone: MutexGuard<'static, ()>,
}

impl Sim {
    /// Loads the library, unless that was done, and puts it back to where it began.
    pub(crate) fn take() -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock();
        let reset = function::<unsafe extern "C" fn()>("simcuda_reset");
        // SAFETY: takes nothing and may be called at any time.
        unsafe { reset() };
        Self { _alone: alone }
    }

    /// The library, and its first device.
    pub(crate) fn device() -> (Self, Device) {
        let sim = Self::take();
        let device = Device::cuda(0).unwrap();
        (sim, device)
    }

    pub(crate) fn set(&self, key: &str, value: &str) {
        set(key, value);
    }

    /// Makes the `nth` call of `name` from now on return `code`.
    pub(crate) fn fail(&self, name: &str, nth: u64, code: c_int) {
        let fail = function::<unsafe extern "C" fn(*const c_char, u64, c_int)>("simcuda_fail");
        let name = CString::new(name).unwrap();
        // SAFETY: the text ends with zero.
        unsafe { fail(name.as_ptr(), nth, code) };
    }

    /// Faults that have not fired.
    pub(crate) fn armed(&self) -> usize {
        let armed = function::<unsafe extern "C" fn() -> usize>("simcuda_armed");
        // SAFETY: takes nothing.
        unsafe { armed() }
    }

    /// How often a function of the library was called.
    pub(crate) fn calls(&self, name: &str) -> u64 {
        calls(name)
    }

    /// How much of a kind of things is held.
    pub(crate) fn held(&self, kind: &str) -> usize {
        let held = function::<unsafe extern "C" fn(*const c_char) -> usize>("simcuda_held");
        let kind = CString::new(kind).unwrap();
        // SAFETY: the text ends with zero.
        unsafe { held(kind.as_ptr()) }
    }

    /// The calls so far, each with its code, and what work complained about.
    pub(crate) fn log(&self) -> String {
        log()
    }

    /// The names of the calls since `before`, an earlier log.
    pub(crate) fn names_since(&self, before: &str) -> Vec<String> {
        let log = self.log();
        let new = log[before.len()..].lines();
        new.map(|line| line.split(' ').next().unwrap().to_owned())
            .collect()
    }
}
