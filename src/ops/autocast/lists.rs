//! The type in which each op runs within a scope, as data.
//!
//! A table is PyTorch's for CUDA or for CPU, plus a few entries of this crate, plus the user's own. The user's
//! entries take precedence, so they can also override the table.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::names;

/// How an op chooses its type within an enabled scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CastPolicy {
    /// It runs in the type of the scope.
    Lower,
    /// It runs in f32.
    Single,
    /// It runs in the widest type among its operands.
    Widest,
    /// It takes its operands unchanged, as does any op that is on no list.
    AsGiven,
    /// It must not run within the scope: its result does not survive 16 bits, and there is another op whose result
    /// does.
    Refused,
}

/// The lists of ops that a scope uses. Cheap to clone.
///
/// # Examples
/// ```
/// use kitsune::ops::autocast::{CastPolicy, OpLists};
///
/// let lists = OpLists::cuda().with("my_attention", CastPolicy::Lower);
/// assert_eq!(lists.policy("my_attention"), CastPolicy::Lower);
/// assert_eq!(lists.policy("softmax"), CastPolicy::Single);
/// assert_eq!(OpLists::cpu().policy("softmax"), CastPolicy::AsGiven);
/// ```
#[derive(Clone, Debug, Default)]
pub struct OpLists {
    table: Table,
    /// `None` until the first op is added, so that the common case takes no memory.
    own: Option<Arc<BTreeMap<String, CastPolicy>>>,
}

#[derive(Clone, Copy, Debug, Default)]
enum Table {
    #[default]
    Cuda,
    Cpu,
}

impl OpLists {
    /// PyTorch's lists for CUDA, the default: exponentials, sums, norms and losses in f32. `batch_norm`, which is on
    /// none of PyTorch's lists, runs in f32 as well.
    #[must_use]
    pub fn cuda() -> Self {
        Self::default()
    }

    /// PyTorch's lists for CPU: fewer products in 16 bits, and softmax, layer norm and sums in the type of their
    /// operands.
    #[must_use]
    pub fn cpu() -> Self {
        Self {
            table: Table::Cpu,
            own: None,
        }
    }

    /// These lists, with the policy of `op` replaced by `policy`.
    #[must_use]
    pub fn with(mut self, op: impl Into<String>, policy: CastPolicy) -> Self {
        let own = self.own.get_or_insert_default();
        Arc::make_mut(own).insert(op.into(), policy);
        self
    }

    /// The policy for `op`, by its name in PyTorch or [`ops`](crate::ops), or the name under which it was added.
    #[must_use]
    pub fn policy(&self, op: &str) -> CastPolicy {
        let own = self.own.as_ref().and_then(|own| own.get(op));
        own.copied().unwrap_or_else(|| match self.table {
            Table::Cuda => cuda(op),
            Table::Cpu => cpu(op),
        })
    }
}

fn cuda(op: &str) -> CastPolicy {
    // PyTorch composes the loss from log_softmax and nll_loss.
    let added = matches!(
        op,
        "softmax_cross_entropy" | "softmax_cross_entropy_ignoring" | "batch_norm"
    );
    if names::CUDA_LOWER.contains(&op) {
        CastPolicy::Lower
    } else if added || names::CUDA_SINGLE.contains(&op) || begins(op, names::CUDA_SINGLE_PREFIXES) {
        CastPolicy::Single
    } else if names::CUDA_WIDEST.contains(&op) {
        CastPolicy::Widest
    } else if names::CUDA_REFUSED.contains(&op) {
        CastPolicy::Refused
    } else {
        CastPolicy::AsGiven
    }
}

fn cpu(op: &str) -> CastPolicy {
    let added = matches!(
        op,
        "softmax_cross_entropy" | "softmax_cross_entropy_ignoring"
    );
    if names::CPU_LOWER.contains(&op) {
        CastPolicy::Lower
    } else if added || names::CPU_SINGLE.contains(&op) || begins(op, names::CPU_SINGLE_PREFIXES) {
        CastPolicy::Single
    } else if names::CPU_WIDEST.contains(&op) {
        CastPolicy::Widest
    } else {
        CastPolicy::AsGiven
    }
}

fn begins(op: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| op.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_the_policy_of_its_list_alone() {
        let (cuda, cpu) = (OpLists::cuda(), OpLists::cpu());
        for (lists, names, policy) in [
            (&cuda, names::CUDA_LOWER, CastPolicy::Lower),
            (&cuda, names::CUDA_SINGLE, CastPolicy::Single),
            (&cuda, names::CUDA_WIDEST, CastPolicy::Widest),
            (&cuda, names::CUDA_REFUSED, CastPolicy::Refused),
            (&cpu, names::CPU_LOWER, CastPolicy::Lower),
            (&cpu, names::CPU_SINGLE, CastPolicy::Single),
            (&cpu, names::CPU_WIDEST, CastPolicy::Widest),
        ] {
            for op in names {
                assert_eq!(lists.policy(op), policy, "{op}");
            }
        }
        assert_eq!(cuda.policy("_upsample_bicubic2d_aa"), CastPolicy::Single);
        assert_eq!(cuda.policy("add"), CastPolicy::AsGiven);
        assert_eq!(cpu.policy("fft_rfft"), CastPolicy::Single);
        assert_eq!(cpu.policy("layer_norm"), CastPolicy::AsGiven);
        assert_eq!(cpu.policy("binary_cross_entropy"), CastPolicy::Single);
    }

    #[test]
    fn added_entries_come_first_and_stay_in_their_copy() {
        let base = OpLists::cuda().with("mine", CastPolicy::Lower);
        let changed = base.clone().with("softmax", CastPolicy::AsGiven);
        assert_eq!(changed.policy("mine"), CastPolicy::Lower);
        assert_eq!(changed.policy("softmax"), CastPolicy::AsGiven);
        assert_eq!(base.policy("softmax"), CastPolicy::Single);
        assert_eq!(OpLists::cuda().policy("mine"), CastPolicy::AsGiven);
    }
}
