//! Saving a scaler, and going on from what was saved.
//!
//! A restored scaler is in the state of one that has just been updated: whatever it did for its optimizers since its
//! last update belongs to an iteration that no longer exists. Device memory stays where it is, so that captured graphs
//! go on.

use crate::amp::slot::Stage;
use crate::amp::{GradScaler, ScalerState};
use crate::error::{Result, ScalerMisuse};
use crate::optim::moment;
use crate::storage::Load;

impl GradScaler {
    /// What is needed to go on later. A disabled scaler gives the state that was loaded last, or an empty one. Gradients
    /// are no part of it: save between an update and the first backward pass after it. Waits for the device.
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

    /// Goes on from a saved state: scale, trackers, factors, interval and limits become those of `state`. What the
    /// state lacks stays as it is here; [`keeps_on_load`](Self::keeps_on_load) lists it. Waits for the device.
    ///
    /// Allowed at any time. An iteration under way is abandoned: all optimizers are ready, and no flag, norm or clip
    /// coefficient of it counts, whether or not its step was made. Gradients with a term from before this call are
    /// refused by name, marked or not; drop them with [`zero_grad`](crate::optim::Optimizer::zero_grad), or set others.
    /// So is a gradient whose [`tag`](Self::tag) was taken before. Graphs that were captured before go on with the
    /// restored scale, and with the factors and limits that were captured.
    ///
    /// A state from another [`ScalingMode`](crate::amp::ScalingMode) is converted, so that a scale outlasts a phase that
    /// needs none:
    ///
    /// | state of \ into | scaling | only checking | disabled |
    /// |---|---|---|---|
    /// | scaling | taken | scale and trackers are kept aside, and saved again | kept, and saved again |
    /// | only checking, with a scale kept aside | that scale and its trackers are taken | taken, with what it keeps | kept, and saved again |
    /// | only checking | the initial scale, with trackers of 0; all else is taken | taken | kept, and saved again |
    /// | disabled (empty) | refused | refused | taken |
    ///
    /// A state that does not tell its mode, as of PyTorch or of version 1, is one of the scaler's own mode; if that only
    /// checks and the state's scale is not 1, it is one of a scaling scaler.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) with the first key that is missing or cannot work;
    /// [`Error::Driver`](crate::Error::Driver) if the driver refuses. Nothing was changed.
    pub fn load_state_dict(&mut self, state: &ScalerState) -> Result<()> {
        self.load(state)?.carry_out()
    }

    /// [`load_state_dict`](Self::load_state_dict), checked and ready.
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
            // A copy of the journal that is on its way tells of the abandoned training.
            journal.outdate();
            self.unwatched = 0;
            self.kept_scale = restored.kept_scale;
            self.config = restored.config;
        }))
    }

    /// The keys that `state` has no value for and that [`load_state_dict`](Self::load_state_dict) would leave as they
    /// are in this scaler: [`ScalerState::lacks`], and the scale if losses are scaled here and `state` is of a scaler
    /// that only checked. None for a disabled scaler.
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
