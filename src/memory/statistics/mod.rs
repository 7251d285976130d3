//! What a pool counts.
//!
//! A [`Gauge`] follows one quantity: its current value, its peak, and the sums of increases and decreases. [`Usage`]
//! has the gauges of what callers hold. Threads count in [`Counts`] of their own and fold them into the pool's, so a
//! part can have seen more frees than allocations. [`TagTable`] counts bytes by tag, [`Peaks`] has the peaks of scopes.
//!
//! The pool updates plain numbers under its lock. Exporting them is the work of `telemetry`.

mod gauge;
mod peaks;
mod pool_stats;
mod tags;
mod thread_counts;

pub use gauge::Stat;
pub(crate) use gauge::{Gauge, Usage};
pub(crate) use peaks::Peaks;
pub use peaks::{ScopeStats, ScopedStat};
pub use pool_stats::PoolStats;
pub(crate) use tags::TagTable;
pub use tags::{TagScope, TagStat, tag};
pub(crate) use thread_counts::Counts;
