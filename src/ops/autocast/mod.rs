//! The scope in which ops choose their compute type.
//!
//! Within `autocast(true, dtype)` matrix products run in `dtype`. Ops that would lose too much there, such as sums
//! and losses, run in f32. All others take their operands unchanged. The assignment is data ([`OpLists`]): PyTorch's
//! lists, which a user can extend. The ops of this crate ask [`autocast_dtype`]. Other ops can ask it too, or
//! [`dtype_for`], which also handles ops that run in their widest operand's type.
//!
//! A scope belongs to its thread and ends when its guard is dropped, even if a panic drops it. Scopes nest: the
//! innermost one applies, and it may be disabled. A new thread has none.
//!
//! Casts of weights are cached until the thread's outermost scope ends. A weight that was written in the meantime is
//! cast again (`cache`).
//!
//! Only f16, bf16 and f32 tensors are cast; f64 and integers never are.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::storage::Tensor;

mod cache;
mod lists;
mod names;

pub use lists::{CastPolicy, OpLists};

use cache::CastCache;

/// The settings of a scope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutocastState {
    enabled: bool,
    dtype: DType,
    caches_weights: bool,
}

impl AutocastState {
    /// The state outside of every scope.
    const OFF: Self = Self {
        enabled: false,
        dtype: DType::F16,
        caches_weights: true,
    };

    /// Whether ops choose their compute type.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The type that matrix products run in while the scope is enabled.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether casts of weights are cached.
    #[must_use]
    pub fn caches_weights(&self) -> bool {
        self.caches_weights
    }
}

/// One open scope.
struct Scope {
    /// The number of its guard.
    number: u64,
    state: AutocastState,
    lists: OpLists,
}

/// The open scopes of a thread, innermost last, and their cache.
struct Scopes {
    open: Vec<Scope>,
    cache: CastCache,
}

thread_local! {
    static SCOPES: RefCell<Option<Scopes>> = const { RefCell::new(None) };
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// Opens a scope on this thread that lasts as long as the guard: [`Autocast`] with its defaults.
///
/// With a `dtype` other than f16 or bf16 the scope is disabled, as in PyTorch: casting to it would gain nothing.
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
    Autocast::new(dtype).enabled(enabled).enter()
}

/// A builder for a scope, with other lists or without a cache.
///
/// # Examples
/// ```
/// use kitsune::DType;
/// use kitsune::ops::autocast::{Autocast, CastPolicy, OpLists, autocast_dtype};
///
/// let lists = OpLists::cuda().with("my_attention", CastPolicy::Lower);
/// let _scope = Autocast::new(DType::Bf16).lists(lists).enter();
/// assert_eq!(autocast_dtype("my_attention"), Some(DType::Bf16));
/// ```
#[derive(Clone, Debug)]
#[must_use = "a scope begins when it is entered"]
pub struct Autocast {
    state: AutocastState,
    lists: OpLists,
}

impl Autocast {
    /// An enabled scope of type `dtype` with PyTorch's lists for CUDA, which caches casts of weights. With a `dtype`
    /// other than f16 or bf16 it is disabled.
    pub fn new(dtype: DType) -> Self {
        let state = AutocastState {
            enabled: dtype.is_half(),
            dtype,
            caches_weights: true,
        };
        let lists = OpLists::default();
        Self { state, lists }
    }

    /// Whether the scope is enabled. A disabled scope covers a part of an outer one in which ops take their operands
    /// unchanged.
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.state.enabled &= enabled;
        self
    }

    /// Replaces the lists.
    pub fn lists(mut self, lists: OpLists) -> Self {
        self.lists = lists;
        self
    }

    /// Whether casts of weights are cached, the default. They take memory (tag `autocast`) until the thread's
    /// outermost scope ends. Disable it around a captured graph that is replayed while a scope stays open: the cache
    /// does not notice weights that replays write.
    pub fn caches_weights(mut self, caches: bool) -> Self {
        self.state.caches_weights = caches;
        self
    }

    /// Opens the scope on this thread until the guard is dropped.
    pub fn enter(self) -> AutocastGuard {
        let number = NEXT.replace(NEXT.get() + 1);
        let scope = Scope {
            number,
            state: self.state,
            lists: self.lists,
        };
        SCOPES.with_borrow_mut(|scopes| {
            let scopes = scopes.get_or_insert_with(|| Scopes {
                open: Vec::new(),
                cache: CastCache::default(),
            });
            scopes.open.push(scope);
        });
        AutocastGuard {
            number,
            of_this_thread: PhantomData,
        }
    }
}

/// Calls `f` with the innermost scope of this thread.
fn with_innermost<R>(f: impl FnOnce(Option<&Scope>) -> R) -> R {
    SCOPES.with_borrow(|scopes| f(scopes.as_ref().and_then(|scopes| scopes.open.last())))
}

/// The settings of this thread's innermost scope.
#[must_use]
pub fn autocast_state() -> AutocastState {
    with_innermost(|scope| scope.map_or(AutocastState::OFF, |scope| scope.state))
}

