//! Settings of a host device.
//!
//! A configuration is checked once, when the device is opened; after that every value in it holds.

use crate::error::{Error, Result};
use crate::units::{Bytes, GIB, KIB, MIB};

/// Unit of page sizes and mapping addresses: that of the CUDA devices the host stands in for, and the
/// size of a huge page.
pub const PAGE_GRANULARITY: u64 = 2 * MIB;

/// Unit in which plain memory is counted: the system hands out no less.
pub(super) const ALLOCATION_GRANULARITY: u64 = 4 * KIB;

/// Largest capacity: half of the 2^47 bytes that a process can address, so that ranges can be reserved
/// twice over.
const CAPACITY_MAX: u64 = 1 << 46;

/// In which order streams make progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostSchedule {
    /// Every stream has a thread, and the system decides.
    #[default]
    Threads,
    /// No threads: work runs inside the calls of the driver, and a generator with this seed picks the stream
    /// that runs next. A program with one host thread interleaves the same way every time, so a missing
    /// wait that shows under some seed shows under it again.
    Seeded(u64),
}

/// Settings of a host device. Write `HostConfig { capacity, ..HostConfig::default() }`: settings may be
/// added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Bytes of device memory. May exceed the memory of the machine, since untouched bytes cost nothing. Pinned
    /// memory, which does not count here, is touched at once: it is refused where the machine, or a control group of
    /// the process, would have less than a sixteenth of its memory (64 MiB to 4 GiB) left.
    pub capacity: u64,
    /// In which order streams make progress.
    pub schedule: HostSchedule,
    /// Whether pages can be mapped. Needs Linux; elsewhere the device does without.
    pub virtual_memory: bool,
}

impl Default for HostConfig {
    /// 80 GiB, one thread a stream, virtual memory where the system has it.
    fn default() -> Self {
        Self {
            capacity: 80 * GIB,
            schedule: HostSchedule::Threads,
            virtual_memory: cfg!(target_os = "linux"),
        }
    }
}

impl HostConfig {
    /// Refuses settings that cannot work.
    pub(super) fn validate(&self) -> Result<()> {
        if (ALLOCATION_GRANULARITY..=CAPACITY_MAX).contains(&self.capacity) {
            return Ok(());
        }
        Err(Error::config(
            "capacity",
            format!(
                "{} is not between {} and {}",
                Bytes(self.capacity),
                Bytes(ALLOCATION_GRANULARITY),
                Bytes(CAPACITY_MAX)
            ),
        ))
    }
}
