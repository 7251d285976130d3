//! How a pool behaves.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::driver::Device;
use crate::error::{Error, Result};
use crate::units::MIB;

/// Least byte limit that leaves room for one page.
const LIMIT_MIN: u64 = 2 * MIB;

/// Whether a stream may have memory that another stream freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReusePolicy {
    /// Only memory that is known anyway to be complete; no event is recorded to find out.
    Never,
    /// Memory whose last use is found complete when it is wanted. Which that is depends on the device's
    /// pace, so addresses and peaks can differ from run to run.
    #[default]
    OnlyComplete,
    /// Any memory: the wanting stream is made to wait on the device. Addresses and peaks then depend on the
    /// order of calls alone.
    Wait,
}

impl ReusePolicy {
    const ALL: [(Self, &'static str); 3] = [
        (Self::Never, "never"),
        (Self::OnlyComplete, "only-complete"),
        (Self::Wait, "wait"),
    ];
}

impl fmt::Display for ReusePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::ALL
            .iter()
            .find(|(policy, _)| policy == self)
            .map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

impl FromStr for ReusePolicy {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.iter().find(|(_, known)| *known == name);
        found.map(|(policy, _)| *policy).ok_or_else(|| {
            let known = Self::ALL.map(|(_, known)| known).join(", ");
            Error::config("reuse", format!("unknown `{name}`; known are {known}"))
        })
    }
}

/// Settings of a [`Pool`](super::Pool). Checked once, when the pool is made.
///
/// Write `PoolConfig { limit, ..PoolConfig::default() }`: settings may be added.
#[derive(Clone, Debug, Default)]
pub struct PoolConfig {
    /// Most bytes the pool may hold from the driver; `None` leaves it to the device.
    pub limit: Option<u64>,
    /// Most the pool may hold as a part of the device's memory, above 0 and at most 1; `None` leaves it to
    /// the device. With a limit in bytes the smaller counts.
    pub fraction: Option<f64>,
    /// Whether a stream may have memory that another stream freed.
    pub reuse: ReusePolicy,
    /// Takes memory by plain driver allocations even where the device can map pages: for memory that is
    /// registered with others (IPC, some network cards). Streams then share memory only when there is no
    /// more.
    pub contiguous: bool,
    /// Longest time the host waits for streams in one allocation, when neither the pool nor the device has
    /// memory; after that the allocation fails. `None` waits as long as it takes, zero never waits. Drivers
    /// have no wait with an end, so the pool looks at least once a millisecond, and gives up at the first look
    /// after the deadline: it can take longer by the time that the system lets a thread sleep too long.
    /// Callbacks, and calls that wait for their own sake ([`Pool::trim`](super::Pool::trim)), are not
    /// counted.
    pub wait_deadline: Option<Duration>,
    /// Returns memory that has been idle this long to the driver, at the first call after that which the
    /// calling thread's cache cannot serve alone; `None` keeps it. What counts is how much was needed at the
    /// peak of a period of this length, so memory goes back after one to two periods; an eighth of that peak
    /// is held on to beside it. No thread watches the clock: see [`Pool::decay_now`](super::Pool::decay_now).
    pub decay: Option<Duration>,
    /// Gives the same addresses and the same peak on every run of a program that makes the same calls from one thread:
    /// nothing depends on how far the device is. Streams have each other's memory by waiting on the device
    /// ([`ReusePolicy::Wait`], also in place of [`ReusePolicy::OnlyComplete`]) or not at all, and where the pool must
    /// know that work is complete, because memory has run out or is returned, or because a stream was dropped and a new
    /// one is met, the host waits for it. Addresses are the same up to where the driver puts the pool's ranges.
    /// Excludes `wait_deadline` and `decay`, which go by the clock.
    pub deterministic: bool,
    /// Overwrites blocks with `0xFF` bytes (NaN in every float type) when they become reusable, in stream
    /// order, so that a use after free is seen in the result. For tests: it costs a fill per free.
    pub poison: bool,
}

impl PoolConfig {
    /// The settings as the pool works with them; refuses those that cannot work on `device`.
    pub(crate) fn checked(mut self, device: &Device) -> Result<Self> {
        Self::check_limit(self.limit, device)?;
        if let Some(fraction) = self.fraction {
            if !(fraction > 0.0 && fraction <= 1.0) {
                let reason = format!("{fraction} is not above 0 and at most 1");
                return Err(Error::config("fraction", reason));
            }
            let bytes = fraction_of(device, fraction);
            if bytes < LIMIT_MIN {
                let reason =
                    format!("{fraction} comes to {bytes} bytes; at least {LIMIT_MIN} are needed");
                return Err(Error::config("fraction", reason));
            }
        }
        if self.deterministic {
            let timed = [("wait_deadline", self.wait_deadline), ("decay", self.decay)];
            if let Some((key, _)) = timed.iter().find(|(_, time)| time.is_some()) {
                let reason = "goes by the clock, which a deterministic pool does not";
                return Err(Error::config(key, reason));
            }
            if self.reuse == ReusePolicy::OnlyComplete {
                self.reuse = ReusePolicy::Wait;
            }
        }
        Ok(self)
    }

    /// Refuses a limit that cannot work on `device`.
    pub(crate) fn check_limit(limit: Option<u64>, device: &Device) -> Result<()> {
        let Some(limit) = limit else {
            return Ok(());
        };
        let total = device.properties().total_memory;
        if limit < LIMIT_MIN {
            let reason = format!("{limit} bytes; at least {LIMIT_MIN} are needed");
            return Err(Error::config("limit", reason));
        }
        if limit > total {
            let reason = format!("{limit} bytes, but the device has {total}");
            return Err(Error::config("limit", reason));
        }
        Ok(())
    }

    /// Most bytes the pool may hold at the start.
    pub(crate) fn byte_limit(&self, device: &Device) -> Option<u64> {
        let of_device = self.fraction.map(|fraction| fraction_of(device, fraction));
        [self.limit, of_device].into_iter().flatten().min()
    }
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a part of a device's memory, in whole bytes"
)]
fn fraction_of(device: &Device, fraction: f64) -> u64 {
    (device.properties().total_memory as f64 * fraction) as u64
}
