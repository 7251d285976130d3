//! The table of metrics, and handing their values to the `metrics` facade.

use std::sync::Arc;

use metrics::{Label, SharedString, Unit, describe_counter, describe_gauge};

use super::ledger::{self, Kind, Name, Number, Reading, Rows};
use crate::amp::fp8::{Fp8Scaler, Fp8Stats, Fp8TensorStats};
use crate::amp::{GradScaler, ScalerStats};
use crate::driver::{Device, DeviceKind};
use crate::error::Result;
use crate::memory::{Pool, PoolStats, TagStat};

/// One metric of a source `S`: what it is called, what it means, where its value comes from.
struct Metric<S> {
    name: &'static str,
    unit: Unit,
    help: &'static str,
    value: Value<S>,
}

/// How a value moves, and how it is read.
enum Value<S> {
    /// A quantity that may go up and down: those of several sources add up.
    Amount(fn(&S) -> f64),
    /// A ratio, a factor or a state: of several sources the largest counts.
    Level(fn(&S) -> f64),
    /// A total that only grows.
    Counter(fn(&S) -> u64),
}

impl<S> Metric<S> {
    const fn gauge(name: &'static str, help: &'static str, read: fn(&S) -> f64) -> Self {
        let (unit, value) = (Unit::Count, Value::Amount(read));
        Self {
            name,
            unit,
            help,
            value,
        }
    }

    const fn level(name: &'static str, help: &'static str, read: fn(&S) -> f64) -> Self {
        let (unit, value) = (Unit::Count, Value::Level(read));
        Self {
            name,
            unit,
            help,
            value,
        }
    }

    const fn bytes(name: &'static str, help: &'static str, read: fn(&S) -> f64) -> Self {
        let (unit, value) = (Unit::Bytes, Value::Amount(read));
        Self {
            name,
            unit,
            help,
            value,
        }
    }

    const fn seconds(name: &'static str, help: &'static str, read: fn(&S) -> f64) -> Self {
        let (unit, value) = (Unit::Seconds, Value::Amount(read));
        Self {
            name,
            unit,
            help,
            value,
        }
    }

    const fn counter(name: &'static str, help: &'static str, read: fn(&S) -> u64) -> Self {
        let (unit, value) = (Unit::Count, Value::Counter(read));
        Self {
            name,
            unit,
            help,
            value,
        }
    }

    fn describe(&self) {
        match self.value {
            Value::Amount(_) | Value::Level(_) => {
                describe_gauge!(self.name, self.unit, self.help);
            }
            Value::Counter(_) => describe_counter!(self.name, self.unit, self.help),
        }
    }

    fn read(&self, source: &S) -> Reading {
        let number = match self.value {
            Value::Amount(read) => Number::Amount(read(source)),
            Value::Level(read) => Number::Level(read(source)),
            Value::Counter(read) => Number::Counter(read(source)),
        };
        Reading {
            name: self.name,
            number,
        }
    }
}

/// All metrics of `table`, read from `source`.
fn read<S>(table: &[Metric<S>], source: &S) -> Vec<Reading> {
    table.iter().map(|metric| metric.read(source)).collect()
}

