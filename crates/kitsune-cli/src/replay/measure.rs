//! Measures a pool on programs: memory held, driver calls, and time.
//!
//! Every measurement makes a new pool, and a new device if that is the host. The first pass starts with an empty pool,
//! the second with a pool that has seen the sizes; the timed passes follow. Memory is not touched, except in a check,
//! which is a separate run.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use indicatif::ProgressBar;
use kitsune::units::GIB;
use kitsune::{Device, Error, HostConfig, HostSchedule, Pool, PoolConfig, ReusePolicy};

use super::addresses::{self, DigestedBackend};
use super::backend::{Backend, PoolBackend, SystemBackend};
use super::check::CheckedBackend;
use super::crew::{Pass, Stop, play};
use super::figures::{Figures, median};
use super::meter::Meter;
use super::player::{HANDOFF_CAPACITY, Handoff, Player, Tools};
use super::prices::Prices;
use super::probe::ProbeDriver;
use super::program::{Operation, Program};
use crate::args::DeviceChoice;
use crate::failure::Failure;

/// Minimum duration of a timed repeat; shorter ones would mostly measure the clock.
const REPEAT_MIN: Duration = Duration::from_millis(20);
/// Default memory of the host device.
const DEVICE_BYTES: u64 = 80 * GIB;
/// Passes of a check or of a digest: one with an empty pool, and one with a pool that reuses memory.
const CHECK_PASSES: u32 = 2;

/// Arguments common to `kitsune replay` and `kitsune churn`.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Setup {
    /// Memory limit of the pool, for example 512MiB.
    #[arg(long, value_name = "BYTES", value_parser = crate::args::parse_bytes)]
    pub(crate) limit: Option<u64>,

    /// Device to run on. The memory of a CUDA device is fixed, and its streams run in an order of their own.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Host)]
    pub(crate) device: DeviceChoice,

    /// Memory of the host device [default: 80GiB]. May exceed the machine's memory, since it is not touched.
    #[arg(long, value_name = "BYTES", value_parser = crate::args::parse_bytes)]
    pub(crate) device_bytes: Option<u64>,

    /// When a stream may reuse memory that another stream freed: never, only-complete or wait.
    #[arg(long, value_name = "POLICY", default_value_t)]
    pub(crate) policy: ReusePolicy,

    /// Simulate a slow device: events complete N allocations after they are recorded, or when the host waits for them.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) event_lag: u64,

    /// Prices of driver calls in microseconds, a JSON file: `{"map_us": 2, ...}`. Prices that it does not name are the
    /// published ones.
    #[arg(long, value_name = "FILE")]
    pub(crate) prices: Option<PathBuf>,

    /// Seed of the order in which the host device's streams make progress, and of random workloads.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Timed repeats.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) repeats: u32,

    /// Also check, in a separate run, that every block keeps what is written to it.
    #[arg(long)]
    pub(crate) check: bool,

    /// Print the result as one JSON object.
    #[arg(long)]
    pub(crate) json: bool,

    /// Whether the pool is deterministic. Only for one program.
    #[arg(skip)]
    pub(crate) deterministic: bool,

    /// What `prices` contains.
    #[arg(skip)]
    pub(crate) price_list: Prices,
}

impl Setup {
    /// Resolves `--device auto` and reads the price list.
    ///
    /// # Errors
    /// [`Failure::Input`] for settings that need the host device, and for a price list that is none.
    pub(crate) fn decided(&self) -> Result<Self, Failure> {
        let device = self.device.decided();
        if device == DeviceChoice::Cuda && self.device_bytes.is_some() {
            let reason = "--device-bytes: the memory of a CUDA device is fixed; see --limit";
            return Err(Failure::Input(reason.to_owned()));
        }
        let price_list = match &self.prices {
            Some(file) => Prices::read(file)?,
            None => Prices::default(),
        };
        Ok(Self {
            device,
            price_list,
            ..self.clone()
        })
    }

