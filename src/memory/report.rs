//! The report of an allocation that failed.

use super::backing::Refusal;
use super::pool::Shared;
use super::state::State;
use super::wanted::Wanted;
use crate::error::OutOfMemory;

/// Tags that are named.
const TAGS_MAX: usize = 3;

/// Where the memory is, now that every way of finding some was tried.
pub(super) fn report(
    shared: &Shared,
    state: &mut State,
    wanted: Wanted<'_>,
    refusal: Refusal,
    tried: Vec<&'static str>,
) -> OutOfMemory {
    shared.fold_caches(state);
    let device = shared.device.memory_info().ok();
    let device_free = device.map_or(0, |info| info.free);
    let device_total = shared.device.properties().total_memory;
    let reserved = state.bytes_held();
    let mut tags = state.tags.snapshot();
    tags.sort_by_key(|tag| std::cmp::Reverse(tag.allocated_bytes.current));
    let largest = tags
        .iter()
        .filter(|tag| tag.allocated_bytes.current > 0)
        .take(TAGS_MAX);
    OutOfMemory {
        requested: wanted.requested,
        pinned: false,
        allocated: state.usage.allocated.stat().current,
        pending: state.pending.bytes(),
        pending_by_stream: state.pending_by_stream(),
        reserved,
        split: state.split_bytes(),
        largest_free: state.largest_free(wanted.memory),
        device_free,
        device_total,
        held_by_others: device.map(|info| info.total.saturating_sub(info.free + reserved)),
        limit: state.memories.limit(),
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
