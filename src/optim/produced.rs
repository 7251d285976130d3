//! Checks gradients in the pass that makes them.
//!
//! A pass that adds to a gradient reads and writes all of it, so it can check the gradient on the way and save a
//! scaler's check from reading it again. The results, the *partials*, lie in device memory that belongs to the
//! parameter. They are valid for one scaler, for the scale of one iteration, and until the gradient is written again:
//! its memory has a [version](Tensor::version), and a changed version invalidates the partials.
//!
//! Must not know: how a scaler uses the results.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::gradient_produce::{ProduceOperands, can_produce, partial_words, produce};
use crate::memory;
use crate::optim::ScaleTag;
use crate::storage::{Meter, Metered, Tensor};

/// The inputs for checking a gradient while it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckAtOnce<'a> {
    /// The scaler, and the moment from which it has its scale.
    pub(crate) by: ScaleTag,
    /// An f32 by which gradients are multiplied before the check.
    pub(crate) inv_scale: &'a Tensor,
    /// Counts the memory of the results.
    pub(crate) meter: &'a Arc<Meter>,
}

/// The results of checking a parameter's gradient in the pass that made it.
#[derive(Debug, Default)]
pub(super) struct Produced {
    /// Kept from gradient to gradient, so its address does not change and later steps allocate nothing.
    partials: Option<Metered>,
    /// The tag that the check was for, and the gradient's version after it.
    checked: Option<(ScaleTag, u64)>,
}

impl Produced {
    /// Discards the results.
    pub(super) fn forget(&mut self) {
        self.checked = None;
    }

    /// Enqueues `sum = sum + term` and checks the sum. Returns `false` if there is no such kernel for these types;
    /// nothing was enqueued then.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory) for the partials;
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit. Nothing was added.
    pub(super) fn add(
        &mut self,
        op: &'static str,
        sum: &Tensor,
        term: &Tensor,
        check: &CheckAtOnce<'_>,
    ) -> Result<bool> {
        if !can_produce(term.dtype(), sum.dtype()) {
            return Ok(false);
        }
        let words = partial_words(sum.len());
        let partials = match self.partials.take().filter(|kept| kept.len() == words) {
            Some(mut kept) => {
                kept.move_to(check.meter);
                kept
            }
            None => {
                let _tag = memory::tag("amp");
                let made = Tensor::uninit(sum.context(), [words], DType::F64)?;
                Metered::new(made, check.meter)
            }
        };
        let operands = ProduceOperands {
            term: term.span()?,
            sum: sum.span()?,
            inv_scale: Some(check.inv_scale.span()?),
            partials: partials.span()?,
        };
        self.partials = Some(partials);
        sum.keep_version();
        sum.mark_written();
        produce(op, sum.context().stream(), &operands, true)?;
        self.checked = sum.version().map(|version| (check.by, version));
        Ok(true)
    }

    /// The results for `gradient`, if it was checked for `by` and not written since.
    pub(super) fn partials(&self, by: ScaleTag, gradient: &Tensor) -> Option<&Tensor> {
        let version = gradient.version()?;
        let holds = self.checked == Some((by, version));
        self.partials.as_deref().filter(|_| holds)
    }
}
