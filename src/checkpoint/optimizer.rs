//! The part that holds an optimizer.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Part;
use crate::amp::ClipState;
use crate::error::{Error, NAMES_TOLD, Result, listed};
use crate::optim::{GroupState, NamedTensors, OptimizerState, Parameter};

/// An optimizer but for its tensors. In files of version 1 a part is the list of groups.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OptimizerPart {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rule: Option<String>,
    groups: Vec<GroupState>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clip: Option<ClipState>,
}

impl OptimizerPart {
    pub(super) fn of(state: OptimizerState, clip: Option<ClipState>) -> (Self, NamedTensors) {
        let OptimizerState {
            rule,
            groups,
            tensors,
        } = state;
        (Self { rule, groups, clip }, tensors)
    }

    /// The state in `part`, and the limit of the norm if it was saved.
    pub(super) fn read(name: &str, part: &Part) -> Result<(OptimizerState, Option<ClipState>)> {
        let read = match &part.settings {
            groups @ Value::Array(_) => Vec::deserialize(groups).map(|groups| Self {
                groups,
                ..Self::default()
            }),
            settings => Self::deserialize(settings),
        };
        let Self { rule, groups, clip } =
            read.map_err(|error| Error::state(name, error.to_string()))?;
        let state = OptimizerState {
            rule,
            groups,
            tensors: part.tensors.clone(),
        };
        Ok((state, clip))
    }
}

/// Refuses parameters whose gradients a step is still to use.
pub(super) fn expect_used(parameters: &[Parameter]) -> Result<()> {
    let unused = parameters.iter().filter(|one| one.has_unused_grad());
    let names: Vec<_> = unused.map(Parameter::name).collect();
    let Some((first, others)) = names.split_first() else {
        return Ok(());
    };
    let mut reason = "has a gradient that no step has used, and a checkpoint holds no gradients; save after \
                      the step, or call zero_grad and make the gradients again after the restoration"
        .to_owned();
    if !others.is_empty() {
        let others = others.iter().map(|name| format!("`{name}`"));
        reason += &format!("; so do {}", listed(others, NAMES_TOLD - 1));
    }
    Err(Error::state(*first, reason))
}