    /// Memory of the device; of a CUDA device, the memory that is free.
    ///
    /// # Errors
    /// [`Error::Driver`] if there is no such device.
    pub(crate) fn memory(&self) -> Result<u64, Error> {
        match self.device {
            DeviceChoice::Cuda => Ok(self.open(0)?.memory_info()?.free),
            _ => Ok(self.host_bytes()),
        }
    }

    /// Memory of the host device.
    pub(super) fn host_bytes(&self) -> u64 {
        self.device_bytes.unwrap_or(DEVICE_BYTES)
    }

    fn open(&self, host_bytes: u64) -> Result<Device, Error> {
        self.device.open(HostConfig {
            capacity: host_bytes,
            schedule: HostSchedule::Seeded(self.seed),
            ..HostConfig::default()
        })
    }
}

/// What ends a measurement early.
#[derive(Debug)]
pub(crate) enum Halt {
    /// The device or the pool could not be made.
    Setup(Error),
    /// A program was stopped.
    Play(Stop),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Setup(error)
    }
}

impl From<Stop> for Halt {
    fn from(stop: Stop) -> Self {
        Self::Play(stop)
    }
}

/// A new pool on a device, with the probe between them.
struct Bench {
    probe: Arc<ProbeDriver>,
    backend: PoolBackend,
}

impl Bench {
    fn new(setup: &Setup, host_bytes: u64, programs: &[Program]) -> Result<Self, Error> {
        let below = setup.open(host_bytes)?;
        let probe = Arc::new(ProbeDriver::new(
            Arc::clone(below.driver()),
            setup.event_lag,
        ));
        let device = Device::from_driver(Arc::clone(&probe) as _);
        let config = PoolConfig {
            limit: setup.limit,
            reuse: setup.policy,
            deterministic: setup.deterministic,
            ..PoolConfig::default()
        };
        let streams = programs
            .iter()
            .map(|program| program.streams)
            .max()
            .unwrap_or(0)
            .max(1);
        let backend = PoolBackend::new(Pool::new(&device, config)?, streams)?;
        Ok(Self { probe, backend })
    }
}

/// One player per program, each with its own `backend`. Programs that hand blocks over are paired.
fn players<'a, B: Backend>(
    programs: &'a [Program],
    tools: &Tools,
    mut backend: impl FnMut(&Program) -> Result<B, Error>,
) -> Result<Vec<Player<'a, B>>, Error> {
    let mut receiver = None;
    let mut players = Vec::with_capacity(programs.len());
    for program in programs {
        let does = |wanted: fn(&Operation) -> bool| program.operations.iter().any(wanted);
        let handoff = if does(|operation| matches!(operation, Operation::Send { .. })) {
            let (to, from) = sync_channel(HANDOFF_CAPACITY);
            receiver = Some(from);
            Handoff::To(to)
        } else if does(|operation| matches!(operation, Operation::Receive { .. })) {
            Handoff::From(
                receiver
                    .take()
                    .expect("a sender stands before each receiver"),
            )
        } else {
            Handoff::None
        };
        let backend = backend(program)?;
        players.push(Player::new(program, backend, handoff, tools.clone()));
    }
    Ok(players)
}

/// The tools that players need on a device with a lag.
fn tools(probe: &ProbeDriver) -> Tools {
    Tools {
        clock: probe.clock(),
        meter: None,
    }
}

/// Times repeats of a pass.
struct Stopwatch {
    repeats: usize,
    /// Allocations of the thread that has the most.
    pairs: u64,
    rounds: u32,
    /// In ns per pair.
    times: Vec<f64>,
}

impl Stopwatch {
    fn new(programs: &[Program], repeats: u32) -> Self {
        let pairs = programs
            .iter()
            .map(|program| program.allocations)
            .max()
            .unwrap_or(0);
        Self {
            repeats: repeats as usize,
            pairs,
            rounds: 1,
            times: Vec::new(),
        }
    }

