//! The pool: its public verbs, and the two paths, [`allocate`] and [`free`].
//!
//! [`shared`] is what all handles share: the heaps and the books ([`core`]) under one lock ([`lock`]), the caches of
//! threads ([`threads`]), the queues of frees that found the lock taken. [`reclaim`] finds memory when there is none,
//! [`wait`] waits for streams on the host, [`report`] says why an allocation failed. A [`Block`] is what a caller
//! holds.

mod allocate;
mod block;
mod controls;
mod core;
mod free;
mod free_records;
mod hooks;
mod lock;
mod peak_scope;
mod poison;
mod reclaim;
mod report;
mod shared;
mod threads;
mod wait;

#[cfg(feature = "metrics")]
use std::any::Any;
use std::fmt;
use std::sync::Arc;
#[cfg(feature = "metrics")]
use std::sync::Weak;

pub use block::{Block, Watch};
pub use hooks::Registration;
pub use peak_scope::PeakScope;
pub(crate) use shared::Shared;
pub(crate) use wait::wait_for_streams;

use self::core::Core;
use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::config::PoolConfig;
use crate::memory::routing::Routing;
use crate::memory::statistics::{PoolStats, TagStat};
use crate::memory::types::{HeapId, PoolId, Refusal, Request};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Mutex, SegQueue};
use crate::units::Numbers;
use lock::BROKEN;
use report::report;
use shared::Handle;
use threads::Close;

/// A caching allocator for one device. Cheap to clone; all clones are the same pool. Memory goes back to
/// the driver with the last clone and the last block.
///
/// # Dropping
/// A pool is kept by its clones and by what was made with it: blocks, so tensors and buffers too, private pools and
/// their graphs, peak scopes. Dropping one of these waits for no stream while another is left. Dropping the last clone
/// takes the pool's lock to empty the threads' caches, so it may wait for a driver call of another thread.
///
/// The drop of the last of all *blocks the host* until every stream that the pool served has run what uses its memory,
/// and calls the driver for each segment. A thread that must not wait keeps none of the last ones, or has the streams
/// synchronized before. In a kernel, which may not wait, a thread made for it returns the rest.
#[derive(Clone)]
pub struct Pool {
    handle: Arc<Handle>,
}

impl Pool {
    /// A pool on `device`, empty until the first allocation.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for settings that cannot work on this device; [`Error::Driver`] if it has
    /// no range of addresses for the pool.
    pub fn new(device: &Device, config: PoolConfig) -> Result<Self> {
        static NUMBERS: Numbers = Numbers::new("pools");
        Self::numbered(device, config, &NUMBERS)
    }

    pub(crate) fn numbered(device: &Device, config: PoolConfig, numbers: &Numbers) -> Result<Self> {
        let config = config.checked(device)?;
        let shared = Shared {
            id: PoolId::new(numbers.next()),
            device: device.clone(),
            core: Mutex::new(Core::new(device, &config)?),
            config,
            routing: Routing::default(),
            caches: Arc::default(),
            freed: SegQueue::new(),
            released: SegQueue::new(),
            has_queued: AtomicBool::new(false),
            hooks: Arc::default(),
        };
        Ok(Self {
            handle: Arc::new(Handle {
                shared: Arc::new(shared),
            }),
        })
    }

    #[inline]
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.handle.shared
    }

    /// The device whose memory this is.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.shared().device
    }

    /// Names this pool among all that ever were, and tells whether its last clone is gone.
    #[cfg(feature = "metrics")]
    pub(crate) fn token(&self) -> Weak<dyn Any + Send + Sync> {
        let handle: Weak<Handle> = Arc::downgrade(&self.handle);
        handle
    }

    /// The settings the pool works with: those it was made with, and in deterministic mode a policy that does
    /// not depend on the device's pace.
    #[must_use]
    pub fn config(&self) -> &PoolConfig {
        &self.shared().config
    }

    /// Memory for `bytes` bytes, for use on `stream` from now on; its contents are undefined. Zero bytes
    /// give a block without memory. During a capture or a pass of a [`PrivatePool`](super::PrivatePool) of
    /// this pool, the block comes from that one, as said there.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] with a report after every way of finding memory failed;
    /// [`Error::InvalidArgument`] for a stream of another device; during a capture, [`Error::Driver`] if the
    /// driver cannot tell whether the stream is part of it; [`Error::BrokenPool`] if the pool
    /// [is broken](Self::is_broken).
    #[inline]
    pub fn allocate(&self, bytes: u64, stream: &Stream) -> Result<Block> {
        allocate::allocate(&self.handle, bytes, stream)
    }

    /// Why a wrapper with a limit, of which it says (used, limit), refuses `bytes` on `stream`.
    #[cold]
    pub(crate) fn refuse(&self, bytes: u64, stream: &Stream, (used, limit): (u64, u64)) -> Error {
        let shared = self.shared();
        if let Err(error) = shared.check_device(stream) {
            return error;
        }
        if shared.routing.are_closed() {
            return BROKEN;
        }
        let mut core = shared.lock_and_fold();
        let request = Request {
            bytes,
            ..Request::new(bytes, stream, HeapId::DEFAULT)
        };
        let mut report = report(shared, &mut core, request, Refusal::Limit, Vec::new());
        report.limit = Some(limit);
        report.limit_used = Some(used);
        report.into()
    }

    /// The statistics now. They are exact, peaks included, if one thread at a time calls the pool, whichever that is, and
    /// makes at least a handful of calls in its turn. Where calls overlap, or threads change after every call or two, `current` is exact at some moment during this call, and a peak may miss what several threads
    /// held together for a moment.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.shared().lock_and_fold().stats()
    }

    /// Allocated bytes by tag, with the peak of each.
    #[must_use]
    pub fn tag_stats(&self) -> Vec<TagStat> {
        self.shared().lock_and_fold().tags.snapshot()
    }

    /// Sets every peak to the present value.
    pub fn reset_peaks(&self) {
        self.shared().lock_and_fold().reset_peaks();
    }

    /// Flushes every thread's cache and walks every structure. For a moment when no other thread uses the
    /// pool.
    ///
    /// # Panics
    /// If an invariant is broken: a bug of this crate.
    pub fn check_invariants(&self) {
        let shared = self.shared();
        let mut core = shared.lock().unwrap_or_else(|error| panic!("{error}"));
        shared.fold_caches(&mut core);
        shared.empty_caches(&mut core, Close::No);
        core.check_invariants();
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pool({:?}, {:?})", self.device(), self.config())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::driver::{Device, HostConfig};

    #[test]
    fn no_pool_gets_the_number_of_another() {
        let device = Device::host(HostConfig::default()).unwrap();
        let stream = device.create_stream().unwrap();
        let numbers = Numbers::starting_at(u32::MAX - 1, "pools");
        let make = || Pool::numbered(&device, PoolConfig::default(), &numbers);
        let last = make().unwrap();
        // Kept and found again by the thread: the keys of its stream caches are none of the reserved ones.
        let ptr = last.allocate(512, &stream).unwrap().ptr();
        assert_eq!(last.allocate(512, &stream).unwrap().ptr(), ptr);
        let panic = catch_unwind(AssertUnwindSafe(make)).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert_eq!(message, "all 4294967295 numbers of pools are used up");
        last.check_invariants();
    }
}
