//! Pinned host memory for staging, cached.
//!
//! Pinning takes the system milliseconds, so memory that is freed stays pinned and serves later requests, the free
//! part that fits a request best first. Copies between pinned memory and a device run while the host goes on; a block
//! may therefore be freed while streams still use it. Each use leaves an event behind, and the memory is handed out
//! again only when all of them have passed, which is asked when the memory is wanted.
//!
//! What is pinned is bounded: before more is pinned, idle segments go back to the driver until what is pinned then is
//! at most twice the most that was ever in use, by callers or by streams. A segment is idle when no block lies in it.
//!
//! When the driver or the limit refuses, what is idle is given back and the driver asked again; then what waits for
//! streams is waited for. No call of the driver that could block is made under the pool's lock.
//!
//! Must not know: blocks of device memory, tensors.

mod block;
mod cache;
mod config;
mod growth;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};

pub use block::PinnedBlock;
pub use config::PinnedConfig;

use self::cache::{Area, Cache, Uses};
use crate::driver::Device;
use crate::error::{Error, Result};
use crate::memory::decay::Decay;
use crate::memory::guard::{Breakable, Locked};
use crate::memory::statistics::{Gauge, Stat};

/// A cache of pinned host memory. Cheap to clone; all clones are the same pool. Memory goes back to the
/// driver with the last clone and the last block.
///
/// Requests are rounded up to 4 KiB. What is freed stays pinned for later requests, of any size: a request takes the
/// free part that fits it best and leaves the rest of it to others. Those of up to 1 MiB and larger ones keep apart.
/// Before the pool pins more, it returns idle memory until it holds at most twice the most bytes that were ever in use
/// at once, those that streams still used after the free included. [`PinnedConfig`] can bound it further.
///
/// # Dropping
/// The drop of a block or a clone waits for no stream while another is left. The drop of the last of all *blocks the
/// host* until the recorded uses of all cached memory are over, and calls the driver for each segment.
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
/// drop(again);
/// pool.empty_cache()?;
/// assert_eq!(pool.stats().reserved_bytes.current, 0);
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Clone)]
pub struct PinnedPool {
    shared: Arc<Shared>,
}

/// What the clones of a pool and its blocks share.
struct Shared {
    device: Device,
    state: Mutex<State>,
    /// Held while segments go back to the driver, so that who needs the room finds it there afterwards. Taken before
    /// `state`.
    returns: Mutex<()>,
}

#[derive(Debug)]
struct State {
    cache: Cache,
    limit: Option<u64>,
    decay: Decay,
    /// Most bytes that callers and streams used at once.
    peak: u64,
    /// Bytes that threads are asking the driver for.
    asked: u64,
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
    /// Bytes in callers' hands, rounded up to 4 KiB.
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
        Self::with(device, &PinnedConfig::default())
    }

    /// As [`new`](Self::new), with settings.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for settings that cannot work.
    pub fn with_config(device: &Device, config: PinnedConfig) -> Result<Self> {
        config.check()?;
        Ok(Self::with(device, &config))
    }

    fn with(device: &Device, config: &PinnedConfig) -> Self {
        let state = State {
            cache: Cache::default(),
            limit: config.limit,
            decay: Decay::new(config.decay, Instant::now()),
            peak: 0,
            asked: 0,
            blocks: Gauge::default(),
            requested: Gauge::default(),
            allocated: Gauge::default(),
            reserved: Gauge::default(),
            cache_hits: 0,
            ooms: 0,
            host_allocs: 0,
            host_frees: 0,
            is_broken: false,
        };
        let shared = Shared {
            device: device.clone(),
            state: Mutex::new(state),
            returns: Mutex::default(),
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
    /// [`Error::OutOfMemory`] if the driver or the limit refuses even when all that is
    /// idle was given back and all streams that use freed blocks were waited for; at once for more than 2 TiB and for
    /// more than the limit. [`Error::BrokenPool`] after a call that panicked while it held the pool's lock.
    pub fn allocate(&self, bytes: u64) -> Result<PinnedBlock> {
        let shared = &self.shared;
        let area = match bytes {
            0 => None,
            bytes => Some(shared.take(bytes)?),
        };
        Ok(PinnedBlock::new(shared.clone(), area, bytes))
    }

    /// Gives the driver all memory that nobody holds and no stream uses: [`trim`](Self::trim) to 0.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps that.
    pub fn empty_cache(&self) -> Result<()> {
        self.trim(0)
    }

    /// Gives the driver idle memory until the pool holds at most `target` bytes or nothing more is idle. Memory goes
    /// back as it was pinned, as a whole. Does not wait for streams: what they use stays.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refused some; the pool then keeps that.
    pub fn trim(&self, target: u64) -> Result<()> {
        self.shared.release_idle(target)
    }

    /// Ends a period of [`PinnedConfig::decay`] now, whether one is set or not: gives the driver idle memory until what
    /// is left is what callers held at the period's peak, and an eighth more. Does not wait for streams.
    pub fn decay_now(&self) {
        self.shared.decay();
    }

    /// Most bytes the pool may hold.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.shared.look().limit
    }

    /// Sets the most bytes the pool may hold from now on, in place of [`PinnedConfig::limit`]. If it holds more, this
    /// returns what is idle, as [`trim`](Self::trim) does; until enough of the rest was freed and returned, nothing
    /// more is pinned.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a limit that [`with_config`](Self::with_config) would
    /// refuse, with nothing changed; [`Error::Driver`] if the driver did not take memory back,
    /// with the limit set all the same.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<()> {
        config::check_limit(limit)?;
        self.shared.look().limit = limit;
        self.shared.release_idle(limit.unwrap_or(u64::MAX))
    }

    /// Walks every structure. For a moment when no other thread uses the pool.
    ///
    /// # Panics
    /// If an invariant is broken: a bug of this crate.
    pub fn check_invariants(&self) {
        let Ok(state) = self.shared.lock() else {
            return;
        };
        let (held, taken) = state.cache.check_invariants();
        assert_eq!(held, state.reserved.stat().current, "reserved bytes");
        let known = state.allocated.stat().current + state.cache.waiting_bytes();
        // What may be in use for ever is taken, but nobody's.
        assert!(known <= taken, "{known} bytes in blocks, {taken} taken");
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
        self.decay.take(area.bytes);
        area
    }

    /// Takes a block back, with what is known of its uses; `None` if it may be in use for ever.
    fn free(&mut self, area: Area, requested: u64, uses: Option<Uses>) {
        self.blocks.decrease(1);
        self.requested.decrease(requested);
        self.allocated.decrease(area.bytes);
        self.decay.give(area.bytes);
        if let Some(uses) = uses {
            self.cache.put(area, uses);
        }
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

    fn free(&self, area: Area, requested: u64, uses: Option<Uses>) {
        // A broken pool takes nothing back.
        if let Ok(mut state) = self.lock() {
            state.free(area, requested, uses);
        }
    }
}

impl fmt::Debug for PinnedPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PinnedPool({:?})", self.shared.device)
    }
}
