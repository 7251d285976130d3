//! Moving elements between the host, streams and devices.

use super::{Context, Shape, Tensor};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::memory::PinnedBlock;

impl Tensor {
    /// A tensor with the elements of `values`, which may be reused as soon as this returns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `values` does not have as many elements as `shape`;
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if the copy cannot be enqueued.
    pub fn from_slice<T: Element>(
        context: &Context,
        shape: impl Into<Shape>,
        values: &[T],
    ) -> Result<Self> {
        let shape = shape.into();
        if shape.elements() != Some(values.len()) {
            let reason = format!("{} values do not make a tensor of {shape}", values.len());
            return Err(Error::argument("from_slice", reason));
        }
        let tensor = Self::uninit(context, shape, T::DTYPE)?;
        tensor.buffer().write(0, bytemuck::cast_slice(values))?;
        Ok(tensor)
    }

    /// Overwrites the elements with `values`, in stream order. `values` may be reused as soon as this returns.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the type or the count differs; otherwise as [`copy_from`](Self::copy_from).
    pub fn copy_from_slice<T: Element>(&self, values: &[T]) -> Result<()> {
        self.expect_dtype("copy_from_slice", T::DTYPE)?;
        if self.is_contiguous() && self.len() == values.len() {
            return self
                .buffer()
                .write(self.start_byte(), bytemuck::cast_slice(values));
        }
        self.copy_from(&Self::from_slice(self.context(), self.shape(), values)?)
    }

    /// Overwrites the elements with the first bytes of `source`, in stream order, in index order and the
    /// host's byte order. Does not wait for the copy. `source` may be dropped; accessing its bytes waits for the copy.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `source` is shorter than the elements or is on another platform;
    /// [`Error::Capturing`] during a capture, with nothing enqueued; [`Error::OutOfMemory`] for a tensor
    /// that is not contiguous; [`Error::Driver`] if the copy cannot be enqueued.
    pub fn copy_from_pinned(&self, source: &mut PinnedBlock) -> Result<()> {
        let bytes = self.expect_room("copy_from_pinned", source)?;
        if self.is_contiguous() && self.layout().offset() == 0 {
            return self.buffer().write_pinned(source, bytes);
        }
        let dense = Self::uninit(self.context(), self.shape(), self.dtype())?;
        dense.buffer().write_pinned(source, bytes)?;
        self.copy_from(&dense)
    }

    /// Copies the elements to the start of `destination`, in stream order, in index order and the host's
    /// byte order. Does not wait for the copy; accessing the bytes of `destination` does.
    ///
    /// # Errors
    /// As [`copy_from_pinned`](Self::copy_from_pinned).
    pub fn copy_to_pinned(&self, destination: &mut PinnedBlock) -> Result<()> {
        let bytes = self.expect_room("copy_to_pinned", destination)?;
        let dense = self.contiguous()?;
        dense
            .buffer()
            .read_pinned(dense.start_byte(), destination, bytes)
    }

    /// The elements in index order. Blocks until the stream has computed them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `T` is not the element type; [`Error::Driver`] if earlier work failed.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype("to_vec", T::DTYPE)?;
        let dense = self.contiguous()?;
        let mut values = vec![T::default(); dense.len()];
        let bytes = bytemuck::cast_slice_mut(&mut values);
        dense.buffer().read(dense.start_byte(), bytes)?;
        Ok(values)
    }

    /// The only element. Blocks until the stream has computed it.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is not exactly one element, or `T` is not its type;
    /// [`Error::Driver`] if earlier work failed.
    pub fn item<T: Element>(&self) -> Result<T> {
        if self.len() != 1 {
            return Err(Error::argument(
                "item",
                format!("a tensor of {} elements", self.len()),
            ));
        }
        Ok(self.to_vec()?[0])
    }

    /// A copy on another stream, or on another device of the same platform. The copy is ordered with both streams: it
    /// runs after everything enqueued for this tensor so far, and before anything enqueued later.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the devices are on different platforms; [`Error::OutOfMemory`];
    /// [`Error::Driver`] if the copy cannot be enqueued.
    pub fn copy_to(&self, context: &Context) -> Result<Self> {
        let (to, from) = (context.device(), self.context().device());
        if to.driver().platform() != from.driver().platform() {
            return Err(Error::argument(
                "copy_to",
                format!("{from:?} cannot reach {to:?}"),
            ));
        }
        let dense = self.contiguous()?;
        let copy = Self::uninit(context, self.shape(), self.dtype())?;
        copy.buffer()
            .copy_across(dense.buffer(), dense.start_byte(), copy.buffer().bytes())?;
        Ok(copy)
    }

    /// The size of all elements in bytes; an error if `pinned` is smaller.
    fn expect_room(&self, op: &'static str, pinned: &PinnedBlock) -> Result<u64> {
        let bytes = self.len() as u64 * (self.dtype().bits() / 8);
        if bytes <= pinned.bytes() {
            return Ok(bytes);
        }
        let reason = format!(
            "the elements are {bytes} bytes, the block has {}",
            pinned.bytes()
        );
        Err(Error::argument(op, reason))
    }

    fn expect_dtype(&self, op: &'static str, dtype: DType) -> Result<()> {
        if self.dtype() == dtype {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!("the tensor is {}, not {dtype}", self.dtype()),
        ))
    }
}
