//! Copies from pageable host memory on devices where the CUDA library may read the source after the call returns.
//!
//! If the device cannot access pageable memory, the library stages the bytes before the call returns. If it can (the
//! CPU shares its page tables, or the kernel mirrors them), the library makes no such promise. This module then stages
//! the bytes itself, in a ring of pinned memory. A part of the ring is reused once the copy out of it has run. The host
//! waits only when the ring is full.
//!
//! Invariant: the bytes between `tail` and `head` belong to copies in flight, each with its mark, oldest first.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::context::Context;
use super::memory;
use super::streams::{EventEntry, StreamEntry};
use crate::driver::DevicePtr;
use crate::error::Result;
use crate::units::{MIB, to_usize};

/// Size of the ring in bytes: what a 60 GB/s link transfers in a quarter of a millisecond.
const RING: u64 = 16 * MIB;
/// Largest single copy, so that the host stages one part while another is transferred.
const PART: u64 = RING / 4;
/// Copies start at multiples of this.
const ALIGNMENT: u64 = 64;
/// Most copies in flight, whatever their size.
const MARKS_MAX: usize = 256;

/// The ring of one device, made at the first copy and kept until the process ends.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<Option<Ring>>);

/// Positions only grow; a position's offset in the ring is the position modulo [`RING`].
#[derive(Debug)]
struct Ring {
    start: DevicePtr,
    head: u64,
    tail: u64,
    /// The end position of each copy in flight.
    marks: VecDeque<(u64, EventEntry)>,
}

impl Uploads {
    /// Enqueues a copy of `src`, which is not read after this returns.
    ///
    /// # Safety
    /// As [`Driver::copy_from_host`](crate::driver::Driver::copy_from_host).
    pub(super) unsafe fn upload(
        &self,
        call: &'static str,
        stream: &Arc<StreamEntry>,
        number: u64,
        (dst, src): (DevicePtr, &[u8]),
    ) -> Result<()> {
        let context = stream.context;
        let mut ring = self.0.lock();
        let ring = match &mut *ring {
            Some(ring) => ring,
            none => none.insert(Ring::new(context)?),
        };
        let mut to = dst;
        for part in src.chunks(to_usize(PART)) {
            let bytes = part.len() as u64;
            let place = ring.room(call, bytes)?;
            let staged = std::ptr::with_exposed_provenance_mut::<u8>(to_usize(place.0));
            // SAFETY: `room` reserved this many bytes of the ring, which no copy in flight reads.
            unsafe { staged.copy_from_nonoverlapping(part.as_ptr(), part.len()) };
            // SAFETY: the bytes were just written, and are not written again until the mark below is passed.
            let staged = unsafe { std::slice::from_raw_parts(staged, part.len()) };
            // SAFETY: the caller promises the destination.
            unsafe { memory::upload(call, stream, to, staged) }?;
            ring.mark(call, stream, number, bytes)?;
            to = to.offset(bytes);
        }
        Ok(())
    }
}

impl Ring {
    fn new(context: &Context) -> Result<Self> {
        Ok(Self {
            start: memory::allocate_pinned(context, RING)?,
            head: 0,
            tail: 0,
            marks: VecDeque::new(),
        })
    }

    /// A contiguous place for `bytes`. It counts as used only once [`mark`](Self::mark) is called.
    fn room(&mut self, call: &'static str, bytes: u64) -> Result<DevicePtr> {
        let left = RING - self.head % RING;
        if left < bytes {
            // Skip the rest of the ring: it belongs to the previous copy, or is free.
            self.head += left;
            match self.marks.back_mut() {
                Some((end, _)) => *end = self.head,
                None => self.tail = self.head,
            }
        }
        while self.head + bytes > self.tail + RING || self.marks.len() >= MARKS_MAX {
            let (end, event) = self
                .marks
                .front()
                .expect("a full ring has copies under way");
            event.synchronize(call)?;
            self.tail = *end;
            self.marks.pop_front();
        }
        Ok(self.start.offset(self.head % RING))
    }

    /// Marks the copy from the place that `room` returned last.
    fn mark(
        &mut self,
        call: &'static str,
        stream: &StreamEntry,
        number: u64,
        bytes: u64,
    ) -> Result<()> {
        let marked = EventEntry::create(stream.context).and_then(|event| {
            event.record(call, stream, number)?;
            Ok(event)
        });
        match marked {
            Ok(event) => {
                self.head += bytes.next_multiple_of(ALIGNMENT);
                self.marks.push_back((self.head, event));
                Ok(())
            }
            // Without a mark, the host must wait for the copy.
            Err(_) => stream.synchronize(call),
        }
    }
}
