//! When a stream may touch what another stream freed.
//!
//! Each stream that the pool meets gets a number and an *epoch*, a counter that moves only when somebody asks how far
//! the stream is. A free stamps (stream, epoch) and costs nothing more. When another stream wants the memory, an event
//! is recorded at the present end of the owner. It covers everything stamped so far, and the epoch moves on. A *fence*
//! (stream, epoch) is passed once an event at or after that epoch is complete, or once the requester has been made to
//! wait for one. A program with one stream records no event at all.
//!
//! A wait covers all earlier epochs, and completion holds for every stream. Both are remembered, so a *dominated* fence
//! costs one comparison.
//!
//! In deterministic mode nothing depends on how far the device is: the host waits to find out whether work is complete,
//! and never queries.

use std::collections::BTreeMap;

use super::clock::{Clock, is_free_to_wait};
use crate::driver::Stream;
use crate::memory::config::ReusePolicy;
use crate::memory::types::{FIRST_EPOCH, Fence, OWNER_BITS, StreamIndex};
use crate::units::StreamId;

/// While another stream lacks memory of this one, record one event for this many frees.
const FREES_PER_EVENT: u32 = 8;
/// Stop recording events in advance after this many. A batch of frees counts as the events that it would have had.
const EVENTS_AHEAD: u32 = 64;

/// The streams that a pool has met, and what is known of their progress.
#[derive(Debug)]
pub(crate) struct Fences {
    clocks: Vec<Clock>,
    owners: BTreeMap<StreamId, StreamIndex>,
    /// The streams looked up last, the latest first.
    recent: [Option<(StreamId, StreamIndex)>; 2],
    /// Whether an event of some stream is due.
    is_due: bool,
    is_deterministic: bool,
    /// How often the host has waited for an event.
    host_waits: u64,
}

impl Fences {
    pub(crate) fn new(is_deterministic: bool) -> Self {
        Self {
            clocks: vec![Clock::new(None, FIRST_EPOCH, is_deterministic)],
            owners: BTreeMap::new(),
            recent: [None; 2],
            is_due: false,
            is_deterministic,
            host_waits: 0,
        }
    }

    /// How often the host has waited for an event, which only happens in deterministic pools.
    pub(crate) fn host_waits(&self) -> u64 {
        self.host_waits
    }

    /// The stream that `owner` is the number of.
    pub(crate) fn stream(&self, owner: StreamIndex) -> Option<&Stream> {
        self.clocks[owner].stream.as_ref()
    }

    /// The number of `stream`, which the pool keeps alive while it has memory of it.
    #[inline]
    pub(crate) fn owner(&mut self, stream: &Stream) -> StreamIndex {
        let id = stream.id();
        match self.recent[0] {
            Some((last, owner)) if last == id => owner,
            _ => self.look_further(stream),
        }
    }

    fn look_further(&mut self, stream: &Stream) -> StreamIndex {
        let owner = match self.recent[1] {
            Some((id, owner)) if id == stream.id() => owner,
            _ => self.look_up(stream),
        };
        self.recent = [Some((stream.id(), owner)), self.recent[0]];
        owner
    }

    fn look_up(&mut self, stream: &Stream) -> StreamIndex {
        let is_deterministic = self.is_deterministic;
        *self.owners.entry(stream.id()).or_insert_with(|| {
            let vacant = (1..self.clocks.len()).find(|owner| self.clocks[*owner].stream.is_none());
            let Some(owner) = vacant else {
                assert!(
                    self.clocks.len() < (1 << OWNER_BITS) - 2,
                    "a pool knows fewer than 2^20 - 2 streams at once"
                );
                self.clocks.push(Clock::new(
                    Some(stream.clone()),
                    FIRST_EPOCH,
                    is_deterministic,
                ));
                return self.clocks.len() - 1;
            };
            // The epochs of a reused number go on counting, so that stamps of the stream before stay in the past.
            let epoch = self.clocks[owner].epoch;
            self.clocks[owner] = Clock::new(Some(stream.clone()), epoch, is_deterministic);
            owner
        })
    }

    /// Whether [`owner`](Self::owner) was called for `stream` last.
    #[inline]
    pub(crate) fn served_last(&self, stream: &Stream) -> bool {
        self.recent[0].is_some_and(|(last, _)| last == stream.id())
    }

