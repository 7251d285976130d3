//! The scope in which ops choose the type they compute in.
//!
//! Within `autocast(true, dtype)` matrix products run in `dtype`, and what would lose too much there, sums
//! and losses among it, in f32; the rest takes its operands as they come. Which op is which is data, the
//! lists that PyTorch has for CUDA. The ops of this crate ask [`autocast_dtype`]; so can those of any
//! other.
//!
//! A scope belongs to its thread and ends with its guard, also when a panic unwinds it. Scopes nest: the
//! innermost one counts, and may be switched off. A new thread has none.
//!
//! Only f16, bf16 and f32 tensors are cast; f64 and integers never are.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;

use crate::dtype::DType;

/// What a scope says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutocastState {
    enabled: bool,
    dtype: DType,
}

impl AutocastState {
    /// Outside of every scope.
    const OFF: Self = Self {
        enabled: false,
        dtype: DType::F16,
    };

    /// Whether ops choose their type.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The type that matrix products run in while the scope is enabled.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }
}

thread_local! {
    /// The scopes that are open on this thread, innermost last, each with the number of its guard.
    static SCOPES: RefCell<Vec<(u64, AutocastState)>> = const { RefCell::new(Vec::new()) };
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// Opens a scope on this thread, which lasts as long as the guard.
///
/// A `dtype` other than f16 or bf16 gives a scope that is not enabled, as in PyTorch: there is nothing to
/// gain from casting to it.
///
/// # Examples
/// ```
/// use kitsune::DType;
/// use kitsune::ops::autocast::{autocast, autocast_dtype};
///
/// assert_eq!(autocast_dtype("linear"), None);
/// {
///     let _scope = autocast(true, DType::Bf16);
///     assert_eq!(autocast_dtype("linear"), Some(DType::Bf16));
///     assert_eq!(autocast_dtype("softmax"), Some(DType::F32));
///     assert_eq!(autocast_dtype("relu"), None);
/// }
/// assert_eq!(autocast_dtype("linear"), None);
/// ```
#[must_use = "the scope ends when its guard is dropped"]
pub fn autocast(enabled: bool, dtype: DType) -> AutocastGuard {
    let number = NEXT.replace(NEXT.get() + 1);
    let state = AutocastState {
        enabled: enabled && dtype.is_half(),
        dtype,
    };
    SCOPES.with_borrow_mut(|scopes| scopes.push((number, state)));
    AutocastGuard {
        number,
        of_this_thread: PhantomData,
    }
}

/// What the innermost scope of this thread says.
#[must_use]
pub fn autocast_state() -> AutocastState {
    SCOPES.with_borrow(|scopes| {
        scopes
            .last()
            .map_or(AutocastState::OFF, |(_, state)| *state)
    })
}

/// Ends its scope on drop. Stays on the thread that opened it.
#[derive(Debug)]
pub struct AutocastGuard {
    number: u64,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for AutocastGuard {
    fn drop(&mut self) {
        // Searched for, because guards that are stored may be dropped in any order. In a destructor that
        // runs after the thread's own storage is gone, there is no scope left to end.
        let _ = SCOPES.try_with(|scopes| {
            scopes
                .borrow_mut()
                .retain(|(number, _)| *number != self.number);
        });
    }
}

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
}

/// The policy for `op`, by its name in PyTorch or in [`ops`](super); `None` for an op that takes its
/// operands as they come.
#[must_use]
pub fn cast_policy(op: &str) -> Option<CastPolicy> {
    if LOWER.contains(&op) {
        Some(CastPolicy::Lower)
    } else if SINGLE.contains(&op) || SINGLE_PREFIXES.iter().any(|prefix| op.starts_with(prefix)) {
        Some(CastPolicy::Single)
    } else if WIDEST.contains(&op) {
        Some(CastPolicy::Widest)
    } else {
        None
    }
}

/// The type in which `op` must run under the present scope; `None` if it takes its operands as they come,
/// or if their widest type decides ([`CastPolicy::Widest`]).
#[must_use]
pub fn autocast_dtype(op: &str) -> Option<DType> {
    let state = autocast_state();
    if !state.enabled {
        return None;
    }
    match cast_policy(op)? {
        CastPolicy::Lower => Some(state.dtype),
        CastPolicy::Single => Some(DType::F32),
        CastPolicy::Widest => None,
    }
}

/// Whether a scope casts tensors of this type at all.
#[must_use]
pub fn is_eligible(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16 | DType::F32)
}

/// Matrix products, and what is made of them.
const LOWER: &[&str] = &[
    "_convolution",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_tbc",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "cudnn_convolution",
    "cudnn_convolution_transpose",
    "prelu",
    "addmm",
    "addmv",
    "addr",
    "matmul",
    "einsum",
    "mm",
    "mv",
    "linalg_vecdot",
    "linear",
    "addbmm",
    "baddbmm",
    "bmm",
    "chain_matmul",
    "linalg_multi_dot",
    "_thnn_fused_lstm_cell",
    "_thnn_fused_gru_cell",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention",
];

