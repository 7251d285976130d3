//! A tensor in 8 bits, with what its elements are to be multiplied by.

use crate::dtype::DType;
use crate::error::Result;
use crate::launch;
use crate::storage::Tensor;

/// Numbers of 8 bits and one over their scale, which is theirs alone: a scale that moves later does not touch them.
/// Clones share the memory.
#[derive(Clone, Debug)]
pub struct Quantized {
    pub(super) values: Tensor,
    pub(super) inverse: Tensor,
}

impl Quantized {
    /// The scaled numbers, of the shape of what was converted.
    #[must_use]
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// What they are to be multiplied by: an f32.
    #[must_use]
    pub fn inverse_scale(&self) -> &Tensor {
        &self.inverse
    }

    /// The numbers in a wider type: multiplied in f32 (f64 for f64), and rounded to `dtype`.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`](crate::Error::UnsupportedDtype) if `dtype` is no float of 16 bits or more;
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
