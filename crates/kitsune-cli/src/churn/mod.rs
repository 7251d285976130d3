//! `kitsune churn`: runs synthetic allocation workloads on a pool and on the system's allocator.

mod cases;
mod minstd;
mod training;
mod workloads;

use kitsune::units::MIB;

use self::workloads::{Shape, Workload};
use crate::failure::Failure;
use crate::replay::{self, Figures, Halt, Setup};

/// The largest program, in allocations over all threads: about 5 GB.
const ALLOCATIONS_MAX: u64 = 100_000_000;

/// Arguments of `kitsune churn`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ChurnArgs {
    /// Workload to run.
    #[arg(long, value_enum)]
    workload: Workload,

    /// Size of every block [default: 512; 8 for multi-stream, 64KiB for producer-consumer,
    /// 0.9 % of the device for priming].
    #[arg(long, value_name = "BYTES", value_parser = crate::args::parse_bytes)]
    bytes: Option<u64>,

    /// Allocations of each thread that allocates; training workloads complete the last step.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    allocs: u64,

    /// Largest block of the random workload, in MiB [default: 64].
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=16_000))]
    max_mib: Option<u64>,

    /// Host threads [default: 1; 2 for producer-consumer].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: Option<u32>,

    /// Streams, assigned to the threads in turn [default: one per thread; 4 for multi-stream].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    streams: Option<u32>,

    #[command(flatten)]
    setup: Setup,
}

/// Runs the workload and prints the result.
pub(crate) fn run(args: &ChurnArgs) -> Result<(), Failure> {
    let setup = args.setup.decided()?;
    let shape = shape(args, &setup)?;
    let names: Vec<_> = (0..shape.threads)
        .map(|thread| format!("thread {thread}"))
        .collect();
    let figures = churn(&setup, &shape).map_err(|halt| replay::failure(halt, &names))?;
    replay::print(&figures, setup.json)
}

fn churn(setup: &Setup, shape: &Shape) -> Result<Figures, Halt> {
    let bar = replay::progress(setup);
    let programs = shape.programs();
    let mut figures = replay::measure(setup, &programs, &bar)?;
    figures.malloc_ns_per_pair = Some(replay::time_system(setup, &programs)?);
    if setup.check {
        replay::check(setup, &programs)?;
        figures.checked = true;
    }
    bar.finish_and_clear();
    Ok(figures)
}

/// The workload's parameters, or why they are inconsistent.
fn shape(args: &ChurnArgs, setup: &Setup) -> Result<Shape, Failure> {
    let workload = args.workload;
    let refuse = |reason: String| Err(Failure::Input(reason));
    let pairs = workload == Workload::ProducerConsumer;
    let threads = args.threads.unwrap_or(if pairs { 2 } else { 1 });
    let bytes = match workload {
        Workload::Hot => Some(512),
        Workload::MultiStream => Some(8),
        Workload::ProducerConsumer => Some(64 << 10),
        Workload::Priming => {
            let at_once = cases::PRIMED_BLOCKS * u64::from(threads);
            Some((setup.memory()? / 10 * 9 / at_once).max(1))
        }
        _ => None,
    };
    if args.bytes.is_some() && bytes.is_none() {
        return refuse("--bytes: this workload chooses its own block sizes".to_owned());
    }
    if args.max_mib.is_some() && workload != Workload::Random {
        return refuse("--max-mib: only for the random workload".to_owned());
    }
    if pairs && !threads.is_multiple_of(2) {
        return refuse(format!(
            "--threads {threads}: each producer needs a consumer"
        ));
    }
    if args.allocs > ALLOCATIONS_MAX / u64::from(threads) {
        return refuse(format!(
            "--allocs {}: no more than {ALLOCATIONS_MAX} over all threads",
            args.allocs
        ));
    }
    let streams = match workload {
        Workload::MultiStream => 4,
        _ => threads,
    };
    Ok(Shape {
        workload,
        bytes: args.bytes.or(bytes).unwrap_or(0),
        allocations: args.allocs,
        max_bytes: args.max_mib.unwrap_or(64) * MIB,
        threads,
        streams: args.streams.unwrap_or(streams),
        seed: setup.seed,
    })
}
