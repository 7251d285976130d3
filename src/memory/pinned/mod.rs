//! Pinned host memory for staging, cached.
//!
//! Pinning takes the system milliseconds, so a block that is freed stays pinned and serves the next request
//! of its size. Copies between pinned memory and a device run while the host goes on; a block may therefore
//! be freed while streams still use it. Each use leaves an event behind, and the memory is handed out again
//! only when all of them have passed, which is asked when the memory is wanted.
//!
//! When the driver refuses, what is cached is given back to it and it is asked again; then what waits for
//! streams is waited for. No call of the driver that could block is made under the pool's lock.
//!
//! Must not know: blocks of device memory, tensors.

mod block;
mod cache;

use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

pub use block::PinnedBlock;

use self::cache::{Area, Cache, Uses, area_bytes};
use super::guard::{Breakable, Locked};
use super::stats::{Gauge, Stat};
use crate::driver::{Device, DevicePtr};
use crate::error::{Error, OutOfMemory, Result};
use crate::units::to_usize;

/// A cache of pinned host memory. Cheap to clone; all clones are the same pool. Memory goes back to the
/// driver with the last clone and the last block.
///
/// # Dropping
/// The drop of a block or a clone waits for no stream while another is left. The drop of the last of all *blocks the
/// host* until the recorded uses of all cached memory are over, and calls the driver for each block.
///
/// Requests are rounded up to a power of two from 4 KiB to 1 MiB, above that by at most an eighth.
///
/// # Examples
/// ```
/// use kitsune::memory::PinnedPool;
/// use kitsune::{Device, HostConfig};
///
/// let pool = PinnedPool::new(&Device::host(HostConfig::default())?);
/// let mut block = pool.allocate(1000)?;
/// block.as_mut_slice()?.fill(7);
/// drop(block);
/// let again = pool.allocate(2000)?;
/// assert_eq!(pool.stats().num_host_alloc, 1);
/// # drop(again);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Clone)]
pub struct PinnedPool {
    shared: Arc<Shared>,
}

/// What the clones of a pool and its blocks share.
pub(super) struct Shared {
    device: Device,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    cache: Cache,
    blocks: Gauge,
    requested: Gauge,
    allocated: Gauge,
    reserved: Gauge,
    cache_hits: u64,
    ooms: u64,
    host_allocs: u64,
    host_frees: u64,
    /// Whether a change stopped half-way. Then nothing is cached here any more.
    is_broken: bool,
}

impl Breakable for Shared {
    type Books = State;

    #[cold]
    fn break_down(&self, state: &mut State) {
        state.is_broken = true;
        // Whether streams use it, nobody knows: it stays pinned.
        std::mem::forget(std::mem::take(&mut state.cache));
    }

    fn check(&self, state: &State) -> Result<()> {
        if state.is_broken {
            return Err(Error::BrokenPool {
                pool: "pinned pool",
            });
        }
        Ok(())
    }
}

/// Statistics of a [`PinnedPool`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct PinnedStats {
    /// Blocks in callers' hands.
    pub allocation: Stat,
    /// Bytes callers asked for.
    pub requested_bytes: Stat,
    /// Bytes in callers' hands, rounded.
    pub allocated_bytes: Stat,
    /// Bytes pinned.
    pub reserved_bytes: Stat,
    /// Bytes of blocks that were freed while streams used them, and were not asked about since.
    pub waiting_bytes: u64,
    /// Allocations served without the driver.
    pub cache_hits: u64,
    /// Allocations that failed.
    pub num_ooms: u64,
    /// Driver allocations.
    pub num_host_alloc: u64,
    /// Driver frees.
    pub num_host_free: u64,
}

