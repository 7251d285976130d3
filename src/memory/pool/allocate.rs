//! The path of an allocation, from the thread's cache down to the driver.
//!
//! ```text
//! allocate             the stream cache that the thread used last        no lock
//! allocate_elsewhere   another of its stream caches, a private heap
//! allocate_past_cache  under the pool's lock:
//!                      what other threads freed meanwhile is taken back
//!                      what this thread left is taken back
//!                      free memory of the stream
//!                      other streams' memory, new pages, stitching       reclaim::allocate
//!                      the ladder, when memory is short                  reclaim::allocate
//! fill                 the record of the block, the one place that writes it
//! ```

use std::sync::Arc;

use super::block::{Block, Extras};
use super::core::Core;
use super::lock::BROKEN;
use super::reclaim;
use super::shared::{BlockRecord, Handle, List, Record, Shared, ThreadCache};
use super::threads::{self, Caller};
use crate::driver::Stream;
use crate::error::Result;
use crate::memory::guard::Locked;
use crate::memory::thread_cache::{Miss, Size, list};
use crate::memory::types::{CacheKey, Counted, HeapId, Place, Placement, Request, TagId};

/// As [`Pool::allocate`](super::Pool::allocate).
#[inline]
pub(super) fn allocate(pool: &Arc<Handle>, bytes: u64, stream: &Stream) -> Result<Block> {
    let block = match threads::take(pool, stream, bytes) {
        Ok(record) => Ok(Block::new(Some(record))),
        Err(miss) => allocate_past_cache(&pool.shared, bytes, stream, miss),
    };
    #[cfg(asan)]
    let block = block.inspect(Block::permit);
    block
}

/// Allocates what the stream cache in front did not have. After [`Miss::Here`] the memory is ordinary and the stream of
/// the pool's device: there was no route when the cache was looked at, and no other stream has a cache.
#[inline(never)]
fn allocate_past_cache(
    shared: &Arc<Shared>,
    requested: u64,
    stream: &Stream,
    miss: Miss<Caller<'_>>,
) -> Result<Block> {
    let Miss::Here(caller) = miss else {
        return allocate_elsewhere(shared, requested, stream);
    };
    if requested == 0 {
        return Ok(Block::new(None));
    }
    let request = Request::new(requested, stream, HeapId::DEFAULT);
    let key = CacheKey::new(shared.id, stream.id());
    let (mut core, fuse) = shared.lock_with_fuse()?;
    reclaim::prepare(shared, &mut core, stream);
    if shared.caches.is_separate() && shared.caches.is_due() {
        shared.join_caches(&mut core);
    }
    let record = match fetch(caller, shared, &mut core, key, &request) {
        Ok(record) => {
            fuse.defuse();
            drop(core);
            record
        }
        Err(kept) => {
            fuse.defuse();
            let core = Locked::new(core, &**shared);
            let placement = reclaim::allocate(shared, core, Request { kept, ..request })?;
            counted_record(placement, request, shared)
        }
    };
    Ok(Block::new(Some(record)))
}

/// Allocates where the stream cache in front was not looked at.
#[inline(never)]
fn allocate_elsewhere(shared: &Arc<Shared>, requested: u64, stream: &Stream) -> Result<Block> {
    shared.check_device(stream)?;
    if shared.routing.are_closed() {
        return Err(BROKEN);
    }
    if requested == 0 {
        return Ok(Block::new(None));
    }
    let heap = shared.routing.find(shared.id, stream)?;
    let request = Request::new(requested, stream, heap);
    if heap != HeapId::DEFAULT {
        let placement = reclaim::allocate(shared, shared.lock()?, request)?;
        return Ok(Block::new(Some(counted_record(placement, request, shared))));
    }
    let key = CacheKey::new(shared.id, stream.id());
    if let Some(record) = threads::take_anywhere(shared, key, (requested, request.bytes)) {
        return Ok(Block::new(Some(record)));
    }
    // A thread that is going down has no cache, and one that a driver had do other work by now may be at that of
    // another pool: this pool looks by itself.
    match threads::caller(shared) {
        Some(caller) => allocate_past_cache(shared, requested, stream, Miss::Here(caller)),
        None => {
            let mut core = shared.lock()?;
            reclaim::prepare(shared, &mut core, stream);
            let placement = reclaim::allocate(shared, core, request)?;
            Ok(Block::new(Some(counted_record(placement, request, shared))))
        }
    }
}

