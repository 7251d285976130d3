//! `kitsune doctor`: reports this machine's CUDA support, and which device would be used.
//!
//! Missing CUDA support is a finding, not a failure: the exit code is 0 whatever is found.

use kitsune::Device;
use kitsune::driver::DeviceKind;
use kitsune::units::Bytes;
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::failure::Failure;
use crate::output;
use crate::summary::table;

/// The findings. The field names are the keys of the JSON output, which is part of the command's interface.
#[derive(Debug, Serialize)]
struct Findings {
    /// The version of this program.
    kitsune: &'static str,
    /// Why no CUDA device can be used; `null` if one can.
    why_not_cuda: Option<String>,
    /// The file of the driver's library, usable or not.
    driver_library: Option<String>,
    /// The newest CUDA version that the driver supports.
    driver_cuda_version: Option<String>,
    devices: Vec<DeviceFindings>,
    toolkit: Vec<LibraryFindings>,
    /// The device that `--device auto` selects.
    auto: String,
    /// Whether that is the host.
    host_fallback: bool,
}

#[derive(Debug, Serialize)]
struct DeviceFindings {
    ordinal: u32,
    name: String,
    compute_capability: Option<String>,
    total_bytes: u64,
    free_bytes: Option<u64>,
    multiprocessors: u32,
    virtual_memory: bool,
    page_granularity: u64,
    memory_pools: bool,
    /// The compute capability the chosen kernels were compiled for; `null` if none can run on the device.
    kernels_for: Option<String>,
    /// The PTX version of those kernels.
    ptx_version: Option<String>,
    /// Why cuBLASLt does not compute matrix products; `null` if it does.
    why_not_cublaslt: Option<String>,
}

/// A library of the CUDA toolkit.
#[derive(Debug, Serialize)]
struct LibraryFindings {
    name: &'static str,
    /// `null` if it cannot be loaded.
    file: Option<String>,
}

/// Collects the findings and prints them.
pub(crate) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let findings = look()?;
    if args.json {
        let text = serde_json::to_string(&findings);
        return output::print(&text.expect("a struct of numbers and strings is always JSON"));
    }
    output::print(&findings.to_table())
}

fn look() -> Result<Findings, Failure> {
    let auto = Device::auto()?;
    let mut findings = Findings {
        kitsune: env!("CARGO_PKG_VERSION"),
        why_not_cuda: Device::why_not_cuda(),
        driver_library: None,
        driver_cuda_version: None,
        devices: Vec::new(),
        toolkit: Vec::new(),
        auto: auto.properties().name.clone(),
        host_fallback: auto.properties().kind == DeviceKind::Host,
    };
    cuda(&mut findings);
    Ok(findings)
}

#[cfg(not(feature = "cuda"))]
fn cuda(_: &mut Findings) {}

#[cfg(feature = "cuda")]
fn cuda(findings: &mut Findings) {
    use kitsune::driver::cuda::{Installation, toolkit};
    use kitsune::launch::why_not_cublaslt;

    findings.toolkit = toolkit()
        .into_iter()
        .map(|library| LibraryFindings {
            name: library.name,
            file: library.file.map(|file| file.display().to_string()),
        })
        .collect();
    // Report the file even if the library cannot be used.
    findings.driver_library = Installation::library().map(|file| file.display().to_string());
    // `why_not_cuda` already has the reason.
    let Ok(installation) = Installation::find() else {
        return;
    };
    findings.driver_library = Some(installation.library.display().to_string());
    findings.driver_cuda_version = Some(dotted(installation.driver_version));
    let devices = installation.devices.into_iter().map(|device| {
        let properties = device.properties;
        let opened = Device::cuda(properties.ordinal.0);
        let info = opened.and_then(|device| device.memory_info());
        DeviceFindings {
            ordinal: properties.ordinal.0,
            name: properties.name,
            compute_capability: properties.compute_capability.map(dotted),
            total_bytes: properties.total_memory,
            free_bytes: info.ok().map(|info| info.free),
            multiprocessors: device.multiprocessors,
            virtual_memory: properties.virtual_memory,
            page_granularity: properties.page_granularity,
            memory_pools: device.memory_pools,
            kernels_for: device.kernels_for.map(dotted),
            ptx_version: device.ptx_version.map(str::to_owned),
            why_not_cublaslt: why_not_cublaslt(properties.ordinal.0)
                .unwrap_or_else(|error| Some(error.to_string())),
        }
    });
    findings.devices = devices.collect();
}

