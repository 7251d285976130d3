//! A tensor in 8 bits, with the factor that restores its elements.

use crate::dtype::DType;
use crate::error::Result;
use crate::launch;
use crate::storage::Tensor;

/// Elements of 8 bits and the inverse of their scale. It is a copy, so later changes of the scale do not affect it.
/// Clones share the memory.
#[derive(Clone, Debug)]
pub struct Quantized {
    pub(super) values: Tensor,
    pub(super) inverse: Tensor,
}

impl Quantized {
    /// The scaled elements, in the shape of the converted tensor.
    #[must_use]
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// The factor that restores the elements: an f32.
    #[must_use]
    pub fn inverse_scale(&self) -> &Tensor {
        &self.inverse
    }

    /// The elements in a wider type: multiplied in f32 (f64 for f64) and rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) unless `dtype` is a float of 16 bits or more;
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory).
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        let context = self.values.context();
        let wide = Tensor::uninit(context, self.values.shape(), dtype)?;
        launch::dequantize(
            context.stream(),
            &self.values.span()?,
            &self.inverse.span()?,
            &wide.span()?,
        )?;
        Ok(wide)
    }
}
