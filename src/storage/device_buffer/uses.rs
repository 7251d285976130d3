//! Records which streams used a buffer, which parts they used, and the end of each stream's last use.
//!
//! The home stream is not recorded, because the buffer itself is ordered with it.
//!
//! Must not know: what memory is used, who waits.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, ThreadId};

use cudarc::driver::{CudaEvent, CudaStream, DriverError};

/// Whether a use reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// Identifies a cudarc stream: context, handle, and, for the per-thread default stream, the thread.
type Name = (usize, usize, Option<ThreadId>);

fn name(stream: &CudaStream) -> Name {
    let handle = stream.cu_stream().addr();
    let per_thread = (handle == 2).then(|| thread::current().id());
    (stream.context().cu_ctx().addr(), handle, per_thread)
}

/// The streams other than home that used a buffer: a list that only grows, so that it can lend out its events.
#[derive(Default)]
pub(super) struct Uses(OnceLock<Box<Use>>);

/// The uses of one stream.
pub(super) struct Use {
    stream: Name,
    has_written: AtomicBool,
    /// The range of elements from the first to the last used.
    first: AtomicUsize,
    end_of_last: AtomicUsize,
    /// The end of the last use. Marks nothing until the first use ends.
    end: CudaEvent,
    next: Uses,
}

impl Use {
    /// The end of the last use.
    pub(super) fn end(&self) -> &CudaEvent {
        &self.end
    }

    /// Whether a use of `part` has to wait for this stream's uses: they share elements, and one of them writes.
    pub(super) fn is_before(&self, part: &Range<usize>, access: Access) -> bool {
        // Acquire, here and below: pairs with the Release in `add`. If another thread adds a use at the same time,
        // the borrow rules guarantee that it is of another part, or that both only read.
        let first = self.first.load(Ordering::Acquire);
        let is_shared = first < part.end && part.start < self.end_of_last.load(Ordering::Acquire);
        is_shared && (access == Access::Write || self.has_written.load(Ordering::Acquire))
    }

    /// Records a use.
    pub(super) fn add(&self, part: &Range<usize>, access: Access) {
        if access == Access::Write {
            self.has_written.store(true, Ordering::Release);
        }
        self.first.fetch_min(part.start, Ordering::Release);
        self.end_of_last.fetch_max(part.end, Ordering::Release);
    }
}

impl Uses {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Use> {
        let first = self.0.get();
        std::iter::successors(first, |usage| usage.next.0.get()).map(|usage| &**usage)
    }

    /// The entry of `stream`, created if there is none.
    pub(super) fn on(&self, stream: &CudaStream) -> Result<&Use, DriverError> {
        let wanted = name(stream);
        let mut place = self;
        loop {
            let usage = match place.0.get() {
                Some(usage) => usage,
                None => {
                    let new = Box::new(Use {
                        stream: wanted,
                        has_written: AtomicBool::new(false),
                        first: AtomicUsize::new(usize::MAX),
                        end_of_last: AtomicUsize::new(0),
                        end: stream.context().new_event(None)?,
                        next: Self::default(),
                    });
                    // Another thread may have been faster: then its entry stays, and the loop continues.
                    place.0.get_or_init(|| new)
                }
            };
            if usage.stream == wanted {
                // A destroyed stream may have had the same handle, so wait for its last use.
                stream.wait(&usage.end)?;
                return Ok(usage);
            }
            place = &usage.next;
        }
    }
}
