//! Saves and restores a scaler.
//!
//! A restored scaler is in the state of one that has just been updated: what it did for its optimizers since its last
//! update belongs to an abandoned iteration. Device memory keeps its addresses, so captured graphs stay valid.

use crate::amp::slot::Stage;
use crate::amp::{GradScaler, ScalerState};
use crate::error::{Result, ScalerMisuse};
use crate::optim::moment;
use crate::storage::Load;

impl GradScaler {
    /// The state needed to resume later. A disabled scaler returns the state it last loaded, or an empty one.
    /// Gradients are not included: save between an update and the first backward pass after it. Waits for the device.
    ///
    /// # Errors
    /// [`ScalerMisuse::MidIteration`] if an update is due; [`Error::Driver`](crate::Error::Driver) if work of the stream
    /// failed.
    pub fn state_dict(&self) -> Result<ScalerState> {
        let Some(memory) = &self.memory else {
            return Ok(self.held.clone());
        };
        if self.slots.iter().any(|slot| slot.stage() != Stage::Ready) {
            return Err(ScalerMisuse::MidIteration.into());
        }
        let trackers = memory.trackers()?;
        Ok(ScalerState {
            kept_scale: self.kept_scale,
            ..ScalerState::new(&self.config, self.scale_factor()?, trackers)
        })
    }

    /// Resumes from a saved state: scale, trackers, factors, interval and limits become those of `state`. Keys that
    /// the state lacks keep their current value; [`keeps_on_load`](Self::keeps_on_load) lists them. Waits for the
    /// device.
    ///
    /// Allowed at any time. An iteration in progress is abandoned: all optimizers are ready, and its flags, norms and
    /// clip coefficients do not count, whether or not its step was made. Gradients with a term from before this call
    /// are refused by name, marked or not: drop them with [`zero_grad`](crate::optim::Optimizer::zero_grad), or set
    /// others. A gradient whose [`tag`](Self::tag) was taken before is refused too. Graphs captured before use the
    /// restored scale, but keep the factors and limits they were captured with.
    ///
    /// A state from another [`ScalingMode`](crate::amp::ScalingMode) is converted, so that a scale survives a phase
    /// without scaling:
    ///
    /// | state of \ loaded into | scaling | only checking | disabled |
    /// |---|---|---|---|
    /// | scaling | loaded | scale and trackers are set aside and saved again | kept and saved again |
    /// | only checking, with a scale set aside | that scale and its trackers are loaded | loaded, including the scale set aside | kept and saved again |
    /// | only checking | initial scale, trackers of 0; everything else is loaded | loaded | kept and saved again |
    /// | disabled (empty) | refused | refused | loaded |
    ///
    /// A state without a mode, from PyTorch or of version 1, is taken to have the scaler's own mode; but if that only
    /// checks and the state's scale is not 1, the state is taken to be of a scaling scaler.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) with the first key that is missing or invalid;
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &ScalerState) -> Result<()> {
        self.load(state)?.carry_out()
    }

    /// [`load_state_dict`](Self::load_state_dict), checked but not carried out yet.
    pub(crate) fn load(&mut self, state: &ScalerState) -> Result<Load<'_>> {
        let Some(memory) = &self.memory else {
            state.check_version()?;
            let state = state.clone();
            return Ok(Load::default().then(move || self.held = state));
        };
        let restored = state.apply(&self.config)?;
        let writes = memory.writes(restored.scale, restored.trackers)?;
        let journal = memory.journal.clone();
        Ok(Load::writing(writes).then(move || {
            let now = moment();
            (self.since, self.restored) = (now, now);
            self.slots.iter_mut().for_each(|slot| slot.abandon(now));
            // A pending copy of the journal describes the abandoned run.
            journal.outdate();
            self.unwatched = 0;
            self.kept_scale = restored.kept_scale;
            self.config = restored.config;
        }))
    }

    /// The keys that `state` lacks and that [`load_state_dict`](Self::load_state_dict) would leave unchanged in this
    /// scaler: [`ScalerState::lacks`], and the scale if this scaler scales losses and `state` comes from one that
    /// only checked. Empty for a disabled scaler.
    #[must_use]
    pub fn keeps_on_load(&self, state: &ScalerState) -> Vec<&'static str> {
        if !self.is_enabled() {
            return Vec::new();
        }
        let mut keys = state.lacks();
        if self.is_scaling() && state.has_no_scale() {
            keys.push("scale");
        }
        keys
    }
}
