//! Gradients that were checked where they were made.
//!
//! A pass that adds to a gradient reads and writes all of it, so it can find out on the way what a scaler's check
//! would read it again for. What it found, the *partials*, lies in device memory of the parameter's own and holds for
//! one scaler, for the scale of one iteration, and until the gradient is written again: its memory has a
//! [version](Tensor::version), and another one means that the partials say nothing any more.
//!
//! Must not know: what a scaler does with what was found.

use std::sync::Arc;

use crate::dtype::DType;
use crate::error::Result;
use crate::launch::gradient_produce::{ProduceOperands, can_produce, partial_words, produce};
use crate::memory;
use crate::optim::ScaleTag;
use crate::storage::{Meter, Metered, Tensor};

/// What a gradient is to be checked with while it is made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CheckAtOnce<'a> {
    /// The scaler, and since when it has its scale.
    pub(crate) by: ScaleTag,
    /// An f32 that gradients are multiplied by before they are judged.
    pub(crate) inv_scale: &'a Tensor,
    /// Counts the memory of what is found.
    pub(crate) meter: &'a Arc<Meter>,
}

/// What is known of a parameter's gradient from the pass that made it.
#[derive(Debug, Default)]
pub(super) struct Produced {
    /// Kept from gradient to gradient: its address stays, and later steps allocate nothing.
    partials: Option<Metered>,
    /// For whom it was checked, and the gradient's version then.
    checked: Option<(ScaleTag, u64)>,
}

impl Produced {
    /// Nothing is known of the gradient any more.
    pub(super) fn forget(&mut self) {
        self.checked = None;
    }

    /// Enqueues `sum = sum + term` and checks the sum. `false` if no kernel does that for these types: nothing was
    /// enqueued then.
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

    /// What was found about `gradient`, if it was checked for `by` and not written since.
    pub(super) fn partials(&self, by: ScaleTag, gradient: &Tensor) -> Option<&Tensor> {
        let version = gradient.version()?;
        let holds = self.checked == Some((by, version));
        self.partials.as_deref().filter(|_| holds)
    }
}