/// What is published of a pool, under the labels `device` and `pool`.
const POOL: &[Metric<PoolStats>] = &[
    Metric::level(
        "kitsune.pool.up",
        "1 while a pool of this name exists, else 0.",
        |_| 1.0,
    ),
    Metric::bytes(
        "kitsune.pool.requested_bytes",
        "Bytes that callers asked for and hold.",
        |pool| real(pool.requested_bytes.current),
    ),
    Metric::bytes(
        "kitsune.pool.allocated_bytes",
        "Bytes in callers' hands, rounded to blocks.",
        |pool| real(pool.allocated_bytes.current),
    ),
    Metric::bytes(
        "kitsune.pool.active_bytes",
        "Allocated bytes, and freed bytes that other streams may still use.",
        |pool| real(pool.active_bytes.current),
    ),
    Metric::bytes(
        "kitsune.pool.reserved_bytes",
        "Bytes held from the driver.",
        |pool| real(pool.reserved_bytes.current),
    ),
    Metric::bytes(
        "kitsune.pool.inactive_split_bytes",
        "Free bytes between blocks in use, which cannot go back to the driver.",
        |pool| real(pool.inactive_split_bytes),
    ),
    Metric::bytes(
        "kitsune.pool.requested_peak_bytes",
        "Highest value of requested bytes.",
        |pool| real(pool.requested_bytes.peak),
    ),
    Metric::bytes(
        "kitsune.pool.allocated_peak_bytes",
        "Highest value of allocated bytes.",
        |pool| real(pool.allocated_bytes.peak),
    ),
    Metric::bytes(
        "kitsune.pool.reserved_peak_bytes",
        "Highest value of reserved bytes.",
        |pool| real(pool.reserved_bytes.peak),
    ),
    Metric::gauge("kitsune.pool.blocks", "Blocks in callers' hands.", |pool| {
        real(pool.allocation.current)
    }),
    Metric::gauge(
        "kitsune.pool.segments",
        "Ranges held from the driver.",
        |pool| real(pool.segment.current),
    ),
    Metric::level(
        "kitsune.pool.fragmentation_ratio",
        "Share of the reserved bytes that is free but split up, 0 to 1.",
        PoolStats::fragmentation,
    ),
    Metric::counter("kitsune.pool.allocations", "Allocations served.", |pool| {
        pool.allocation.allocated
    }),
    Metric::counter(
        "kitsune.pool.frees",
        "Blocks given back by callers.",
        |pool| pool.allocation.freed,
    ),
    Metric::counter(
        "kitsune.pool.cache_hits",
        "Allocations served without the driver.",
        |pool| pool.cache_hits,
    ),
    Metric::counter(
        "kitsune.pool.alloc_retries",
        "Allocations that had to release cached memory and try again.",
        |pool| pool.num_alloc_retries,
    ),
    Metric::counter("kitsune.pool.ooms", "Allocations that failed.", |pool| {
        pool.num_ooms
    }),
    Metric::counter(
        "kitsune.pool.stream_syncs",
        "Times the host waited for streams to find memory.",
        |pool| pool.num_sync_all_streams,
    ),
    Metric::counter(
        "kitsune.pool.driver_allocs",
        "Driver allocations.",
        |pool| pool.num_device_alloc,
    ),
    Metric::counter("kitsune.pool.driver_frees", "Driver frees.", |pool| {
        pool.num_device_free
    }),
];

/// What is published of each tag of a pool, under the further label `tag`.
const TAG: &[Metric<TagStat>] = &[
    Metric::bytes(
        "kitsune.tag.allocated_bytes",
        "Bytes that a component holds.",
        |tag| real(tag.allocated_bytes.current),
    ),
    Metric::bytes(
        "kitsune.tag.allocated_peak_bytes",
        "Most bytes that a component held.",
        |tag| real(tag.allocated_bytes.peak),
    ),
];

/// What is published of a gradient scaler, under the label `scaler`.
const SCALER: &[Metric<ScalerStats>] = &[
    Metric::level(
        "kitsune.amp.up",
        "1 while a scaler of this name exists, else 0.",
        |_| 1.0,
    ),
    Metric::level(
        "kitsune.amp.scale",
        "Factor by which losses are multiplied.",
        |amp| amp.scale,
    ),
    Metric::level(
        "kitsune.amp.skipped_in_a_row",
        "Steps skipped since the last one that was not.",
        |amp| real(amp.skipped_in_a_row),
    ),
    Metric::counter(
        "kitsune.amp.steps",
        "Optimizer steps, skipped or not.",
        |amp| amp.steps,
    ),
    Metric::counter(
        "kitsune.amp.overflow_steps",
        "Steps skipped because a gradient was infinite or NaN.",
        |amp| amp.skipped,
    ),
    Metric::level(
        "kitsune.amp.last_good_scale",
        "Scale of the last step that was applied, 0 before.",
        |amp| amp.last_good_scale.unwrap_or(0.0),
    ),
    Metric::seconds(
        "kitsune.amp.check_seconds",
        "Device time in checks of gradients, if timed.",
        |amp| amp.times.unwrap_or_default().check.as_secs_f64(),
    ),
    Metric::seconds(
        "kitsune.amp.clip_seconds",
        "Device time in clipping, if timed.",
        |amp| amp.times.unwrap_or_default().clip.as_secs_f64(),
    ),
    Metric::seconds(
        "kitsune.amp.step_seconds",
        "Device time in optimizer steps, if timed.",
        |amp| amp.times.unwrap_or_default().step.as_secs_f64(),
    ),
    Metric::level(
        "kitsune.amp.alarm",
        "1 while steps go on being skipped, else 0.",
        |amp| f64::from(u8::from(amp.alarm.is_some())),
    ),
    Metric::bytes(
        "kitsune.amp.scratch_bytes",
        "Bytes of the pool that scaling, checking and clipping hold.",
        |amp| real(amp.scratch_bytes),
    ),
    Metric::bytes(
        "kitsune.amp.scratch_peak_bytes",
        "Most bytes that they held.",
        |amp| real(amp.scratch_peak_bytes),
    ),
    Metric::counter(
        "kitsune.amp.nan_steps",
        "Steps skipped with a NaN among the gradients.",
        |amp| amp.nan_steps,
    ),
    Metric::counter(
        "kitsune.amp.infinite_weights",
        "Elements of weights that applied steps made infinite or NaN.",
        |amp| amp.infinite_weights,
    ),
    Metric::counter(
        "kitsune.amp.scale_growths",
        "Times the scale grew after an interval without overflow.",
        |amp| amp.growths,
    ),
    Metric::counter(
        "kitsune.amp.scale_backoffs",
        "Updates of the scale that saw an overflow.",
        |amp| amp.backoffs,
    ),
];