#[cfg(feature = "cuda")]
fn dotted((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

impl Findings {
    fn to_table(&self) -> String {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
        let mut rows = vec![
            ("kitsune", self.kitsune.to_owned()),
            ("CUDA driver", or_none(&self.driver_library)),
        ];
        if let Some(version) = &self.driver_cuda_version {
            rows.push(("CUDA version", format!("up to {version}")));
        }
        if let Some(reason) = &self.why_not_cuda {
            rows.push(("no CUDA", reason.clone()));
        }
        rows.extend(
            self.devices
                .iter()
                .map(|device| ("device", device.to_text())),
        );
        rows.extend(
            self.toolkit
                .iter()
                .map(|library| (library.name, or_none(&library.file))),
        );
        let note = if self.host_fallback {
            " (no CUDA device can be used)"
        } else {
            ""
        };
        rows.push(("--device auto", format!("{}{note}", self.auto)));
        table(&rows)
    }
}

impl DeviceFindings {
    fn to_text(&self) -> String {
        let yes = |is: bool| if is { "yes" } else { "no" };
        let free = self
            .free_bytes
            .map_or_else(|| "unknown".to_owned(), |free| Bytes(free).to_string());
        let kernels = match (&self.kernels_for, &self.ptx_version) {
            (Some(target), Some(version)) => format!("for {target}, PTX {version}"),
            _ => "none for this device".to_owned(),
        };
        let products = match &self.why_not_cublaslt {
            None => "by cuBLASLt".to_owned(),
            Some(reason) => format!("by Kitsune's kernel, because {reason}"),
        };
        format!(
            "{}: {}, compute capability {}, {} multiprocessors\n\
             memory: {free} of {} free\n\
             virtual memory: {}\n\
             memory pools: {}\n\
             kernels: {kernels}\n\
             matrix products: {products}",
            self.ordinal,
            self.name,
            self.compute_capability.as_deref().unwrap_or("unknown"),
            self.multiprocessors,
            Bytes(self.total_bytes),
            match self.virtual_memory {
                true => format!("yes, in units of {}", Bytes(self.page_granularity)),
                false => "no".to_owned(),
            },
            yes(self.memory_pools),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_reads() {
        let findings = Findings {
            kitsune: "1.2.3",
            why_not_cuda: None,
            driver_library: Some("/lib/libcuda.so.1".to_owned()),
            driver_cuda_version: Some("13.0".to_owned()),
            devices: vec![DeviceFindings {
                ordinal: 0,
                name: "H".to_owned(),
                compute_capability: Some("9.0".to_owned()),
                total_bytes: 80 << 30,
                free_bytes: Some(79 << 30),
                multiprocessors: 132,
                virtual_memory: true,
                page_granularity: 2 << 20,
                memory_pools: true,
                kernels_for: Some("8.0".to_owned()),
                ptx_version: Some("8.0".to_owned()),
                why_not_cublaslt: None,
            }],
            toolkit: vec![LibraryFindings {
                name: "NCCL",
                file: None,
            }],
            auto: "H".to_owned(),
            host_fallback: false,
        };
        let expected = "\
kitsune        1.2.3
CUDA driver    /lib/libcuda.so.1
CUDA version   up to 13.0
device         0: H, compute capability 9.0, 132 multiprocessors
               memory: 79.0 GiB of 80.0 GiB free
               virtual memory: yes, in units of 2.0 MiB
               memory pools: yes
               kernels: for 8.0, PTX 8.0
               matrix products: by cuBLASLt
NCCL           none
--device auto  H
";
        assert_eq!(findings.to_table(), expected);
    }
}
