//! Settings of a host device.
//!
//! A configuration is validated once, when the device is opened.

use crate::error::{Error, Result};
use crate::units::{Bytes, GIB, KIB, MIB};

/// Unit of page sizes and mapping addresses: that of CUDA devices, and the size of a huge page.
pub const PAGE_GRANULARITY: u64 = 2 * MIB;

/// Unit of plain memory: the smallest piece that the system hands out.
pub(super) const ALLOCATION_GRANULARITY: u64 = 4 * KIB;

/// Largest capacity: half of the 2^47 bytes that a process can address, so that addresses for twice the capacity can
/// be reserved.
const CAPACITY_MAX: u64 = 1 << 46;

/// The order in which streams make progress.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostSchedule {
    /// Every stream has a thread, and the operating system schedules the threads.
    #[default]
    Threads,
    /// No threads: work runs inside driver calls, and a random generator with this seed picks the stream
    /// that runs next. A program with one host thread interleaves the same way every time, so a missing wait that fails
    /// under a seed fails under it again.
    Seeded(u64),
}

/// Settings of a host device. Write `HostConfig { capacity, ..HostConfig::default() }`, so that code still compiles
/// when settings are added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    /// Bytes of device memory. Can exceed the memory of the machine, since untouched bytes cost nothing. Pinned memory
    /// does not count against it. Pinned memory is touched at once, and refused if it would leave the machine, or a
    /// control group of the process, with less than a sixteenth of its memory (64 MiB to 4 GiB).
    pub capacity: u64,
    /// The order in which streams make progress.
    pub schedule: HostSchedule,
    /// Whether pages can be mapped. Needs Linux; ignored on other systems.
    pub virtual_memory: bool,
}

impl Default for HostConfig {
    /// 80 GiB, one thread per stream, virtual memory on Linux.
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
