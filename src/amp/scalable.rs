//! Values that can be scaled: tensors, losses, and collections of them.

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::ops::Loss;
use crate::storage::Tensor;

/// Something [`GradScaler::scale`](crate::amp::GradScaler::scale) can multiply by the loss scale.
pub trait Scalable {
    /// The type of the scaled value.
    type Output;

    /// The value multiplied by `scale`, an f32 on the device; for `None` the value itself, sharing its memory.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for integers and 8-bit types; [`Error::InvalidArgument`] on another stream than the
    /// scale; [`Error::OutOfMemory`].
    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self::Output>;
}

impl Scalable for Tensor {
    type Output = Self;

    /// The product is f32, or f64 for f64. PyTorch keeps 16 bits for tensors of one dimension or more, although 1
    /// times the initial scale is infinite in f16.
    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self> {
        let Some(scale) = scale else {
            return Ok(self.clone());
        };
        if !self.dtype().is_computed() {
            return Err(Error::UnsupportedDtype {
                op: "scale",
                dtype: self.dtype(),
            });
        }
        expect_stream(self, scale)?;
        let wide = if self.dtype() == DType::F64 {
            DType::F64
        } else {
            DType::F32
        };
        let scaled = Self::uninit(self.context(), self.shape(), wide)?;
        let input = self.contiguous()?;
        launch::scale(
            self.context().stream(),
            &input.span()?,
            &scale.span()?,
            &scaled.span()?,
        )?;
        Ok(scaled)
    }
}

impl Scalable for Loss {
    type Output = Self;

    /// The value and the gradient that its backward pass starts from are both multiplied.
    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self> {
        match scale {
            // Calls `Loss::scaled_by`, an inherent method, which takes precedence over this trait's.
            Some(scale) => {
                expect_stream(self.value(), scale)?;
                Self::scaled_by(self, scale)
            }
            None => Ok(self.clone()),
        }
    }
}

/// Refuses `outputs` on another stream than `scale`.
fn expect_stream(outputs: &Tensor, scale: &Tensor) -> Result<()> {
    if outputs.context().stream().id() == scale.context().stream().id() {
        return Ok(());
    }
    let reason =
        format!("{outputs:?} is on another stream than the scaler; copy_to its context first");
    Err(Error::argument("scale", reason))
}

impl<T: Scalable + ?Sized> Scalable for &T {
    type Output = T::Output;

    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<T::Output> {
        (**self).scaled_by(scale)
    }
}

impl<T: Scalable> Scalable for [T] {
    type Output = Vec<T::Output>;

    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self::Output> {
        self.iter().map(|item| item.scaled_by(scale)).collect()
    }
}

impl<T: Scalable> Scalable for Vec<T> {
    type Output = Vec<T::Output>;

    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self::Output> {
        self.as_slice().scaled_by(scale)
    }
}

impl<T: Scalable, const N: usize> Scalable for [T; N] {
    type Output = Vec<T::Output>;

    fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self::Output> {
        self.as_slice().scaled_by(scale)
    }
}

macro_rules! tuple {
    ($($item:ident $place:tt),+) => {
        impl<$($item: Scalable),+> Scalable for ($($item,)+) {
            type Output = ($($item::Output,)+);

            fn scaled_by(&self, scale: Option<&Tensor>) -> Result<Self::Output> {
                Ok(($(self.$place.scaled_by(scale)?,)+))
            }
        }
    };
}

tuple!(A 0, B 1);
tuple!(A 0, B 1, C 2);
tuple!(A 0, B 1, C 2, D 3);
