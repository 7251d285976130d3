//! Integration tests: one program, a folder for each module of the library.
//!
//! `cargo test --test it memory::model` runs one suite. Suites take their device, their seeds and their simulated
//! drivers from [`support`]. A test that needs a process for itself asks [`support::process`] for one.

mod amp;
mod checkpoint;
#[cfg(all(target_os = "linux", feature = "cuda"))]
mod cuda;
mod driver;
mod kernels;
mod memory;
mod ops;
mod optim;
mod storage;
mod support;
#[cfg(feature = "metrics")]
mod telemetry;
mod tidy;
