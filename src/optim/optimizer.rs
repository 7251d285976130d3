//! The interface of optimizers.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::launch::update_pass::StepScalars;
use crate::optim::{OptimizerState, Parameter, WeightOverflow, state, weights};
use crate::storage::Tensor;

/// Identity of an optimizer, unique within a process. The optimizer holds it for its whole life; when the last clone
/// is dropped, state kept elsewhere for the optimizer can be freed.
#[derive(Clone, Debug)]
pub struct OptimizerId(Arc<Identity>);

#[derive(Debug)]
struct Identity {
    number: u64,
    /// The scaler that drives the optimizer, while that scaler lives.
    driver: Mutex<Weak<u64>>,
    /// Memory in which steps count the weights that they make infinite or NaN.
    lost_weights: OnceLock<Tensor>,
}

/// Reveals whether an optimizer still exists, without keeping it alive.
#[derive(Debug)]
pub(crate) struct OptimizerLife(Weak<Identity>);

impl OptimizerLife {
    pub(crate) fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl PartialEq for OptimizerId {
    fn eq(&self, other: &Self) -> bool {
        self.number() == other.number()
    }
}

impl Eq for OptimizerId {}

impl Hash for OptimizerId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.number().hash(state);
    }
}

impl OptimizerId {
    /// A new, unique identity.
    #[must_use]
    #[expect(
        clippy::new_without_default,
        reason = "a default value would not suggest a fresh one"
    )]
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        // Relaxed: the number only has to be unique.
        Self(Arc::new(Identity {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            driver: Mutex::default(),
            lost_weights: OnceLock::new(),
        }))
    }

    /// An identity for an optimizer whose steps count in `lost_weights` the weights that they make infinite or NaN.
    pub(super) fn counting(lost_weights: Tensor) -> Self {
        let id = Self::new();
        // Cannot fail: the identity is new.
        let _ = id.0.lost_weights.set(lost_weights);
        id
    }

    /// Memory in which the optimizer's steps count the weights that they make infinite or NaN, if they do. Part of
    /// the identity, so that a wrapper that forwards the identity of its inner optimizer also forwards the counts.
    pub(crate) fn lost_weights(&self) -> Option<&Tensor> {
        self.0.lost_weights.get()
    }

    /// The identity as a number.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.number
    }

    pub(crate) fn life(&self) -> OptimizerLife {
        OptimizerLife(Arc::downgrade(&self.0))
    }

    /// Makes `scaler` the driver of the optimizer. Returns `false` if another scaler drives it and is still alive.
    pub(crate) fn claim(&self, scaler: &Arc<u64>) -> bool {
        let mut driver = self.0.driver.lock();
        match driver.upgrade() {
            Some(other) => Arc::ptr_eq(&other, scaler),
            None => {
                *driver = Arc::downgrade(scaler);
                true
            }
        }
    }
}

/// The inputs that decide and scale one step: tensors of one element, read on the device when the step runs. All are
/// f32, except `clip`, which may be f64.
#[derive(Clone, Debug, Default)]
pub struct StepInputs {
    /// The step must change nothing unless this is 0. Any other value skips it, including NaN.
    pub found_inf: Option<Tensor>,
    /// The inverse of the loss scale, if gradients are still multiplied by it. If the clip coefficient would be below
    /// the normal numbers of f32, this is smaller by a power of two instead.
    pub inv_scale: Option<Tensor>,
    /// The clip coefficient, a factor for gradients after unscaling. A scaler passes an f64 if a gradient is f64,
    /// otherwise an f32.
    pub clip: Option<Tensor>,
}

impl StepInputs {
    pub(super) fn scalars(&self) -> Result<StepScalars> {
        let span = |tensor: &Option<Tensor>| tensor.as_ref().map(Tensor::span).transpose();
        Ok(StepScalars {
            found_inf: span(&self.found_inf)?,
            inv_scale: span(&self.inv_scale)?,
            clip: span(&self.clip)?,
        })
    }
}

/// The error for a group that does not exist.
pub(super) fn no_group(group: usize, groups: usize) -> Error {
    let reason = format!("group {group} of {groups}, counted from 0");
    Error::argument("settings", reason)
}

/// Moves parameters by their gradients.
pub trait Optimizer {
    /// The identity this optimizer was made with.
    fn id(&self) -> &OptimizerId;

    /// The parameters that it moves, always in the same order.
    fn parameters(&self) -> &[Parameter];

    /// Enqueues one step for every parameter that has a gradient. The host does not wait. Gradients are
    /// only read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the inputs do not fit or two gradients share memory;
    /// [`Error::OutOfMemory`] in a first step. Nothing was moved.
    fn step(&mut self, inputs: &StepInputs) -> Result<()>;

