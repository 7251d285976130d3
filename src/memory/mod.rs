//! The allocator: device memory, cached and reused in stream order.
//!
//! # Words
//! *Requested ≤ allocated ≤ active ≤ reserved* bytes: asked for ≤ rounded and in callers' hands ≤ plus
//! freed but waiting for other streams ≤ held from the driver. A *page* is 2 MiB of physical memory with
//! one *home* address; the homes of all pages form the *territory*. A *block* is what a caller gets; its
//! *home stream* is the one it was allocated for. A *hole* is a free part of the territory, owned by the
//! stream that freed it. A *range* maps pages a second time, side by side. A *fence* (stream, epoch) is
//! the point after which a hole may be touched by others. A *segment* is one driver allocation: a page, or
//! where the device cannot map pages, a plain allocation.
//!
//! # The protocol
//! A block is freed in stream order: the moment its owner drops it, the next allocation on the home stream
//! may have it, because everything that stream will do comes after everything it has been given so far. No
//! event, no wait. This holds only if the host enqueued the last use before it dropped the block, which
//! Rust's ownership gives, also across threads: handing a block over and freeing it through the pool's lock
//! or its queue are both release/acquire edges.
//!
//! A stream other than home that touches the block must be named through
//! [`Block::record_stream`]. The free then stamps a fence for each such stream, and the block stays
//! *active* until the home stream has passed all of them. [`Block::record_use`] stamps the fence at the call.
//!
//! Another stream may take a hole once it has passed the hole's fence, as far as [`ReusePolicy`] lets it
//! find out (an event recorded when the memory is wanted, and asked) or bring it about (a wait on the
//! device). The host waits only when memory has run out.
//!
//! A stream that nobody but the pool holds gets no more work. Once it has run what it was given, the pool lets go
//! of it, and its holes become anyone's: looked at whenever a new stream is met.
//!
//! A captured graph needs memory that is nobody else's: a [`PrivatePool`], a *memory* of its own under the same
//! lock, to which allocations for captured streams are *routed*.
//!
//! # Where a block comes from
//! In order: the lane of the calling thread and stream; a hole of the stream; a hole of another stream behind a fence; new pages, within a small slack
//! of the most ever in use; free pages from anywhere, stitched in a range; new pages. Then, when the device
//! or the limit refuses: room among other streams' small blocks, lent; the program's callbacks; waiting on the
//! host, stream by stream; returning idle pages; failing with a report, told to the program's observers.
//!
//! # The files
//! `territory` (holes in pages, with `starts` and `freed`), `arena` (small blocks), `bins` (best fit, of blocks in a
//! `slab`), `ranges` (second mappings, at `addresses` reserved ahead) and `fences` keep the books; `paged`, `growth`
//! and `stitch` act on them; `segmented` does without page mapping; `memories` holds one of these for the pool and one
//! for each private pool; `state` adds statistics, `spares` keeps records (`record` is where they lie, `packed` what
//! they say in little room), `reclaim` has the ladder (with `wanted`, `waits`, `hooks` and `report`), `pool` the calls,
//! `lock` and `guard` the lock, `controls` and `decay` what shrinks a pool. What needs no lock of the pool is in
//! `cache`: `contents`, made of `lane`s, behind `biased`. Captures are in `routes` and `private`. `peaks` counts for a
//! part of a program, `wrap` is what stands around a pool: limits, logs, the table of live blocks. `pinned` is the pool
//! of host memory for staging.
//!
//! Must not know: tensors, element types, metrics.

mod addresses;
mod arena;
mod backing;
mod biased;
mod bins;
mod block;
mod cache;
mod config;
mod contents;
mod controls;
mod counts;
mod decay;
mod fences;
mod freed;
mod growth;
mod guard;
mod hooks;
mod lane;
mod local;
mod lock;
mod memories;
mod packed;
mod paged;
mod peaks;
mod pending;
mod pinned;
mod poison;
mod pool;
mod private;
mod ranges;
mod reclaim;
mod record;
mod report;
mod routes;
mod segmented;
mod slab;
mod small;
mod spares;
mod starts;
mod state;
mod stats;
mod stitch;
mod tags;
mod territory;
mod waits;
mod wanted;
mod wrap;

pub use block::Block;
pub use config::{PoolConfig, ReusePolicy};
pub use hooks::Registration;
pub use peaks::{PeakScope, ScopeStats, ScopedStat};
pub use pinned::{PinnedBlock, PinnedConfig, PinnedPool, PinnedStats};
pub use pool::Pool;
pub use private::{CapturedGraph, PrivatePool};
pub use stats::{PoolStats, Stat};
pub use tags::{TagScope, TagStat, tag};
pub use wrap::{
    Allocate, Limit, Log, LogAction, LogError, LogEvent, LogSink, Track, TrackReport, TrackedBlock,
    Watch,
};
