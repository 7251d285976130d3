//! What leaves the process for others to read: statistics, and [traces](trace) and [logs](ReplayCsv)
//! of allocations.
//!
//! Pools and scalers count for themselves, in plain numbers. This module reads those numbers and hands them
//! to the `metrics` facade, where whatever recorder the program installed (Prometheus, StatsD, a test's)
//! takes them. It is called, it is never calling back: publish after a step, or on a timer.
//!
//! Words. A *gauge* may go up and down; a *counter* only goes up, and is published as a total, so that
//! publishing twice counts nothing twice. Pools and scalers are published under names, which may be used again: the
//! total is that of all that had the name. Gauges are of those that still exist.
//!
//! Invariants: every metric stands in one table, in base units, and is described before it is published
//! under the same name. Must not know: how a recorder presents what it is given.
//!
//! ```
//! # #[cfg(feature = "metrics")] {
//! use kitsune::{Device, HostConfig, Pool, PoolConfig, telemetry};
//!
//! let device = Device::host(HostConfig::default())?;
//! let pool = Pool::new(&device, PoolConfig::default())?;
//! // After the recorder was installed: units and help texts, once.
//! telemetry::describe();
//! telemetry::publish(&pool);
//! # }
//! # Ok::<(), kitsune::Error>(())
//! ```

#[cfg(feature = "metrics")]
mod ledger;
#[cfg(feature = "metrics")]
mod metrics;
mod replay_csv;
pub mod trace;

pub use self::replay_csv::ReplayCsv;

#[cfg(feature = "metrics")]
pub use self::metrics::{
    describe, publish, publish_as, publish_fp8, publish_fp8_as, publish_scaler, publish_scaler_as,
    sweep,
};
