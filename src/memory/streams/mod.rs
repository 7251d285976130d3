//! What is known of streams: how far they are, and who may use whose memory.
//!
//! A [`Clock`](clock::Clock) follows one stream by events. [`Fences`] has the clocks of all streams and answers whether
//! one stream may use what another one freed. [`DeferredFrees`] holds the deferred frees: blocks that other streams may
//! still be using. Nothing here knows where memory lies.

mod clock;
mod deferred;
mod fences;

pub(crate) use clock::is_free_to_wait;
pub(crate) use deferred::{DeferredFrees, Returned};
pub(crate) use fences::Fences;
