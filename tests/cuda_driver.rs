//! The CUDA device over a simulated driver: what it asks of the driver's library, and what it must not.

#![cfg(all(target_os = "linux", feature = "cuda"))]
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests call the driver with plain addresses, and fail by panicking"
)]

mod cuda_support;
mod driver_support;

use cuda_support::Sim;
use driver_support::{allocate, copy, fill, read, refusal, write};
use kitsune::driver::{DeviceKind, DevicePtr, PageHandle, RawEvent, RawGraph, RawStream};
use kitsune::units::{KIB, MIB};
use kitsune::{Device, Error, Event, Stream};

const PAGE: u64 = 2 * MIB;
const INVALID_VALUE: i32 = 1;

#[test]
fn the_device_says_what_it_is() {
    let (_sim, device) = Sim::device();
    let properties = device.properties();
    assert_eq!(properties.kind, DeviceKind::Cuda);
    assert_eq!(properties.name, "Simulated CUDA device");
    assert_eq!(properties.total_memory, 8 << 30);
    assert!(properties.virtual_memory);
    assert_eq!(properties.page_granularity, PAGE);
    assert_eq!(properties.compute_capability, Some((9, 0)));
    assert_eq!(Device::why_not_cuda(), None);
    assert!(Device::auto().unwrap().is_same(&device));
    let info = device.memory_info().unwrap();
    assert_eq!(info.total, 8 << 30);
}