    /// Whether `stream` has a number already.
    #[inline]
    pub(crate) fn knows(&self, stream: &Stream) -> bool {
        let id = stream.id();
        let mut recent = self.recent.iter().flatten();
        recent.any(|(recent, _)| *recent == id) || self.owners.contains_key(&id)
    }

    /// The streams that nobody but the pool holds, so that they get no more work, and that have run all they were
    /// given. Records no event to find out.
    pub(crate) fn find_gone(&mut self) -> Vec<StreamIndex> {
        let mut gone = Vec::new();
        for owner in 1..self.clocks.len() {
            let stream = self.clocks[owner].stream.as_ref();
            let Some(stream) =
                stream.filter(|stream| stream.is_last_handle() && is_free_to_wait(stream))
            else {
                continue;
            };
            let has_run = if self.is_deterministic {
                stream.synchronize().is_ok()
            } else {
                matches!(stream.is_idle(), Ok(true))
            };
            if has_run && let Some((fence, _)) = self.close_epoch(owner) {
                self.passed(fence);
                gone.push(owner);
            }
        }
        gone
    }

    /// Drops streams that nobody but the pool holds and whose number nothing needs (`is_unused`).
    pub(crate) fn retire(&mut self, is_unused: impl Fn(StreamIndex) -> bool) {
        self.recent = [None; 2];
        let clocks = &mut self.clocks;
        self.owners.retain(|_, owner| {
            let clock = &mut clocks[*owner];
            let is_gone = clock.stream.as_ref().is_some_and(Stream::is_last_handle)
                && clock.complete + 1 >= clock.epoch
                && is_unused(*owner);
            if is_gone {
                clock.stream = None;
                clock.events.clear();
                // It has no more frees, so no event is needed.
                clock.ahead = 0;
                clock.frees = 0;
            }
            !is_gone
        });
    }

    /// The fence of what is freed for `owner` now.
    #[inline]
    pub(crate) fn now(&self, owner: StreamIndex) -> Fence {
        Fence {
            owner,
            epoch: self.clocks[owner].epoch,
        }
    }

    /// Marks the present end of `stream` with an event. What the stream is given from now on comes after the fence.
    /// `None` if no event can be recorded.
    pub(crate) fn mark(&mut self, stream: &Stream) -> Option<Fence> {
        let owner = self.owner(stream);
        let fence = self.now(owner);
        self.clocks[owner].cover(fence.epoch).then_some(fence)
    }

    /// Whether some stream lacks memory that others freed and that it may not wait for.
    pub(crate) fn are_contended(&self) -> bool {
        self.clocks.iter().any(|clock| clock.ahead > 0)
    }

    /// The fence of what is freed for `owner` now. Memory is known to be complete only by an event recorded after its
    /// free. So while other streams lack memory of this one and may not wait, an event is due every few frees.
    #[inline]
    pub(crate) fn stamp(&mut self, owner: StreamIndex) -> Fence {
        let clock = &mut self.clocks[owner];
        if clock.ahead > 0 {
            clock.frees += 1;
            self.is_due |= clock.frees >= FREES_PER_EVENT;
        }
        self.now(owner)
    }

    /// Records the events that are due.
    #[inline]
    pub(crate) fn record_due(&mut self) {
        if self.is_due {
            self.is_due = false;
            self.record_all_due();
        }
    }

    #[inline(never)]
    fn record_all_due(&mut self) {
        for owner in 1..self.clocks.len() {
            let clock = &mut self.clocks[owner];
            let due = clock.frees / FREES_PER_EVENT;
            if due > 0 {
                // Frees are counted only while an event is due in advance. That event is recorded and counted here.
                clock.ahead -= (due - 1).min(clock.ahead - 1);
                self.stamp_for_others(owner);
            }
        }
    }

    /// As [`stamp`](Self::stamp), for a deferred free, which waits for `owner` in any case: records the event at once.
    pub(crate) fn stamp_for_others(&mut self, owner: StreamIndex) -> Fence {
        let fence = self.now(owner);
        let clock = &mut self.clocks[owner];
        if clock.ahead > 0 {
            clock.frees = 0;
            clock.ahead -= 1;
            clock.cover(fence.epoch);
        }
        fence
    }