    /// Computes the rounds of the first timed repeat from an untimed pass.
    fn start(&mut self, warm: Pass) -> u32 {
        if self.pairs == 0 {
            return 0;
        }
        let one = (warm.elapsed / warm.rounds).max(Duration::from_nanos(100));
        let rounds = REPEAT_MIN.as_nanos().div_ceil(one.as_nanos());
        self.rounds = u32::try_from(rounds).unwrap_or(u32::MAX);
        self.rounds
    }

    /// Records a repeat. Returns the rounds of the next one, or 0 after the last.
    fn lap(&mut self, pass: Pass) -> u32 {
        let pairs = self.pairs as f64 * f64::from(pass.rounds);
        self.times.push(pass.elapsed.as_secs_f64() * 1e9 / pairs);
        if self.times.len() < self.repeats {
            self.rounds
        } else {
            0
        }
    }

    /// All times in ascending order.
    fn into_times(mut self) -> Vec<f64> {
        self.times.sort_by(f64::total_cmp);
        self.times
    }
}

/// What the timed repeats cost in driver calls.
#[derive(Default)]
struct Warm {
    rounds: u64,
    pages_mapped: u64,
    driver_ms: f64,
}

impl Warm {
    fn add(&mut self, pass: Pass, pages_mapped: u64, driver_ms: f64) {
        self.rounds += u64::from(pass.rounds);
        self.pages_mapped += pages_mapped;
        self.driver_ms += driver_ms;
    }

    /// A total per step, where a pass has `steps` steps; a pass without any counts as one.
    fn per_step(&self, total: f64, steps: u64) -> Option<f64> {
        (self.rounds > 0).then(|| total / (self.rounds * steps.max(1)) as f64)
    }
}

/// Plays `programs` together on a new pool.
pub(crate) fn measure(
    setup: &Setup,
    programs: &[Program],
    bar: &ProgressBar,
) -> Result<Figures, Halt> {
    let Bench { probe, backend } = Bench::new(setup, setup.host_bytes(), programs)?;
    let streams = backend.streams.len() as u64;
    let meter = Arc::new(Meter::new(Arc::clone(&probe)));
    let tools = Tools {
        meter: Some(Arc::clone(&meter)),
        ..tools(&probe)
    };
    let players = players(programs, &tools, |_| Ok(backend.clone()))?;
    let mut figures = Figures {
        device: backend.pool.device().properties().name.clone(),
        host_threads: programs
            .iter()
            .map(|program| program.threads() as u64)
            .sum(),
        steps: programs.iter().map(|program| program.steps).sum(),
        allocs: programs.iter().map(|program| program.allocations).sum(),
        ..Figures::default()
    };
    let mut watch = Stopwatch::new(programs, setup.repeats);
    let (mut passes, mut calls) = (0, probe.calls());
    let mut warm = Warm::default();
    play(players, |before| {
        let Some((pass, ooms)) = before else { return 1 };
        bar.inc(1);
        passes += 1;
        let earlier = std::mem::replace(&mut calls, probe.calls());
        let made = calls.since(&earlier);
        match passes {
            1 => {
                // Not from the pool's statistics, which add up the peaks of threads.
                figures.peak_requested_bytes = meter.peak();
                figures.peak_reserved_bytes = backend.pool.stats().reserved_bytes.peak;
                figures.driver_allocs = made.allocations;
                figures.events_recorded = made.records;
                figures.pages_mapped_first = made.pages_mapped;
                figures.pages_mapped_per_step_late = meter.pages_mapped_late();
                figures.map_calls_first = made.map_calls;
                figures.driver_ms_first = setup.price_list.milliseconds(&made);
                let told = programs
                    .iter()
                    .map(|program| program.synchronizations(streams));
                figures.host_syncs = made.host_syncs - told.sum::<u64>();
                figures.ooms = ooms;
                1
            }
            2 => {
                figures.driver_calls_steady = made.memory;
                watch.start(pass)
            }
            _ => {
                figures.driver_calls_settled = Some(made.memory as f64 / f64::from(pass.rounds));
                warm.add(
                    pass,
                    made.pages_mapped,
                    setup.price_list.milliseconds(&made),
                );
                watch.lap(pass)
            }
        }
    })?;
    let (requested, reserved) = (figures.peak_requested_bytes, figures.peak_reserved_bytes);
    figures.ratio = (requested > 0).then(|| reserved as f64 / requested as f64);
    figures.pages_mapped_per_step = warm.per_step(warm.pages_mapped as f64, figures.steps);
    figures.driver_ms_per_step = warm.per_step(warm.driver_ms, figures.steps);
    figures.times = watch.into_times();
    figures.ns_per_pair = median(&figures.times);
    Ok(figures)
}

