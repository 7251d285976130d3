//! Poison mode: freed blocks are overwritten, so that a use after free shows in the result. Builds for AddressSanitizer
//! also forbid them, in any mode, so that a use after free ends the process.
//!
//! The fill is work of the block's home stream. In a capture it becomes part of the graph and runs again with each
//! launch, so it must touch nothing but memory of that graph.

use crate::memory::streams::is_free_to_wait;
use crate::memory::thread_cache::{BlockRecord, Home};
use crate::memory::types::HeapId;

/// Byte that freed blocks are overwritten with in poison mode: NaN in every float type.
const POISON: u8 = 0xff;

/// Poisons a block of the default heap, unless that would become part of a graph, which would overwrite the
/// memory again in whose ever hands it is then.
pub(crate) fn in_default_heap<H: Home>(record: &BlockRecord<H>, heap: HeapId) {
    if heap == HeapId::DEFAULT && is_free_to_wait(&record.home) {
        overwrite(record);
    }
    #[cfg(asan)]
    forbid(record, heap);
}

/// Forbids a free block of the default heap from where its home stream is now. Replays may use private heap at any
/// time.
#[cfg(asan)]
pub(super) fn forbid<H: Home>(record: &BlockRecord<H>, heap: HeapId) {
    if heap == HeapId::DEFAULT {
        set_permitted(record, false);
    }
}

/// Permits a block that is handed out, from where its home stream is now.
#[cfg(asan)]
pub(super) fn permit<H: Home>(record: &BlockRecord<H>) {
    set_permitted(record, true);
}

#[cfg(asan)]
fn set_permitted<H: Home>(record: &BlockRecord<H>, is_permitted: bool) {
    let (bytes, raw) = (record.size.allocated(), record.home.raw());
    let driver = record.home.driver();
    driver.permit(record.ptr, bytes, is_permitted, raw);
}

/// Overwrites a block that is about to become reusable, in order with its home stream.
#[expect(unsafe_code, reason = "the pool owns the memory it overwrites")]
pub(super) fn overwrite<H: Home>(record: &BlockRecord<H>) {
    let raw = record.home.raw();
    // SAFETY: the block was freed by its owner and is in no free list yet, so nothing touches it until the
    // home stream has passed this fill; its segment is returned only after that stream has passed.
    let filled = unsafe {
        record
            .home
            .driver()
            .fill(record.ptr, POISON, record.size.allocated(), raw)
    };
    // A refused fill leaves the block unpoisoned, which only a test could notice.
    drop(filled);
}
