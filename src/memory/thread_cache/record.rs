//! What the pool must know to take a block back, one cache line for each block.
//!
//! With tens of thousands of blocks in use, most of those that are freed have not been touched for long, and the cache
//! miss costs more than the work on the record. So records have memory of their own, in chunks that are large pages of
//! the host. A chunk is kept until the process ends and its slots are used again. There are as many slots as there were
//! records at once, over all pools, the free records that threads keep included.
//!
//! Lock order: the lock of the slots comes last. Nothing is allocated or dropped under it, so a free never waits for
//! another thread's allocation. Loom does not model it, because no thread can be switched under it.

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

/// What keeps the memory of a block: its pool. A type parameter of records, so that thread caches need not know pools.
pub(crate) trait Home: fmt::Debug + Sized {
    /// What only few blocks have, such as other streams that use them.
    type Extras: fmt::Debug;
}

/// What the pool must know to take a block back. A thread cache keeps it together with the block, so that reuse changes
/// no reference count. Most records are read for the first time in long when their block is freed: they are small, and
/// the fields that a free reads lie side by side.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct BlockRecord<H: Home> {
    pub(crate) ptr: DevicePtr,
    /// The next record of the same list.
    pub(crate) next: List<H>,
    /// The stream cache that may keep the block as it is, if any.
    pub(crate) key: CacheKey,
    pub(crate) size: Size,
    pub(crate) location: Location,
    pub(crate) home: Stream,
    /// The pool, while a caller or a thread cache has the block. `None` inside the pool.
    pub(crate) shared: Option<Arc<H>>,
    /// A block with extras has the key of no stream cache.
    pub(crate) extras: Option<Box<H::Extras>>,
}

const _: () =
    assert!(size_of::<BlockRecord<()>>() == SLOT && align_of::<BlockRecord<()>>() == SLOT);

/// Stands for a pool where none is needed.
impl Home for () {
    type Extras = ();
}

/// A record, owned as by a box.
pub(crate) struct Record<H: Home>(NonNull<BlockRecord<H>>);

/// Bytes of a chunk, and its alignment: a large page.
const CHUNK: usize = 2 << 20;
/// Bytes of a slot, and its alignment: a cache line.
const SLOT: usize = 64;
const SLOTS_PER_CHUNK: usize = CHUNK / SLOT;

static SLOTS: Mutex<Slots> = Mutex::new(Slots { vacant: None });

/// Room for a record. A vacant slot holds the next one.
#[derive(Clone, Copy)]
struct Slot(NonNull<Line>);

#[repr(align(64))]
struct Line(#[expect(dead_code, reason = "gives the line its size")] [u8; SLOT]);

const _: () = assert!(size_of::<Option<Slot>>() <= SLOT);

/// The slots without a record.
struct Slots {
    vacant: Option<Slot>,
}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: a slot is memory without an owner, whichever thread takes it.
unsafe impl Send for Slot {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: it owns what it points to, as a box does.
unsafe impl<H: Home> Send for Record<H> where BlockRecord<H>: Send {}

#[expect(unsafe_code, reason = "a pointer says nothing of who may use it")]
// SAFETY: as a box.
unsafe impl<H: Home> Sync for Record<H> where BlockRecord<H>: Sync {}

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
    let Some(first) = NonNull::new(start.cast::<Line>()) else {
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

impl<H: Home> Record<H> {
    #[expect(unsafe_code, reason = "the slot is filled by hand")]
    pub(crate) fn new(record: BlockRecord<H>) -> Self {
        const { assert!(size_of::<BlockRecord<H>>() == SLOT && align_of::<BlockRecord<H>>() == SLOT) };
        let slot = vacant_slot().0.cast::<BlockRecord<H>>();
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

impl<H: Home> Deref for Record<H> {
    type Target = BlockRecord<H>;

    #[inline(always)]
    #[expect(unsafe_code, reason = "owned as by a box")]
    fn deref(&self) -> &BlockRecord<H> {
        // SAFETY: from `new` to `drop` the slot holds a record, which is borrowed with its owner.
        unsafe { self.0.as_ref() }
    }
}

impl<H: Home> DerefMut for Record<H> {
    #[inline(always)]
    #[expect(unsafe_code, reason = "owned as by a box")]
    fn deref_mut(&mut self) -> &mut BlockRecord<H> {
        // SAFETY: as in `deref`.
        unsafe { self.0.as_mut() }
    }
}

impl<H: Home> Drop for Record<H> {
    // Most records are used again as they are.
    #[cold]
    #[inline(never)]
    #[expect(unsafe_code, reason = "the slot is emptied by hand")]
    fn drop(&mut self) {
        // With it may go the last handle of a stream or a pool.
        thread_locals::assert_outside("a record");
        // SAFETY: the slot holds a record, which nobody uses after its owner.
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
