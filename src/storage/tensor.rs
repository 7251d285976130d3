//! A typed, shaped view of a buffer.

use std::fmt;
use std::sync::Arc;

use super::{Buffer, Context, Layout, Shape};
use crate::driver::DevicePtr;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::Span;

/// Elements of one type in device memory. Clones and views share the memory; dropping the last of them
/// frees it in stream order, as a [`Buffer`] does.
#[derive(Clone)]
pub struct Tensor {
    buffer: Arc<Buffer>,
    layout: Layout,
    dtype: DType,
}

impl Tensor {
    /// A tensor with undefined contents.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an invalid shape; [`Error::OutOfMemory`].
    pub fn uninit(context: &Context, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let layout = Layout::dense(shape.into())?;
        let Some(bytes) = dtype.bytes_for(layout.elements() as u64) else {
            return Err(Error::argument(
                "shape",
                format!("{} of {dtype} overflow", layout.shape()),
            ));
        };
        Ok(Self {
            buffer: Arc::new(Buffer::uninit(context, bytes)?),
            layout,
            dtype,
        })
    }

    /// A tensor over the start of `buffer`, which must be large enough for `layout`.
    #[cfg(feature = "cuda")]
    pub(super) fn over(buffer: Buffer, layout: Layout, dtype: DType) -> Self {
        Self {
            buffer: Arc::new(buffer),
            layout,
            dtype,
        }
    }

    /// The tensor's buffer; `None` if another tensor shares it.
    #[cfg(feature = "cuda")]
    pub(super) fn into_buffer(self) -> Option<Buffer> {
        Arc::into_inner(self.buffer)
    }

    /// A tensor of zeros.
    ///
    /// # Errors
    /// As [`uninit`](Self::uninit); [`Error::Driver`] if the fill cannot be enqueued.
    pub fn zeros(context: &Context, shape: impl Into<Shape>, dtype: DType) -> Result<Self> {
        let tensor = Self::uninit(context, shape, dtype)?;
        // All bits zero is zero in every element type.
        tensor.buffer.fill_bytes(0)?;
        Ok(tensor)
    }

    /// A tensor whose elements are all `value`, rounded once to `dtype`.
    ///
    /// # Errors
    /// As [`zeros`](Self::zeros).
    pub fn full(
        context: &Context,
        shape: impl Into<Shape>,
        dtype: DType,
        value: f64,
    ) -> Result<Self> {
        let tensor = Self::uninit(context, shape, dtype)?;
        tensor.fill(value)?;
        Ok(tensor)
    }

    /// Lengths of the dimensions, outermost first.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        self.layout.shape()
    }

    /// Distance between adjacent elements in each dimension, in elements.
    #[must_use]
    pub fn strides(&self) -> &[usize] {
        self.layout.strides()
    }

    /// Shape, strides and offset.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layout.elements()
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stream and pool of this tensor.
    #[must_use]
    pub fn context(&self) -> &Context {
        self.buffer.context()
    }

    /// The tensor's buffer, shared with clones and views.
    #[must_use]
    pub fn buffer(&self) -> &Arc<Buffer> {
        &self.buffer
    }

    /// Address of the first element.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr {
        self.buffer.ptr().offset(self.start_byte())
    }

    /// Byte offset of the first element in the buffer.
    pub(super) fn start_byte(&self) -> u64 {
        self.layout.offset() as u64 * (self.dtype.bits() / 8)
    }

    /// Whether the elements are contiguous in index order.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        self.layout.is_contiguous()
    }

    /// Whether both tensors are the same view of the same memory.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
            && self.layout == other.layout
            && self.dtype == other.dtype
    }

    /// The same elements under another shape; shares the memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the counts differ or the tensor is not contiguous.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        Ok(self.view(self.layout.reshape(shape.into())?))
    }

    /// Dimensions `first` and `second` exchanged; shares the memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such dimension.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        Ok(self.view(self.layout.transpose(first, second)?))
    }

    /// Index `start..start + len` of dimension `dim`; shares the memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such dimension or it is shorter.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        Ok(self.view(self.layout.narrow(dim, start, len)?))
    }

    fn view(&self, layout: Layout) -> Self {
        Self {
            buffer: self.buffer.clone(),
            layout,
            dtype: self.dtype,
        }
    }

    /// The elements as a kernel argument.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the tensor is not contiguous.
    pub(crate) fn span(&self) -> Result<Span> {
        if !self.is_contiguous() {
            let reason = format!("a view of strides {:?} is not contiguous", self.strides());
            return Err(Error::argument("span", reason));
        }
        Ok(self.storage_span())
    }

    /// Everything from the first element to the last, including gaps, as a kernel argument.
    #[must_use]
    pub(crate) fn storage_span(&self) -> Span {
        if self.is_contiguous() {
            // Kernels use all of a contiguous argument. A view with gaps may have more gaps than elements, so it is
            // not announced.
            let element = self.dtype.bits() / 8;
            let [start, bytes] =
                [self.layout.offset(), self.layout.extent()].map(|count| count as u64 * element);
            self.buffer.announce(start, bytes);
        }
        self.place()
    }

    /// [`storage_span`](Self::storage_span) without announcing it to the driver: for comparisons, or for a kernel that
    /// uses only a few of the elements.
    #[must_use]
    pub(crate) fn place(&self) -> Span {
        self.buffer
            .span(self.layout.offset(), self.layout.extent(), self.dtype)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tensor({} {} at {:#x})",
            self.dtype,
            self.shape(),
            self.ptr().0
        )
    }
}
