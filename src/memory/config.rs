//! How a pool behaves.

use std::fmt;
use std::str::FromStr;

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
#[derive(Clone, Debug, Default)]
pub struct PoolConfig {
    /// Most bytes the pool may hold from the driver; `None` leaves it to the device.
    pub limit: Option<u64>,
    /// Whether a stream may have memory that another stream freed.
    pub reuse: ReusePolicy,
    /// Takes memory by plain driver allocations even where the device can map pages: for memory that is
    /// registered with others (IPC, some network cards). Streams then share nothing.
    pub contiguous: bool,
    /// Overwrites blocks with `0xFF` bytes (NaN in every float type) when they become reusable, in stream
    /// order, so that a use after free is seen in the result. For tests: it costs a fill per free.
    pub poison: bool,
}

impl PoolConfig {
    /// Refuses settings that cannot work on `device`.
    pub(super) fn validate(&self, device: &Device) -> Result<()> {
        let Some(limit) = self.limit else {
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
}
