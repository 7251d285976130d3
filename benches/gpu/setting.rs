//! What every part is given: the words of the command line, the device, and where figures go.

use std::io::Write;
use std::path::PathBuf;

use kitsune::driver::cuda::Installation;
use kitsune::{Context, Device, Error, Result};
use serde_json::{Value, json};

use crate::PARTS;
use crate::cuda::Cuda;

/// The command line.
#[derive(Debug, Default)]
pub(crate) struct Words {
    /// `cargo bench -- --test` asks whether benches run, and for no figures.
    pub(crate) is_smoke: bool,
    /// Sizes for a simulated device.
    is_small: bool,
    /// Parts to run; all if empty.
    parts: Vec<String>,
    /// Traces to play.
    traces: Vec<PathBuf>,
}

impl Words {
    /// Understands `--small`, `--test`, names of parts, and traces, which end in `.at`. What cargo adds is passed over.
    ///
    /// # Errors
    /// The first word that is none of these.
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut words = Self::default();
        for word in arguments {
            match word.as_str() {
                "--bench" => {}
                "--test" => words.is_smoke = true,
                "--small" => words.is_small = true,
                trace if trace.ends_with(".at") => words.traces.push(trace.into()),
                part if PARTS.iter().any(|(name, _)| *name == part) => words.parts.push(word),
                _ => return Err(word),
            }
        }
        Ok(words)
    }

    pub(crate) fn asks_for(&self, part: &str) -> bool {
        self.parts.is_empty() || self.parts.iter().any(|asked| asked == part)
    }
}

/// The device and how to measure on it.
pub(crate) struct Setting {
    pub(crate) device: Device,
    pub(crate) cuda: Cuda,
    pub(crate) traces: Vec<PathBuf>,
    is_small: bool,
}

impl Setting {
    /// Opens the first CUDA device and tells what it is.
    pub(crate) fn open(words: &Words) -> Result<Self> {
        let device = Device::cuda(0)?;
        let installation = Installation::find()?;
        let setting = Self {
            cuda: Cuda::open(&installation.library)?,
            device,
            traces: words.traces.clone(),
            is_small: words.is_small,
        };
        let properties = setting.device.properties();
        let (major, minor) = installation.driver_version;
        let capability = properties.compute_capability.unwrap_or_default();
        setting.tell(
            "device",
            &properties.name,
            json!({
                "driver": format!("{major}.{minor}"),
                "compute_capability": format!("{}.{}", capability.0, capability.1),
                "total_bytes": properties.total_memory,
                "multiprocessors": installation.devices[0].multiprocessors,
            }),
        );
        Ok(setting)
    }

    /// `full` on a device, `small` on a simulated one.
    pub(crate) fn size(&self, full: usize, small: usize) -> usize {
        if self.is_small { small } else { full }
    }

    /// A context with a pool of its own, so that a part leaves nothing behind.
    pub(crate) fn context(&self) -> Result<Context> {
        Context::new(&self.device)
    }

    /// Prints a figure, or several that belong together.
    pub(crate) fn tell(&self, part: &str, name: &str, figures: Value) {
        let mut line = json!({ "part": part, "name": name });
        if let (Some(line), Value::Object(figures)) = (line.as_object_mut(), figures) {
            line.extend(figures);
        }
        println!("{line}");
        // A figure that was known must not be lost when what follows is ended.
        let _ = std::io::stdout().flush();
    }
}

/// An error of this program's own, in the crate's type.
pub(crate) fn failure(call: &'static str, code: i32) -> Error {
    Error::Driver {
        call,
        code,
        reason: "see the codes of the CUDA driver".to_owned(),
    }
}
