//! By which rule an optimizer moves weights: what a saved state is held against.

use std::collections::BTreeMap;
use std::fmt;

use crate::dtype::DType;
use crate::optim::{MasterWeights, Moments, Parameter};

/// What was decided when a group of parameters was given to an optimizer and is no number that may change, by name:
/// whether momentum is Nesterov's, the seed of random numbers, and the like.
pub type Flags = BTreeMap<String, String>;

/// A rule with its flags, as errors tell it.
pub(super) struct Told<'a> {
    pub(super) rule: &'a str,
    /// Those that differ.
    pub(super) flags: Vec<(&'a str, &'a str)>,
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.rule)?;
        for (place, (name, value)) in self.flags.iter().enumerate() {
            let joined = if place == 0 { " with" } else { "," };
            write!(f, "{joined} {name} = {value}")?;
        }
        Ok(())
    }
}

/// The flag of the masters that `parameters` get; none where nothing has a master.
pub(super) fn master_flag(
    masters: MasterWeights,
    parameters: &[Parameter],
) -> Option<(&'static str, String)> {
    let any = |dtype| {
        let mut dtypes = parameters.iter().map(|parameter| parameter.value().dtype());
        dtypes.any(|one| one == dtype)
    };
    let form = match masters {
        _ if !any(DType::Bf16) && !any(DType::F16) => return None,
        MasterWeights::Off => "off",
        MasterWeights::Split if any(DType::Bf16) => "split",
        MasterWeights::F32 | MasterWeights::Split => "f32",
    };
    Some(("master_weights", form.to_owned()))
}

/// The flag of the type in which moments of `parameters` are kept; none where it is f64 whatever is asked for.
pub(super) fn moments_flag(
    moments: Moments,
    parameters: &[Parameter],
) -> Option<(&'static str, String)> {
    let mut dtypes = parameters.iter().map(|parameter| parameter.value().dtype());
    let form = match moments {
        _ if dtypes.all(|dtype| dtype == DType::F64) => return None,
        Moments::Full => "full",
        Moments::Bf16 => "bf16",
    };
    Some(("moments", form.to_owned()))
}
