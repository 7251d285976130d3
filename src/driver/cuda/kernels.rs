//! Device code: the PTX that the crate carries, loaded at the first launch, and launches of its entry points.
//!
//! The text is compiled by the driver for the device it runs on, and the driver keeps the result on disk. It
//! is loaded late because a program that only wants memory should not wait for that.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUfunc_st, CUfunction_attribute, CUmod_st};
use parking_lot::{Mutex, RwLock};

use super::context::{Context, Raw};
use super::failure::{code, code_of, refuse};
use super::library::ask;
use super::streams::StreamEntry;
use crate::driver::{Arguments, DeviceProperties, Kernel};
use crate::error::{Error, Result};

const CALL: &str = "launch";

/// Shared memory that a block may have without asking for more.
const SHARED_BYTES_PLAIN: u32 = 48 << 10;

/// All entry points, for devices of one compute capability and later ones.
#[derive(Debug)]
pub(super) struct Ptx {
    /// The compute capability, as (major, minor).
    pub(super) target: (u32, u32),
    /// Ends with a zero.
    text: &'static str,
}

/// One text for all devices: for a newer one it would be the same instructions, which the driver compiles for the
/// device it has.
static PTX: Ptx = Ptx {
    target: (8, 0),
    text: concat!(
        include_str!("../../../kernels/ptx/kitsune.compute_80.ptx"),
        "\0"
    ),
};

impl Ptx {
    /// What a device of this compute capability can run.
    pub(super) fn choose(capability: Option<(u32, u32)>) -> Option<&'static Self> {
        (Some(PTX.target) <= capability).then_some(&PTX)
    }

    /// The version of the PTX language, as the text states it.
    pub(super) fn version(&self) -> &'static str {
        let line = self
            .text
            .lines()
            .find_map(|line| line.strip_prefix(".version "));
        line.unwrap_or("of no version").trim()
    }
}

/// The code of one device, as far as it was asked for.
#[derive(Debug, Default)]
pub(super) struct Code {
    module: Mutex<Option<Raw<CUmod_st>>>,
    functions: RwLock<HashMap<&'static str, Raw<CUfunc_st>>>,
}

impl Code {
    /// Enqueues a kernel. The library copies the arguments before it returns.
    ///
    /// # Safety
    /// As [`Driver::launch`](crate::driver::Driver::launch).
    pub(super) unsafe fn launch(&self, kernel: &dyn Kernel, stream: &StreamEntry) -> Result<()> {
        let context = stream.context;
        let mut arguments = Arguments::new();
        kernel.arguments(&mut arguments);
        let entry = kernel.entry();
        if arguments.is_empty() {
            return Err(no_code(entry));
        }
        let _bound = context.bind(CALL)?;
        let function = self.function(context, entry)?;
        let grid = kernel.grid();
        if grid.shared_bytes > SHARED_BYTES_PLAIN {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = c_int::try_from(grid.shared_bytes).unwrap_or(c_int::MAX);
            // SAFETY: the function belongs to a module that is never unloaded.
            unsafe {
                ask!(
                    context.library,
                    CALL,
                    cuFuncSetAttribute(function.0, attribute, bytes)
                )
            }?;
        }
        // Every entry point takes one struct, so there is one pointer.
        let mut parameters = [arguments.as_bytes().as_ptr().cast_mut().cast::<c_void>()];
        let (blocks, threads, shared) = (grid.blocks, grid.threads, grid.shared_bytes);
        // SAFETY: function and stream are alive; the struct is the one that the entry point takes, as the
        // tests of the kernels compare; the caller promises the rest.
        unsafe {
            ask!(
                context.library,
                CALL,
                cuLaunchKernel(
                    function.0,
                    blocks,
                    1,
                    1,
                    threads,
                    1,
                    1,
                    shared,
                    stream.raw(),
                    parameters.as_mut_ptr(),
                    null_mut(),
                )
            )
        }
    }

    fn function(&self, context: &Context, entry: &'static str) -> Result<Raw<CUfunc_st>> {
        if let Some(function) = self.functions.read().get(entry) {
            return Ok(*function);
        }
        let module = self.module(context)?;
        let name = CString::new(entry).map_err(|_| no_code(entry))?;
        let mut function = null_mut();
        let place = &raw mut function;
        // SAFETY: the module is never unloaded, the name ends with zero, `function` takes the answer.
        let found = unsafe {
            ask!(
                context.library,
                CALL,
                cuModuleGetFunction(place, module.0, name.as_ptr())
            )
        };
        match found {
            Err(error) if code_of(&error) == Some(code::NOT_FOUND) => return Err(no_code(entry)),
            outcome => outcome?,
        }
        self.functions.write().insert(entry, Raw(function));
        Ok(Raw(function))
    }

    fn module(&self, context: &Context) -> Result<Raw<CUmod_st>> {
        let mut loaded = self.module.lock();
        if let Some(module) = *loaded {
            return Ok(module);
        }
        let capability = context.properties.compute_capability;
        let too_old = || too_old(CALL, &context.properties);
        let ptx = Ptx::choose(capability).ok_or_else(too_old)?;
        let mut module = null_mut();
        let (place, text) = (&raw mut module, ptx.text.as_ptr().cast::<c_void>());
        // SAFETY: the text ends with zero, there are no options, `module` takes the answer.
        let outcome = unsafe {
            ask!(
                context.library,
                CALL,
                cuModuleLoadDataEx(place, text, 0, null_mut(), null_mut())
            )
        };
        match outcome {
            Err(error) if code_of(&error) == Some(code::UNSUPPORTED_PTX_VERSION) => {
                let (major, minor) = context.library.version();
                let reason = format!(
                    "the driver supports CUDA {major}.{minor} and cannot compile PTX {}: install a newer one",
                    ptx.version()
                );
                return Err(refuse(CALL, code::UNSUPPORTED_PTX_VERSION, reason));
            }
            outcome => outcome?,
        }
        Ok(*loaded.insert(Raw(module)))
    }
}

fn no_code(entry: &str) -> Error {
    refuse(CALL, code::NOT_FOUND, format!("no code for {entry}"))
}

/// Refuses a device that none of the code can run on.
pub(crate) fn check(properties: &DeviceProperties) -> Result<()> {
    match Ptx::choose(properties.compute_capability) {
        Some(_) => Ok(()),
        None => Err(too_old("open", properties)),
    }
}

fn too_old(call: &'static str, properties: &DeviceProperties) -> Error {
    let (major, minor) = properties.compute_capability.unwrap_or_default();
    let reason = format!(
        "{} has compute capability {major}.{minor}, and the kernels need 8.0",
        properties.name
    );
    refuse(call, code::NO_BINARY_FOR_GPU, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_from_8_0_on_have_code() {
        let target = |major, minor| Ptx::choose(Some((major, minor))).map(|ptx| ptx.target);
        assert_eq!(target(7, 5), None);
        assert_eq!(target(8, 0), Some((8, 0)));
        assert_eq!(target(12, 0), Some((8, 0)));
        assert!(Ptx::choose(None).is_none());
    }

    #[test]
    fn the_code_is_old_enough_for_the_oldest_driver() {
        assert_eq!(PTX.version(), "8.0", "what drivers for CUDA 12.0 compile");
    }
}
