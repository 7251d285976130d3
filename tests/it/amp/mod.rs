//! Mixed precision: scaler, optimizers under it, 8-bit scaling, checkpoints.

mod checkpoint;
mod clip;
mod conformance;
mod edges;
mod fp8;
mod optimizer;
mod oracle_gradients;
mod oracle_scale;
mod oracle_steps;
mod produced;
mod scaler;
mod step_faults;
mod traffic;
mod training;
mod watch;
mod weights;