    /// Whether `requester` may enqueue work on memory behind `fence`. `reuse` says whether to record and query an
    /// event, or to make the requester wait.
    pub(crate) fn pass(
        &mut self,
        requester: StreamIndex,
        fence: Fence,
        reuse: ReusePolicy,
    ) -> bool {
        let Fence { owner, epoch } = fence;
        if owner == requester || self.is_dominated(requester, fence) {
            return true;
        }
        if reuse == ReusePolicy::Never {
            return false;
        }
        if !self.clocks[owner].cover(epoch) {
            return false;
        }
        if reuse == ReusePolicy::OnlyComplete {
            let clock = &mut self.clocks[owner];
            clock.poll();
            let is_passed = epoch <= clock.complete;
            if !is_passed {
                clock.ahead = EVENTS_AHEAD;
            }
            return is_passed;
        }
        self.wait(requester, fence)
    }

    /// The newest epoch of `owner` up to which `requester` may enqueue work without a wait. `newest` is the newest
    /// epoch of any stamp. If `reuse` allows it, records an event, so that a later call can answer with a newer epoch.
    pub(crate) fn reach(
        &mut self,
        requester: StreamIndex,
        owner: StreamIndex,
        newest: u64,
        reuse: ReusePolicy,
    ) -> u64 {
        let is_reached = self.is_dominated(
            requester,
            Fence {
                owner,
                epoch: newest,
            },
        );
        if !is_reached && reuse != ReusePolicy::Never {
            let clock = &mut self.clocks[owner];
            clock.cover(newest);
            clock.poll();
            if reuse == ReusePolicy::OnlyComplete && clock.complete < newest {
                clock.ahead = EVENTS_AHEAD;
            }
        }
        self.waited_for(requester, owner)
            .max(self.clocks[owner].complete)
    }

    fn waited_for(&self, requester: StreamIndex, owner: StreamIndex) -> u64 {
        let waited = self.clocks[requester].waited.get(owner);
        waited.copied().unwrap_or(0)
    }

    fn is_dominated(&self, requester: StreamIndex, fence: Fence) -> bool {
        let waited = self.waited_for(requester, fence.owner);
        fence.epoch <= waited.max(self.clocks[fence.owner].complete)
    }

    /// Makes `requester` wait, on the device, for the first event at or past `fence`.
    fn wait(&mut self, requester: StreamIndex, fence: Fence) -> bool {
        let events = &self.clocks[fence.owner].events;
        let first = events.partition_point(|(covered, _)| *covered < fence.epoch);
        let Some((covered, event)) = events.get(first) else {
            return false;
        };
        let covered = *covered;
        let waiter = self.clocks[requester]
            .stream
            .as_ref()
            .expect("the requester is a stream in use");
        // In a capture, to wait for an event outside of it would end the capture.
        if !is_free_to_wait(waiter) || waiter.wait(event).is_err() {
            return false;
        }
        let waited = &mut self.clocks[requester].waited;
        if waited.len() <= fence.owner {
            waited.resize(fence.owner + 1, 0);
        }
        waited[fence.owner] = covered;
        true
    }

    /// Whether everything up to `fence` is known to have run. Queries nothing.
    pub(crate) fn is_known_complete(&self, fence: Fence) -> bool {
        fence.epoch <= self.clocks[fence.owner].complete
    }

    /// Whether everything up to `fence` has run, by the events recorded so far, without waiting.
    pub(crate) fn is_complete(&mut self, fence: Fence) -> bool {
        if self.is_deterministic {
            return self.ask_complete(fence);
        }
        let clock = &mut self.clocks[fence.owner];
        clock.poll();
        fence.epoch <= clock.complete
    }

    /// Whether everything up to `fence` has run. Records an event if there is none, so that a later call can find out.
    pub(crate) fn ask_complete(&mut self, fence: Fence) -> bool {
        if self.is_known_complete(fence) {
            return true;
        }
        let clock = &mut self.clocks[fence.owner];
        if !clock.cover(fence.epoch) {
            return false;
        }
        if self.is_deterministic {
            self.host_waits += 1;
            return clock.synchronize(fence.epoch);
        }
        self.is_complete(fence)
    }

