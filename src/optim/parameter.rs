//! A named weight with a place for its gradient.
//!
//! Gradients of several micro-batches are summed. In 16 bits a large sum loses small terms; a parameter that
//! [accumulates in f32](Parameter::accumulate_in_f32) sums in its own buffer, at a fixed address.
//!
//! Each gradient carries the history of its loss scale: the [`ScaleTag`] it was given with, the scaler that divided
//! it by the scale, and the moments of its first and last term. This reveals a gradient that is divided twice, never,
//! or has terms of two scales, without reading its elements.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch;
use crate::optim::produced::{CheckAtOnce, Produced};
use crate::storage::{Tensor, moment};

/// A trainable weight. Cheap to clone; clones are the same parameter.
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
    origin: Origin,
    produced: Produced,
    /// The buffer in which terms are summed. Kept from window to window.
    accumulator: Option<Tensor>,
}

impl Grad {
    fn put(&mut self, tensor: Option<Tensor>, origin: Origin) {
        (self.tensor, self.origin) = (tensor, origin);
        self.produced.forget();
    }

    /// Makes `tensor` the gradient, the first term of a sum.
    fn begin(&mut self, tensor: Tensor, tag: Option<ScaleTag>) {
        let now = moment();
        let origin = Origin {
            tag,
            unscaled: None,
            since: now,
            until: now,
        };
        self.put(Some(tensor), origin);
    }
}

/// The history of the loss scale in a gradient.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Origin {
    /// The scale it is multiplied by; `None` if that is unknown, or after it was divided by it.
    pub(crate) tag: Option<ScaleTag>,
    /// The scaler that last divided it.
    pub(crate) unscaled: Option<UnscaleMark>,
    /// Moments of its first and its last term.
    pub(crate) since: u64,
    pub(crate) until: u64,
}

/// Marks a gradient as multiplied by the scale that a scaler had between two of its updates. Obtained from
/// [`GradScaler::tag`](../amp/struct.GradScaler.html#method.tag).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScaleTag {
    pub(crate) scaler: u64,
    pub(crate) since: u64,
}

/// The scaler that divided a gradient by its scale, the moment from which it had that scale, and the optimizer.
/// Meaningless after the scaler's next update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnscaleMark {
    pub(crate) scaler: u64,
    pub(crate) since: u64,
    pub(crate) optimizer: u64,
}

impl UnscaleMark {
    /// The scaler, and the moment from which it has its scale.
    pub(crate) fn tag(&self) -> ScaleTag {
        ScaleTag {
            scaler: self.scaler,
            since: self.since,
        }
    }
}

