//! A per-thread cache of weight casts, so that a weight used many times is cast once.
//!
//! Only f32 tensors whose memory keeps a version are cached ([`Tensor::version`]: the weights of parameters). The key
//! of an entry is the weight's address and layout and the type of the cast; the entry also holds the weight's
//! version. A weight that was written since, or another tensor at the same address, is cast again. Memory counts
//! under the tag `autocast` and is freed with the thread's outermost scope.
//!
//! The cache is not used while the stream is captured: a replay must cast again.

use std::collections::HashMap;

use crate::dtype::DType;
use crate::error::Result;
use crate::memory;
use crate::storage::{Layout, Tensor};

/// Address and layout of the weight, and the type it was cast to.
type Key = (u64, Layout, DType);

/// The casts of one thread, each with the version of the weight it was made from.
#[derive(Debug, Default)]
pub(super) struct CastCache {
    casts: HashMap<Key, (u64, Tensor)>,
}

impl CastCache {
    /// Whether casts of `weight` to `dtype` can be kept.
    pub(super) fn takes(weight: &Tensor, dtype: DType) -> Result<bool> {
        if weight.dtype() != DType::F32 || !dtype.is_half() || weight.version().is_none() {
            return Ok(false);
        }
        let stream = weight.context().stream();
        Ok(!stream.driver().is_capturing(stream.raw())?)
    }

    /// The cached cast of `weight` at its current version, if there is one.
    pub(super) fn find(&self, weight: &Tensor, dtype: DType) -> Option<Tensor> {
        let (version, cast) = self.casts.get(&key(weight, dtype))?;
        (Some(*version) == weight.version()).then(|| cast.clone())
    }

    /// Caches `cast`, made from `weight` at `version`, and returns the entry it replaces.
    pub(super) fn keep(&mut self, weight: &Tensor, version: u64, cast: Tensor) -> Option<Tensor> {
        let key = key(weight, cast.dtype());
        let replaced = self.casts.insert(key, (version, cast));
        replaced.map(|(_, tensor)| tensor)
    }
}

/// A new cast of `weight`. Its memory counts under the cache's tag.
pub(super) fn cast(weight: &Tensor, dtype: DType) -> Result<Tensor> {
    let _tag = memory::tag("autocast");
    weight.cast(dtype)
}

fn key(weight: &Tensor, dtype: DType) -> Key {
    (weight.ptr().0, weight.layout().clone(), dtype)
}
