//! The whole simulated machine, behind one lock, and the way into it that every exported call takes.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::capture::Capture;
use crate::config::{Config, Counts};
use crate::memory::Memory;
use crate::modules::{Function, Shim};
use crate::pages::Pages;
use crate::streams::{Event, Op, Stream};

/// What a call returns when it fails.
pub(crate) type Code = c_int;

/// Codes by their names in CUDA, without the prefix `CUDA_ERROR_`.
pub(crate) mod code {
    use super::Code;

    pub(crate) const INVALID_VALUE: Code = 1;
    pub(crate) const OUT_OF_MEMORY: Code = 2;
    pub(crate) const NOT_INITIALIZED: Code = 3;
    pub(crate) const INVALID_DEVICE: Code = 101;
    pub(crate) const INVALID_IMAGE: Code = 200;
    pub(crate) const INVALID_CONTEXT: Code = 201;
    pub(crate) const UNSUPPORTED_PTX_VERSION: Code = 222;
    pub(crate) const INVALID_HANDLE: Code = 400;
    pub(crate) const ILLEGAL_STATE: Code = 401;
    pub(crate) const NOT_FOUND: Code = 500;
    pub(crate) const NOT_READY: Code = 600;
    pub(crate) const ILLEGAL_ADDRESS: Code = 700;
    pub(crate) const LAUNCH_FAILED: Code = 719;
    pub(crate) const NOT_SUPPORTED: Code = 801;
    pub(crate) const CAPTURE_UNSUPPORTED: Code = 900;
    pub(crate) const CAPTURE_INVALIDATED: Code = 901;
    pub(crate) const CAPTURE_MERGE: Code = 902;
    pub(crate) const CAPTURE_UNMATCHED: Code = 903;
    pub(crate) const CAPTURE_UNJOINED: Code = 904;
    pub(crate) const CAPTURE_ISOLATION: Code = 905;
    pub(crate) const CAPTURED_EVENT: Code = 907;
}

/// Primary contexts are these numbers and the device's.
pub(crate) const CONTEXT: usize = 0xc0_0000;

/// The machine.
#[derive(Default)]
pub(crate) struct Sim {
    pub(crate) config: Config,
    pub(crate) is_initialized: bool,
    /// The error that broke the context, returned from then on.
    pub(crate) broken: Option<Code>,
    /// Calls in order, each with what it returned; not those that only ask for the current context.
    pub(crate) log: Vec<(&'static str, Code)>,
    pub(crate) counts: Counts,
    /// What work complained about, for people.
    pub(crate) complaints: Vec<String>,
    last_handle: usize,
    pub(crate) memory: Memory,
    pub(crate) pages: Pages,
    pub(crate) streams: HashMap<usize, Stream>,
    pub(crate) events: HashMap<usize, Event>,
    pub(crate) captures: HashMap<usize, Capture>,
    pub(crate) graphs: HashMap<usize, Arc<[Op]>>,
    pub(crate) executables: HashMap<usize, Arc<[Op]>>,
    /// PTX texts.
    pub(crate) modules: HashMap<usize, String>,
    pub(crate) functions: HashMap<usize, Function>,
    pub(crate) shim: Option<Shim>,
}

static SIM: Mutex<Option<Sim>> = Mutex::new(None);

thread_local! {
    /// The context that is current on this thread; 0 for none.
    pub(crate) static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Runs `body` on the machine, which is made at the first call.
pub(crate) fn with<T>(body: impl FnOnce(&mut Sim) -> T) -> T {
    let mut sim = SIM.lock();
    body(sim.get_or_insert_with(|| Sim {
        config: Config::from_environment(),
        ..Sim::default()
    }))
}

/// Calls that need neither initialization nor a healthy context, and are not worth a line in the log.
const SIMPLE: [&str; 5] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRelease_v2",
];

/// The way into every exported function: counts, fails if it is to, runs `body`, and writes the log.
pub(crate) fn enter(name: &'static str, body: impl FnOnce(&mut Sim) -> Result<(), Code>) -> c_int {
    with(|sim| {
        *sim.counts.entry(name).or_default() += 1;
        let is_simple = SIMPLE.contains(&name);
        let outcome = match (sim.config.fault(name), sim.broken) {
            (Some(code), _) => Err(code),
            (None, Some(code)) if !is_simple => Err(code),
            _ if !is_simple && !sim.is_initialized => Err(code::NOT_INITIALIZED),
            _ => body(sim),
        };
        let code = outcome.err().unwrap_or(0);
        if !is_simple {
            sim.log.push((name, code));
        }
        code
    })
}

impl Sim {
    /// A handle that was never given out.
    pub(crate) fn handle(&mut self) -> usize {
        // Numbers that no memory lies at, and that are not taken for the default streams' handles.
        self.last_handle += 0x10;
        self.last_handle + 0x1000
    }

    /// The device of the context that is current on this thread.
    pub(crate) fn device(&self) -> Result<c_int, Code> {
        match CURRENT.get() {
            0 => Err(code::INVALID_CONTEXT),
            context => Ok(c_int::try_from(context - CONTEXT).unwrap_or(0)),
        }
    }
}
