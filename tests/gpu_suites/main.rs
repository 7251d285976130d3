//! The suites that run on a machine with a GPU, as one program: what `scripts/gpu/pack` carries there.
//!
//! They are those of `tests/it` that take their device from [`support::device`]: `gpu_suites amp::scaler` runs one.
//! `cargo test` leaves this program out, since `it` runs the same tests.

#[path = "../it/amp/mod.rs"]
mod amp;
#[path = "../it/kernels/mod.rs"]
mod kernels;
mod memory;
#[path = "../it/ops/mod.rs"]
mod ops;
#[path = "../it/optim/mod.rs"]
mod optim;
#[path = "../it/storage/mod.rs"]
mod storage;
#[path = "../it/support/mod.rs"]
mod support;
