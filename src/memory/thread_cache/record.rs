//! The record of a block: all that the pool needs to take the block back, in one cache line.
//!
//! With tens of thousands of blocks in use, most blocks have left the processor's caches by the time they are freed,
//! and the cache miss costs more than the work on the record. So records have an allocator of their own: slots of one
//! cache line, in chunks the size of a huge page. Chunks live until the process ends, and vacated slots are reused.
//! There are as many slots as there were records at the peak, over all pools, including the free records that threads
//! keep.
//!
//! Lock order: the lock on the slots comes last. Nothing is allocated or dropped under it, so a free never waits for
//! another thread's allocation. Loom does not model this lock; no switch of threads can happen while it is held.

use std::alloc::{Layout, alloc, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;

use parking_lot::Mutex;

use super::list::List;
use super::size::Size;
use crate::driver::{DevicePtr, Stream};
use crate::memory::thread_locals;
use crate::memory::types::{CacheKey, Location};

/// The pool that a block belongs to. Records take it as a type parameter, so that thread caches need not know pools.
pub(crate) trait Home: fmt::Debug + Sized {
    /// Data that few blocks have, such as the other streams that use them.
    type Extras: fmt::Debug;
}

/// All that the pool needs to take a block back. A thread cache keeps the record together with the block, so that reuse
/// changes no reference count. A free usually finds the record out of the processor's caches, so a record takes a
/// single cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct BlockRecord<H: Home> {
    pub(crate) ptr: DevicePtr,
    /// The next record of the same list.
    pub(crate) next: List<H>,
    /// The stream cache that can keep the block; [`CacheKey::NONE`] if none can.
    pub(crate) key: CacheKey,
    pub(crate) size: Size,
    pub(crate) location: Location,
    pub(crate) home: Stream,
    /// The pool, while a caller or a thread cache has the block. `None` inside the pool.
    pub(crate) shared: Option<Arc<H>>,
    /// A block with extras has the key [`CacheKey::NONE`].
    pub(crate) extras: Option<Box<H::Extras>>,
}

const _: () =
    assert!(size_of::<BlockRecord<()>>() == SLOT && align_of::<BlockRecord<()>>() == SLOT);

/// Stands in for a pool where none is needed.
impl Home for () {
    type Extras = ();
}

/// An owning pointer to a record, like a `Box`.
pub(crate) struct Record<H: Home>(NonNull<BlockRecord<H>>);

/// Size and alignment of a chunk: a huge page.
const CHUNK: usize = 2 << 20;
/// Size and alignment of a slot: a cache line.
const SLOT: usize = 64;
const SLOTS_PER_CHUNK: usize = CHUNK / SLOT;

static SLOTS: Mutex<Slots> = Mutex::new(Slots { vacant: None });

/// Room for one record. A vacant slot stores the pointer to the next vacant slot.
#[derive(Clone, Copy)]
struct Slot(NonNull<Line>);

#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "gives the line its size")] [u8; SLOT]);

const _: () = assert!(size_of::<Option<Slot>>() <= SLOT);

/// The vacant slots.
struct Slots {
    vacant: Option<Slot>,
}

#[expect(
    unsafe_code,
    reason = "a raw pointer is not `Send` or `Sync` by itself"
)]
// SAFETY: a slot is plain memory that is not tied to a thread.
unsafe impl Send for Slot {}

#[expect(
    unsafe_code,
    reason = "a raw pointer is not `Send` or `Sync` by itself"
)]
// SAFETY: a record owns what it points to, like a `Box`.
unsafe impl<H: Home> Send for Record<H> where BlockRecord<H>: Send {}

#[expect(
    unsafe_code,
    reason = "a raw pointer is not `Send` or `Sync` by itself"
)]
// SAFETY: a record owns what it points to, like a `Box`, and `&Record` gives only `&BlockRecord`.
unsafe impl<H: Home> Sync for Record<H> where BlockRecord<H>: Sync {}

#[expect(
    unsafe_code,
    reason = "vacant slots are linked through their own memory"
)]
impl Slots {
    fn take(&mut self) -> Option<Slot> {
        let slot = self.vacant?;
        // SAFETY: the slot is in the list, so `put` or `chunk` has written its link.
        self.vacant = unsafe { slot.link().read() };
        Some(slot)
    }

