//! The CUDA driver over a simulated library, and what is built on it.

mod buffers;
mod cublaslt;
mod driver;
mod exit;
mod memory;
mod ptx;
mod training;
