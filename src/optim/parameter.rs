//! A named weight with a place for its gradient.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::storage::Tensor;

/// A weight that is trained. Cheap to clone; clones are the same parameter.
#[derive(Clone)]
pub struct Parameter {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    value: Tensor,
    grad: Mutex<Grad>,
}

#[derive(Default)]
struct Grad {
    tensor: Option<Tensor>,
    unscaled: Option<UnscaleMark>,
}

/// Which scaler divided a gradient by its scale, in which of its iterations, and for which optimizer.
/// Outside that iteration the mark means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnscaleMark {
    pub(crate) scaler: u64,
    pub(crate) iteration: u64,
    pub(crate) optimizer: u64,
}

impl Parameter {
    /// A parameter without a gradient. Its elements are those of `value`, not a copy.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for integers, [`Error::InvalidArgument`] for a view whose elements do not
    /// stand one after another.
    pub fn new(name: impl Into<String>, value: Tensor) -> Result<Self> {
        let op = "Parameter::new";
        if !value.dtype().is_float() {
            return Err(Error::UnsupportedDtype {
                op,
                dtype: value.dtype(),
            });
        }
        if !value.is_contiguous() {
            return Err(Error::argument(
                op,
                "the value is a view with gaps or out of order",
            ));
        }
        // So that casts of the weight that are kept can be known to be stale.
        value.keep_version();
        Ok(Self {
            inner: Arc::new(Inner {
                name: name.into(),
                value,
                grad: Mutex::default(),
            }),
        })
    }

    /// The name, as reports give it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The weight. Optimizers write it in place.
    #[must_use]
    pub fn value(&self) -> &Tensor {
        &self.inner.value
    }

    /// The gradient, if one was set since [`zero_grad`](Self::zero_grad).
    #[must_use]
    pub fn grad(&self) -> Option<Tensor> {
        self.inner.grad.lock().tensor.clone()
    }

    /// Makes `grad` the gradient. It is not copied: unscaling and clipping change it in place.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if shape or stream differ from the value's, or for an f64 gradient of a
    /// narrower weight, which might not survive the conversion.
    pub fn set_grad(&self, grad: Tensor) -> Result<()> {
        self.check_grad("set_grad", &grad)?;
        *self.inner.grad.lock() = Grad {
            tensor: Some(grad),
            unscaled: None,
        };
        Ok(())
    }

    /// Adds `grad` to the gradient, or makes it the gradient if there is none. The sum is written over the
    /// gradient that was there, in its type, rounded once.
    ///
    /// # Errors
    /// As [`set_grad`](Self::set_grad), and [`Error::OutOfMemory`] if `grad` must be converted first.
    pub fn accumulate_grad(&self, grad: Tensor) -> Result<()> {
        self.check_grad("accumulate_grad", &grad)?;
        let mut slot = self.inner.grad.lock();
        let Some(sum) = &slot.tensor else {
            slot.tensor = Some(grad);
            return Ok(());
        };
        let sum = sum.contiguous()?;
        let term = grad.cast(sum.dtype())?.contiguous()?;
        let stream = sum.context().stream();
        launch::add(stream, &sum.span()?, &term.span()?, &sum.span()?)?;
        slot.tensor = Some(sum);
        Ok(())
    }

    /// Drops the gradient. Its memory goes back to the pool unless someone else holds it.
    pub fn zero_grad(&self) {
        *self.inner.grad.lock() = Grad::default();
    }

    /// Whether both are the same parameter.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn unscaled(&self) -> Option<UnscaleMark> {
        self.inner.grad.lock().unscaled
    }

    pub(crate) fn mark_unscaled(&self, mark: UnscaleMark) {
        self.inner.grad.lock().unscaled = Some(mark);
    }

    fn check_grad(&self, op: &'static str, grad: &Tensor) -> Result<()> {
        let Inner { name, value, .. } = &*self.inner;
        let reason = if grad.shape() != value.shape() {
            format!(
                "a gradient of shape {} for `{name}` of {}",
                grad.shape(),
                value.shape()
            )
        } else if grad.context().stream().id() != value.context().stream().id() {
            format!("a gradient on another stream than `{name}`; copy_to its context first")
        } else if !grad.dtype().is_float() {
            return Err(Error::UnsupportedDtype {
                op,
                dtype: grad.dtype(),
            });
        } else if grad.dtype() == DType::F64 && value.dtype() != DType::F64 {
            format!(
                "an f64 gradient for `{name}` of {}; cast it first",
                value.dtype()
            )
        } else {
            return Ok(());
        };
        Err(Error::argument(op, reason))
    }
}

impl fmt::Debug for Parameter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Parameter({} {:?})", self.inner.name, self.inner.value)
    }
}
