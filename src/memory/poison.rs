//! Poison mode: freed blocks are overwritten, so that a use after free shows in the result. In builds for
//! AddressSanitizer they are also forbidden, in any mode, so that a use after free ends the process.
//!
//! The fill is work of the block's home stream like any other, so in a capture it becomes part of the graph and
//! happens again with each launch. It must then hit nothing but memory of that graph.

use super::block::BlockRecord;
use super::fences::is_free_to_wait;
use super::memories::MemoryIndex;
use crate::driver::Device;

/// Byte that freed blocks are overwritten with in poison mode: NaN in every float type.
const POISON: u8 = 0xff;

/// Poisons a block of ordinary memory, unless that would become part of a graph, which would overwrite the
/// memory again in whose ever hands it is then.
pub(super) fn ordinary(device: &Device, record: &BlockRecord) {
    if record.memory() == MemoryIndex::ORDINARY && is_free_to_wait(&record.home) {
        overwrite(device, record);
    }
    #[cfg(asan)]
    forbid(record);
}

/// Forbids a block that its caller has just freed. In poison mode that happens behind the overwriting; where other
/// streams used the block, when they are done with it.
#[cfg(asan)]
pub(super) fn forbid_freed(record: &BlockRecord) {
    let has_users = record
        .extras
        .as_ref()
        .is_some_and(|extras| !extras.users.is_empty());
    let is_overwritten = record.shared().config.poison;
    if !has_users && !is_overwritten {
        forbid(record);
    }
}

/// Forbids a free block of ordinary memory from where its home stream is now. Replays may use private memory at any
/// time.
#[cfg(asan)]
pub(super) fn forbid(record: &BlockRecord) {
    if record.memory() == MemoryIndex::ORDINARY {
        permit(record, false);
    }
}

/// Permits a block that is handed out, from where its home stream is now.
#[cfg(asan)]
pub(super) fn permit_handed_out(record: &BlockRecord) {
    permit(record, true);
}

#[cfg(asan)]
fn permit(record: &BlockRecord, is_permitted: bool) {
    let (bytes, raw) = (record.size.allocated(), record.home.raw());
    let driver = record.home.driver();
    driver.permit(record.ptr, bytes, is_permitted, raw);
}

/// Poisons a private block if that becomes part of the graph that is being captured with its memory: any
/// later, it could hit what a graph is using. Only the stream that the capture was begun on can take work at
/// any time in it; another may have been joined for the last time.
pub(super) fn private(record: &BlockRecord) {
    let Some(shared) = &record.shared else {
        return;
    };
    if shared.config.poison && shared.routes.captured_from(&record.home) == Some(record.memory()) {
        overwrite(&shared.device, record);
    }
}

/// Overwrites a block that is about to become reusable, in order with its home stream.
#[expect(unsafe_code, reason = "the pool owns the memory it overwrites")]
fn overwrite(device: &Device, record: &BlockRecord) {
    let raw = record.home.raw();
    // SAFETY: the block was freed by its owner and is in no free list yet, so nothing touches it until the
    // home stream has passed this fill; its segment is returned only after that stream has passed.
    let filled = unsafe {
        device
            .driver()
            .fill(record.ptr, POISON, record.size.allocated(), raw)
    };
    // A refused fill leaves the block unpoisoned, which only a test could notice.
    drop(filled);
}