    /// As [`ask_complete`](Self::ask_complete), but queries the stream itself too: an idle stream has passed
    /// everything, with or without an event.
    pub(crate) fn passed_by_now(&mut self, fence: Fence) -> bool {
        let stream = self.stream(fence.owner);
        let is_idle = !self.is_deterministic
            && !self.is_known_complete(fence)
            && stream.is_some_and(|stream| {
                is_free_to_wait(stream) && matches!(stream.is_idle(), Ok(true))
            });
        if is_idle && let Some((closed, _)) = self.close_epoch(fence.owner) {
            self.passed(closed);
        }
        self.ask_complete(fence)
    }

    /// The present end of `owner`, marked with an event if one can be recorded.
    pub(crate) fn end(&mut self, owner: StreamIndex) -> Fence {
        let fence = self.now(owner);
        self.clocks[owner].cover(fence.epoch);
        fence
    }

    /// Closes the present epoch of every stream. A wait on the host that begins after this covers those epochs; frees
    /// during the wait have later ones.
    pub(crate) fn close_epochs(&mut self) -> Vec<(Fence, Stream)> {
        let owners = 0..self.clocks.len();
        owners.filter_map(|owner| self.close_epoch(owner)).collect()
    }

    /// Closes the present epoch of a stream, if it was not dropped.
    pub(crate) fn close_epoch(&mut self, owner: StreamIndex) -> Option<(Fence, Stream)> {
        let clock = &mut self.clocks[owner];
        let stream = clock.stream.clone()?;
        let epoch = clock.epoch;
        clock.move_on();
        Some((Fence { owner, epoch }, stream))
    }

    /// Records that the host has waited until everything up to `fence` had run.
    pub(crate) fn passed(&mut self, fence: Fence) {
        let clock = &mut self.clocks[fence.owner];
        clock.complete = clock.complete.max(fence.epoch);
        while clock
            .events
            .front()
            .is_some_and(|(covered, _)| *covered <= fence.epoch)
        {
            clock.events.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};

    fn of_one_stream() -> (Fences, Stream, StreamIndex) {
        let device = Device::host(HostConfig::default()).unwrap();
        let stream = device.create_stream().unwrap();
        let mut fences = Fences::new(false);
        let owner = fences.owner(&stream);
        (fences, stream, owner)
    }

    #[test]
    fn events_are_recorded_every_few_frees_while_others_ask_in_vain() {
        let (mut fences, stream, owner) = of_one_stream();
        let free = |fences: &mut Fences| {
            for _ in 0..FREES_PER_EVENT {
                fences.stamp(owner);
                fences.record_due();
            }
            fences.now(owner).epoch - FIRST_EPOCH
        };
        assert_eq!(free(&mut fences), 0, "nobody asks");
        fences.clocks[owner].ahead = EVENTS_AHEAD;
        for events in 1..EVENTS_AHEAD + 3 {
            assert_eq!(free(&mut fences), u64::from(events.min(EVENTS_AHEAD)));
        }
        stream.synchronize().unwrap();
        fences.clocks[owner].poll();
        assert_eq!(fences.clocks[owner].complete, u64::from(EVENTS_AHEAD));
    }

    #[test]
    fn frees_at_once_have_one_event_and_count_as_many() {
        let (mut fences, _stream, owner) = of_one_stream();
        for (frees, ahead) in [(FREES_PER_EVENT * 5 + 3, 2), (FREES_PER_EVENT * 9, 0)] {
            fences.clocks[owner].ahead = 7;
            let before = fences.now(owner).epoch;
            for _ in 0..frees {
                fences.stamp(owner);
            }
            fences.record_due();
            assert_eq!(fences.clocks[owner].ahead, ahead);
            assert_eq!(fences.now(owner).epoch - before, 1);
        }
    }

    #[test]
    fn a_stream_that_is_gone_is_asked_no_more() {
        let (mut fences, stream, owner) = of_one_stream();
        fences.clocks[owner].ahead = EVENTS_AHEAD;
        stream.synchronize().unwrap();
        drop(stream);
        assert_eq!(fences.find_gone(), [owner]);
        fences.retire(|_| true);
        assert!(fences.stream(owner).is_none() && !fences.are_contended());
    }
}
