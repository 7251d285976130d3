//! The report of an allocation that failed.

use super::core::Core;
use super::shared::Shared;
use crate::error::OutOfMemory;
use crate::memory::types::{Refusal, Request};

/// Tags that are named.
const TAGS_MAX: usize = 3;

/// Where the memory is, now that every way of finding some was tried.
pub(crate) fn report(
    shared: &Shared,
    core: &mut Core,
    request: Request<'_>,
    refusal: Refusal,
    tried: Vec<&'static str>,
) -> OutOfMemory {
    shared.fold_caches(core);
    let device = shared.device.memory_info().ok();
    let device_free = device.map_or(0, |info| info.free);
    let device_total = shared.device.properties().total_memory;
    let reserved = core.bytes_held();
    let mut tags = core.tags.snapshot();
    tags.sort_by_key(|tag| std::cmp::Reverse(tag.allocated_bytes.current));
    let largest = tags
        .iter()
        .filter(|tag| tag.allocated_bytes.current > 0)
        .take(TAGS_MAX);
    OutOfMemory {
        requested: request.requested,
        pinned: false,
        allocated: core.usage.allocated.stat().current,
        pending: core.deferred.bytes(),
        pending_by_stream: core.deferred_by_stream(),
        reserved,
        split: core.split_bytes(),
        largest_free: core.largest_free(request.heap),
        device_free,
        device_total,
        held_by_others: device.map(|info| info.total.saturating_sub(info.free + reserved)),
        limit: core.heaps.limit(),
        limit_used: None,
        limited: matches!(refusal, Refusal::Limit),
        driver_error: match refusal {
            Refusal::Driver(error) => Some(error.to_string()),
            _ => None,
        },
        tried,
        largest_tags: largest
            .map(|tag| (tag.tag.to_owned(), tag.allocated_bytes.current))
            .collect(),
    }
}
