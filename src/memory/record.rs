//! Where records of blocks lie: in one cache line each, side by side in large pages of the host.
//!
//! With tens of thousands of blocks in use, most that are freed were not touched for long, and where a record lies costs
//! more than what is done with it. So records have memory of their own, in chunks. A chunk is kept until the process ends,
//! and its places are taken again: there are as many as records were in use at once in all pools.

use std::alloc::{Layout, alloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use parking_lot::Mutex;

use super::block::BlockRecord;

/// A record, owned as by a box.
pub(super) struct Record(NonNull<BlockRecord>);

const _: () = assert!(size_of::<BlockRecord>() == 64 && align_of::<BlockRecord>() == 64);

/// Bytes of the others, and what they are aligned to: a large page.
const CHUNK: usize = 2 << 20;

static PLACES: Mutex<Places> = Mutex::new(Places {
    vacant: Vec::new(),
    rest: None,
});

/// Places for records.
struct Places {
    /// Those whose records are gone.
    vacant: Vec<Place>,
    /// The next place of the latest chunk that was never used, and how many there are.
    rest: Option<(Place, usize)>,
}

/// Room for a record.
#[derive(Clone, Copy)]
struct Place(NonNull<BlockRecord>);

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: a place is memory without an owner, whichever thread takes it.
unsafe impl Send for Place {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: it owns what it points to, as a box does.
unsafe impl Send for Record where BlockRecord: Send {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: as a box.
unsafe impl Sync for Record where BlockRecord: Sync {}

impl Places {
    fn take(&mut self) -> Place {
        if let Some(place) = self.vacant.pop() {
            return place;
        }
        let (place, count) = match self.rest.take() {
            Some(rest) => rest,
            None => Self::chunk(CHUNK),
        };
        if count > 1 {
            self.rest = Some((place.next(), count - 1));
        }
        place
    }

    /// The places of a new chunk.
    #[cold]
    #[expect(unsafe_code, reason = "the chunk is laid out by hand")]
    fn chunk(bytes: usize) -> (Place, usize) {
        let layout = Layout::from_size_align(bytes, bytes).expect("a power of two");
        // SAFETY: the layout has bytes.
        let start = unsafe { alloc(layout) };
        let Some(first) = NonNull::new(start.cast()) else {
            handle_alloc_error(layout);
        };
        advise_large_pages(start, bytes);
        (Place(first), bytes / size_of::<BlockRecord>())
    }
}

/// Tells the system that a chunk is best kept in one large page. Without one it is as good as any memory.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call on memory that is ours")]
fn advise_large_pages(start: *mut u8, bytes: usize) {
    use rustix::mm::{Advice, madvise};
    // SAFETY: the memory was allocated just now, and the advice does not change what is in it.
    let _ = unsafe { madvise(start.cast(), bytes, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_: *mut u8, _: usize) {}

impl Place {
    /// The place behind this one, which is not the last of its chunk.
    #[expect(unsafe_code, reason = "the chunk is laid out by hand")]
    fn next(self) -> Self {
        // SAFETY: the caller's chunk goes on behind this place.
        Self(unsafe { self.0.add(1) })
    }
}

impl Record {
    #[expect(unsafe_code, reason = "the place is filled by hand")]
    pub(super) fn new(record: BlockRecord) -> Self {
        let Place(place) = PLACES.lock().take();
        // SAFETY: the place has the size and alignment of a record, and nobody else has it.
        unsafe { place.write(record) };
        Self(place)
    }
}

impl Deref for Record {
    type Target = BlockRecord;

    #[inline(always)]
    #[expect(unsafe_code, reason = "owned as by a box")]
    fn deref(&self) -> &BlockRecord {
        // SAFETY: from `new` to `drop` the place holds a record, which is borrowed with its owner.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for Record {
    #[inline(always)]
    #[expect(unsafe_code, reason = "owned as by a box")]
    fn deref_mut(&mut self) -> &mut BlockRecord {
        // SAFETY: as in `deref`.
        unsafe { self.0.as_mut() }
    }
}

impl Drop for Record {
    // Most records are used again as they are.
    #[cold]
    #[inline(never)]
    #[expect(unsafe_code, reason = "the place is emptied by hand")]
    fn drop(&mut self) {
        // SAFETY: the place holds a record, which nobody uses after its owner.
        unsafe { ptr::drop_in_place(self.0.as_ptr()) };
        PLACES.lock().vacant.push(Place(self.0));
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::lane::LaneKey;
    use super::super::packed::{Location, Size};
    use super::super::tags::TagId;
    use super::*;
    use crate::driver::{Device, DevicePtr, HostConfig};
    use crate::memory;

    #[test]
    fn places_lie_side_by_side_across_chunks_and_are_taken_again() {
        let mut places = Places {
            vacant: Vec::new(),
            rest: None,
        };
        let per_chunk = CHUNK / size_of::<BlockRecord>();
        let taken: Vec<Place> = (0..2 * per_chunk + 1).map(|_| places.take()).collect();
        let address = |place: &Place| place.0.as_ptr().addr();
        let mut addresses: Vec<usize> = taken.iter().map(address).collect();
        assert!(addresses.iter().all(|at| at.is_multiple_of(64)));
        for chunk in addresses.chunks(per_chunk) {
            assert!(chunk[0].is_multiple_of(CHUNK));
            assert!(chunk.windows(2).all(|pair| pair[1] == pair[0] + 64));
        }
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), taken.len(), "no place is given out twice");
        places.vacant.push(taken[7]);
        assert_eq!(address(&places.take()), address(&taken[7]));
    }

    #[test]
    fn what_a_record_holds_is_dropped_with_it() {
        let device = Device::host(HostConfig::default()).unwrap();
        let stream = device.create_stream().unwrap();
        let record = |next| {
            Record::new(BlockRecord {
                ptr: DevicePtr(512),
                next,
                key: LaneKey::NONE,
                size: Size::new((1, 512), TagId::NONE),
                location: Location::new(1, memory::backing::Place::Small(0)),
                home: stream.clone(),
                shared: None,
                extras: None,
            })
        };
        let first = record(Some(record(None)));
        assert_eq!(first.next.as_deref().map(|next| next.ptr), Some(first.ptr));
        assert!(!stream.is_last_handle());
        std::thread::scope(|scope| {
            scope.spawn(move || drop(first));
        });
        assert!(stream.is_last_handle());
    }
}