/// What overflows, or loses too much, in 16 bits: powers, sums, norms, losses.
const SINGLE: &[&str] = &[
    "acos",
    "asin",
    "cosh",
    "erfinv",
    "exp",
    "expm1",
    "log",
    "log10",
    "log2",
    "log1p",
    "reciprocal",
    "rsqrt",
    "sinh",
    "tan",
    "pow",
    "softplus",
    "layer_norm",
    "native_layer_norm",
    "rms_norm",
    "group_norm",
    "frobenius_norm",
    "nuclear_norm",
    "cosine_similarity",
    "poisson_nll_loss",
    "cosine_embedding_loss",
    "nll_loss",
    "nll_loss2d",
    "hinge_embedding_loss",
    "kl_div",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "mse_loss",
    "margin_ranking_loss",
    "multilabel_margin_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "multi_margin_loss",
    "binary_cross_entropy_with_logits",
    "dist",
    "pdist",
    "cdist",
    "renorm",
    "logsumexp",
    "norm",
    "prod",
    "softmax",
    "log_softmax",
    "cumprod",
    "cumsum",
    "linalg_vector_norm",
    "linalg_matrix_norm",
    "sum",
    // PyTorch makes it of log_softmax and nll_loss.
    "softmax_cross_entropy",
];

/// Families of ops of which every member runs in f32.
const SINGLE_PREFIXES: &[&str] = &["upsample_", "_upsample_"];

/// Ops that need their operands in one type.
const WIDEST: &[&str] = &[
    "addcdiv",
    "addcmul",
    "atan2",
    "bilinear",
    "cross",
    "dot",
    "vdot",
    "grid_sampler",
    "index_put",
    "tensordot",
    "scatter_add",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_disjoint() {
        for op in LOWER {
            assert_eq!(cast_policy(op), Some(CastPolicy::Lower));
            assert!(!SINGLE.contains(op) && !WIDEST.contains(op), "{op}");
        }
        for op in SINGLE {
            assert_eq!(cast_policy(op), Some(CastPolicy::Single));
            assert!(!WIDEST.contains(op), "{op}");
        }
        assert_eq!(cast_policy("dot"), Some(CastPolicy::Widest));
        assert_eq!(
            cast_policy("_upsample_bicubic2d_aa"),
            Some(CastPolicy::Single)
        );
        assert_eq!(cast_policy("add"), None);
    }

    #[test]
    fn scopes_nest_and_are_restored() {
        assert_eq!(autocast_state(), AutocastState::OFF);
        let outer = autocast(true, DType::F16);
        {
            let _inner = autocast(true, DType::Bf16);
            assert_eq!(autocast_dtype("mm"), Some(DType::Bf16));
            let _off = autocast(false, DType::F16);
            assert_eq!(autocast_dtype("mm"), None);
            assert_eq!(autocast_dtype("sum"), None);
        }
        assert_eq!(autocast_dtype("mm"), Some(DType::F16));
        assert_eq!(autocast_dtype("dot"), None);
        drop(outer);
        assert_eq!(autocast_state(), AutocastState::OFF);
    }

    #[test]
    fn guards_may_be_dropped_in_any_order() {
        let first = autocast(true, DType::F16);
        let second = autocast(true, DType::Bf16);
        drop(first);
        assert_eq!(autocast_dtype("mm"), Some(DType::Bf16));
        drop(second);
        assert_eq!(autocast_dtype("mm"), None);
    }

    #[test]
    fn a_panic_ends_its_scopes() {
        let outcome = std::panic::catch_unwind(|| {
            let _scope = autocast(true, DType::F16);
            panic!("on purpose");
        });
        assert!(outcome.is_err());
        assert_eq!(autocast_state(), AutocastState::OFF);
    }

    #[test]
    fn a_scope_belongs_to_its_thread() {
        let _scope = autocast(true, DType::F16);
        std::thread::scope(|threads| {
            let other = threads.spawn(|| {
                let _scope = autocast(true, DType::Bf16);
                autocast_dtype("mm")
            });
            assert_eq!(other.join().unwrap(), Some(DType::Bf16));
            let bare = threads.spawn(|| autocast_dtype("mm"));
            assert_eq!(bare.join().unwrap(), None);
        });
        assert_eq!(autocast_dtype("mm"), Some(DType::F16));
    }

    #[test]
    fn only_16_bit_floats_can_be_chosen() {
        for dtype in [DType::F32, DType::F64, DType::U32] {
            let _scope = autocast(true, dtype);
            assert!(!autocast_state().is_enabled());
            assert_eq!(autocast_dtype("mm"), None);
        }
    }
}
