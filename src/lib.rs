//! Memory and mixed precision for people who write trainers.
//!
//! The modules, in reading order; each uses only those above it:
//!
//! - [`error`]: what can go wrong, told so that a caller can act on it.
//! - [`units`]: bytes, alignment, newtypes.
//! - [`dtype`]: element types, their bits and roundings.
//! - [`driver`]: everything that is asked of a device; the host device.
//! - [`launch`]: one typed launcher a kernel, beside its host twin.
//! - [`memory`]: the allocator.
//! - [`storage`]: tensors over pool memory.
//! - [`ops`]: what a trainer computes around mixed precision, forward and backward.
//! - [`optim`]: parameters, optimizers, clipping.
//! - [`amp`]: loss scaling, autocast, overflow reports.
//! - [`checkpoint`]: trainings in files.
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

/// The code in README.md and in docs/, run as tests.
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
