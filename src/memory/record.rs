//! Where records of blocks lie: in one cache line each, side by side in large pages of the host.
//!
//! With tens of thousands of blocks in use, most that are freed were not touched for long, and where a record lies costs
//! more than what is done with it. So records have memory of their own, in chunks. A chunk is kept until the process ends,
//! and its slots are taken again: there are as many as there were records at once, in all pools, those that threads keep
//! for reuse included.
//!
//! Lock order: the slots come last. Nothing is allocated or dropped under their lock, so a free waits for no other thread's
//! allocation. It is none of loom's: no thread can be switched under it.

use std::alloc::{Layout, alloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use parking_lot::Mutex;

use super::block::BlockRecord;
use super::local;

/// A record, owned as by a box.
pub(super) struct Record(NonNull<BlockRecord>);

const _: () = assert!(size_of::<BlockRecord>() == 64 && align_of::<BlockRecord>() == 64);

/// Bytes of a chunk, and its alignment: a large page.
const CHUNK: usize = 2 << 20;
const SLOTS_PER_CHUNK: usize = CHUNK / size_of::<BlockRecord>();

static SLOTS: Mutex<Slots> = Mutex::new(Slots { vacant: None });

/// Room for a record. While there is none in it, it holds the next vacant slot.
#[derive(Clone, Copy)]
struct Slot(NonNull<BlockRecord>);

const _: () = assert!(size_of::<Option<Slot>>() <= size_of::<BlockRecord>());

/// The slots without a record.
struct Slots {
    vacant: Option<Slot>,
}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: a slot is memory without an owner, whichever thread takes it.
unsafe impl Send for Slot {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: it owns what it points to, as a box does.
unsafe impl Send for Record where BlockRecord: Send {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: as a box.
unsafe impl Sync for Record where BlockRecord: Sync {}

#[expect(unsafe_code, reason = "vacant slots are a list in themselves")]
impl Slots {
    fn take(&mut self) -> Option<Slot> {
        let slot = self.vacant?;
        // SAFETY: a vacant slot holds the next one.
        self.vacant = unsafe { slot.link().read() };
        Some(slot)
    }

    /// Puts slots in, from `first` to `last`, which are linked.
    fn put(&mut self, first: Slot, last: Slot) {
        let before = self.vacant.replace(first);
        // SAFETY: the slot is large enough and aligned, and nothing else is in it.
        unsafe { last.link().write(before) };
    }
}

impl Slot {
    /// Where a vacant slot holds the next one.
    fn link(self) -> NonNull<Option<Self>> {
        self.0.cast()
    }
}

/// A new chunk: its first slot, and its last. They are linked in order.
#[cold]
#[expect(unsafe_code, reason = "the chunk is laid out by hand")]
fn chunk() -> (Slot, Slot) {
    let layout = Layout::from_size_align(CHUNK, CHUNK).expect("a power of two");
    // SAFETY: the layout has bytes.
    let start = unsafe { alloc(layout) };
    let Some(first) = NonNull::new(start.cast::<BlockRecord>()) else {
        handle_alloc_error(layout);
    };
    advise_large_pages(start);
    // SAFETY: the chunk has that many slots.
    let slot = |nth| Slot(unsafe { first.add(nth) });
    for nth in 1..SLOTS_PER_CHUNK {
        // SAFETY: as in `put`.
        unsafe { slot(nth - 1).link().write(Some(slot(nth))) };
    }
    (slot(0), slot(SLOTS_PER_CHUNK - 1))
}

/// Tells the system that a chunk is best kept in one large page. Without one it is as good as any memory.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "a system call on memory that is ours")]
fn advise_large_pages(chunk: *mut u8) {
    use rustix::mm::{Advice, madvise};
    // SAFETY: the memory was allocated just now, and the advice does not change what is in it.
    let _ = unsafe { madvise(chunk.cast(), CHUNK, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_: *mut u8) {}

impl Record {
    #[expect(unsafe_code, reason = "the slot is filled by hand")]
    pub(super) fn new(record: BlockRecord) -> Self {
        let Slot(slot) = vacant_slot();
        // SAFETY: the slot has the size and alignment of a record, and nobody else has it.
        unsafe { slot.write(record) };
        Self(slot)
    }
}

fn vacant_slot() -> Slot {
    loop {
        let vacant = SLOTS.lock().take();
        if let Some(slot) = vacant {
            return slot;
        }
        let (first, last) = chunk();
        SLOTS.lock().put(first, last);
    }
}

impl Deref for Record {
    type Target = BlockRecord;

    #[inline(always)]
    #[expect(unsafe_code, reason = "owned as by a box")]
    fn deref(&self) -> &BlockRecord {
        // SAFETY: from `new` to `drop` the slot holds a record, which is borrowed with its owner.
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
    #[expect(unsafe_code, reason = "the slot is emptied by hand")]
    fn drop(&mut self) {
        // With it may go the last handle of a stream or a pool.
        local::assert_outside("a record");
        // SAFETY: the slot holds a record, which nobody uses after its owner.
        unsafe { ptr::drop_in_place(self.0.as_ptr()) };
        let slot = Slot(self.0);
        SLOTS.lock().put(slot, slot);
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::backing::Place;
    use super::super::lane::LaneKey;
    use super::super::packed::{Location, Size};
    use super::super::tags::TagId;
    use super::*;
    use crate::driver::{Device, DevicePtr, HostConfig};

    #[test]
    fn slots_lie_side_by_side_in_each_chunk_and_are_taken_again() {
        let mut slots = Slots { vacant: None };
        assert!(slots.take().is_none());
        for _ in 0..2 {
            let (first, last) = chunk();
            slots.put(first, last);
        }
        let address = |slot: Slot| slot.0.as_ptr().addr();
        let taken: Vec<Slot> = std::iter::from_fn(|| slots.take()).collect();
        let mut addresses: Vec<usize> = taken.iter().copied().map(address).collect();
        for chunk in addresses.chunks(SLOTS_PER_CHUNK) {
            assert!(chunk[0].is_multiple_of(CHUNK));
            assert!(chunk.windows(2).all(|pair| pair[1] == pair[0] + 64));
        }
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 2 * SLOTS_PER_CHUNK);
        for slot in [taken[7], taken[7000]] {
            slots.put(slot, slot);
        }
        let again: Vec<usize> = std::iter::from_fn(|| slots.take()).map(address).collect();
        assert_eq!(again, [address(taken[7000]), address(taken[7])]);
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
                location: Location::new(1, Place::Small(0)),
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
