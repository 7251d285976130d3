//! The allocator: device memory, cached and reused in stream order.
//!
//! # Words
//! - A *block* is device memory in a caller's hands. Its *home stream* is the one it was allocated for.
//! - A *request* is an allocation that a thread cache could not serve, and a *placement* is the memory found for it.
//! - A *page* is 2 MiB of physical memory. A *mapping* gives pages addresses; a *reservation* is a range of addresses
//!   that pages can be mapped to.
//! - A *page heap* divides mapped pages into blocks and *free blocks*. The stream that freed it owns a free block.
//! - A *backend* takes memory from the driver: pages for a page heap or, where the device cannot map pages, plain
//!   allocations. A *segment* is one driver allocation of either kind.
//! - A *heap* is a backend with its books. A pool has a default heap, and one for each private pool.
//! - A *fence* is a point in a stream. Other streams may touch a free block after its fence.
//! - A *deferred free* is a freed block that other streams may still be using.
//! - A *thread cache* keeps blocks that its thread freed. Its *overflow* waits for the pool to take it back.
//! - An *adaptor* is an allocator around another one: a limit, a log, a table of live blocks.
//!
//! Four totals in bytes, each at least the one before: *requested* (asked for), *allocated* (rounded up, in callers'
//! hands), *active* (with deferred frees), *reserved* (held from the driver).
//!
//! # The protocol
//! A block is freed in stream order: as soon as its owner drops it, the next allocation on the home stream can reuse
//! it, because work enqueued later on that stream runs after all work enqueued before. This needs no event and no wait.
//! It holds only if the host enqueued the last use before it dropped the block. Rust's ownership ensures that, also
//! across threads: handing a block over and freeing it through the pool's lock or queue are release/acquire edges.
//!
//! Name every other stream that touches the block through [`Block::record_stream`]. The free is then deferred until the
//! home stream has passed a fence in each of them. [`Block::record_use`] sets the fence at the call.
//!
//! Another stream can take a free block once it has passed the block's fence. [`ReusePolicy`] says how the pool may
//! find that out (record an event when the memory is wanted, and query it) or bring it about (a wait on the device).
//! The host waits only when memory has run out.
//!
//! A stream that only the pool still holds can get no new work. Once its work is done, the pool drops it, and every
//! stream may use its free blocks.
//!
//! A captured graph needs memory that nobody else uses: a [`PrivatePool`] has a heap of its own under the same lock,
//! and allocations for captured streams are routed to it.
//!
//! # Where a block comes from
//! `pool/allocate.rs` has the path, in this order: the thread cache; a free block of the stream; a free block of
//! another stream, behind its fence; new pages, while the pool holds little more than its peak in use; free pages from
//! anywhere, stitched in a new mapping; new pages; room among other streams' small blocks. When the device or the limit
//! refuses, `pool/reclaim.rs` goes on: the threads' caches; the program's callbacks; waits on the host, stream by
//! stream; returning idle pages; failure with a report.
//!
//! # Rooms
//! Each module below uses only modules declared before it, and nothing before `pool` knows the pool. `cargo tidy`
//! checks both.
//!
//! Must not know: tensors, element types, metrics.

// How a pool behaves, as the program sets it.
pub(crate) mod config;

// Plain data that the rooms share: sizes, identities, fences, placements, requests.
pub(crate) mod types;

// A lock that refuses its data once a panic has unwound through it.
pub(crate) mod guard;

// Which memory has been idle long enough to go back to the driver.
pub(crate) mod decay;

// What the fast path reads of the calling thread.
pub(crate) mod thread_locals;

// Counters, peaks and tags.
pub(crate) mod statistics;

// Free blocks by size, and blocks that tile a segment.
pub(crate) mod free_list;

// How far streams are, who may use whose memory, deferred frees.
pub(crate) mod streams;

// Which bytes of the mapped pages are free, and for whom.
pub(crate) mod page_heap;

// Memory from the driver: pages, mappings, segments; the heaps of a pool.
pub(crate) mod backend;

// What a thread keeps of a pool, without the pool's lock.
pub(crate) mod thread_cache;

// Which allocations go to a private pool.
pub(crate) mod routing;

// The pool: the paths of an allocation and of a free, the lock, reclaiming.
pub(crate) mod pool;

// Private pools and captured graphs.
pub(crate) mod capture;

// Allocators around allocators.
pub(crate) mod adaptor;

// Pinned host memory for staging.
pub(crate) mod pinned;

pub use adaptor::{
    Allocate, Limit, Log, LogAction, LogError, LogEvent, LogSink, Track, TrackReport, TrackedBlock,
};
pub use capture::{CapturedGraph, PrivatePool};
pub use config::{PoolConfig, ReusePolicy};
pub use pinned::{PinnedBlock, PinnedConfig, PinnedPool, PinnedStats};
pub use pool::{Block, PeakScope, Pool, Registration, Watch};
pub use statistics::{PoolStats, ScopeStats, ScopedStat, Stat, TagScope, TagStat, tag};
