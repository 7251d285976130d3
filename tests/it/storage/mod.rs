//! Tensors and buffers at their edges.

mod edges;
