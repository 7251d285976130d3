//! A caching CUDA allocator and mixed-precision runtime for people who write trainers.
//!
//! The modules, in reading order; each uses only those above it:
//!
//! - [`error`]: the crate's error type.
//! - [`units`]: bytes, alignment, newtypes.
//! - [`dtype`]: element types, their bit layouts and rounding.
//! - [`driver`]: the interface to a device; the host device and CUDA.
//! - [`memory`]: the allocator.
//! - [`storage`]: tensors in pool memory.
//! - [`ops`]: the operations that mixed-precision training needs, forward and backward.
//! - [`optim`]: parameters, optimizers, clipping.
//! - [`amp`]: loss scaling, autocast, overflow reports.
//! - [`checkpoint`]: saving and resuming a training run.
//! - [`telemetry`]: statistics for other programs.

#[cfg(not(target_pointer_width = "64"))]
compile_error!("kitsune needs 64-bit addresses");

pub mod error;
pub mod units;

mod sync;

#[cfg(test)]
mod fuzz;

pub mod dtype;

pub mod driver;

// A typed launcher for each kernel, with its host twin. Public for the tests and benches of this repository only: a launch
// takes addresses, and nothing but `storage` can promise that they are live.
#[doc(hidden)]
pub mod launch;

pub mod memory;

pub mod storage;

pub mod ops;

pub mod optim;

pub mod amp;

pub mod checkpoint;

pub mod telemetry;

pub use driver::{Device, Event, Graph, HostConfig, HostSchedule, Stream};
pub use dtype::{DType, Element, F8E4M3, F8E5M2, Overflow, bf16, f16};
pub use error::{Error, OutOfMemory, Result};
pub use memory::{Block, CapturedGraph, Pool, PoolConfig, PoolStats, PrivatePool, ReusePolicy};
pub use storage::{Buffer, Context, HostTensor, Shape, Tensor};

/// Compiles and runs the code in README.md and docs/ as doc tests.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/amp.md")]
    mod amp {}
    #[doc = include_str!("../docs/memory.md")]
    mod memory {}
    #[doc = include_str!("../docs/from-pytorch.md")]
    mod from_pytorch {}
    #[doc = include_str!("../docs/testing.md")]
    mod testing {}
}