/// Places a block in memory that is free for the stream at once, when the pool has taken back what the calling
/// thread left, and if need be also the large blocks that it keeps. If that cannot be done: the bytes that the
/// thread still keeps for the stream.
#[inline]
fn fetch(
    caller: Caller<'_>,
    shared: &Arc<Shared>,
    core: &mut Core,
    key: CacheKey,
    request: &Request<'_>,
) -> Result<Record, u64> {
    let mut refused = None;
    let tag = caller.tag();
    let found = caller.enter(|cache| {
        if cache.has_overflow() {
            core.take_overflow(cache, &mut refused);
        }
        if !cache.bring_to_front(key) {
            return Err(0);
        }
        if shared.caches.is_separate() {
            core.fold(cache);
        }
        let found = place(cache, shared, core, (request, tag));
        found.or_else(|kept| place_again(cache, shared, core, (request, tag, kept), &mut refused))
    });
    core.record_due_events();
    if refused.is_some() {
        list::drop_all(refused);
    }
    found
}

/// Places a block after the large blocks went back that the thread keeps, if it keeps any beside `kept` bytes.
#[cold]
#[inline(never)]
fn place_again(
    cache: &mut ThreadCache,
    shared: &Arc<Shared>,
    core: &mut Core,
    (request, tag, kept): (&Request<'_>, TagId, u64),
    refused: &mut List,
) -> Result<Record, u64> {
    core.set_limits(cache);
    cache.overflow_large();
    if !cache.has_overflow() {
        return Err(kept);
    }
    core.take_overflow(cache, refused);
    place(cache, shared, core, (request, tag))
}

/// Places a block in memory that is free for the stream at once, and counts it.
// Always: it is all that happens to most blocks that no stream cache had.
#[inline(always)]
fn place(
    cache: &mut ThreadCache,
    shared: &Arc<Shared>,
    core: &mut Core,
    (request, tag): (&Request<'_>, TagId),
) -> Result<Record, u64> {
    let kept = cache.kept_bytes();
    let Some(placement) = core.place(request, kept) else {
        return Err(kept);
    };
    cache.count(tag, request.requested, request.bytes);
    let free_record = || {
        let mut record = core.free_records.take(placement.location.owner())?;
        record.shared = Some(shared.clone());
        record.key = key_for(shared, request.stream, false);
        Some(record)
    };
    let record = cache.take_free_record().or_else(free_record);
    Ok(fill(record, placement, *request, tag, shared))
}

/// The record of a placement that the thread has not counted yet.
fn counted_record(placement: Placement, request: Request<'_>, shared: &Arc<Shared>) -> Record {
    let tag = shared.count(request.requested, request.bytes);
    fill(None, placement, request, tag, shared)
}

/// The record of a block: a free record of the request's stream, or a new one.
#[inline(always)]
fn fill(
    free: Option<Record>,
    placement: Placement,
    request: Request<'_>,
    tag: TagId,
    shared: &Arc<Shared>,
) -> Record {
    let Some(mut record) = free else {
        return new_record(placement, request, tag, shared);
    };
    record.ptr = placement.ptr;
    record.size = Size::new((request.requested, request.bytes), tag);
    record.location = placement.location;
    record
}

#[inline(never)]
fn new_record(
    placement: Placement,
    request: Request<'_>,
    tag: TagId,
    shared: &Arc<Shared>,
) -> Record {
    let is_private = request.heap != HeapId::DEFAULT;
    let extras = is_private.then(|| {
        Box::new(Extras {
            heap: request.heap,
            ..Extras::default()
        })
    });
    let is_lent = matches!(placement.location.place(), Place::Lent { .. });
    Record::new(BlockRecord {
        ptr: placement.ptr,
        size: Size::new((request.requested, request.bytes), tag),
        location: placement.location,
        key: key_for(shared, request.stream, is_private || is_lent),
        next: None,
        home: request.stream.clone(),
        shared: Some(shared.clone()),
        extras,
    })
}

/// The stream cache that may keep a block as it is when it is freed: none if freed memory is overwritten, or if the
/// block is private or lent.
fn key_for(shared: &Shared, stream: &Stream, is_private_or_lent: bool) -> CacheKey {
    if shared.config.poison || is_private_or_lent {
        CacheKey::NONE
    } else {
        CacheKey::new(shared.id, stream.id())
    }
}

impl Shared {
    /// Counts an allocation that no stream cache served; its tag.
    fn count(&self, requested: u64, allocated: u64) -> TagId {
        let (tag, counted) = threads::count(self.id, requested, allocated);
        if counted == Counted::No
            && let Ok(mut core) = self.lock()
        {
            threads::fold_of_thread(self, &mut core);
            core.count(tag, requested, allocated);
        }
        tag
    }
}
