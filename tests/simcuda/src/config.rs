//! What the simulated machine is like, and which calls fail.

use std::collections::BTreeMap;
use std::ffi::c_int;

/// Settings, each by its key in `SIMCUDA` and `simcuda_set`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `devices`: how many.
    pub devices: c_int,
    /// `version`: newest CUDA version supported, as 12080.
    pub version: c_int,
    /// `memory`: bytes of each device.
    pub memory: usize,
    /// `virtual_memory`: 1 or 0.
    pub virtual_memory: c_int,
    /// `pools`: 1 or 0.
    pub pools: c_int,
    /// `pageable`: 1 if devices reach ordinary memory of the host, which copies then read late.
    pub pageable: c_int,
    /// `capability`: compute capability, as 90.
    pub capability: c_int,
    /// `shim`: path of the library that runs kernels.
    pub shim: Option<String>,
    /// `fail`: `name:nth:code`, may be given many times. Counts down.
    pub faults: Vec<Fault>,
}

/// A call that is to fail, once.
#[derive(Clone, Debug)]
pub struct Fault {
    /// The function.
    pub name: String,
    /// Which of its calls from now on; the first is 1.
    pub nth: u64,
    /// What it returns.
    pub code: c_int,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            devices: 1,
            version: 13_000,
            memory: 8 << 30,
            virtual_memory: 1,
            pools: 1,
            pageable: 0,
            capability: 90,
            shim: None,
            faults: Vec::new(),
        }
    }
}

impl Config {
    /// The defaults, changed as the variable `SIMCUDA` says.
    ///
    /// # Panics
    /// If the variable cannot be understood: a test with a wrong setting would prove nothing.
    #[must_use]
    pub fn from_environment() -> Self {
        let mut config = Self::default();
        let text = std::env::var("SIMCUDA").unwrap_or_default();
        for setting in text.split(',').filter(|setting| !setting.is_empty()) {
            let known = setting
                .split_once('=')
                .and_then(|(key, value)| config.set(key, value));
            assert!(known.is_some(), "SIMCUDA: cannot understand `{setting}`");
        }
        config
    }

    /// Changes one setting; `None` if there is no such key or the value does not fit it.
    pub fn set(&mut self, key: &str, value: &str) -> Option<()> {
        match key {
            "devices" => self.devices = value.parse().ok()?,
            "version" => self.version = value.parse().ok()?,
            "memory" => self.memory = value.parse().ok()?,
            "virtual_memory" => self.virtual_memory = value.parse().ok()?,
            "pools" => self.pools = value.parse().ok()?,
            "pageable" => self.pageable = value.parse().ok()?,
            "capability" => self.capability = value.parse().ok()?,
            "shim" => self.shim = Some(value.to_owned()),
            "fail" => {
                let mut parts = value.split(':');
                let (name, nth, code) = (parts.next()?, parts.next()?, parts.next()?);
                self.faults.push(Fault {
                    name: name.to_owned(),
                    nth: nth.parse().ok()?,
                    code: code.parse().ok()?,
                });
            }
            _ => return None,
        }
        Some(())
    }

    /// Counts a call of `name` for the faults, and gives the code of one that is due.
    pub(crate) fn fault(&mut self, name: &str) -> Option<c_int> {
        for fault in self.faults.iter_mut().filter(|fault| fault.name == name) {
            fault.nth = fault.nth.saturating_sub(1);
        }
        let due = |fault: &Fault| fault.name == name && fault.nth == 0;
        let index = self.faults.iter().position(due)?;
        Some(self.faults.remove(index).code)
    }
}

/// How often each function was called.
pub(crate) type Counts = BTreeMap<&'static str, u64>;
