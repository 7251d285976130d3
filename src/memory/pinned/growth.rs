//! Finding pinned memory, pinning more, and giving it back.

use std::time::Instant;

use super::cache::{Area, Segment, area_bytes, new_segment};
use super::{Shared, State};
use crate::driver::DevicePtr;
use crate::error::{Error, OutOfMemory, Result};
use crate::memory::guard::Breakable;
use crate::units::to_usize;

/// What is pinned is at most so many times the most that was ever in use, unless blocks lie in all of it.
const PINNED_PER_PEAK: u64 = 2;

/// Why more was not pinned.
enum Refusal {
    /// The pool's limit.
    Limit,
    /// The size itself.
    Size,
    /// The driver, with its error.
    Driver(Error),
    /// The pool, which a panic broke.
    Broken(Error),
}

impl State {
    /// Bytes that are pinned or about to be.
    fn held(&self) -> u64 {
        self.reserved.stat().current + self.asked
    }

    /// Bytes that callers and streams use, or that callers are about to get.
    fn in_use(&self) -> u64 {
        self.allocated.stat().current + self.cache.waiting_bytes() + self.asked
    }

    /// What may stay pinned before `bytes` more are.
    fn room_beside(&self, bytes: u64) -> u64 {
        let peak = self.peak.max(self.allocated.stat().peak);
        let most = peak
            .max(self.in_use() + bytes)
            .saturating_mul(PINNED_PER_PEAK);
        most.min(self.limit.unwrap_or(u64::MAX))
            .saturating_sub(bytes)
    }

    /// Takes an idle segment out if more than `keep` bytes are held.
    fn take_surplus(&mut self, keep: u64) -> Option<Segment> {
        let surplus = self.held().saturating_sub(keep);
        if surplus == 0 {
            return None;
        }
        self.cache.look_at_waiting();
        self.cache.take_idle(surplus)
    }

    /// Counts `bytes` as asked for, or refuses.
    fn ask(&mut self, bytes: u64) -> Result<(), Refusal> {
        let limit = self.limit.unwrap_or(u64::MAX);
        if bytes > limit.saturating_sub(self.held()) {
            return Err(Refusal::Limit);
        }
        self.asked += bytes;
        Ok(())
    }
}

impl Shared {
    /// Finds memory for `requested` bytes, not 0.
    pub(super) fn take(&self, requested: u64) -> Result<Area> {
        let Some(bytes) = area_bytes(requested) else {
            return Err(self.report(requested, &Refusal::Size).into());
        };
        if self.lock()?.limit.is_some_and(|limit| bytes > limit) {
            return Err(self.report(requested, &Refusal::Limit).into());
        }
        self.decay_if_due();
        if let Some(area) = self.take_cached(requested, |state| state.cache.take(bytes))? {
            return Ok(area);
        }
        if let Ok(area) = self.take_new(requested, bytes) {
            return Ok(area);
        }
        // What the driver does not take back stays cached; the driver decides whether the rest suffices.
        drop(self.release_idle(0));
        if let Ok(area) = self.take_new(requested, bytes) {
            return Ok(area);
        }
        let anywhere = |state: &mut State| state.cache.take_anywhere(bytes);
        if let Some(area) = self.take_cached(requested, anywhere)? {
            return Ok(area);
        }
        self.wait_for_streams();
        if let Some(area) = self.take_cached(requested, anywhere)? {
            return Ok(area);
        }
        drop(self.release_idle(0));
        self.take_new(requested, bytes)
            .map_err(|refusal| match refusal {
                Refusal::Broken(error) => error,
                refusal => self.report(requested, &refusal).into(),
            })
    }

    fn take_cached(
        &self,
        requested: u64,
        take: impl FnOnce(&mut State) -> Option<Area>,
    ) -> Result<Option<Area>> {
        let mut state = self.lock()?;
        let Some(area) = take(&mut state) else {
            return Ok(None);
        };
        state.cache_hits += 1;
        Ok(Some(state.hand_out(requested, area)))
    }

    /// Gives back what is too much beside `bytes` more, and counts those as asked for.
    fn make_room(&self, bytes: u64) -> Result<(), Refusal> {
        let _returns = self.returns.lock();
        loop {
            let keep = self.lock().map_err(Refusal::Broken)?.room_beside(bytes);
            // What the driver does not take back stays; the limit decides whether that is too much.
            let (returned, _) = self.return_idle(keep);
            match self.look().ask(bytes) {
                // Others may have freed meanwhile.
                Err(_) if returned > 0 => {}
                outcome => return outcome,
            }
        }
    }

