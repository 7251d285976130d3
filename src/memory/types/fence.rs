//! Points in streams.

use super::StreamIndex;

/// The owner of memory that every stream may use: it was never used, or its last use is known to be complete.
pub(crate) const UNOWNED: StreamIndex = 0;

/// The epoch of a stream before any event was recorded on it. Epoch 0 is the time before the pool.
pub(crate) const FIRST_EPOCH: u64 = 1;

/// Bits of an [`StreamIndex`]. The two greatest numbers belong to no stream.
pub(crate) const OWNER_BITS: u32 = 20;
/// Bits of an epoch. They last a hundred days if an epoch ends every microsecond.
pub(crate) const EPOCH_BITS: u32 = 43;

/// A point in a stream, after everything that was freed for `owner` up to `epoch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fence {
    pub(crate) owner: StreamIndex,
    pub(crate) epoch: u64,
}
