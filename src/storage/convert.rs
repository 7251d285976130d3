//! Filling, converting and rearranging elements on one stream.

use super::Tensor;
use crate::dtype::{DType, Overflow};
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
    /// being the same view; [`Error::UnsupportedDtype`] for a conversion between float and integer.
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

    /// The same values in another element type, rounded once. Values that are too large become infinity (NaN in e4m3,
    /// which has no infinity). If the tensor already has that type, returns a clone that shares its memory.
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

    /// The same values in an 8-bit type, rounded once. `overflow` selects the result for values that are too large,
    /// where [`cast`](Self::cast) uses infinity. If the tensor already has that type, returns a clone that shares its
    /// memory.
    ///
    /// # Errors
    /// As [`cast`](Self::cast); [`Error::UnsupportedDtype`] if `dtype` has more than 8 bits.
    ///
    /// # Examples
    /// ```
    /// # use kitsune::{Context, DType, Device, F8E4M3, Overflow, Tensor};
    /// # let context = Context::new(&Device::auto()?)?;
    /// let x = Tensor::from_slice(&context, [3], &[17.0f32, -1000.0, f32::INFINITY])?;
    /// let saturated = x.cast_with(DType::F8E4M3, Overflow::Saturate)?;
    /// assert_eq!(saturated.cast(DType::F32)?.to_vec::<f32>()?, [16.0, -448.0, 448.0]);
    /// let plain = x.cast(DType::F8E4M3)?.to_vec::<F8E4M3>()?;
    /// assert!(plain[1].is_nan() && plain[2].is_nan());
    /// # Ok::<(), kitsune::Error>(())
    /// ```
    pub fn cast_with(&self, dtype: DType, overflow: Overflow) -> Result<Self> {
        if !dtype.is_f8() {
            return Err(Error::UnsupportedDtype {
                op: "cast_with",
                dtype,
            });
        }
        if self.dtype() == dtype {
            return Ok(self.clone());
        }
        let converted = Self::uninit(self.context(), self.shape(), dtype)?;
        let dense = self.contiguous()?;
        let stream = self.context().stream();
        launch::cast_with(stream, &dense.span()?, &converted.span()?, overflow)?;
        Ok(converted)
    }

    /// The same values, contiguous in index order. If the tensor already is contiguous, returns a clone that shares
    /// its memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Driver`] if the copy cannot be enqueued.
    pub fn contiguous(&self) -> Result<Self> {
        if self.is_contiguous() {
            return Ok(self.clone());
        }
        self.duplicate()
    }

    /// A copy in new memory, on the same stream.
    ///
    /// # Errors
    /// As [`contiguous`](Self::contiguous).
    pub fn duplicate(&self) -> Result<Self> {
        let copy = Self::uninit(self.context(), self.shape(), self.dtype())?;
        copy.copy_from(self)?;
        Ok(copy)
    }
}
