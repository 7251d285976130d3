//! Copies from ordinary memory of the host, where the library may read it after the call.
//!
//! Devices that cannot reach ordinary memory have it copied aside before the call returns. Those that can (with
//! a processor that shares its page tables, or a kernel that mirrors them) are promised nothing of the kind, so
//! there the bytes are copied aside here: into a ring of pinned memory, whose room is had again when the copy out
//! of it has run. The host waits only where the ring is full.
//!
//! Invariants: bytes between `tail` and `head` belong to copies under way, each with its mark, oldest first.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::context::Context;
use super::memory;
use super::streams::{EventEntry, StreamEntry};
use crate::driver::DevicePtr;
use crate::error::Result;
use crate::units::{MIB, to_usize};

/// Bytes of a ring: what a link of 60 GB/s takes in a quarter of a millisecond.
const RING: u64 = 16 * MIB;
/// Bytes of a copy at most, so that one is made while another runs.
const PART: u64 = RING / 4;
/// Copies start at multiples of this.
const ALIGNMENT: u64 = 64;
/// Copies under way at most, however small.
const MARKS_MAX: usize = 256;

/// The ring of one device, made at the first copy and kept until the process ends.
#[derive(Debug, Default)]
pub(super) struct Uploads(Mutex<Option<Ring>>);

/// Places count on, and lie at their remainder by the ring's length.
#[derive(Debug)]
struct Ring {
    start: DevicePtr,
    head: u64,
    tail: u64,
    /// The end of each copy under way.
    marks: VecDeque<(u64, EventEntry)>,
}

impl Uploads {
    /// Enqueues a copy of `src`, which is read before this returns.
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
            // SAFETY: `room` gave so many bytes of the ring, which no copy under way reads.
            unsafe { staged.copy_from_nonoverlapping(part.as_ptr(), part.len()) };
            // SAFETY: written just now, and left alone until the mark below is passed.
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

    /// A place for `bytes` in one piece. The ring is as it was until the copy is marked.
    fn room(&mut self, call: &'static str, bytes: u64) -> Result<DevicePtr> {
        let left = RING - self.head % RING;
        if left < bytes {
            // What is left before the end goes with the copy before it, or is free.
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

    /// Notes the copy out of the place that was given last.
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
            // Without a mark, the host has to see the copy through.
            Err(_) => stream.synchronize(call),
        }
    }
}
