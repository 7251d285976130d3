//! A simulated CUDA driver library, for tests of Kitsune where there is no GPU.
//!
//! It exports the functions of `libcuda` that Kitsune and cudarc's safe layer call, over memory of the host:
//!
//! - Streams are lazy. Work waits in a queue until somebody waits for it; a query takes one step and then
//!   answers as things were before. A wait that was forgotten, and memory used again too early, show every time.
//! - An event means the record before the wait, as in CUDA. Captured work is kept and run when its graph is
//!   launched; what captures forbid invalidates them.
//! - Virtual memory is one file, parts of which are mapped at any number of addresses, without access until
//!   access is set. Plain memory is mapped for each allocation, so a use after free is a fault.
//! - Modules are PTX text; an entry point is run by a library that has the same source compiled for the host.
//! - Calls need a current context. Work on memory that is not there breaks the context for good.
//!
//! Tests steer it by `simcuda_*` functions, or a process through the variable `SIMCUDA`
//! (`key=value,key=value`, as [`config`] reads it): which call fails and how, what the device is like, which
//! calls were made, what is still held.
//!
//! - The legacy default stream runs in order with blocking streams; each thread has a default stream of its own.
//!
//! What it does not have: time of its own, threads that run by themselves, memory pools with attributes that mean
//! anything, peer access.

#![cfg(target_os = "linux")]

mod capture;
pub mod config;
mod control;
mod exports;
mod memory;
mod modules;
mod pages;
mod sim;
mod streams;
