//! The operations in a stream's queue: work and marks.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::landing::Landing;
use super::mark::{Failure, Mark};
use crate::driver::{DevicePtr, Kernel};
use crate::units::to_usize;

/// One entry of a stream's queue.
#[derive(Debug)]
pub(super) enum Operation {
    /// Work that touches memory. Does not run if the stream has failed.
    Work(Work),
    /// Passes the mark.
    Record(Arc<Mark>),
    /// Work whose caller waits for it: runs it, then passes the mark.
    Awaited(Work, Arc<Mark>),
    /// Blocks the stream until the mark is passed. A failure before the mark becomes the stream's failure.
    Wait(Arc<Mark>),
}

impl Operation {
    /// Whether a stream that reaches this operation can run it without waiting.
    pub(super) fn is_ready(&self) -> bool {
        match self {
            Self::Work(_) | Self::Record(_) | Self::Awaited(..) => true,
            Self::Wait(mark) => mark.is_passed(),
        }
    }
}

/// Work that touches memory. Constructing it is unsafe: the caller promises that running it will be sound.
#[derive(Debug)]
pub(super) struct Work(Kind);

#[derive(Debug)]
enum Kind {
    Copy {
        dst: DevicePtr,
        src: DevicePtr,
        bytes: u64,
    },
    Upload {
        dst: DevicePtr,
        staged: Box<[u8]>,
    },
    Download {
        dst: Landing,
        src: DevicePtr,
    },
    Fill {
        dst: DevicePtr,
        value: u8,
        bytes: u64,
    },
    Kernel(Box<dyn Kernel>),
    Graph(Arc<[Work]>),
    #[cfg(asan)]
    Shadow(super::shadow::Shadow),
}

impl Work {
    /// A copy of `bytes` bytes.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of [`Driver::copy`](crate::driver::Driver::copy) hold.
    pub(super) unsafe fn copy(dst: DevicePtr, src: DevicePtr, bytes: u64) -> Self {
        Self(Kind::Copy { dst, src, bytes })
    }

    /// A copy from bytes that the work owns.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of [`Driver::copy_from_host`](crate::driver::Driver::copy_from_host)
    /// hold.
    pub(super) unsafe fn upload(dst: DevicePtr, staged: Box<[u8]>) -> Self {
        Self(Kind::Upload { dst, staged })
    }

    /// A copy to a host slice, unless the slice was withdrawn.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of [`Driver::copy_to_host`](crate::driver::Driver::copy_to_host) hold.
    pub(super) unsafe fn download(dst: Landing, src: DevicePtr) -> Self {
        Self(Kind::Download { dst, src })
    }

    /// Writes one byte value to a range.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of [`Driver::fill`](crate::driver::Driver::fill) hold.
    pub(super) unsafe fn fill(dst: DevicePtr, value: u8, bytes: u64) -> Self {
        Self(Kind::Fill { dst, value, bytes })
    }

    /// A kernel.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of [`Kernel::run`] hold.
    pub(super) unsafe fn kernel(kernel: Box<dyn Kernel>) -> Self {
        Self(Kind::Kernel(kernel))
    }

    /// A change of what AddressSanitizer permits.
    #[cfg(asan)]
    pub(super) fn shadow(shadow: super::shadow::Shadow) -> Self {
        Self(Kind::Shadow(shadow))
    }

    /// Captured work, in the order of its capture.
    ///
    /// # Safety
    /// Whenever it is run, the safety conditions of all its parts hold.
    pub(super) unsafe fn graph(parts: Arc<[Self]>) -> Self {
        Self(Kind::Graph(parts))
    }

    /// Runs the work, then drops it, so that everything a kernel owns is gone before the stream proceeds.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let outcome = self.run();
        outcome.and(self.discard())
    }

    /// Drops the work without running it.
    pub(super) fn discard(self) -> Result<(), Failure> {
        catch_unwind(AssertUnwindSafe(|| drop(self)))
            .map_err(|panic| failure("dropping a kernel", &*panic))
    }

    fn run(&self) -> Result<(), Failure> {
        match &self.0 {
            Kind::Copy { dst, src, bytes } => {
                // SAFETY: the constructor's caller promised both ranges; `ptr::copy` allows overlap.
                unsafe {
                    std::ptr::copy(address(*src).cast_const(), address(*dst), to_usize(*bytes))
                }
                Ok(())
            }
            Kind::Upload { dst, staged } => {
                // SAFETY: the constructor's caller promised the destination; the source is ours.
                unsafe { std::ptr::copy(staged.as_ptr(), address(*dst), staged.len()) }
                Ok(())
            }
            Kind::Download { dst, src } => {
                // SAFETY: the constructor's caller promised the source.
                unsafe { dst.fill_from(address(*src).cast_const()) }
                Ok(())
            }
            Kind::Fill { dst, value, bytes } => {
                // SAFETY: the constructor's caller promised the destination.
                unsafe { std::ptr::write_bytes(address(*dst), *value, to_usize(*bytes)) }
                Ok(())
            }
            Kind::Kernel(kernel) => {
                // A kernel works on plain memory. Whatever state a panic leaves there, the stream has failed and
                // reports the failure, so the results are never taken as valid.
                catch_unwind(AssertUnwindSafe(|| {
                    // SAFETY: the constructor's caller promised the kernel's safety conditions.
                    unsafe { kernel.run() }
                }))
                .map_err(|panic| failure(&format!("kernel {}", kernel.entry()), &*panic))
            }
            Kind::Graph(parts) => parts.iter().try_for_each(Self::run),
            #[cfg(asan)]
            Kind::Shadow(shadow) => {
                shadow.apply();
                Ok(())
            }
        }
    }
}

/// Converts a device address to a host pointer.
fn address(ptr: DevicePtr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(to_usize(ptr.0))
}

/// The failure that a panic in `what` causes.
fn failure(what: &str, panic: &(dyn Any + Send)) -> Failure {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("{what} panicked: {message}").into()
}
