//! Describes this machine's CUDA installation, for `kitsune doctor` and other diagnostics.

use std::path::PathBuf;

use super::kernels::target_for;
use super::library::Library;
use super::{CudaDriver, context};
use crate::driver::DeviceProperties;
use crate::error::Result;

/// The CUDA driver of this machine and its devices.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Installation {
    /// The file the driver's library was loaded from.
    pub library: PathBuf,
    /// The newest CUDA version that the driver supports, as (major, minor).
    pub driver_version: (u32, u32),
    /// The devices, in the driver's order.
    pub devices: Vec<CudaDevice>,
}

/// A CUDA device, as `kitsune doctor` reports it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CudaDevice {
    /// The properties that every device has.
    pub properties: DeviceProperties,
    /// Whether the driver has a stream-ordered allocator for it.
    pub memory_pools: bool,
    /// The number of multiprocessors.
    pub multiprocessors: u32,
    /// The compute capability that the chosen kernels were compiled for, as (major, minor); `None` if there are
    /// none for this device.
    pub kernels_for: Option<(u32, u32)>,
    /// The PTX version of the chosen kernels.
    pub ptx_version: Option<&'static str>,
}

impl Installation {
    /// The file of the driver's library, usable or not; `None` if there is none.
    #[must_use]
    pub fn library() -> Option<PathBuf> {
        Library::first_file()
    }

    /// Looks for the driver and opens each device.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) with call `open` if there is no driver, if it is too old or damaged or
    /// cannot be initialized, or if a device cannot be opened.
    pub fn find() -> Result<Self> {
        let library = Library::get()?;
        let devices = (0..context::count(library)?).map(|ordinal| {
            let context = CudaDriver::get(ordinal)?.context;
            let target = target_for(context.properties.compute_capability);
            Ok(CudaDevice {
                properties: context.properties.clone(),
                memory_pools: context.abilities.memory_pools,
                multiprocessors: context.abilities.multiprocessors,
                kernels_for: target,
                ptx_version: target.map(|_| kitsune_kernels::PTX_VERSION),
            })
        });
        Ok(Self {
            library: library.path(),
            driver_version: library.version(),
            devices: devices.collect::<Result<_>>()?,
        })
    }
}
