//! Private pools: memory for captured graphs.
//!
//! A graph has addresses written into it, so nobody else may have its memory for as long as it can run. A
//! [`PrivatePool`] is a heap of its own within a [`Pool`]: allocations are routed to it during a warm-up before the
//! capture and during the capture (`routing` says which), and its memory goes to nobody else until the handle and every
//! graph captured with it are dropped. After that, once the streams that ran its graphs have passed, the pool reuses
//! the idle part: the next allocation that needs more memory takes it, whether of the default heap or of another
//! private pool, and trimming and decay return it to the driver. Blocks that are still held stay where they are.
//!
//! In a capture, no event is recorded or queried, the host waits for nothing, and nothing is unmapped. New pages may be
//! taken, because that is no work of a stream. The same stream reuses memory freed in the capture at once, since its
//! order is the graph's order. Other streams cannot have it before the capture is over, because the pool does not know
//! which of them have joined the graph.
//!
//! Each warm-up and each capture begins with a wait of the host for all streams, which makes all free memory of the
//! private heap unowned. So the same allocations get the same memory each time.

use std::sync::Arc;

use crate::driver::{Graph, Stream};
use crate::error::{Error, Result};
use crate::memory::pool::{Pool, Shared, wait_for_streams};
use crate::memory::types::HeapId;

/// Memory set aside for captured graphs. Cheap to clone; all clones are the same.
///
/// Graphs captured with one private pool share its memory: each may use what the others left free. They must
/// therefore never run at the same time, and what one of them computed is kept only in blocks that are still
/// held when the next is captured.
///
/// # Examples
/// ```
/// use kitsune::{Device, HostConfig, Pool, PoolConfig};
///
/// let device = Device::host(HostConfig::default())?;
/// let pool = Pool::new(&device, PoolConfig::default())?;
/// let stream = device.create_stream()?;
/// let private = pool.private()?;
/// let step = || pool.allocate(1 << 20, &stream).map(drop);
/// private.prime(step)?;
/// let allocations = pool.stats().num_device_alloc;
/// let graph = private.capture(&stream, step)?;
/// assert_eq!(pool.stats().num_device_alloc, allocations);
/// // SAFETY: the captured work touches no memory but that of the graph.
/// unsafe { graph.launch(&stream) }?;
/// # Ok::<(), kitsune::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct PrivatePool {
    heap: Arc<PrivateMemory>,
}

/// Work captured with memory of a private pool, which it keeps.
#[derive(Debug)]
pub struct CapturedGraph {
    graph: Graph,
    heap: Arc<PrivateMemory>,
}

/// A private heap in use. Released with its last holder.
#[derive(Debug)]
struct PrivateMemory {
    shared: Arc<Shared>,
    index: HeapId,
}

impl Pool {
    /// A new private pool within this one: it counts to this pool's limit and statistics.
    ///
    /// # Errors
    /// [`Error::Driver`] if the device has no range of addresses for it.
    pub fn private(&self) -> Result<PrivatePool> {
        let shared = self.shared().clone();
        let index = shared.lock()?.add_private()?;
        Ok(PrivatePool {
            heap: Arc::new(PrivateMemory { shared, index }),
        })
    }
}

impl PrivatePool {
    /// Runs `work`, as a rule the work to be captured, so that the memory it needs is here afterwards.
    ///
    /// While it runs, every allocation of the calling thread from the pool comes from here; other threads
    /// are not affected. Passes nest, and a capture within a pass goes before it. First, the host waits for
    /// all streams that the pool served. The blocks that the pass leaves behind stay with their owners.
    ///
    /// A capture that allocates as the pass before it did calls no driver for memory if that pass
    /// did not: run passes until [`num_device_alloc`](crate::memory::PoolStats::num_device_alloc) stands still. The
    /// second as a rule takes nothing new.
    pub fn prime<T>(&self, work: impl FnOnce() -> T) -> T {
        let PrivateMemory { shared, index } = &*self.heap;
        // In a broken pool, what `work` allocates is refused.
        drop(self.start_afresh());
        let _scope = shared.routing.begin_warm_up(shared.id(), *index);
        work()
    }

    /// Records the work that `enqueue` puts on `stream` instead of running it, as [`Stream::capture`] does,
    /// with memory from here.
    ///
    /// Until `enqueue` returns, every allocation from the pool for `stream`, and for streams that joined the
    /// capture, comes from here, whichever thread asks. Allocate for another stream after it joined: before
    /// that it gets the default heap, which a graph must not use beyond its block's life. First, the host
    /// waits for all streams that the pool served.
    ///
    /// # Errors
    /// What `enqueue` returns; [`Error::InvalidArgument`] for a stream of another device, and while another
    /// capture with memory of this pool is under way; [`Error::Driver`] and [`Error::Capturing`] as
    /// [`Stream::capture`]. The capture is over in any case, and what it freed is here again.
    pub fn capture(
        &self,
        stream: &Stream,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<CapturedGraph> {
        let PrivateMemory { shared, index } = &*self.heap;
        if !stream.device().is_same(&shared.device) {
            let reason = "the stream belongs to another device";
            return Err(Error::argument("capture", reason));
        }
        self.start_afresh()?;
        let graph = stream.capture(|| {
            let _scope = shared.routing.begin_capture(stream, *index)?;
            enqueue()
        })?;
        Ok(CapturedGraph {
            graph,
            heap: self.heap.clone(),
        })
    }

    /// Bytes held from the driver for this private pool.
    #[must_use]
    pub fn reserved_bytes(&self) -> u64 {
        let PrivateMemory { shared, index } = &*self.heap;
        let core = shared.look();
        core.heaps.get(*index).totals().reserved_bytes
    }

    /// Makes all free memory here unowned. The host waits for all streams for that.
    fn start_afresh(&self) -> Result<()> {
        let shared = &self.heap.shared;
        wait_for_streams(shared, &mut shared.lock()?)
    }
}

impl CapturedGraph {
    /// Enqueues the captured work on `stream`.
    ///
    /// # Errors
    /// [`Error::Driver`] if the driver refuses; [`Error::InvalidArgument`] for a stream of another device.
    ///
    /// # Safety
    /// Until `stream` has passed this point, no other graph on the same private pool runs, nor a pass of it;
    /// memory outside the private pool that the captured work touches is still allocated and untouched by
    /// others; and so are those blocks of the private pool that the work touches and that outlived the
    /// capture, for as long as they are held.
    #[expect(
        unsafe_code,
        reason = "a graph uses addresses that were live when it was captured"
    )]
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let shared = &self.heap.shared;
        if !stream.device().is_same(&shared.device) {
            let reason = "the stream belongs to another device";
            return Err(Error::argument("launch", reason));
        }
        // Before it runs: from now on the pool waits for the stream before the memory goes.
        shared.lock()?.note_launch(self.heap.index, stream);
        // SAFETY: the caller vouches for all memory but that of the private pool, which this graph keeps.
        unsafe { self.graph.launch(stream) }
    }

    /// A handle of the graph's private pool, for capturing another graph with the same memory.
    #[must_use]
    pub fn private_pool(&self) -> PrivatePool {
        PrivatePool {
            heap: self.heap.clone(),
        }
    }
}

impl Drop for PrivateMemory {
    fn drop(&mut self) {
        self.shared.release_memory(self.index);
    }
}
