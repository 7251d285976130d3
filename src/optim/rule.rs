//! The rule by which an optimizer moves weights, for comparison with a saved state.

use std::collections::BTreeMap;
use std::fmt;

use crate::dtype::DType;
use crate::optim::{MasterWeights, Moments, Parameter};

/// Choices for a group of parameters that are fixed when the optimizer is made, by name: whether momentum is
/// Nesterov's, the seed of random numbers, and the like.
pub type Flags = BTreeMap<String, String>;

/// A rule with its flags, as errors show it.
pub(super) struct Told<'a> {
    pub(super) rule: &'a str,
    /// The flags that differ.
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

/// The flag for the masters of `parameters`; `None` if no parameter can have one.
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

/// The flag for the type of the moments of `parameters`; `None` if all are f64, where the setting has no effect.
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
