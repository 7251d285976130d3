//! The devices that the cases are run on, and what the cases need beside them.

use kitsune::driver::DevicePtr;
use kitsune::{Block, Device, HostConfig, Pool, PoolConfig, Stream};

use crate::driver_support::Gate;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// A page, the least that paged memory takes from a driver.
pub(crate) const PAGE: u64 = 2 * MIB;
/// A size that shares neither a page nor a plain segment with others, so that it is its address that tells
/// whether memory is used again.
pub(crate) const OWN: u64 = 12 * MIB;

/// A device under test.
pub(crate) trait Subject {
    /// Whether it maps pages: streams then share memory.
    const IS_PAGED: bool;

    /// A device with `capacity` bytes of memory.
    fn device(capacity: u64) -> Device;

    /// Keeps `stream` from going on until the returned closure is called.
    fn hold(stream: &Stream) -> Box<dyn FnOnce()> {
        let gate = Gate::close(stream);
        Box::new(move || gate.open())
    }
}

fn host(capacity: u64, virtual_memory: bool) -> Device {
    let config = HostConfig {
        capacity,
        virtual_memory,
        ..HostConfig::default()
    };
    Device::host(config).unwrap()
}

/// The host device, mapping pages where the system lets it.
pub(crate) struct Paged;

impl Subject for Paged {
    const IS_PAGED: bool = cfg!(target_os = "linux");

    fn device(capacity: u64) -> Device {
        host(capacity, Self::IS_PAGED)
    }
}

/// The host device with plain allocations.
pub(crate) struct Plain;

impl Subject for Plain {
    const IS_PAGED: bool = false;

    fn device(capacity: u64) -> Device {
        host(capacity, false)
    }
}

/// A device, a pool on it with default settings, and a stream.
pub(crate) fn setup<S: Subject>(capacity: u64) -> (Device, Pool, Stream) {
    setup_with::<S>(capacity, PoolConfig::default())
}

pub(crate) fn setup_with<S: Subject>(capacity: u64, config: PoolConfig) -> (Device, Pool, Stream) {
    let device = S::device(capacity);
    let pool = Pool::new(&device, config).unwrap();
    let stream = device.create_stream().unwrap();
    (device, pool, stream)
}

pub(crate) fn limited<S: Subject>(capacity: u64, limit: u64) -> (Device, Pool, Stream) {
    let config = PoolConfig {
        limit: Some(limit),
        ..PoolConfig::default()
    };
    setup_with::<S>(capacity, config)
}

/// The addresses of a block.
pub(crate) fn range(block: &Block) -> std::ops::Range<u64> {
    let DevicePtr(start) = block.ptr();
    start..start + block.allocated()
}

/// Bytes in callers' hands, from the statistics.
pub(crate) fn allocated(pool: &Pool) -> u64 {
    pool.stats().allocated_bytes.current
}

/// Bytes held from the driver, from the statistics.
pub(crate) fn reserved(pool: &Pool) -> u64 {
    pool.stats().reserved_bytes.current
}
