//! Tensors over pool memory.
//!
//! A [`Context`] pairs a stream with the pool that its memory comes from. A [`Buffer`] owns one block. A [`Tensor`] is
//! a typed, shaped view of a buffer; clones and views share the buffer.
//!
//! # Ordering
//! A tensor belongs to its context's stream, and everything done to it through this module is enqueued there, in the
//! order of the calls. Dropping the last tensor of a buffer frees the memory in stream order: work already enqueued can
//! still use it. To use data on another stream or device, copy it there with [`Tensor::copy_to`], which orders the two
//! streams.
//!
//! With the feature `cuda`, [`DeviceBuffer`] provides memory for code written against cudarc: its kernels, cuBLAS,
//! NCCL.
//!
//! Must not know: what the numbers mean.

mod buffer;
mod context;
mod convert;
#[cfg(feature = "cuda")]
mod device_buffer;
mod host_tensor;
mod layout;
mod metered;
mod overwrite;
mod tensor;
mod transfer;
mod version;

pub use buffer::Buffer;
pub use context::Context;
#[cfg(feature = "cuda")]
pub use device_buffer::{DeviceBuffer, DeviceView, DeviceViewMut, InUse};
pub use host_tensor::HostTensor;
pub use layout::{Layout, Shape};
pub(crate) use metered::{Meter, Metered};
pub(crate) use overwrite::{Attempt, Load};
pub use tensor::Tensor;
pub(crate) use version::moment;