    /// Enqueues one step that is always applied, with gradients that need neither unscaling nor clipping.
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`Error::InvalidArgument`] for a gradient that is marked as still multiplied by a
    /// loss scale.
    fn step_unscaled(&mut self) -> Result<()> {
        Parameter::expect_unscaled("step", self.parameters())?;
        self.step(&StepInputs::default())
    }

    /// Returns the weights that steps made infinite or NaN since the last call, counting only elements that were
    /// finite before. A 16-bit weight can become infinite although its master is finite. Steps under a scaler are not
    /// included: their report is
    /// [`StepOutcome::weight_overflows`](../amp/struct.StepOutcome.html#method.weight_overflows), which also includes
    /// counts that other steps left here. Waits for the device.
    ///
    /// The optimizers of this crate count in the pass that writes the weights. For others the list is empty.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed; [`Error::Capturing`] during a capture.
    fn take_weight_overflows(&self) -> Result<Vec<WeightOverflow>> {
        let counts = self.id().lost_weights();
        counts.map_or(Ok(Vec::new()), |counts| {
            weights::take(counts, self.parameters())
        })
    }

    /// The tensors that a step reads and writes besides parameter `index` and its gradient. Each has a name that is
    /// unique for the parameter; the order never changes. A skipped step leaves all of them unchanged. To resume a
    /// run bit for bit, save them with the parameters and write them back in stream order (`tensor.copy_from(…)`).
    /// Empty for a parameter that does not exist.
    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        let _ = index;
        Vec::new()
    }

    /// The groups of parameters that share settings, as ranges of [`parameters`](Self::parameters).
    fn groups(&self) -> Vec<Range<usize>> {
        std::iter::once(0..self.parameters().len()).collect()
    }

    /// The name of the rule by which it moves parameters. A state saved under another rule is refused. With `None`,
    /// neither the rule nor [`flags`](Self::flags) are compared.
    fn rule(&self) -> Option<&'static str> {
        None
    }

    /// Choices for a group that are fixed when the optimizer is made, each with its name. A saved state with another
    /// value is refused. Empty for a group that does not exist.
    fn flags(&self, group: usize) -> Vec<(&'static str, String)> {
        let _ = group;
        Vec::new()
    }

    /// The settings of a group that may change between steps, each with its name. Empty for a group that does
    /// not exist.
    fn settings(&self, group: usize) -> Vec<(&'static str, f64)> {
        let _ = group;
        Vec::new()
    }

    /// Changes settings of a group by name: all of `changes`, or none. Applies to steps enqueued from now on, and to
    /// launches of graphs that captured one.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of an unknown setting or one with an invalid value, and the number of
    /// the group; [`Error::InvalidArgument`] if there is no such group; [`Error::Capturing`] during a capture: change
    /// settings before or after it. Nothing was changed.
    fn set_settings(&mut self, group: usize, changes: &[(&str, f64)]) -> Result<()> {
        let groups = self.groups().len();
        match changes.first() {
            _ if group >= groups => Err(no_group(group, groups)),
            None => Ok(()),
            Some((name, _)) => Err(Error::config(
                "settings",
                format!("group {group}: there is no `{name}`"),
            )),
        }
    }

    /// The state needed to resume later, besides the parameters: rule, groups with their settings, and the tensors of
    /// [`state`](Self::state). Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if two parameters have one name; [`Error::Driver`] if work of the stream failed.
    fn state_dict(&self) -> Result<OptimizerState> {
        state::save(self)
    }

    /// Resumes from a saved state. Waits for the device.
    ///
    /// Parameters are found by name, whatever order and groups they were saved in; their values do not change. A
    /// group gets the settings that its parameters were saved with, which must be the same for all of them. The
    /// random numbers that round bf16 moments depend on the order of the parameters, so in another order the results
    /// differ.
    ///
    /// Parameters with master weights may be restored before or after this call. If they are written after it, and
    /// not together with the state as [`Restore`](../checkpoint/struct.Restore.html) does, the next step waits for
    /// the device once: it keeps f32 masters if the parameters are their nearest values, and otherwise rebuilds them.
    ///
    /// A state of another [rule](Self::rule) or with other [flags](Self::flags) is refused. To load it anyway, set
    /// its `rule` to `None`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the rule, the parameters, the setting or the group that does not fit. For
    /// parameters it lists all that are missing on either side or have another shape. [`Error::Driver`] if the driver
    /// refuses. Nothing was changed.
    fn load_state_dict(&mut self, state: &OptimizerState) -> Result<()> {
        self.load_state_dict_keeping(state, &[])
    }

    /// [`load_state_dict`](Self::load_state_dict), except that the settings named in `kept` are left unchanged in all
    /// groups.
    ///
    /// # Errors
    /// As [`load_state_dict`](Self::load_state_dict), and for a name that is not a setting.
    fn load_state_dict_keeping(&mut self, state: &OptimizerState, kept: &[&str]) -> Result<()> {
        state::check_kept(self, kept)?;
        state::load(self, state, kept)?.carry_out()
    }

    /// Drops the gradients of all parameters.
    fn zero_grad(&self) {
        self.parameters().iter().for_each(Parameter::zero_grad);
    }
}
