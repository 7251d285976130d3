//! What bounds and shrinks a pool from outside, and who is asked and told when memory is short.

use std::sync::Arc;

use super::Pool;
use super::hooks::Registration;
use super::reclaim;
use crate::error::{OutOfMemory, Result};
use crate::memory::config::PoolConfig;

impl Pool {
    /// Returns all memory without a block in use to the driver: [`trim`](Self::trim) to 0.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refused some; the pool then keeps it.
    pub fn empty_cache(&self) -> Result<()> {
        self.trim(0)
    }

    /// Returns idle memory to the driver until the pool holds at most `target` bytes, or until what is left
    /// has blocks in it. Pages, or plain allocations, go back as a whole; the smallest gaps go first. Does
    /// nothing if the pool holds no more than that. Otherwise, if what is known to be complete does not
    /// suffice, blocks the host until every stream that the pool has served has passed its last use; other
    /// threads go on meanwhile.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver refused some; the pool then keeps it.
    pub fn trim(&self, target: u64) -> Result<()> {
        let shared = self.shared();
        reclaim::trim(shared, &mut shared.lock()?, target)
    }

    /// Ends a period of [`PoolConfig::decay`] now, whether one is set or not: returns to the driver what was
    /// not needed since the last period's end, as far as it is known to be complete, and lets go of streams that
    /// nobody else holds. Empties all threads' caches for that. Never waits on the host, except in
    /// [deterministic](PoolConfig::deterministic) mode.
    pub fn decay_now(&self) {
        let shared = self.shared();
        // A broken pool returns nothing.
        if let Ok(mut core) = shared.lock() {
            reclaim::decay(shared, &mut core);
        }
    }

    /// Most bytes the pool may hold: the limit set last, or what [`PoolConfig::limit`] and
    /// [`PoolConfig::fraction`] came to.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.shared().look().heaps.limit()
    }

    /// Whether a call panicked while it held the pool's lock: an invariant broke, or a driver panicked. Such a pool
    /// hands out nothing more, and every call that would returns [`Error::BrokenPool`](crate::Error::BrokenPool).
    /// Blocks that are out stay valid and may be dropped; their memory, and all else that the pool holds, stays taken
    /// until the process ends. Statistics are those of the last moment, without what was freed since.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.shared().routing.are_closed()
    }

    /// Sets the most bytes the pool may hold from now on, in place of [`PoolConfig::limit`] and
    /// [`PoolConfig::fraction`]; `None` leaves it to the device. If the pool holds more, this returns what it
    /// can, as [`trim`](Self::trim) does; blocks in use stay, and until enough of them are freed and
    /// returned, nothing more is taken from the driver.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for a limit that [`Pool::new`] would refuse, with nothing
    /// changed; [`Error::Driver`](crate::Error::Driver) if the driver did not take memory back, with the limit set all
    /// the same.
    pub fn set_limit(&self, limit: Option<u64>) -> Result<()> {
        let shared = self.shared();
        PoolConfig::check_limit(limit, &shared.device)?;
        let mut core = shared.lock()?;
        core.heaps.set_limit(limit);
        reclaim::trim(shared, &mut core, limit.unwrap_or(u64::MAX))
    }

    /// Asks `callback` for memory when neither the pool nor the device has any: before the host waits for
    /// streams, with the bytes that are wanted. Several are asked in order of registration, until the
    /// allocation succeeds.
    ///
    /// A callback runs on the allocating thread, without any lock of the pool: it may free blocks, allocate,
    /// and drop handles of the pool. A shortage inside a callback asks nobody. If it panics, so does the
    /// allocation, and the pool goes on. What it owns lives until the registration is dropped; if that is a
    /// handle of this pool, so does the pool. An allocation within a capture, for its graph, asks nobody.
    ///
    /// ```
    /// use std::sync::{Arc, Mutex};
    /// use kitsune::{Block, Device, HostConfig, Pool, PoolConfig};
    ///
    /// let device = Device::host(HostConfig { capacity: 64 << 20, ..HostConfig::default() })?;
    /// let pool = Pool::new(&device, PoolConfig::default())?;
    /// let stream = device.create_stream()?;
    /// let spare: Arc<Mutex<Vec<Block>>> = Arc::default();
    /// spare.lock().unwrap().push(pool.allocate(40 << 20, &stream)?);
    /// let of_callback = Arc::clone(&spare);
    /// let _registration = pool.on_shortage(move |_wanted| of_callback.lock().unwrap().clear());
    /// assert!(pool.allocate(40 << 20, &stream).is_ok());
    /// # Ok::<(), kitsune::Error>(())
    /// ```
    pub fn on_shortage(&self, callback: impl Fn(u64) + Send + Sync + 'static) -> Registration {
        self.shared().hooks.add_on_shortage(Arc::new(callback))
    }

    /// Tells `observer` of every allocation that fails for lack of memory, before the error is returned. As
    /// with [`on_shortage`](Self::on_shortage), it runs without any lock of the pool; failures inside a
    /// callback or observer are told to nobody, nor are those within a capture for its graph.
    pub fn on_out_of_memory(
        &self,
        observer: impl Fn(&OutOfMemory) + Send + Sync + 'static,
    ) -> Registration {
        self.shared().hooks.add_on_failure(Arc::new(observer))
    }
}
