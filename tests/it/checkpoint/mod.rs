//! Checkpoints: states of other rules, orders and versions.

mod state;
