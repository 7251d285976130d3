//! The `kitsune` command as its users run it.

mod churn;
mod cli;
mod command;
#[cfg(all(target_os = "linux", feature = "cuda"))]
mod cuda_doctor;
#[cfg(all(target_os = "linux", feature = "cuda"))]
mod cuda_replay;
#[cfg(all(target_os = "linux", feature = "cuda"))]
mod cuda_train;
mod replay;
mod train_gpt;
mod train_resume;