/// What is published of a scaler of 8-bit tensors, under the label `scaler`.
const FP8_SCALER: &[Metric<Fp8Stats>] = &[Metric::level(
    "kitsune.fp8.up",
    "1 while a scaler of 8-bit tensors of this name exists, else 0.",
    |_| 1.0,
)];

/// What is published of each tensor of a scaler of 8-bit tensors, under the labels `scaler` and `tensor`.
const FP8: &[Metric<Fp8TensorStats>] = &[
    Metric::level(
        "kitsune.fp8.scale",
        "Factor by which the tensor is multiplied.",
        |fp8| fp8.scale.into(),
    ),
    Metric::level(
        "kitsune.fp8.amax",
        "Largest magnitude that the last update of the scale saw, 0 before.",
        |fp8| fp8.amax.into(),
    ),
    Metric::counter("kitsune.fp8.elements", "Elements converted.", |fp8| {
        fp8.elements
    }),
    Metric::counter(
        "kitsune.fp8.overflowed_elements",
        "Elements that were too large, infinities included.",
        |fp8| fp8.overflowed,
    ),
    Metric::counter(
        "kitsune.fp8.vanished_elements",
        "Elements other than 0 that became 0.",
        |fp8| fp8.vanished,
    ),
    Metric::counter(
        "kitsune.fp8.nan_elements",
        "Elements that are NaN.",
        |fp8| fp8.nan,
    ),
    Metric::counter(
        "kitsune.fp8.scale_updates",
        "Updates of the scale, whether or not it moved.",
        |fp8| fp8.updates,
    ),
    Metric::counter(
        "kitsune.fp8.not_finite_updates",
        "Updates of the scale that saw an infinity or NaN.",
        |fp8| fp8.not_finite,
    ),
];

/// Gives the installed recorder the unit and help text of every metric. Metrics that are published without
/// are complete but for these.
pub fn describe() {
    POOL.iter().for_each(Metric::describe);
    TAG.iter().for_each(Metric::describe);
    SCALER.iter().for_each(Metric::describe);
    FP8_SCALER.iter().for_each(Metric::describe);
    FP8.iter().for_each(Metric::describe);
}

/// Publishes the statistics of `pool` as those of the pool `default` of its device. See [`publish_as`].
pub fn publish(pool: &Pool) {
    publish_as(pool, "default");
}

