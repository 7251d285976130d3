//! Free blocks, and the blocks around them: found by size, split, merged with their neighbors.
//!
//! [`Bins`] file free blocks by size and find the best fit. A [`Slab`] holds the blocks themselves, by index. An
//! [`Tiling`] tiles segments with blocks. All of it works on offsets and indices: nothing here knows addresses, streams
//! or why a block is free.

mod bins;
mod slab;
mod tiling;

pub(crate) use bins::{Bins, Link, Links, NONE};
pub(crate) use slab::{Linked, Slab};
pub(crate) use tiling::Tiling;
