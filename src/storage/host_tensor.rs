//! Tensors in host memory, for saving and loading.
//!
//! The bytes are those of the device, so a round trip keeps every bit, including NaN payloads.

use std::fmt;
use std::sync::Arc;

use super::{Context, Layout, Shape, Tensor};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::units::to_usize;

/// Elements of one type and their shape, in index order and the host's byte order. Clones share them.
#[derive(Clone, PartialEq, Eq)]
pub struct HostTensor {
    dtype: DType,
    shape: Shape,
    bytes: Arc<Vec<u8>>,
}

impl HostTensor {
    /// Elements whose bytes are `bytes`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an invalid shape, or if the number of bytes does not match it.
    pub fn new(dtype: DType, shape: impl Into<Shape>, bytes: Vec<u8>) -> Result<Self> {
        let shape = shape.into();
        let elements = Layout::dense(shape.clone())?.elements() as u64;
        if dtype.bytes_for(elements) != Some(bytes.len() as u64) {
            let reason = format!("{} bytes do not make {shape} of {dtype}", bytes.len());
            return Err(Error::argument("HostTensor::new", reason));
        }
        Ok(Self {
            dtype,
            shape,
            bytes: Arc::new(bytes),
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_slice<T: Element>(shape: impl Into<Shape>, values: &[T]) -> Result<Self> {
        Self::new(T::DTYPE, shape, bytemuck::cast_slice(values).to_vec())
    }

    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Lengths of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The elements' bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The elements.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `T` is not their type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.dtype {
            let reason = format!("the elements are {}, not {}", self.dtype, T::DTYPE);
            return Err(Error::argument("HostTensor::to_vec", reason));
        }
        let mut values = vec![T::default(); self.bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&self.bytes);
        Ok(values)
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostTensor({} {})", self.dtype, self.shape)
    }
}

impl Tensor {
    /// The elements on the host, in index order. Blocks until the stream has computed them.
    ///
    /// # Errors
    /// [`Error::Driver`] if earlier work failed; [`Error::OutOfMemory`] for a view with gaps.
    pub fn to_host(&self) -> Result<HostTensor> {
        let dense = self.contiguous()?;
        let bytes = self.len() as u64 * (self.dtype().bits() / 8);
        let mut bytes = vec![0; to_usize(bytes)];
        dense.buffer().read(dense.start_byte(), &mut bytes)?;
        Ok(HostTensor {
            dtype: self.dtype(),
            shape: self.shape().clone(),
            bytes: Arc::new(bytes),
        })
    }

    /// A tensor with the elements of `host`, which may be dropped as soon as this returns.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if the copy cannot be enqueued.
    pub fn from_host(context: &Context, host: &HostTensor) -> Result<Self> {
        let tensor = Self::uninit(context, &host.shape, host.dtype)?;
        tensor.buffer().write(0, &host.bytes)?;
        Ok(tensor)
    }
}
