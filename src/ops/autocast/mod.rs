//! The scope in which ops choose the type they compute in.
//!
//! Within `autocast(true, dtype)` matrix products run in `dtype`, and what would lose too much there, sums
//! and losses among it, in f32; the rest takes its operands as they come. Which op is which is data
//! ([`OpLists`]): PyTorch's lists, which a user can extend. The ops of this crate ask [`autocast_dtype`]; so
//! can those of any other, or [`dtype_for`], which also settles ops that run in their widest operand's type.
//!
//! A scope belongs to its thread and ends with its guard, also when a panic unwinds it. Scopes nest: the
//! innermost one counts, and may be switched off. A new thread has none.
//!
//! Casts of weights are kept until the thread's outermost scope ends, and made anew for a weight that was
//! written meanwhile (`cache`).
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

/// What a scope says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutocastState {
    enabled: bool,
    dtype: DType,
    caches_weights: bool,
}

impl AutocastState {
    /// Outside of every scope.
    const OFF: Self = Self {
        enabled: false,
        dtype: DType::F16,
        caches_weights: true,
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

    /// Whether casts of weights are kept for the next use.
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

/// The scopes that are open on a thread, innermost last, and what they keep.
struct Scopes {
    open: Vec<Scope>,
    cache: CastCache,
}

thread_local! {
    static SCOPES: RefCell<Option<Scopes>> = const { RefCell::new(None) };
    static NEXT: Cell<u64> = const { Cell::new(0) };
}

/// Opens a scope on this thread, which lasts as long as the guard: [`Autocast`] with its defaults.
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
    Autocast::new(dtype).enabled(enabled).enter()
}

/// A scope to be opened, with other lists or without a cache.
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
    /// An enabled scope of type `dtype` with PyTorch's lists for CUDA, which keeps casts of weights. With a
    /// `dtype` other than f16 or bf16 it is not enabled.
    pub fn new(dtype: DType) -> Self {
        let state = AutocastState {
            enabled: dtype.is_half(),
            dtype,
            caches_weights: true,
        };
        let lists = OpLists::default();
        Self { state, lists }
    }

    /// Switches it off, for a part of an outer scope in which ops take their operands as they come.
    pub fn enabled(mut self, enabled: bool) -> Self {
        self.state.enabled &= enabled;
        self
    }

    /// Goes by `lists`.
    pub fn lists(mut self, lists: OpLists) -> Self {
        self.lists = lists;
        self
    }

    /// Whether casts of weights are kept for the next use, the default. They take memory (tag `autocast`)
    /// until the thread's outermost scope ends. Switch it off around a captured graph that is replayed while
    /// a scope stays open: replays write weights without the cache hearing of it.
    pub fn caches_weights(mut self, caches: bool) -> Self {
        self.state.caches_weights = caches;
        self
    }

    /// Opens the scope on this thread, as long as the guard lives.
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

/// What the innermost scope of this thread says.
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
        // Searched for, because guards that are stored may be dropped in any order. In a destructor that
        // runs after the thread's own storage is gone, there is no scope left to end. What the cache held is
        // freed after the borrow.
        let _ended = SCOPES.try_with(|scopes| {
            let mut scopes = scopes.borrow_mut();
            let open = &mut scopes.as_mut()?.open;
            open.retain(|scope| scope.number != self.number);
            if open.is_empty() { scopes.take() } else { None }
        });
    }
}

/// The policy for `op`, by its name in PyTorch or in [`ops`](super), in the lists of the innermost scope;
/// outside of every scope, in PyTorch's for CUDA.
#[must_use]
pub fn cast_policy(op: &str) -> CastPolicy {
    with_innermost(|scope| match scope {
        Some(scope) => scope.lists.policy(op),
        None => OpLists::default().policy(op),
    })
}

/// The type in which `op` must run under the present scope; `None` if it takes its operands as they come,
/// or if [`dtype_for`] must look at them.
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

/// The type in which `op` must run on operands of these types under the present scope; `None` if it takes
/// them as they come. Operands that [`is_eligible`] says no to neither count nor are to be cast. For an op
/// that runs in its widest operand's type, f16 beside bf16 gives f32, which holds both; PyTorch refuses that.
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

/// `tensor` in the type in which `op` runs under the present scope. f64 and integers stay as they are, and so
/// does everything outside a scope.
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
    // What it replaces is freed after the borrow.
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