/// Ends its scope on drop. Stays on the thread that opened it.
#[derive(Debug)]
pub struct AutocastGuard {
    number: u64,
    of_this_thread: PhantomData<*const ()>,
}

impl Drop for AutocastGuard {
    fn drop(&mut self) {
        // The scope is searched for, because stored guards may be dropped in any order. In a destructor that runs
        // after the thread's own storage is gone, there is no scope left to end. The cache is freed after the borrow
        // ends.
        let _ended = SCOPES.try_with(|scopes| {
            let mut scopes = scopes.borrow_mut();
            let open = &mut scopes.as_mut()?.open;
            open.retain(|scope| scope.number != self.number);
            if open.is_empty() { scopes.take() } else { None }
        });
    }
}

/// The policy for `op`, by its name in PyTorch or in [`ops`](super). Uses the lists of the innermost scope, or
/// PyTorch's for CUDA outside of every scope.
#[must_use]
pub fn cast_policy(op: &str) -> CastPolicy {
    with_innermost(|scope| match scope {
        Some(scope) => scope.lists.policy(op),
        None => OpLists::default().policy(op),
    })
}

/// The type in which `op` must run in the current scope; `None` if it takes its operands unchanged, or if
/// [`dtype_for`] must inspect them.
#[must_use]
pub fn autocast_dtype(op: &str) -> Option<DType> {
    let state = autocast_state();
    if !state.enabled {
        return None;
    }
    match cast_policy(op) {
        CastPolicy::Lower => Some(state.dtype),
        CastPolicy::Single => Some(DType::F32),
        CastPolicy::Widest | CastPolicy::AsGiven | CastPolicy::Refused => None,
    }
}

/// The type in which `op` must run on operands of these types in the current scope; `None` if it takes them
/// unchanged. Operands that are not [eligible](is_eligible) do not count and must not be cast. For an op that runs in
/// its widest operand's type, f16 with bf16 gives f32, which holds both; PyTorch refuses that.
///
/// # Errors
/// [`Error::InvalidArgument`] for an op that the scope refuses.
///
/// # Examples
/// ```
/// use kitsune::DType::{F16, F32, F64};
/// use kitsune::ops::autocast::{autocast, dtype_for};
///
/// let _scope = autocast(true, F16);
/// assert_eq!(dtype_for("matmul", &[F32, F32])?, Some(F16));
/// assert_eq!(dtype_for("dot", &[F16, F32])?, Some(F32));
/// assert_eq!(dtype_for("dot", &[F16, F64])?, Some(F16));
/// assert!(dtype_for("binary_cross_entropy", &[F16, F16]).is_err());
/// # Ok::<(), kitsune::Error>(())
/// ```
pub fn dtype_for(op: &str, operands: &[DType]) -> Result<Option<DType>> {
    if !autocast_state().enabled {
        return Ok(None);
    }
    match cast_policy(op) {
        CastPolicy::Widest => {
            let eligible = operands.iter().copied().filter(|dtype| is_eligible(*dtype));
            Ok(eligible.reduce(super::promoted))
        }
        CastPolicy::Refused => Err(Error::argument(
            "autocast",
            format!(
                "{op} is unsafe in 16 bits; use its form that takes logits, or leave the scope"
            ),
        )),
        _ => Ok(autocast_dtype(op)),
    }
}

/// `tensor` in the type in which `op` runs in the current scope. f64 and integers are unchanged, and so is everything
/// outside a scope.
///
/// # Errors
/// [`Error::OutOfMemory`]; [`Error::Driver`] if the cast cannot be enqueued.
pub fn operand(op: &str, tensor: &Tensor) -> Result<Tensor> {
    match autocast_dtype(op) {
        Some(dtype) if is_eligible(tensor.dtype()) && tensor.dtype() != dtype => {
            cast_or_cached(tensor, dtype)
        }
        _ => Ok(tensor.clone()),
    }
}

fn cast_or_cached(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    let Some(version) = tensor.version().filter(|_| autocast_state().caches_weights) else {
        return tensor.cast(dtype);
    };
    if !CastCache::takes(tensor, dtype)? {
        return tensor.cast(dtype);
    }
    let kept = SCOPES.with_borrow(|scopes| scopes.as_ref()?.cache.find(tensor, dtype));
    if let Some(kept) = kept {
        return Ok(kept);
    }
    let cast = cache::cast(tensor, dtype)?;
    // The replaced entry is freed after the borrow ends.
    let _replaced = SCOPES.with_borrow_mut(|scopes| {
        let scopes = scopes.as_mut()?;
        scopes.cache.keep(tensor, version, cast.clone())
    });
    Ok(cast)
}

/// Whether a scope casts tensors of this type at all.
#[must_use]
pub fn is_eligible(dtype: DType) -> bool {
    matches!(dtype, DType::F16 | DType::Bf16 | DType::F32)
}

#[cfg(test)]
mod tests {
    use super::*;

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