impl PinnedPool {
    /// A pool of the host memory that `device` and the devices of its platform reach. Empty until the first
    /// allocation.
    #[must_use]
    pub fn new(device: &Device) -> Self {
        let shared = Shared {
            device: device.clone(),
            state: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The device whose driver pins the memory.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// Host memory for `bytes` bytes that no stream uses. Its contents have any value. Zero bytes give a
    /// block without memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] if the driver refuses even when it was given back all that is cached;
    /// [`Error::BrokenPool`] after a call that panicked while it held the pool's lock.
    pub fn allocate(&self, bytes: u64) -> Result<PinnedBlock> {
        let shared = &self.shared;
        let area = match bytes {
            0 => None,
            bytes => Some(shared.take(bytes)?),
        };
        Ok(PinnedBlock::new(shared.clone(), area, bytes))
    }

    /// Gives the driver all memory that nobody holds and no stream uses. Does not wait for streams.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps that.
    pub fn empty_cache(&self) -> Result<()> {
        self.shared.release_idle()
    }

    /// The statistics now.
    #[must_use]
    pub fn stats(&self) -> PinnedStats {
        let state = self.shared.look();
        PinnedStats {
            allocation: state.blocks.stat(),
            requested_bytes: state.requested.stat(),
            allocated_bytes: state.allocated.stat(),
            reserved_bytes: state.reserved.stat(),
            waiting_bytes: state.cache.waiting_bytes(),
            cache_hits: state.cache_hits,
            num_ooms: state.ooms,
            num_host_alloc: state.host_allocs,
            num_host_free: state.host_frees,
        }
    }
}

impl State {
    fn hand_out(&mut self, requested: u64, area: Area) -> Area {
        self.blocks.increase(1);
        self.requested.increase(requested);
        self.allocated.increase(area.bytes);
        area
    }

    fn take_cached(&mut self, requested: u64, bytes: u64) -> Option<Area> {
        let area = self.cache.take(bytes)?;
        self.cache_hits += 1;
        Some(self.hand_out(requested, area))
    }
}

impl Shared {
    /// # Errors
    /// [`Error::BrokenPool`] if the state cannot be trusted.
    fn lock(&self) -> Result<Locked<'_, MutexGuard<'_, State>, Self>> {
        let state = self.look();
        self.check(&state)?;
        Ok(state)
    }

    /// The state, which is empty but for its counters if it cannot be trusted.
    fn look(&self) -> Locked<'_, MutexGuard<'_, State>, Self> {
        Locked::new(self.state.lock(), self)
    }

    /// Finds memory for `requested` bytes, not 0.
    fn take(&self, requested: u64) -> Result<Area> {
        let Some(bytes) = area_bytes(requested) else {
            return Err(self.report(requested, None).into());
        };
        let cached = self.lock()?.take_cached(requested, bytes);
        if let Some(area) = cached {
            return Ok(area);
        }
        if let Ok(area) = self.take_new(requested, bytes) {
            return Ok(area);
        }
        // What the driver does not take back stays cached; the driver decides whether the rest suffices.
        drop(self.release_idle());
        if let Ok(area) = self.take_new(requested, bytes) {
            return Ok(area);
        }
        self.wait_for_streams();
        let cached = self.lock()?.take_cached(requested, bytes);
        if let Some(area) = cached {
            return Ok(area);
        }
        drop(self.release_idle());
        self.take_new(requested, bytes)
            .map_err(|error| self.report(requested, Some(&error)).into())
    }

    /// Takes `bytes` from the driver.
    #[expect(unsafe_code, reason = "a slice of bytes must have been written once")]
    fn take_new(&self, requested: u64, bytes: u64) -> Result<Area> {
        let ptr = self.device.driver().allocate_pinned(bytes)?;
        let start = std::ptr::with_exposed_provenance_mut::<u8>(to_usize(ptr.0));
        // SAFETY: the driver has just handed out these bytes, readable and writable by the host.
        unsafe { start.write_bytes(0, to_usize(bytes)) };
        let mut state = match self.lock() {
            Ok(state) => state,
            Err(error) => {
                // What the driver does not take back stays pinned, as the rest of a broken pool does.
                drop(self.free_pinned(ptr));
                return Err(error);
            }
        };
        state.host_allocs += 1;
        state.reserved.increase(bytes);
        Ok(state.hand_out(requested, Area { ptr, bytes }))
    }

    /// Takes a block back, with what is known of its uses; `None` if it may be in use for ever.
    fn free(&self, area: Area, requested: u64, uses: Option<Uses>) {
        let Ok(mut state) = self.lock() else {
            return;
        };
        state.blocks.decrease(1);
        state.requested.decrease(requested);
        state.allocated.decrease(area.bytes);
        if let Some(uses) = uses {
            state.cache.put(area, uses);
        }
    }

    /// Gives the driver what no stream uses.
    fn release_idle(&self) -> Result<()> {
        let idle = self.look().cache.take_idle();
        let mut outcome = Ok(());
        for area in idle {
            let freed = self.free_pinned(area.ptr);
            let mut state = self.look();
            if freed.is_ok() {
                state.host_frees += 1;
                state.reserved.decrease(area.bytes);
            } else {
                state.cache.put(area, Uses::new());
            }
            outcome = outcome.and(freed);
        }
        outcome
    }

    #[expect(
        unsafe_code,
        reason = "freeing is a promise that nothing uses the memory"
    )]
    fn free_pinned(&self, ptr: DevicePtr) -> Result<()> {
        // SAFETY: the area comes from the cache, so no block has it, and all its uses have passed.
        unsafe { self.device.driver().free_pinned(ptr) }
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
    fn report(&self, requested: u64, refusal: Option<&Error>) -> OutOfMemory {
        let mut state = self.look();
        state.ooms += 1;
        let tried = match refusal {
            None => Vec::new(),
            Some(_) => vec![
                "cached blocks",
                "the driver",
                "returning idle memory",
                "waiting for streams",
            ],
        };
        OutOfMemory {
            requested,
            allocated: state.allocated.stat().current,
            pending: state.cache.waiting_bytes(),
            reserved: state.reserved.stat().current,
            largest_free: state.cache.largest_free(),
            device_free: self.device.memory_info().map_or(0, |info| info.free),
            device_total: self.device.properties().total_memory,
            driver_error: refusal.map(Error::to_string),
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
        drop(self.release_idle());
    }
}

impl fmt::Debug for PinnedPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedPool({:?})", self.shared.device)
    }
}
