//! Filling, converting and rearranging elements on one stream.

use super::Tensor;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;

impl Tensor {
    /// Sets every element to `value`, rounded once.
    ///
    /// # Errors
    /// [`Error::Driver`] if it cannot be enqueued; for a view with gaps also [`Error::OutOfMemory`].
    pub fn fill(&self, value: f64) -> Result<()> {
        self.mark_written();
        if self.is_contiguous() {
            return launch::fill(self.context().stream(), &self.storage_span(), value);
        }
        self.copy_from(&Self::full(
            self.context(),
            self.shape(),
            self.dtype(),
            value,
        )?)
    }

    /// Overwrites the elements with those of `source`, converted with one rounding.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the shapes differ, the streams differ, or the two overlap without
    /// being the same; [`Error::UnsupportedDtype`] for a conversion between float and integer.
    pub fn copy_from(&self, source: &Self) -> Result<()> {
        if self.shape() != source.shape() {
            let reason = format!("{} does not fit {}", source.shape(), self.shape());
            return Err(Error::argument("copy_from", reason));
        }
        if self.is_same(source) {
            return Ok(());
        }
        self.mark_written();
        let stream = self.context().stream();
        let (to, from) = (self.storage_span(), source.storage_span());
        if self.is_contiguous() && source.is_contiguous() {
            return launch::cast(stream, &from, &to);
        }
        let copy = launch::StridedCopy {
            shape: self.shape(),
            src: &from,
            src_strides: source.strides(),
            dst: &to,
            dst_strides: self.strides(),
        };
        launch::copy_strided(stream, &copy)
    }

    /// The same values in another element type, rounded once. The tensor itself, sharing its memory, if it
    /// has that type already.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::UnsupportedDtype`] for a conversion between float and integer.
    pub fn cast(&self, dtype: DType) -> Result<Self> {
        if self.dtype() == dtype {
            return Ok(self.clone());
        }
        let converted = Self::uninit(self.context(), self.shape(), dtype)?;
        converted.copy_from(self)?;
        Ok(converted)
    }

    /// The same values one after another in index order. The tensor itself, sharing its memory, if they
    /// stand so already.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if the copy cannot be enqueued.
    pub fn contiguous(&self) -> Result<Self> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        self.duplicate()
    }

    /// A copy with memory of its own, on the same stream.
    ///
    /// # Errors
    /// As [`contiguous`](Self::contiguous).
    pub fn duplicate(&self) -> Result<Self> {
        let copy = Self::uninit(self.context(), self.shape(), self.dtype())?;
        copy.copy_from(self)?;
        Ok(copy)
    }
}
