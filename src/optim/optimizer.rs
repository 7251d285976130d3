//! What an optimizer is to those who drive it.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::launch::update_pass::StepScalars;
use crate::optim::{OptimizerState, Parameter, WeightOverflow, state, weights};
use crate::storage::Tensor;

/// Identity of an optimizer, never given twice in a process. Held by the optimizer for its whole life: when
/// the last clone is gone, whoever kept something for the optimizer may let go of it.
#[derive(Clone, Debug)]
pub struct OptimizerId(Arc<Identity>);

#[derive(Debug)]
struct Identity {
    number: u64,
    /// The one scaler that drives the optimizer, as long as it lives.
    driver: Mutex<Weak<u64>>,
    /// Where steps count the weights that they make infinite or NaN.
    lost_weights: OnceLock<Tensor>,
}

/// Tells whether an optimizer still exists, without keeping it.
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
    /// An identity that no optimizer has had yet.
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
        // Nobody else knows this identity yet.
        let _ = id.0.lost_weights.set(lost_weights);
        id
    }

    /// Where the optimizer's steps count the weights that they make infinite or NaN, if they do. Belongs to the identity
    /// so that an optimizer wrapped in another one is still heard.
    pub(crate) fn lost_weights(&self) -> Option<&Tensor> {
        self.0.lost_weights.get()
    }

    /// The number behind it.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.0.number
    }

    pub(crate) fn life(&self) -> OptimizerLife {
        OptimizerLife(Arc::downgrade(&self.0))
    }

    /// Makes `scaler` the one that drives the optimizer. `false` if another one does, and is still there.
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

/// What decides and scales one step: tensors of one element, read on the device when the step runs. All are f32, but
/// for `clip`, which may be f64.
#[derive(Clone, Debug, Default)]
pub struct StepInputs {
    /// The step must change nothing at all unless this is 0. Any other value skips, NaN too.
    pub found_inf: Option<Tensor>,
    /// Gradients are still multiplied by the loss scale, and this is its inverse. Where a clip coefficient would be
    /// smaller than the normal numbers of f32, this is smaller by a power of two instead.
    pub inv_scale: Option<Tensor>,
    /// Gradients are to be multiplied by this after unscaling: the clip coefficient. A scaler gives it in f64 if a
    /// gradient is f64, else in f32.
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

/// The error for the number of a group that does not exist.
pub(super) fn no_group(group: usize, groups: usize) -> Error {
    let reason = format!("group {group} of {groups}, counted from 0");
    Error::argument("settings", reason)
}

/// Moves parameters by their gradients.
pub trait Optimizer {
    /// The identity this optimizer was made with.
    fn id(&self) -> &OptimizerId;

    /// The parameters it moves, always in the same order.
    fn parameters(&self) -> &[Parameter];

    /// Enqueues one step for every parameter that has a gradient. The host does not wait. Gradients are
    /// only read.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the inputs do not fit or two gradients share memory;
    /// [`Error::OutOfMemory`] in a first step. Nothing was moved.
    fn step(&mut self, inputs: &StepInputs) -> Result<()>;

    /// One step with gradients that need neither unscaling nor clipping, which is always applied.
    ///
    /// # Errors
    /// As [`step`](Self::step), and [`Error::InvalidArgument`] for a gradient that says it is still multiplied by a loss scale.
    fn step_unscaled(&mut self) -> Result<()> {
        Parameter::expect_unscaled("step", self.parameters())?;
        self.step(&StepInputs::default())
    }

    /// The weights that steps made infinite or NaN, each with the elements that were finite before, since this was last
    /// asked. A weight of 16 bits becomes infinite although its master is finite. Steps under a scaler do not count
    /// here: their report is [`StepOutcome::weight_overflows`](../amp/struct.StepOutcome.html#method.weight_overflows),
    /// which also takes in what other steps left here. Waits for the device.
    ///
    /// The optimizers of this crate count, in the pass that writes the weights; of others the list is empty.
    ///
    /// # Errors
    /// [`Error::Driver`] if work of the stream failed; [`Error::Capturing`] during a capture.
    fn take_weight_overflows(&self) -> Result<Vec<WeightOverflow>> {
        let counts = self.id().lost_weights();
        counts.map_or(Ok(Vec::new()), |counts| {
            weights::take(counts, self.parameters())
        })
    }

