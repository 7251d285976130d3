//! Device code: the PTX modules of `kitsune-kernels`, and launches of their entry points.
//!
//! The driver compiles a module for its device and caches the result on disk. A module is loaded at the first launch of
//! one of its entry points, so a program compiles only the modules it uses, and none if it only allocates memory.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

use cudarc::driver::sys::{CUfunc_st, CUfunction_attribute, CUmod_st};
use kitsune_kernels::{Module, PTX_VERSION, TARGET, module_of};
use parking_lot::{Mutex, RwLock};

use super::context::{Context, Raw};
use super::failure::{code, code_of, refuse};
use super::library::ask;
use super::streams::StreamEntry;
use crate::driver::{Arguments, DeviceProperties, Kernel};
use crate::error::{Error, Result};

const CALL: &str = "launch";

/// Dynamic shared memory per block that needs no opt-in.
const SHARED_BYTES_PLAIN: u32 = 48 << 10;

/// The compute capability that the code is compiled for, if a device of `capability` can run it.
pub(super) fn target_for(capability: Option<(u32, u32)>) -> Option<(u32, u32)> {
    (Some(TARGET) <= capability).then_some(TARGET)
}

/// The device code that one device has loaded so far.
#[derive(Debug, Default)]
pub(super) struct Code {
    /// The loaded modules, by name. Locked while a module is being loaded, so that a second thread waits for it.
    modules: Mutex<HashMap<&'static str, Raw<CUmod_st>>>,
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
        // SAFETY: function and stream are alive; the struct is the one that the entry point takes, as the kernel
        // tests verify; the caller promises the rest.
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
        let module = module_of(entry).ok_or_else(|| no_code(entry))?;
        let module = self.load(context, module)?;
        let name = CString::new(entry).map_err(|_| no_code(entry))?;
        let mut function = null_mut();
        let place = &raw mut function;
        // SAFETY: the module is never unloaded; the name is NUL-terminated; `function` receives the result.
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

    fn load(&self, context: &Context, module: &'static Module) -> Result<Raw<CUmod_st>> {
        let mut modules = self.modules.lock();
        if let Some(loaded) = modules.get(module.name) {
            return Ok(*loaded);
        }
        if target_for(context.properties.compute_capability).is_none() {
            return Err(too_old(CALL, &context.properties));
        }
        let mut loaded = null_mut();
        let (place, text) = (&raw mut loaded, module.text.as_ptr().cast::<c_void>());
        // SAFETY: the text is NUL-terminated; there are no options; `loaded` receives the result.
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
                    "the driver supports CUDA {major}.{minor} and cannot compile PTX {PTX_VERSION}: update it"
                );
                return Err(refuse(CALL, code::UNSUPPORTED_PTX_VERSION, reason));
            }
            outcome => outcome?,
        }
        modules.insert(module.name, Raw(loaded));
        Ok(Raw(loaded))
    }
}

fn no_code(entry: &str) -> Error {
    refuse(CALL, code::NOT_FOUND, format!("no code for {entry}"))
}

/// Refuses a device that is too old for the kernels.
pub(crate) fn check(properties: &DeviceProperties) -> Result<()> {
    match target_for(properties.compute_capability) {
        Some(_) => Ok(()),
        None => Err(too_old("open", properties)),
    }
}

fn too_old(call: &'static str, properties: &DeviceProperties) -> Error {
    let (major, minor) = properties.compute_capability.unwrap_or_default();
    let reason = format!(
        "{} has compute capability {major}.{minor}, and the kernels need {}.{}",
        properties.name, TARGET.0, TARGET.1
    );
    refuse(call, code::NO_BINARY_FOR_GPU, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_from_8_0_on_have_code() {
        assert_eq!(target_for(Some((7, 5))), None);
        assert_eq!(target_for(Some((8, 0))), Some((8, 0)));
        assert_eq!(target_for(Some((12, 0))), Some((8, 0)));
        assert_eq!(target_for(None), None);
    }
}