/// Publishes the statistics of `pool`, all from one moment, under the label `pool="name"`.
///
/// A name may be used again. Its counters are sums over all pools of the device that were ever published under it, and
/// never fall. Its gauges are those of the pools that still exist: sums of bytes, blocks and segments, the largest of
/// the ratios, and 0 after the last one is gone (with the last clone of the [`Pool`]). What a pool counted after it was
/// published last is not in the sums.
///
/// This call and every other one that publishes also export what became of other pools and scalers, as [`sweep`] does.
/// A recorder that was installed later than a pool was published gets the totals with the next call.
///
/// Takes the pool's lock once, for as long as a copy of its numbers takes, and allocates a few strings: meant for every
/// step or second, not for every allocation.
pub fn publish_as(pool: &Pool, name: &str) {
    let labels = vec![
        Label::new("device", device_label(pool.device())),
        Label::new("pool", shared(name)),
    ];
    let mut rows = Rows::from([(labels.clone(), read(POOL, &pool.stats()))]);
    for tag in pool.tag_stats() {
        let tag_label = Label::new("tag", tag.tag);
        let labels = labels.iter().cloned().chain([tag_label]).collect();
        rows.insert(labels, read(TAG, &tag));
    }
    let kind = Kind::Pool;
    ledger::publish(Name { kind, labels }, pool.token(), rows);
}

/// Publishes the statistics of `scaler` as those of the scaler `default`. See [`publish_scaler_as`].
///
/// # Errors
/// As [`publish_scaler_as`].
pub fn publish_scaler(scaler: &GradScaler) -> Result<()> {
    publish_scaler_as(scaler, "default")
}

/// Publishes the statistics of `scaler` under the label `scaler="name"`.
///
/// A name may be used again, as that of a pool ([`publish_as`]): counters are sums over all scalers of the name. Times
/// and bytes are sums over those that still exist; the scale, the skipped steps in a row and the alarm are the largest
/// among them.
///
/// The statistics lie on the device, so this waits for everything enqueued before: meant for every some steps.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) if work of the stream failed; nothing was published.
pub fn publish_scaler_as(scaler: &GradScaler, name: &str) -> Result<()> {
    let labels = vec![Label::new("scaler", shared(name))];
    let rows = Rows::from([(labels.clone(), read(SCALER, &scaler.stats()?))]);
    let kind = Kind::Scaler;
    ledger::publish(Name { kind, labels }, scaler.token(), rows);
    Ok(())
}

/// Publishes the statistics of `scaler` as those of the scaler `default`. See [`publish_fp8_as`].
///
/// # Errors
/// As [`publish_fp8_as`].
pub fn publish_fp8(scaler: &Fp8Scaler) -> Result<()> {
    publish_fp8_as(scaler, "default")
}

/// Publishes the statistics of each tensor of `scaler` under the labels `scaler="name"` and `tensor`, its name.
///
/// A name may be used again, as that of a pool ([`publish_as`]): counters are sums over all tensors of the name, scales
/// and magnitudes the largest of those that still exist.
///
/// The statistics lie on the device, so this waits for everything enqueued before: meant for every some steps. There
/// are eight series a tensor.
///
/// # Errors
/// [`Error::Driver`](crate::Error::Driver) if work of the stream failed; nothing was published.
pub fn publish_fp8_as(scaler: &Fp8Scaler, name: &str) -> Result<()> {
    let stats = scaler.stats()?;
    let labels = vec![Label::new("scaler", shared(name))];
    let mut rows = Rows::from([(labels.clone(), read(FP8_SCALER, &stats))]);
    for tensor in &stats.tensors {
        let tensor_label = Label::new("tensor", shared(&tensor.name));
        let labels = labels.iter().cloned().chain([tensor_label]).collect();
        rows.insert(labels, read(FP8, tensor));
    }
    let kind = Kind::Fp8;
    ledger::publish(Name { kind, labels }, scaler.token(), rows);
    Ok(())
}

/// Exports what became of everything that was published: the gauges of pools and scalers that are gone become 0.
///
/// Every call that publishes does so too. This one is for a program that has nothing left to publish.
pub fn sweep() {
    ledger::sweep();
}

/// The kind of the device and its place among those of its driver: `host:0`.
fn device_label(device: &Device) -> SharedString {
    let properties = device.properties();
    let kind = match properties.kind {
        DeviceKind::Host => "host",
        DeviceKind::Cuda => "cuda",
    };
    shared(&format!("{kind}:{}", properties.ordinal.0))
}

/// `text`, to be cloned for every metric.
fn shared(text: &str) -> SharedString {
    Arc::<str>::from(text).into()
}

/// A count as a gauge shows it: exact up to 8 PiB.
#[expect(clippy::cast_precision_loss, reason = "gauges are f64")]
fn real(count: u64) -> f64 {
    count as f64
}
