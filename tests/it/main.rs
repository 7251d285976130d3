//! Integration tests: one program, a folder for each module of the library.
//!
//! `cargo test --test it memory::model` runs one suite. Suites take their device, their seeds and their simulated
//! drivers from [`support`]. A test that needs a process for itself asks [`support::process`] for one.
//!
//! A build for AddressSanitizer has only the suites that `.ci/run asan` runs, because it takes minutes to compile.

#[cfg(not(asan))]
mod amp;
#[cfg(asan)]
mod amp {
    mod edges;
}
#[cfg(not(asan))]
mod checkpoint;
#[cfg(all(target_os = "linux", feature = "cuda", not(asan)))]
mod cuda;
mod driver;
#[cfg(not(asan))]
mod kernels;
mod memory;
#[cfg(not(asan))]
mod ops;
#[cfg(not(asan))]
mod optim;
mod storage;
mod support;
#[cfg(all(feature = "metrics", not(asan)))]
mod telemetry;
#[cfg(not(asan))]
mod tidy;
