//! The devices that suites of the allocator run on, and what they need beside them.
//!
//! A suite is written once, over a [`Subject`], and made into tests for each: the host device with and without
//! mapped pages, and the CUDA device over a simulated driver.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a helper of tests enqueues work on memory of its own, and fails by panicking"
)]
#![allow(dead_code, reason = "a program takes the suites it needs")]

use kitsune::driver::DevicePtr;
use kitsune::{Block, Device, Error, HostConfig, OutOfMemory, Pool, PoolConfig, Result, Stream};

#[cfg(all(target_os = "linux", feature = "cuda"))]
use super::cuda;
use super::driver::Gate;
#[cfg(all(target_os = "linux", feature = "cuda"))]
use super::process;

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;
/// A page, the least that paged memory takes from a driver.
pub(crate) const PAGE: u64 = 2 * MIB;
/// A size that shares neither a page nor a plain segment with others, so that it is its address that tells
/// whether memory is used again.
pub(crate) const OWN: u64 = 12 * MIB;

/// A kind of device under test.
pub(crate) trait Subject {
    /// Whether it maps pages: streams then share memory.
    const IS_PAGED: bool;

    /// Runs `case`, the body of the test `name`, where it finds this kind of device.
    fn run(name: &str, case: fn()) {
        let _ = name;
        case();
    }

    /// A device as `config` says, as far as that means something to it: of that capacity at least.
    fn device_like(config: HostConfig) -> Device;

    /// A device with `capacity` bytes of memory.
    fn device(capacity: u64) -> Device {
        Self::device_like(HostConfig {
            capacity,
            ..HostConfig::default()
        })
    }

    /// Keeps `stream` from going on until the returned closure is called.
    fn hold(stream: &Stream) -> Box<dyn FnOnce()>;
}

fn close_gate(stream: &Stream) -> Box<dyn FnOnce()> {
    let gate = Gate::close(stream);
    Box::new(move || gate.open())
}

/// The host device, mapping pages where the system lets it.
pub(crate) struct Paged;

impl Subject for Paged {
    const IS_PAGED: bool = cfg!(target_os = "linux");
    fn device_like(config: HostConfig) -> Device {
        let virtual_memory = Self::IS_PAGED;
        Device::host(HostConfig {
            virtual_memory,
            ..config
        })
        .unwrap()
    }

    fn hold(stream: &Stream) -> Box<dyn FnOnce()> {
        close_gate(stream)
    }
}

/// The host device with plain allocations.
pub(crate) struct Plain;

impl Subject for Plain {
    const IS_PAGED: bool = false;
    fn device_like(config: HostConfig) -> Device {
        Device::host(HostConfig {
            virtual_memory: false,
            ..config
        })
        .unwrap()
    }

    fn hold(stream: &Stream) -> Box<dyn FnOnce()> {
        close_gate(stream)
    }
}

/// The CUDA device over the simulated driver, which is one for the process.
#[cfg(all(target_os = "linux", feature = "cuda"))]
pub(crate) struct SimCuda;

#[cfg(all(target_os = "linux", feature = "cuda"))]
impl Subject for SimCuda {
    const IS_PAGED: bool = true;
    /// In a process of its own: there a CUDA device is the same from begin to end, and so is its size.
    fn run(name: &str, case: fn()) {
        process::alone(name, || {
            let sim = cuda::Sim::take();
            sim.set("shim", kitsune_shim::LIBRARY);
            case();
        });
    }

    fn device_like(config: HostConfig) -> Device {
        cuda::set("memory", &config.capacity.to_string());
        Device::cuda(0).unwrap()
    }

    /// Streams of the simulated driver go on when they are waited for, and by a step when they are asked. So
    /// many steps are not asked for.
    fn hold(stream: &Stream) -> Box<dyn FnOnce()> {
        const STEPS: usize = 1000;
        let driver = stream.driver().clone();
        let scratch = driver.allocate_pinned(1).unwrap();
        for _ in 0..STEPS {
            super::driver::fill(stream, scratch, 0, 1);
        }
        let stream = stream.clone();
        Box::new(move || {
            stream.synchronize().unwrap();
            // SAFETY: the fills have run.
            unsafe { driver.free_pinned(scratch) }.unwrap();
        })
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

/// The report of a request that was refused for want of memory.
pub(crate) fn report<T: std::fmt::Debug>(outcome: Result<T>) -> OutOfMemory {
    match outcome {
        Err(Error::OutOfMemory(report)) => *report,
        other => panic!("running out was expected, not {other:?}"),
    }
}

/// Has what the thread keeps of freed blocks merge, which a pool otherwise does when no hole fits a request.
pub(crate) fn merge(pool: &Pool) {
    pool.check_invariants();
}
