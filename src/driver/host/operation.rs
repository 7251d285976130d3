//! What a stream holds: work and marks.

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
    /// Something that touches memory. Not run once the stream has failed.
    Work(Work),
    /// Passes the mark.
    Record(Arc<Mark>),
    /// Work whose caller waits for it: runs it, then passes the mark.
    Awaited(Work, Arc<Mark>),
    /// Holds the stream until the mark is passed, and hands the stream a failure before the mark.
    Wait(Arc<Mark>),
}

impl Operation {
    /// Whether a stream that gets here can go on at once.
    pub(super) fn is_ready(&self) -> bool {
        match self {
            Self::Work(_) | Self::Record(_) | Self::Awaited(..) => true,
            Self::Wait(mark) => mark.is_passed(),
        }
    }
}

/// Something that touches memory. Whoever makes one promises that running it will be sound.
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
    /// Whenever it is run, what [`Driver::copy`](crate::driver::Driver::copy) asks for holds.
    pub(super) unsafe fn copy(dst: DevicePtr, src: DevicePtr, bytes: u64) -> Self {
        Self(Kind::Copy { dst, src, bytes })
    }

    /// A copy from bytes that it owns.
    ///
    /// # Safety
    /// Whenever it is run, what [`Driver::copy_from_host`](crate::driver::Driver::copy_from_host) asks for
    /// holds.
    pub(super) unsafe fn upload(dst: DevicePtr, staged: Box<[u8]>) -> Self {
        Self(Kind::Upload { dst, staged })
    }

    /// A copy to a slice of the host's, while that is still wanted.
    ///
    /// # Safety
    /// Whenever it is run, what [`Driver::copy_to_host`](crate::driver::Driver::copy_to_host) asks for holds.
    pub(super) unsafe fn download(dst: Landing, src: DevicePtr) -> Self {
        Self(Kind::Download { dst, src })
    }

    /// Writing one byte value to a range.
    ///
    /// # Safety
    /// Whenever it is run, what [`Driver::fill`](crate::driver::Driver::fill) asks for holds.
    pub(super) unsafe fn fill(dst: DevicePtr, value: u8, bytes: u64) -> Self {
        Self(Kind::Fill { dst, value, bytes })
    }

    /// A kernel.
    ///
    /// # Safety
    /// Whenever it is run, what [`Kernel::run`] asks for holds.
    pub(super) unsafe fn kernel(kernel: Box<dyn Kernel>) -> Self {
        Self(Kind::Kernel(kernel))
    }

    /// A change of what the sanitizer permits.
    #[cfg(asan)]
    pub(super) fn shadow(shadow: super::shadow::Shadow) -> Self {
        Self(Kind::Shadow(shadow))
    }

    /// Captured work, in the order of its capture.
    ///
    /// # Safety
    /// Whenever it is run, what every part of it asks for holds.
    pub(super) unsafe fn graph(parts: Arc<[Self]>) -> Self {
        Self(Kind::Graph(parts))
    }

    /// Does the work, then drops it: what a kernel owns is gone when its stream goes on.
    pub(super) fn finish(self) -> Result<(), Failure> {
        let outcome = self.run();
        outcome.and(self.discard())
    }

    /// Drops the work without doing it.
    pub(super) fn discard(self) -> Result<(), Failure> {
        catch_unwind(AssertUnwindSafe(|| drop(self)))
            .map_err(|panic| failure("dropping a kernel", &*panic))
    }

    fn run(&self) -> Result<(), Failure> {
        match &self.0 {
            Kind::Copy { dst, src, bytes } => {
                // SAFETY: whoever made the work promised both ranges; `ptr::copy` allows overlap.
                unsafe {
                    std::ptr::copy(address(*src).cast_const(), address(*dst), to_usize(*bytes))
                }
                Ok(())
            }
            Kind::Upload { dst, staged } => {
                // SAFETY: whoever made the work promised the destination; the source is ours.
                unsafe { std::ptr::copy(staged.as_ptr(), address(*dst), staged.len()) }
                Ok(())
            }
            Kind::Download { dst, src } => {
                // SAFETY: whoever made the work promised the source.
                unsafe { dst.fill_from(address(*src).cast_const()) }
                Ok(())
            }
            Kind::Fill { dst, value, bytes } => {
                // SAFETY: whoever made the work promised the destination.
                unsafe { std::ptr::write_bytes(address(*dst), *value, to_usize(*bytes)) }
                Ok(())
            }
            Kind::Kernel(kernel) => {
                // A kernel works on plain memory: whatever state a panic leaves there, the stream has
                // failed, and nobody is told that its results are good.
                catch_unwind(AssertUnwindSafe(|| {
                    // SAFETY: whoever made the work promised what the kernel asks for.
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

/// The host's pointer for an address of the device.
fn address(ptr: DevicePtr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(to_usize(ptr.0))
}

/// The failure that a panic in `what` stands for.
fn failure(what: &str, panic: &(dyn Any + Send)) -> Failure {
    let message = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message");
    format!("{what} panicked: {message}").into()
}
