//! The suites that run on a machine with a GPU, as one program: what `scripts/gpu/pack` carries there.
//!
//! Each suite is a program of its own everywhere else, and a module here: `gpu_suites amp_scaler::` runs one.
//! Together they need the library and its device code once, a fifth of what they need apart. Not among what
//! `cargo test` runs: every test in here was run there already.

#[path = "../amp_checkpoint.rs"]
mod amp_checkpoint;
#[path = "../amp_clip.rs"]
mod amp_clip;
#[path = "../amp_conformance/main.rs"]
mod amp_conformance;
#[path = "../amp_edges.rs"]
mod amp_edges;
#[path = "../amp_fp8.rs"]
mod amp_fp8;
#[path = "../amp_optimizer.rs"]
mod amp_optimizer;
#[path = "../amp_oracle_gradients.rs"]
mod amp_oracle_gradients;
#[path = "../amp_oracle_scale.rs"]
mod amp_oracle_scale;
#[path = "../amp_oracle_steps.rs"]
mod amp_oracle_steps;
#[path = "../amp_produced.rs"]
mod amp_produced;
#[path = "../amp_scaler.rs"]
mod amp_scaler;
#[path = "../amp_step_faults.rs"]
mod amp_step_faults;
#[path = "../amp_training.rs"]
mod amp_training;
#[path = "../amp_watch.rs"]
mod amp_watch;
#[path = "../amp_weights.rs"]
mod amp_weights;
#[path = "../kernels/main.rs"]
mod kernels;
#[path = "../memory_contents.rs"]
mod memory_contents;
#[path = "../memory_edges.rs"]
mod memory_edges;
#[path = "../memory_faults.rs"]
mod memory_faults;
#[path = "../memory_model.rs"]
mod memory_model;
#[path = "../ops_autocast.rs"]
mod ops_autocast;
#[path = "../ops_autocast_cache.rs"]
mod ops_autocast_cache;
#[path = "../ops_fp8.rs"]
mod ops_fp8;
#[path = "../ops_gradients.rs"]
mod ops_gradients;
#[path = "../ops_ignoring.rs"]
mod ops_ignoring;
#[path = "../ops_results.rs"]
mod ops_results;
#[path = "../ops_transformer.rs"]
mod ops_transformer;
#[path = "../optim_adam.rs"]
mod optim_adam;
#[path = "../optim_adamw.rs"]
mod optim_adamw;
#[path = "../optim_sgd.rs"]
mod optim_sgd;
#[path = "../storage_edges.rs"]
mod storage_edges;