/// Plays `programs` on the system's allocator. Returns the median time in ns per pair, or `None` if memory ran out.
pub(crate) fn time_system(setup: &Setup, programs: &[Program]) -> Result<Option<f64>, Halt> {
    let players = players(programs, &Tools::default(), |_| Ok(SystemBackend))?;
    let mut watch = Stopwatch::new(programs, setup.repeats);
    let (mut passes, mut all_ooms) = (0, 0);
    play(players, |before| {
        let Some((pass, ooms)) = before else { return 1 };
        passes += 1;
        all_ooms += ooms;
        match passes {
            1 => watch.start(pass),
            _ => watch.lap(pass),
        }
    })?;
    Ok(median(&watch.into_times()).filter(|_| all_ooms == 0))
}

/// Plays `programs` on a new pool, writes to every block, and checks that the bytes do not change.
pub(crate) fn check(setup: &Setup, programs: &[Program]) -> Result<(), Halt> {
    let Bench { probe, backend } = Bench::new(setup, setup.host_bytes(), programs)?;
    let next_stamp = Arc::new(AtomicU64::new(0));
    let players = players(programs, &tools(&probe), |program| {
        CheckedBackend::new(
            backend.clone(),
            Arc::clone(&next_stamp),
            program.recorded_uses(),
        )
    })?;
    let mut left = CHECK_PASSES + 1;
    play(players, |_| {
        left -= 1;
        left.min(1)
    })?;
    // Only after all threads are done: the invariants hold only while nothing uses the pool.
    backend.pool.check_invariants();
    Ok(())
}

/// Plays `program` twice on a new pool, and returns a digest of the addresses of all its blocks: first with an empty
/// pool, then with one that reuses memory.
pub(crate) fn address_digest(setup: &Setup, program: &Program) -> Result<String, Halt> {
    let programs = std::slice::from_ref(program);
    let Bench { probe, backend } = Bench::new(setup, setup.host_bytes(), programs)?;
    let digest = Arc::default();
    let players = players(programs, &tools(&probe), |_| {
        let (probe, digest) = (Arc::clone(&probe), Arc::clone(&digest));
        Ok(DigestedBackend::new(backend.clone(), probe, digest))
    })?;
    let mut left = CHECK_PASSES + 1;
    play(players, |_| {
        left -= 1;
        left.min(1)
    })?;
    Ok(addresses::text(&digest))
}

/// Whether all allocations of `programs` succeed on a host device of this size, starting with an empty pool.
pub(crate) fn passes(setup: &Setup, host_bytes: u64, programs: &[Program]) -> Result<bool, Halt> {
    let Bench { probe, backend } = Bench::new(setup, host_bytes, programs)?;
    let players = players(programs, &tools(&probe), |_| Ok(backend.clone()))?;
    let mut room = true;
    play(players, |before| match before {
        None => 1,
        Some((_, ooms)) => {
            room = ooms == 0;
            0
        }
    })?;
    Ok(room)
}
