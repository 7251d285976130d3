//! A device handle that can be passed around.

use std::fmt;
use std::sync::Arc;

use super::{DeviceProperties, Driver, HostConfig, MemoryInfo, Stream, host};
use crate::error::{Error, Result};

/// A device. Cheap to clone; the device is closed when the last clone and everything made from it is gone.
#[derive(Clone)]
pub struct Device {
    driver: Arc<dyn Driver>,
}

impl Device {
    /// The best device of this machine: the first CUDA device, or the host device with default settings if the CUDA
    /// device cannot be opened or is too old for the kernels. [`why_not_cuda`](Self::why_not_cuda) returns the reason.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if no device can be opened.
    pub fn auto() -> Result<Self> {
        if let Ok(device) = Self::complete_cuda() {
            return Ok(device);
        }
        Self::host(HostConfig::default())
    }

    /// The first CUDA device, if kernels can run on it.
    fn complete_cuda() -> Result<Self> {
        let device = Self::cuda(0)?;
        #[cfg(feature = "cuda")]
        super::cuda::check_kernels(device.properties())?;
        Ok(device)
    }

    /// The CUDA device with this number. Opening a device again returns another handle of the same device. Memory can
    /// be allocated on every device of the driver; kernels need compute capability 8.0.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) with call `open` if there is no CUDA driver, if it is too old
    /// (before CUDA 12.0), damaged or cannot be initialized, if it has no such device, or if the crate was
    /// built without the feature `cuda`.
    pub fn cuda(ordinal: u32) -> Result<Self> {
        #[cfg(feature = "cuda")]
        let device = super::cuda::CudaDriver::get(ordinal).map(|driver| Self::from_driver(driver));
        #[cfg(not(feature = "cuda"))]
        let device = Err(crate::error::Error::Driver {
            call: "open",
            code: 0,
            reason: format!("no CUDA device {ordinal}: built without the feature `cuda`"),
        });
        device
    }

    /// Why [`auto`](Self::auto) does not take the first CUDA device; `None` if it does.
    #[must_use]
    pub fn why_not_cuda() -> Option<String> {
        let refused = Self::complete_cuda().err();
        refused.map(|error| error.to_string())
    }

    /// A host device: the CPU and its memory, with asynchronous streams, events and page mapping.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for settings that cannot work,
    /// [`Error::Driver`](crate::Error::Driver) if the system refuses memory or threads.
    pub fn host(config: HostConfig) -> Result<Self> {
        Ok(Self::from_driver(Arc::new(host::HostDriver::new(config)?)))
    }

    /// `count` host devices of one platform. Each has as much memory as `config` says, and they accept each other's
    /// streams and events.
    ///
    /// # Errors
    /// As [`host`](Self::host); also for a count of 0.
    pub fn hosts(config: HostConfig, count: u32) -> Result<Vec<Self>> {
        let drivers = host::HostDriver::platform(config, count)?;
        Ok(drivers
            .into_iter()
            .map(|driver| Self::from_driver(Arc::new(driver)))
            .collect())
    }

    /// A device over any driver: one of your own, or a wrapper such as
    /// [`FaultDriver`](super::fault::FaultDriver).
    #[must_use]
    pub fn from_driver(driver: Arc<dyn Driver>) -> Self {
        Self { driver }
    }

    /// The driver below.
    #[must_use]
    pub fn driver(&self) -> &Arc<dyn Driver> {
        &self.driver
    }

    /// What the device is and can do.
    #[must_use]
    pub fn properties(&self) -> &DeviceProperties {
        self.driver.properties()
    }

    /// Free and total memory now.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver cannot report it.
    pub fn memory_info(&self) -> Result<MemoryInfo> {
        self.driver.memory_info()
    }

    /// A new stream on this device.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) if the driver cannot make another stream.
    pub fn create_stream(&self) -> Result<Stream> {
        Stream::new(self)
    }

    /// Refuses a device of another platform, whose handles would mean something else here.
    pub(super) fn expect_platform(&self, op: &'static str, other: &Self) -> Result<()> {
        if self.driver().platform() == other.driver().platform() {
            return Ok(());
        }
        let reason = format!("{self:?} and {other:?} are on different platforms");
        Err(Error::argument(op, reason))
    }

    /// Whether both are handles of the same open device.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.driver, &other.driver)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let properties = self.properties();
        write!(
            f,
            "Device({:?} {}: {})",
            properties.kind, properties.ordinal.0, properties.name
        )
    }
}