    /// Adds the vacant slots from `first` to `last`, which are linked to each other.
    fn put(&mut self, first: Slot, last: Slot) {
        let next = self.vacant.replace(first);
        // SAFETY: a slot is large enough for a link and aligned, and a vacant one contains nothing else.
        unsafe { last.link().write(next) };
    }
}

impl Slot {
    /// Where a vacant slot stores the next one.
    fn link(self) -> NonNull<Option<Self>> {
        self.0.cast()
    }
}

/// Allocates a chunk and links its slots in order; returns the first and the last.
#[cold]
#[expect(unsafe_code, reason = "the chunk is laid out by hand")]
fn chunk() -> (Slot, Slot) {
    let layout = Layout::from_size_align(CHUNK, CHUNK).expect("a power of two");
    // SAFETY: the layout's size is not zero.
    let start = unsafe { alloc(layout) };
    let Some(first) = NonNull::new(start.cast::<Line>()) else {
        handle_alloc_error(layout);
    };
    advise_large_pages(start);
    // SAFETY: `nth` is below `SLOTS_PER_CHUNK`, so the slot is inside the chunk.
    let slot = |nth| Slot(unsafe { first.add(nth) });
    for nth in 1..SLOTS_PER_CHUNK {
        // SAFETY: the slot is part of the new chunk: large enough for a link, aligned, and used by nothing else.
        unsafe { slot(nth - 1).link().write(Some(slot(nth))) };
    }
    (slot(0), slot(SLOTS_PER_CHUNK - 1))
}

/// Advises the system to back a chunk with a huge page. The chunk works without one as well.
#[cfg(target_os = "linux")]
#[expect(
    unsafe_code,
    reason = "a system call on memory that was allocated here"
)]
fn advise_large_pages(chunk: *mut u8) {
    use rustix::mm::{Advice, madvise};
    // SAFETY: the chunk was just allocated with `CHUNK` bytes, and this advice does not change its contents.
    let _ = unsafe { madvise(chunk.cast(), CHUNK, Advice::LinuxHugepage) };
}

#[cfg(not(target_os = "linux"))]
fn advise_large_pages(_: *mut u8) {}

impl<H: Home> Record<H> {
    #[expect(unsafe_code, reason = "the slot is filled by hand")]
    pub(crate) fn new(record: BlockRecord<H>) -> Self {
        const { assert!(size_of::<BlockRecord<H>>() == SLOT && align_of::<BlockRecord<H>>() == SLOT) };
        let slot = vacant_slot().0.cast::<BlockRecord<H>>();
        // SAFETY: the slot has the size and alignment of a record (asserted above), and it was taken out of the list of
        // vacant slots, so nothing else uses it.
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

impl<H: Home> Deref for Record<H> {
    type Target = BlockRecord<H>;

    #[inline(always)]
    #[expect(unsafe_code, reason = "a record owns its slot, like a `Box`")]
    fn deref(&self) -> &BlockRecord<H> {
        // SAFETY: the slot contains a record from `new` to `drop`, and the reference borrows the owner.
        unsafe { self.0.as_ref() }
    }
}

impl<H: Home> DerefMut for Record<H> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "a record owns its slot, like a `Box`")]
    fn deref_mut(&mut self) -> &mut BlockRecord<H> {
        // SAFETY: as in `deref`; the owner is borrowed mutably, so the reference is unique.
        unsafe { self.0.as_mut() }
    }
}

impl<H: Home> Drop for Record<H> {
    // Cold: most records are reused rather than dropped.
    #[cold]
    #[inline(never)]
    #[expect(unsafe_code, reason = "the slot is emptied by hand")]
    fn drop(&mut self) {
        // The record may hold the last handle of a stream or a pool.
        thread_locals::assert_outside("a record");
        // SAFETY: the slot contains a record, and its owner is being dropped, so nothing uses it afterwards.
        unsafe { ptr::drop_in_place(self.0.as_ptr()) };
        let slot = Slot(self.0.cast());
        SLOTS.lock().put(slot, slot);
    }
}

impl<H: Home> fmt::Debug for Record<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, DevicePtr, HostConfig};
    use crate::memory::thread_cache::size::Size;
    use crate::memory::types::{CacheKey, Location, Place, TagId};

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
        let record = |next: List<()>| {
            Record::new(BlockRecord {
                ptr: DevicePtr(512),
                next,
                key: CacheKey::NONE,
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
