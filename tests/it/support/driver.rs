//! What the tests of the driver share: a kernel made of a closure, and short names for unsafe calls.
//!
//! The memory that tests enqueue work on lives until the test ends, which is what all SAFETY notes rest on.

#![allow(dead_code, reason = "a program takes the suites it needs")]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a test helper calls a driver with plain addresses, and fails by panicking"
)]

use std::fmt;
use std::sync::mpsc::{Receiver, Sender, channel};

use kitsune::driver::{DevicePtr, Kernel};
use kitsune::{Device, Error, HostConfig, HostSchedule, Result, Stream};
use parking_lot::Mutex;

/// A kernel that calls a closure.
pub(crate) struct Act<F>(pub(crate) F);

impl<F> fmt::Debug for Act<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Act")
    }
}

impl<F: Fn() + Send + Sync> Kernel for Act<F> {
    fn entry(&self) -> &'static str {
        "act"
    }

    fn elements(&self) -> u64 {
        1
    }

    unsafe fn run(&self) {
        (self.0)();
    }
}

/// Keeps a stream from going on until it is opened. Closed gates need streams with threads.
pub(crate) struct Gate(Sender<()>);

impl Gate {
    pub(crate) fn close(stream: &Stream) -> Self {
        let (sender, receiver): (_, Receiver<()>) = channel();
        let receiver = Mutex::new(receiver);
        // An error means that the gate was dropped: a failing test must not hang.
        act(stream, move || {
            let _ = receiver.lock().recv();
        });
        Self(sender)
    }

    pub(crate) fn open(self) {
        self.0.send(()).unwrap();
    }
}

pub(crate) fn seeded(seed: u64) -> Device {
    Device::host(HostConfig {
        schedule: HostSchedule::Seeded(seed),
        ..HostConfig::default()
    })
    .unwrap()
}

pub(crate) fn threads() -> Device {
    Device::host(HostConfig::default()).unwrap()
}

/// One device of every schedule.
pub(crate) fn devices() -> [Device; 3] {
    [threads(), seeded(1), seeded(2)]
}

pub(crate) fn act(stream: &Stream, action: impl Fn() + Send + Sync + 'static) {
    try_act(stream, action).unwrap();
}

pub(crate) fn try_act(stream: &Stream, action: impl Fn() + Send + Sync + 'static) -> Result<()> {
    let kernel = Box::new(Act(action));
    // SAFETY: the closures of the tests own what they use.
    unsafe { stream.driver().launch(kernel, stream.raw()) }
}

pub(crate) fn allocate(device: &Device, bytes: u64) -> DevicePtr {
    device.driver().allocate(bytes).unwrap()
}

pub(crate) fn fill(stream: &Stream, dst: DevicePtr, value: u8, bytes: u64) {
    // SAFETY: the test's memory.
    unsafe { stream.driver().fill(dst, value, bytes, stream.raw()) }.unwrap();
}

pub(crate) fn copy(stream: &Stream, dst: DevicePtr, src: DevicePtr, bytes: u64) {
    // SAFETY: the test's memory.
    unsafe { stream.driver().copy(dst, src, bytes, stream.raw()) }.unwrap();
}

pub(crate) fn write(stream: &Stream, dst: DevicePtr, bytes: &[u8]) {
    // SAFETY: the test's memory.
    unsafe { stream.driver().copy_from_host(dst, bytes, stream.raw()) }.unwrap();
}

pub(crate) fn read(stream: &Stream, src: DevicePtr, len: usize) -> Vec<u8> {
    try_read(stream, src, len).unwrap()
}

pub(crate) fn try_read(stream: &Stream, src: DevicePtr, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    // SAFETY: the test's memory.
    unsafe { stream.driver().copy_to_host(&mut bytes, src, stream.raw()) }?;
    Ok(bytes)
}

/// The call, code and reason of a driver's error.
pub(crate) fn refusal<T: fmt::Debug>(outcome: Result<T>) -> (&'static str, i32, String) {
    match outcome {
        Err(Error::Driver { call, code, reason }) => (call, code, reason),
        other => panic!("a refusal by the driver was expected, not {other:?}"),
    }
}

/// Asserts that `outcome` is the error of a call that a capture forbids.
pub(crate) fn assert_capturing<T: fmt::Debug>(outcome: Result<T>, expected: &str) {
    match outcome {
        Err(Error::Capturing { call }) => assert_eq!(call, expected),
        other => panic!("{expected} should be refused during a capture, not {other:?}"),
    }
}
