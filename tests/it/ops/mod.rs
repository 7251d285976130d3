//! Ops and autocast.

mod autocast;
mod autocast_cache;
mod fp8;
mod gradients;
mod ignoring;
mod results;
mod transformer;
