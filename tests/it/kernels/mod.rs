//! Device kernels, run on the host, against their twins: each launch by both from the same arrays.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod elementwise;
mod entries;
mod fp8;
mod large;
mod layouts;
mod places;
mod places_of_steps;
mod produced;
mod rows;
mod shim;
mod support;
mod tables;
mod traffic;
mod training;
mod transformer;
