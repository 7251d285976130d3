//! The pool: model, orders of streams, faults, limits, captures, statistics.

mod asan;
mod broken;
mod capture;
mod conformance;
mod contents;
mod controls;
mod deterministic;
mod edges;
mod faults;
mod gone_streams;
mod left;
mod logs;
mod model;
mod peaks;
mod pinned;
mod pinned_bounds;
mod private;
mod private_faults;
mod private_gone;
mod shortage;
mod streams;
mod tags;
mod turns;
mod wrappers;
