//! The `kitsune` command: trains a small network on the library's public API and tells what happened, and
//! plays recorded or well-known sequences of allocations on a pool.
//!
//! `main` parses, runs and turns the outcome into an exit code; each step lives in a module of its own:
//!
//! - `args`: the command line, checked before anything runs.
//! - `data_file`, `digits`, `batches`, `text`, `random`, `fingerprint`: what is learned, the order in which it is shown,
//!   and how it is told from other data.
//! - `train`: the training run.
//! - `report`, `summary`, `output`: what is told at the end, and how it reaches standard output.
//! - `progress`, `metrics_server`: what is told meanwhile.
//! - `replay`, `churn`: allocations without a network.
//! - `doctor`: what of CUDA is on this machine.
//! - `failure`: what ends a run early.
//!
//! Standard output carries the result and nothing else. A failure is one line on standard error, and so is a warning.

mod args;
mod batches;
mod churn;
mod data_file;
mod digits;
mod doctor;
mod failure;
mod fingerprint;
mod metrics_server;
mod output;
mod progress;
mod random;
mod replay;
mod report;
mod summary;
mod text;
mod train;

use std::process::ExitCode;

use args::{Parsed, TrainArgs};
use failure::Failure;
use progress::Progress;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn run() -> Result<(), Failure> {
    match args::parse(std::env::args_os())? {
        Parsed::Help(text) => output::print(&text),
        Parsed::Train(args) => train_command(&args),
        Parsed::Replay(args) => replay::run(&args),
        Parsed::Churn(args) => churn::run(&args),
        Parsed::Doctor(args) => doctor::run(&args),
    }
}

fn train_command(args: &TrainArgs) -> Result<(), Failure> {
    let data = train::Data::load(args)?;
    if let Some(address) = &args.metrics {
        metrics_server::start(address)?;
    }
    let report = train::run(args, data, &Progress::new(args.steps))?;
    if args.json {
        output::print(&report.to_json())
    } else {
        output::print(&report.to_table())
    }
}