impl Parameter {
    /// A parameter without a gradient. It shares the memory of `value`.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for integers and 8-bit types, [`Error::InvalidArgument`] for a view whose elements
    /// are not contiguous.
    pub fn new(name: impl Into<String>, value: Tensor) -> Result<Self> {
        let op = "Parameter::new";
        if !value.dtype().is_computed() {
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
        // The version reveals when a cached cast of the weight is stale.
        value.keep_version();
        Ok(Self {
            inner: Arc::new(Inner {
                name: name.into(),
                value,
                grad: Mutex::default(),
            }),
        })
    }

    /// The name, as used in reports.
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

    /// Makes `grad` the gradient. It is not copied: unscaling and clipping change it in place. The caller keeps track
    /// of whether it is multiplied by a loss scale.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if shape or stream differ from the value's, or for an f64 gradient of a
    /// narrower weight, which might not survive the conversion.
    pub fn set_grad(&self, grad: Tensor) -> Result<()> {
        self.set_scaled_grad(grad, None)
    }

    /// [`set_grad`](Self::set_grad) for a gradient that is multiplied by a loss scale, marked with its `tag`. Until
    /// it is divided by the scale, only the scaler of that scale accepts it, and only before that scaler's next
    /// update.
    ///
    /// # Errors
    /// As [`set_grad`](Self::set_grad).
    pub fn set_scaled_grad(&self, grad: Tensor, tag: impl Into<Option<ScaleTag>>) -> Result<()> {
        self.check_grad("set_grad", &grad)?;
        self.inner.grad.lock().begin(grad, tag.into());
        Ok(())
    }

    /// Sums gradients in f32 from now on, whatever their type. This call allocates a buffer that is kept: the first
    /// term of [`accumulate_grad`](Self::accumulate_grad) is copied to it, and later terms are added there. The
    /// gradient is then that buffer, at the same address in every window, so each window overwrites the gradient of
    /// the previous one.
    ///
    /// # Errors
    /// [`Error::UnsupportedDtype`] for an f64 parameter, whose gradients do not fit in f32; [`Error::OutOfMemory`].
    pub fn accumulate_in_f32(&self) -> Result<()> {
        let value = &self.inner.value;
        if value.dtype() == DType::F64 {
            return Err(Error::UnsupportedDtype {
                op: "accumulate_in_f32",
                dtype: DType::F64,
            });
        }
        let mut slot = self.inner.grad.lock();
        if slot.accumulator.is_none() {
            let buffer = Tensor::uninit(value.context(), value.shape(), DType::F32)?;
            slot.accumulator = Some(buffer);
        }
        Ok(())
    }

    /// Adds `grad` to the gradient, or makes it the gradient if there is none. The sum overwrites the existing
    /// gradient, rounded once to its type; or it is written in f32 to the buffer of
    /// [`accumulate_in_f32`](Self::accumulate_in_f32).
    ///
    /// # Errors
    /// As [`set_grad`](Self::set_grad), [`Error::InvalidArgument`] if the existing gradient was already divided by a
    /// loss scale or shares memory with `grad`, and [`Error::OutOfMemory`] if one of the two is not contiguous and
    /// must be copied.
    pub fn accumulate_grad(&self, grad: Tensor) -> Result<()> {
        self.accumulate_scaled_grad(grad, None)
    }

    /// [`accumulate_grad`](Self::accumulate_grad) for a gradient that is multiplied by a loss scale, marked as in
    /// [`set_scaled_grad`](Self::set_scaled_grad).
    ///
    /// # Errors
    /// As [`accumulate_grad`](Self::accumulate_grad), and [`Error::InvalidArgument`] if the existing gradient has
    /// another tag.
    pub fn accumulate_scaled_grad(
        &self,
        grad: Tensor,
        tag: impl Into<Option<ScaleTag>>,
    ) -> Result<()> {
        self.accumulate("accumulate_grad", grad, tag.into(), None)
    }

    /// [`accumulate_scaled_grad`](Self::accumulate_scaled_grad), which also checks the sum in the same pass, if there
    /// is a sum and a kernel for its types.
    pub(crate) fn accumulate(
        &self,
        op: &'static str,
        grad: Tensor,
        tag: Option<ScaleTag>,
        check: Option<&CheckAtOnce<'_>>,
    ) -> Result<()> {
        self.check_grad(op, &grad)?;
        let mut slot = self.inner.grad.lock();
        let Some(sum) = &slot.tensor else {
            let first = match &slot.accumulator {
                Some(buffer) => buffer.copy_from(&grad).map(|()| buffer.clone())?,
                None => grad,
            };
            slot.begin(first, tag);
            return Ok(());
        };
        let refuse = |what: &str| Err(Error::argument(op, format!("`{}` {what}", self.inner.name)));
        if slot.origin.unscaled.is_some() {
            return refuse("has a gradient that was divided by the loss scale; drop it first");
        }
        if slot.origin.tag != tag {
            return refuse("has a gradient that was made with another loss scale");
        }
        let sum = match &slot.accumulator {
            Some(buffer) => buffer.copy_from(sum).map(|()| buffer.clone())?,
            None => sum.contiguous()?,
        };
        // The sum overwrites this memory, which would also change the term.
        if sum.place().overlaps(&grad.place()) {
            return refuse(
                "has a gradient that shares memory with the one to be added; add a duplicate of it",
            );
        }
        let term = grad.contiguous()?;
        slot.produced.forget();
        let is_added = match check {
            Some(check) => slot.produced.add(op, &sum, &term, check)?,
            None => false,
        };
        if !is_added {
            sum.mark_written();
            let stream = sum.context().stream();
            launch::add(stream, &sum.span()?, &term.span()?, &sum.span()?)?;
        }
        slot.tensor = Some(sum);
        slot.origin.until = moment();
        Ok(())
    }

    /// Drops the gradient. Its memory returns to the pool unless another handle holds it; the buffer of
    /// [`accumulate_in_f32`](Self::accumulate_in_f32) is kept.
    pub fn zero_grad(&self) {
        self.inner.grad.lock().put(None, Origin::default());
    }

    /// Whether the gradient has a term newer than the last write of the weight, so that no step has used it yet. Any
    /// optimizer's step writes the weight, or marks it as possibly written.
    pub(crate) fn has_unused_grad(&self) -> bool {
        let written = self.inner.value.version();
        self.origin()
            .is_some_and(|origin| written.is_none_or(|written| origin.until > written))
    }

    /// Whether both are the same parameter.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The history of the loss scale in the gradient; `None` without a gradient.
    pub(crate) fn origin(&self) -> Option<Origin> {
        let grad = self.inner.grad.lock();
        grad.tensor.as_ref().map(|_| grad.origin)
    }

    /// The results of checking the gradient where it was made, if they are for this scaler and scale and the gradient
    /// was not written since.
    pub(crate) fn produced(&self, by: ScaleTag) -> Option<Tensor> {
        let grad = self.inner.grad.lock();
        let tensor = grad.tensor.as_ref()?;
        grad.produced.partials(by, tensor).cloned()
    }

    pub(crate) fn mark_unscaled(&self, mark: UnscaleMark) {
        let origin = &mut self.inner.grad.lock().origin;
        origin.unscaled = Some(mark);
        origin.tag = None;
    }

    /// Refuses gradients that are marked as still multiplied by a loss scale.
    pub(crate) fn expect_unscaled(op: &'static str, parameters: &[Self]) -> Result<()> {
        let is_scaled = |parameter: &&Self| {
            parameter
                .origin()
                .is_some_and(|origin| origin.tag.is_some())
        };
        match parameters.iter().find(is_scaled) {
            None => Ok(()),
            Some(parameter) => Err(Error::argument(
                op,
                format!(
                    "the gradient of `{}` is still scaled; unscale it first",
                    parameter.name()
                ),
            )),
        }
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
        } else if !grad.dtype().is_computed() {
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
