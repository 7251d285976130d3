//! The `kitsune` command: trains small networks with the library's public API, and runs recorded traces and synthetic
//! workloads on a pool.
//!
//! `main` parses the arguments, runs the command and turns the outcome into an exit code. The modules:
//!
//! - `args`: the command line, checked before anything runs.
//! - `data_file`, `digits`, `batches`, `text`, `random`, `fingerprint`: the training data, the order in which it is
//!   used, and fingerprints that detect changed data.
//! - `train`: the training run.
//! - `report`, `summary`, `output`: the final report, and writing it to standard output.
//! - `progress`, `metrics_server`: reporting during a run.
//! - `replay`, `churn`: allocation benchmarks.
//! - `doctor`: this machine's CUDA support.
//! - `failure`: errors that end a run early.
//!
//! Standard output carries only the result. A failure or a warning is one line on standard error.

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
