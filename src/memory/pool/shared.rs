//! What all handles and all blocks of a pool share.

use std::fmt;
use std::sync::Arc;

use super::block::Extras;
use super::core::Core;
use super::hooks::Hooks;
use crate::driver::{Device, Stream};
use crate::error::{Error, Result};
use crate::memory::config::PoolConfig;
use crate::memory::routing::Routing;
use crate::memory::thread_cache::{self, Home, Registry};
use crate::memory::types::{Counted, HeapId, PoolId};
use crate::sync::atomic::AtomicBool;
use crate::sync::{Mutex, SegQueue};

/// The record of a block of a pool.
pub(crate) type Record = thread_cache::Record<Shared>;
/// What a [`Record`] points to.
pub(crate) type BlockRecord = thread_cache::BlockRecord<Shared>;
/// A list of records.
pub(crate) type List = thread_cache::List<Shared>;
/// What a thread keeps of a pool.
pub(crate) type ThreadCache = thread_cache::ThreadCache<Shared>;

impl Home for Shared {
    type Extras = Extras;
}

/// Dropped with the last clone of a pool, whatever blocks are still out.
pub(crate) struct Handle {
    pub(super) shared: Arc<Shared>,
}

/// What all clones of a pool and all its blocks share.
pub(crate) struct Shared {
    /// Unique in the process.
    pub(super) id: PoolId,
    pub(crate) device: Device,
    pub(crate) config: PoolConfig,
    pub(crate) routing: Routing,
    pub(crate) core: Mutex<Core>,
    /// Every thread's cache. Locked after `core` where both are needed.
    pub(super) caches: Arc<Registry<Self>>,
    /// Blocks freed while another thread held the lock. The next thread that holds it takes them back.
    pub(crate) freed: SegQueue<(Record, Counted)>,
    /// Private heaps whose last holder was dropped meanwhile.
    pub(crate) released: SegQueue<HeapId>,
    /// Whether either queue may hold something.
    pub(super) has_queued: AtomicBool,
    pub(super) hooks: Arc<Hooks>,
}

impl Shared {
    #[inline]
    pub(super) fn check_device(&self, stream: &Stream) -> Result<()> {
        if stream.device().is_same(&self.device) {
            return Ok(());
        }
        Err(Error::argument(
            "allocate",
            "the stream belongs to another device",
        ))
    }

    #[inline]
    pub(crate) fn id(&self) -> PoolId {
        self.id
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shared({:?})", self.device)
    }
}
