//! What the system is asked to do when a file is replaced, and in which order: seen where the standard library asks.
//!
//! What a program defines comes before what its libraries do, so in the program of these tests the two functions below
//! stand in for those of the C library. They pass calls on, keep what a thread called, and fail if it wants them to.

#![allow(
    unsafe_code,
    reason = "the functions of the C library are unsafe to call"
)]

use std::cell::{Cell, RefCell};
use std::ffi::{c_char, c_int};
use std::fs::{self, File};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::tests::{directory, names};
use super::{nameless, put};

/// A call, by what it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    /// Flushes the file with this inode, when it has so many bytes.
    FlushFile(u64, u64),
    FlushDirectory(u64),
    Rename,
}

/// Picks calls that fail.
type Picks = fn(&Call) -> bool;

thread_local! {
    static CALLS: RefCell<Vec<Call>> = const { RefCell::new(Vec::new()) };
    /// Which kind of call fails.
    static FAILING: Cell<Option<Picks>> = const { Cell::new(None) };
}

/// Notes a call, and says whether it is to fail, with the error in its place.
fn fails(call: Call) -> bool {
    CALLS.with_borrow_mut(|calls| calls.push(call));
    let fails = FAILING.get().is_some_and(|is_such| is_such(&call));
    if fails {
        // SAFETY: the place is this thread's.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        unsafe { *errno = libc::EIO };
    }
    fails
}

/// The C library's.
#[unsafe(no_mangle)]
extern "C" fn fsync(file: c_int) -> c_int {
    // SAFETY: the caller has the file open; it stays open, as this owner is never dropped.
    let borrowed = ManuallyDrop::new(unsafe { File::from_raw_fd(file) });
    let about = borrowed.metadata().expect("an open file has metadata");
    let call = if about.is_dir() {
        Call::FlushDirectory(about.ino())
    } else {
        Call::FlushFile(about.ino(), about.len())
    };
    if fails(call) {
        return -1;
    }
    // SAFETY: the call takes any number.
    let outcome = unsafe { libc::syscall(libc::SYS_fsync, file) };
    c_int::try_from(outcome).expect("it is 0 or -1")
}

/// The C library's.
///
/// # Safety
/// Both are texts that end in a zero.
#[unsafe(no_mangle)]
unsafe extern "C" fn rename(old: *const c_char, new: *const c_char) -> c_int {
    if fails(Call::Rename) {
        return -1;
    }
    let here = libc::AT_FDCWD;
    // SAFETY: the caller's promise.
    let outcome = unsafe { libc::syscall(libc::SYS_renameat2, here, old, here, new, 0) };
    c_int::try_from(outcome).expect("it is 0 or -1")
}

/// Makes `path` a file of 100,000 times `byte`, by a file with a name or without one; also what was called.
fn put_bytes(path: &Path, byte: u8, has_name: bool) -> (io::Result<()>, Vec<Call>) {
    CALLS.take();
    let nameless = nameless(path).filter(|_| !has_name);
    let outcome = put(path, nameless, |file| {
        // In pieces that a buffer holds back.
        (0..1000).try_for_each(|_| file.write_all(&[byte; 100]))
    });
    (outcome, CALLS.take())
}

#[test]
fn a_file_is_flushed_before_it_takes_its_name_and_the_name_after() {
    let directory = directory("flushed");
    let path = directory.join("state");
    for (byte, has_name) in [(1, false), (2, true), (3, false), (4, true)] {
        let (outcome, calls) = put_bytes(&path, byte, has_name);
        outcome.unwrap();
        let expected = [
            Call::FlushFile(fs::metadata(&path).unwrap().ino(), 100_000),
            Call::Rename,
            Call::FlushDirectory(fs::metadata(&directory).unwrap().ino()),
        ];
        assert_eq!(calls, expected);
        assert_eq!(fs::read(&path).unwrap(), [byte; 100_000]);
    }
    fs::remove_dir_all(&directory).unwrap();
}

#[test]
fn whichever_call_fails_one_of_the_files_is_there_and_nothing_else() {
    let directory = directory("failing");
    let path = directory.join("state");
    put_bytes(&path, 1, false).0.unwrap();
    let kinds: [(Picks, usize); 3] = [
        (|call| matches!(call, Call::FlushFile(..)), 1),
        (|call| *call == Call::Rename, 2),
        (|call| matches!(call, Call::FlushDirectory(_)), 3),
    ];
    for has_name in [false, true] {
        for (is_such, calls_until) in kinds {
            FAILING.set(Some(is_such));
            let (outcome, calls) = put_bytes(&path, 2, has_name);
            FAILING.set(None);
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("os error 5"), "{error}");
            assert_eq!(calls.len(), calls_until);
            assert_eq!(names(&directory), ["state"]);
            // The last call comes when the name is taken, and its error says so.
            let is_in_place = calls_until == 3;
            assert_eq!(
                error.starts_with("the new file is in place"),
                is_in_place,
                "{error}"
            );
            let byte = if is_in_place { 2 } else { 1 };
            assert_eq!(fs::read(&path).unwrap(), [byte; 100_000]);
            put_bytes(&path, 1, has_name).0.unwrap();
        }
    }
    fs::remove_dir_all(&directory).unwrap();
}