    /// Pins `bytes` more.
    fn take_new(&self, requested: u64, bytes: u64) -> Result<Area, Refusal> {
        self.make_room(bytes)?;
        let pinned = self.pin(bytes);
        let mut state = self.look();
        state.asked -= bytes;
        let segment = new_segment(pinned.map_err(Refusal::Driver)?, bytes);
        if let Err(error) = self.check(&state) {
            drop(state);
            // What the driver does not take back stays pinned, as the rest of a broken pool does.
            drop(self.free_pinned(segment.ptr));
            return Err(Refusal::Broken(error));
        }
        state.host_allocs += 1;
        state.reserved.increase(bytes);
        state.cache.add(segment);
        let area = state.cache.take(bytes);
        let area = area.expect("a segment was added that fits the request");
        let area = state.hand_out(requested, area);
        state.peak = state.in_use().max(state.peak);
        Ok(area)
    }

    /// Takes `bytes` from the driver.
    #[expect(unsafe_code, reason = "a slice of bytes must have been written once")]
    fn pin(&self, bytes: u64) -> Result<DevicePtr> {
        let ptr = self.device.driver().allocate_pinned(bytes)?;
        let start = std::ptr::with_exposed_provenance_mut::<u8>(to_usize(ptr.0));
        // SAFETY: the driver has just handed out these bytes, readable and writable by the host.
        unsafe { start.write_bytes(0, to_usize(bytes)) };
        Ok(ptr)
    }

    /// Gives the driver idle segments until at most `keep` bytes are held or none is left.
    ///
    /// # Errors
    /// The first refusal of the driver; what it refused stays cached.
    pub(super) fn release_idle(&self, keep: u64) -> Result<()> {
        let _returns = self.returns.lock();
        self.return_idle(keep).1
    }

    /// As [`release_idle`](Self::release_idle), for who holds `returns`; with how many segments went.
    fn return_idle(&self, keep: u64) -> (u64, Result<()>) {
        let (mut returned, mut outcome) = (0, Ok(()));
        let mut refused = Vec::new();
        let surplus = || self.look().take_surplus(keep);
        while let Some(segment) = surplus() {
            match self.free_pinned(segment.ptr) {
                Ok(()) => {
                    let mut state = self.look();
                    state.host_frees += 1;
                    state.reserved.decrease(segment.bytes);
                    returned += 1;
                }
                Err(error) => {
                    outcome = outcome.and(Err(error));
                    refused.push(segment);
                }
            }
        }
        let mut state = self.look();
        refused
            .into_iter()
            .for_each(|segment| state.cache.add(segment));
        (returned, outcome)
    }

    #[expect(
        unsafe_code,
        reason = "freeing is a promise that nothing uses the memory"
    )]
    fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the segment was taken out of the cache with no block in it, and all uses of the blocks that lay in
        // it have passed.
        unsafe { self.device.driver().free_pinned(ptr) }
    }

    fn decay_if_due(&self) {
        let state = self.look();
        let is_due = state.decay.is_on() && state.decay.is_due(Instant::now());
        drop(state);
        if is_due {
            self.decay();
        }
    }

    /// Gives the driver what was not needed in the period that ends now.
    pub(super) fn decay(&self) {
        let keep = self.look().decay.end_period(Instant::now());
        // What the driver does not take back now is offered again after the next period.
        drop(self.release_idle(keep));
    }

    /// Waits on the host for the streams that use what is cached. What a stream that failed may be using
    /// stays.
    fn wait_for_streams(&self) {
        let waiting = self.look().cache.take_waiting();
        for (area, mut uses) in waiting {
            uses.retain(|used| used.event.synchronize().is_err());
            self.look().cache.put(area, uses);
        }
    }

    /// Counts and describes an allocation that failed.
    fn report(&self, requested: u64, refusal: &Refusal) -> OutOfMemory {
        let mut state = self.look();
        state.ooms += 1;
        let at_once = match refusal {
            Refusal::Size => true,
            Refusal::Limit => state.limit.is_some() && area_bytes(requested) > state.limit,
            Refusal::Driver(_) | Refusal::Broken(_) => false,
        };
        let tried = if at_once {
            Vec::new()
        } else {
            vec![
                "cached blocks",
                "the driver",
                "returning idle memory",
                "waiting for streams",
            ]
        };
        let driver_error = match refusal {
            Refusal::Driver(error) => Some(error.to_string()),
            _ => None,
        };
        OutOfMemory {
            requested,
            pinned: true,
            allocated: state.allocated.stat().current,
            pending: state.cache.waiting_bytes(),
            reserved: state.reserved.stat().current,
            largest_free: state.cache.largest_free(),
            device_free: self.device.memory_info().map_or(0, |info| info.free),
            device_total: self.device.properties().total_memory,
            limit: state.limit,
            limited: matches!(refusal, Refusal::Limit),
            driver_error,
            tried,
            ..OutOfMemory::default()
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.wait_for_streams();
        // What the driver does not take back now is lost with the pool, and so is what a stream that failed
        // may still be using.
        drop(self.release_idle(0));
    }
}
