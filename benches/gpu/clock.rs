//! Time: of the device between events in a stream, of the host by its clock. Medians, since other programs and the
//! first runs only ever add to a figure.
//!
//! A trainer's device is busy when a step is enqueued. So before each timed piece of work the stream gets a *runway*, work
//! that lasts until the host has enqueued the piece: gaps that only an idle device would have are not in the figure, and
//! caches are cold.

use std::time::{Duration, Instant};

use kitsune::driver::DevicePtr;
use kitsune::units::{GIB, MIB, to_usize};
use kitsune::{Result, Stream};

use crate::cuda::Handle;
use crate::setting::Setting;

/// Repeats that are not counted: code is loaded, caches and pools fill.
const WARM_UP: usize = 3;
/// Repeats that are counted, at most and at least.
const REPEATS: std::ops::RangeInclusive<usize> = 5..=30;
/// No figure goes on longer, unless its least repeats take longer.
const BUDGET: Duration = Duration::from_millis(1500);

/// The one in the middle; NaN for no numbers.
pub(crate) fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs `pass` until there are repeats enough; gives what the counted ones returned.
pub(crate) fn repeat<T>(mut pass: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    for _ in 0..WARM_UP {
        pass()?;
    }
    let start = Instant::now();
    let mut results = Vec::new();
    while results.len() < *REPEATS.end()
        && (results.len() < *REPEATS.start() || start.elapsed() < BUDGET)
    {
        results.push(pass()?);
    }
    Ok(results)
}

/// Median microseconds that the device takes for what `work` enqueues on `stream`.
pub(crate) fn device_time(
    setting: &Setting,
    stream: &Stream,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    let laps = Laps::new(setting, stream, 1)?;
    let times = repeat(|| {
        laps.runway(1)?;
        laps.mark(0)?;
        work()?;
        laps.mark(1)?;
        stream.synchronize()?;
        laps.lap(0)
    })?;
    Ok(median(times))
}

/// Median nanoseconds of the host for one of `count` calls of `work`, which are timed together; `settle` is not timed.
pub(crate) fn host_time(
    count: u32,
    mut work: impl FnMut() -> Result<()>,
    mut settle: impl FnMut() -> Result<()>,
) -> Result<f64> {
    let times = repeat(|| {
        let start = Instant::now();
        for _ in 0..count {
            work()?;
        }
        let took = start.elapsed();
        settle()?;
        Ok(took.as_secs_f64() * 1e9 / f64::from(count))
    })?;
    Ok(median(times))
}

/// Marks in a stream with laps between them.
pub(crate) struct Laps<'a> {
    setting: &'a Setting,
    stream: &'a Stream,
    events: Vec<Handle>,
    runway: DevicePtr,
    runway_bytes: u64,
}

impl<'a> Laps<'a> {
    pub(crate) fn new(setting: &'a Setting, stream: &'a Stream, laps: usize) -> Result<Self> {
        let events = (0..=laps).map(|_| setting.cuda.event());
        let runway_bytes = setting.size(to_usize(2 * GIB), to_usize(MIB)) as u64;
        Ok(Self {
            events: events.collect::<Result<_>>()?,
            runway: stream.driver().allocate(runway_bytes)?,
            runway_bytes,
            setting,
            stream,
        })
    }

    /// Keeps the device busy for a while: each turn writes 2 GiB.
    pub(crate) fn runway(&self, turns: usize) -> Result<()> {
        let (driver, raw) = (self.stream.driver(), self.stream.raw());
        (0..turns).try_for_each(|_| {
            // SAFETY: the memory is ours, and freed when the stream has passed.
            unsafe { driver.fill(self.runway, 0, self.runway_bytes, raw) }
        })
    }

    /// Puts mark `number` at the end of the stream.
    pub(crate) fn mark(&self, number: usize) -> Result<()> {
        self.setting.cuda.record(self.events[number], self.stream)
    }

    /// Microseconds from mark `number` to the next, once the stream was waited for.
    pub(crate) fn lap(&self, number: usize) -> Result<f64> {
        let (start, end) = (self.events[number], self.events[number + 1]);
        self.setting.cuda.microseconds(start, end)
    }
}

impl Drop for Laps<'_> {
    fn drop(&mut self) {
        // What fails here is left to the end of the process.
        let _ = self.stream.synchronize();
        // SAFETY: the stream was waited for, and nobody else knows the memory.
        let _ = unsafe { self.stream.driver().free(self.runway) };
        for event in &self.events {
            let _ = self.setting.cuda.destroy(*event);
        }
    }
}
