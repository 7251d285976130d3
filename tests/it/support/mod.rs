//! What suites share.

pub(crate) mod amp;
#[cfg(all(target_os = "linux", feature = "cuda"))]
pub(crate) mod cuda;
pub(crate) mod device;
pub(crate) mod driver;
pub(crate) mod process;
pub(crate) mod seeds;
pub(crate) mod subject;
