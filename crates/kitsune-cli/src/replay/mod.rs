//! `kitsune replay`: replays allocation traces on a pool.
//!
//! A trace becomes a `program`. A `player` plays it on a `backend`: the pool, a pool with a `check`, or the system's
//! allocator. A `crew` runs the players; the host threads of each take turns in a `shift`. A `probe` between pool and
//! device counts driver calls, and `prices` says what they cost on a GPU. `measure` puts these together, and `figures`
//! reports the result, with a digest of all `addresses` in deterministic mode.
//! `kitsune churn` runs its workloads the same way.

mod addresses;
mod backend;
mod check;
mod crew;
mod figures;
mod measure;
mod meter;
mod min_device;
mod player;
mod prices;
mod probe;
pub(crate) mod program;
mod shift;

use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use kitsune::telemetry::trace;

pub(crate) use figures::Figures;
pub(crate) use measure::{Halt, Setup, check, measure, time_system};

use self::backend::Trouble;
use self::crew::Stop;
use self::measure::address_digest;
use self::program::{Builder, Program};
use crate::args::DeviceChoice;
use crate::failure::Failure;
use crate::output;

/// Arguments of `kitsune replay`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ReplayArgs {
    /// Traces: plain, .gz or .zst. The host threads of a trace take turns; several traces are played concurrently.
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,

    /// Find the smallest device on which the traces pass, to within a quarter of a percent.
    #[arg(long, conflicts_with = "limit")]
    min_device: bool,

    /// Use a deterministic pool, and report a digest of the addresses of all blocks, which is the same on every run.
    /// One thread then plays all traces, an event of each in turn; a single trace keeps its host threads.
    #[arg(long)]
    deterministic: bool,

    #[command(flatten)]
    setup: Setup,
}

/// Replays and prints the result.
pub(crate) fn run(args: &ReplayArgs) -> Result<(), Failure> {
    let setup = Setup {
        deterministic: args.deterministic,
        ..args.setup.decided()?
    };
    if args.min_device && setup.device == DeviceChoice::Cuda {
        let reason = "--min-device: the memory of a CUDA device is fixed; see --device host";
        return Err(Failure::Input(reason.to_owned()));
    }
    let mut programs = args
        .files
        .iter()
        .map(|file| load(file))
        .collect::<Result<Vec<_>, _>>()?;
    let mut names: Vec<_> = args
        .files
        .iter()
        .map(|file| file.display().to_string())
        .collect();
    if args.deterministic {
        // How threads interleave differs from run to run.
        programs = vec![program::in_turn(&programs)];
        names = vec![names.join(", ")];
    }
    let figures = replay(args, &setup, &programs).map_err(|halt| failure(halt, &names))?;
    if args.min_device && figures.min_device_bytes.is_none() {
        let size = kitsune::units::Bytes(setup.host_bytes());
        let message = format!(
            "--min-device: the traces do not fit on a device of {size}; see --device-bytes"
        );
        return Err(Failure::Run(message));
    }
    print(&figures, setup.json)
}

fn replay(args: &ReplayArgs, setup: &Setup, programs: &[Program]) -> Result<Figures, Halt> {
    let bar = progress(setup);
    let mut figures = measure(setup, programs, &bar)?;
    if let (true, [program]) = (setup.deterministic, programs) {
        figures.address_digest = Some(address_digest(setup, program)?);
    }
    if args.min_device {
        figures.min_device_bytes = min_device::find(setup, programs, &figures, &bar)?;
    }
    if setup.check {
        check(setup, programs)?;
        figures.checked = true;
    }
    bar.finish_and_clear();
    Ok(figures)
}

/// A bar over the passes. If standard error is not a terminal, it shows nothing.
pub(crate) fn progress(setup: &Setup) -> ProgressBar {
    ProgressBar::new(u64::from(setup.repeats) + 2)
}

/// Prints the result.
pub(crate) fn print(figures: &Figures, json: bool) -> Result<(), Failure> {
    output::print(&if json {
        figures.to_json()
    } else {
        figures.to_table()
    })
}

/// Reads a trace as a program.
fn load(file: &Path) -> Result<Program, Failure> {
    let refused = |error: trace::TraceError| {
        let place = match error.line {
            0 => String::new(),
            line => format!(":{line}"),
        };
        Failure::Input(format!("{}{place}: {}", file.display(), error.reason))
    };
    let mut reader = trace::open(file).map_err(refused)?;
    let mut builder = Builder::default();
    while let Some(event) = reader.next() {
        builder.push(&event.map_err(refused)?, reader.line());
    }
    Ok(builder.finish())
}

/// The failure to report for a halt. `names` are the names of the programs, in order.
pub(crate) fn failure(halt: Halt, names: &[String]) -> Failure {
    let Stop {
        player,
        line,
        trouble,
    } = match halt {
        Halt::Setup(error) => return error.into(),
        Halt::Play(stop) => stop,
    };
    let place = match line {
        0 => names[player].clone(),
        line => format!("{}:{line}", names[player]),
    };
    Failure::Run(match trouble {
        Trouble::Refused(error) => format!("{place}: {error}"),
        Trouble::Overwritten(message) => format!("{place}: {message}"),
    })
}