    /// What a step reads and writes beside parameter `index` and its gradient, each with a name that no other
    /// tensor of that parameter has, always in the same order. A skipped step leaves all of it alone. Saved with the
    /// parameters and written back later (in stream order, `tensor.copy_from(…)`), it lets a training go on to
    /// the bit. Empty for a parameter that does not exist.
    fn state(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        let _ = index;
        Vec::new()
    }

    /// The groups of parameters that share settings, as ranges of [`parameters`](Self::parameters).
    fn groups(&self) -> Vec<Range<usize>> {
        std::iter::once(0..self.parameters().len()).collect()
    }

    /// The name of the rule by which it moves parameters. A state that was saved under another one is refused. `None`
    /// says nothing: then neither the rule nor [`flags`](Self::flags) are compared.
    fn rule(&self) -> Option<&'static str> {
        None
    }

    /// What was decided for a group when the optimizer was made and is no number that may change, each with its name:
    /// a saved state with another value is refused. Empty for a group that does not exist.
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

    /// Changes settings of a group by their names: all of `changes`, or none. Holds for steps enqueued from now
    /// on, and for launches of graphs that captured one.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] with the name of a setting that is unknown or cannot have that value, and the
    /// number of the group; [`Error::InvalidArgument`] if there is no such group; [`Error::Capturing`] while a
    /// step is being captured: change settings before or after. Nothing was changed.
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

    /// What is needed to go on later, beside the parameters: the settings of each group, and what
    /// [`state`](Self::state) lists. Waits for the device.
    ///
    /// # Errors
    /// [`Error::InvalidState`] if two parameters have one name; [`Error::Driver`] if work of the stream failed.
    fn state_dict(&self) -> Result<OptimizerState> {
        state::save(self)
    }

    /// Goes on from a saved state. Waits for the device.
    ///
    /// Parameters are found by their names, in whatever order and groups they were saved; their own values stay. A group
    /// gets the settings that its parameters were saved with, which must be the same for all of them. Moments in bf16
    /// take random numbers by the order of the parameters: in another order they go on with others.
    ///
    /// Parameters with master weights may be written before or after. Where they are written after, and not together
    /// with the state as [`Restore`](../checkpoint/struct.Restore.html) does, the next step waits for the device once:
    /// it keeps f32 masters if the parameters are their nearest values, and makes them anew if not.
    ///
    /// A state of another [rule](Self::rule) or with other [flags](Self::flags) is refused. To load it all the same,
    /// make its `rule` `None`.
    ///
    /// # Errors
    /// [`Error::InvalidState`] with the rule, the parameters, the setting or the group that does not fit: all
    /// parameters that are missing, were saved and are not here, or have another shape; [`Error::Driver`] if the driver
    /// refuses. Nothing was changed.
    fn load_state_dict(&mut self, state: &OptimizerState) -> Result<()> {
        self.load_state_dict_keeping(state, &[])
    }

    /// [`load_state_dict`](Self::load_state_dict), but the settings named in `kept` stay as they are, in all groups.
    ///
    /// # Errors
    /// As [`load_state_dict`](Self::load_state_dict), and for a name that is none of a setting.
    fn load_state_dict_keeping(&mut self, state: &OptimizerState, kept: &[&str]) -> Result<()> {
        state::check_kept(self, kept)?;
        state::load(self, state, kept)?.carry_out()
    }

    /// Drops the gradients of all parameters.
    fn zero_grad(&self) {
        self.parameters().iter().for_each(Parameter::zero_grad);
    }
}
