//! Finds and opens the driver's library, and looks up every function before any is called.
//!
//! The types are those of cudarc's bindings, and the compiler checks each signature below against theirs. The calls
//! themselves go through this module's own table, for two reasons. If the library or a function is missing, cudarc
//! panics at the first call, where callers want an error. And cudarc's enum of error codes cannot hold a code newer
//! than the bindings; a plain number can.
//!
//! Once opened, the library stays open. No function is called when the process ends.

use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::PathBuf;
use std::ptr::null;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute, CUdeviceptr, CUevent, CUfunction,
    CUfunction_attribute, CUgraph, CUgraphExec, CUjit_option, CUmemAccessDesc,
    CUmemAllocationGranularity_flags, CUmemAllocationProp, CUmemGenericAllocationHandle, CUmodule,
    CUpointer_attribute, CUresult, CUstream, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use parking_lot::Mutex;

use super::failure::{self, code};
use crate::error::{Error, Result};

/// The oldest supported driver version, CUDA 12.0, in the driver's notation.
const OLDEST: c_int = 12_000;

/// Declares the table of functions, and checks each signature against cudarc's bindings.
macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        /// The library functions that this crate uses, each under its own name.
        #[derive(Debug)]
        #[allow(non_snake_case, reason = "the names are the library's")]
        pub(super) struct Functions {
            $(pub(super) $name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        impl Functions {
            /// Looks up all functions. The error is the name of the first that is missing.
            fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {$(
                    $name: {
                        let symbol = concat!(stringify!($name), "\0").as_bytes();
                        // SAFETY: this is the signature in NVIDIA's header, as the check below shows.
                        *unsafe { library.get(symbol) }.map_err(|_| stringify!($name))?
                    },
                )*})
            }
        }


        $(const _: fn($($type),*) -> CUresult = |$($argument),*| {
            // SAFETY: compiled for the type check, never called.
            unsafe { cudarc::driver::sys::$name($($argument),*) }
        };)*
    };
}

functions! {
    cuInit(flags: c_uint);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut CUdevice, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: CUdevice);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: CUdevice);
    cuDeviceGetAttribute(value: *mut c_int, attribute: CUdevice_attribute, device: CUdevice);
    cuDevicePrimaryCtxRetain(context: *mut CUcontext, device: CUdevice);
    cuCtxGetCurrent(context: *mut CUcontext);
    cuCtxSetCurrent(context: CUcontext);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(ptr: *mut CUdeviceptr, bytes: usize);
    cuMemFree_v2(ptr: CUdeviceptr);
    cuMemAllocAsync(ptr: *mut CUdeviceptr, bytes: usize, stream: CUstream);
    cuMemFreeAsync(ptr: CUdeviceptr, stream: CUstream);
    cuMemHostAlloc(ptr: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemFreeHost(ptr: *mut c_void);
    cuPointerGetAttribute(data: *mut c_void, attribute: CUpointer_attribute, ptr: CUdeviceptr);
    cuMemGetAllocationGranularity(
        bytes: *mut usize,
        properties: *const CUmemAllocationProp,
        option: CUmemAllocationGranularity_flags
    );
    cuMemAddressReserve(
        ptr: *mut CUdeviceptr,
        bytes: usize,
        alignment: usize,
        wanted: CUdeviceptr,
        flags: c_ulonglong
    );
    cuMemAddressFree(ptr: CUdeviceptr, bytes: usize);
    cuMemCreate(
        handle: *mut CUmemGenericAllocationHandle,
        bytes: usize,
        properties: *const CUmemAllocationProp,
        flags: c_ulonglong
    );
    cuMemRelease(handle: CUmemGenericAllocationHandle);
    cuMemMap(
        ptr: CUdeviceptr,
        bytes: usize,
        offset: usize,
        handle: CUmemGenericAllocationHandle,
        flags: c_ulonglong
    );
    cuMemSetAccess(ptr: CUdeviceptr, bytes: usize, access: *const CUmemAccessDesc, count: usize);
    cuMemUnmap(ptr: CUdeviceptr, bytes: usize);
    cuStreamCreate(stream: *mut CUstream, flags: c_uint);
    cuStreamDestroy_v2(stream: CUstream);
    cuStreamSynchronize(stream: CUstream);
    cuStreamQuery(stream: CUstream);
    cuStreamWaitEvent(stream: CUstream, event: CUevent, flags: c_uint);
    cuStreamBeginCapture_v2(stream: CUstream, mode: CUstreamCaptureMode);
    cuStreamEndCapture(stream: CUstream, graph: *mut CUgraph);
    cuStreamIsCapturing(stream: CUstream, status: *mut CUstreamCaptureStatus);
    cuEventCreate(event: *mut CUevent, flags: c_uint);
    cuEventDestroy_v2(event: CUevent);
    cuEventRecord(event: CUevent, stream: CUstream);
    cuEventQuery(event: CUevent);
    cuEventSynchronize(event: CUevent);
    cuMemcpyAsync(dst: CUdeviceptr, src: CUdeviceptr, bytes: usize, stream: CUstream);
    cuMemcpyPeerAsync(
        dst: CUdeviceptr,
        dst_context: CUcontext,
        src: CUdeviceptr,
        src_context: CUcontext,
        bytes: usize,
        stream: CUstream
    );
    cuMemcpyHtoDAsync_v2(dst: CUdeviceptr, src: *const c_void, bytes: usize, stream: CUstream);
    cuMemcpyDtoHAsync_v2(dst: *mut c_void, src: CUdeviceptr, bytes: usize, stream: CUstream);
    cuMemsetD8Async(dst: CUdeviceptr, value: u8, bytes: usize, stream: CUstream);
    cuModuleLoadDataEx(
        module: *mut CUmodule,
        image: *const c_void,
        count: c_uint,
        options: *mut CUjit_option,
        values: *mut *mut c_void
    );
    cuModuleGetFunction(function: *mut CUfunction, module: CUmodule, name: *const c_char);
    cuFuncSetAttribute(function: CUfunction, attribute: CUfunction_attribute, value: c_int);
    cuLaunchKernel(
        function: CUfunction,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared: c_uint,
        stream: CUstream,
        arguments: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    cuGraphInstantiateWithFlags(exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong);
    cuGraphLaunch(exec: CUgraphExec, stream: CUstream);
    cuGraphExecDestroy(exec: CUgraphExec);
    cuGraphDestroy(graph: CUgraph);
}

/// Describes an error code. Not checked against the bindings: their enum cannot hold every code.
type Describe = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;

/// The open library. Its functions can be called as long as a reference to it exists.
#[derive(Debug)]
pub(super) struct Library {
    pub(super) functions: Functions,
    name: Describe,
    text: Describe,
    /// The name it was opened with.
    opened_as: &'static str,
    version: c_int,
    // Never closed: `get` leaks the struct.
    _handle: libloading::Library,
}

/// Calls a library function on behalf of the driver method `$call`, and turns its code into a [`Result`].
macro_rules! ask {
    ($library:expr, $call:expr, $name:ident($($argument:expr),* $(,)?)) => {{
        let library: &$crate::driver::cuda::library::Library = $library;
        let code = (library.functions.$name)($($argument),*);
        library.check($call, stringify!($name), code)
    }};
}
pub(super) use ask;

/// File names of the driver's library, in cudarc's search order, so that both find the same library.
const CANDIDATES: &[&str] = if cfg!(windows) {
    &["nvcuda.dll"]
} else {
    &["libcuda.so", "libcuda.so.1"]
};

/// The file name that NVIDIA's own libraries load.
const USUAL: &str = if cfg!(windows) {
    "nvcuda.dll"
} else {
    "libcuda.so.1"
};

impl Library {
    /// Whether a library that loads the driver by its usual name gets this one.
    pub(super) fn is_found_by_others(&self) -> bool {
        // SAFETY: the driver's library, as in `open`.
        let Ok(usual) = (unsafe { libloading::Library::new(USUAL) }) else {
            return false;
        };
        // SAFETY: this is the signature in NVIDIA's header; it is compared, not called.
        let found = unsafe { usual.get::<unsafe extern "C" fn(c_uint) -> c_int>(b"cuInit\0") };
        found.is_ok_and(|found| *found as usize == self.functions.cuInit as usize)
    }

    /// The driver's library, initialized.
    ///
    /// # Errors
    /// [`Error::Driver`] with call `open` if there is no library, if it lacks a function or is too old, or if it cannot
    /// be initialized (for example because there is no device). The next call tries again.
    pub(super) fn get() -> Result<&'static Self> {
        static OPENED: Mutex<Option<&'static Library>> = Mutex::new(None);
        let mut opened = OPENED.lock();
        if let Some(library) = *opened {
            return Ok(library);
        }
        let library = Self::open()?;
        Ok(opened.insert(Box::leak(Box::new(library))))
    }

    /// Tries the candidates until one is not a stub. Toolkits install stubs to link against, and a stub sometimes
    /// precedes the real library on the search path.
    fn open() -> Result<Self> {
        let mut refused = None;
        let mut damaged = String::new();
        for name in CANDIDATES {
            let handle = match load(name) {
                Ok(handle) => handle,
                Err(reason) => {
                    damaged.extend(reason);
                    continue;
                }
            };
            match Self::initialize(name, handle) {
                Err(error) if failure::code_of(&error) == Some(code::STUB_LIBRARY) => {
                    refused.get_or_insert(error);
                }
                outcome => return outcome,
            }
        }
        Err(refused.unwrap_or_else(|| {
            let reason = format!(
                "no NVIDIA driver: {} cannot be loaded{damaged}",
                CANDIDATES.join(" or ")
            );
            failure::refuse("open", code::SHARED_OBJECT_INIT_FAILED, reason)
        }))
    }

    fn initialize(opened_as: &'static str, handle: libloading::Library) -> Result<Self> {
        // A driver that is too old also lacks functions. The version makes the better error message, so check it first.
        let version = version_of(opened_as, &handle)?;
        if version < OLDEST {
            let reason = format!(
                "the driver supports CUDA {}, which is older than {}: install driver 525 or later",
                dotted(version),
                dotted(OLDEST)
            );
            return Err(failure::refuse("open", code::INSUFFICIENT_DRIVER, reason));
        }
        let missing = |name| missing(opened_as, name);
        let functions = Functions::find(&handle).map_err(missing)?;
        let library = Self {
            functions,
            name: describe(&handle, "cuGetErrorName").map_err(missing)?,
            text: describe(&handle, "cuGetErrorString").map_err(missing)?,
            opened_as,
            version,
            _handle: handle,
        };
        // SAFETY: may be called at any time; the flags must be 0.
        unsafe { ask!(&library, "open", cuInit(0)) }?;
        Ok(library)
    }

    /// The newest CUDA version that the driver supports, as (major, minor).
    pub(super) fn version(&self) -> (u32, u32) {
        let version = self.version.unsigned_abs();
        (version / 1000, version % 1000 / 10)
    }

    /// The file the library was loaded from, or the name it was opened with if the file cannot be determined.
    pub(super) fn path(&self) -> PathBuf {
        file_of(self.functions.cuInit as usize, self.opened_as)
    }

    /// The file of the first library found, usable or not.
    pub(super) fn first_file() -> Option<PathBuf> {
        let (name, library) = CANDIDATES
            .iter()
            .find_map(|name| Some((name, load(name).ok()?)))?;
        // A damaged library may lack either symbol.
        let address = [&b"cuInit\0"[..], b"cuDriverGetVersion\0"]
            .into_iter()
            .find_map(|symbol| {
                // SAFETY: only the address is read, nothing is called.
                let found = unsafe { library.get::<unsafe extern "C" fn()>(symbol) };
                found.ok().map(|function| *function as usize)
            })
            .unwrap_or(0);
        Some(file_of(address, name))
    }

    /// Turns `code`, returned by the function `name`, into the result of the driver method `call`.
    pub(super) fn check(&self, call: &'static str, name: &str, code: c_int) -> Result<()> {
        if code == code::SUCCESS {
            return Ok(());
        }
        if failure::is_capture_refusal(code) {
            return Err(Error::Capturing { call });
        }
        Err(failure::refuse(call, code, self.describe(name, code)))
    }

    /// Describes `code`, returned by the function `name`, for an error message.
    fn describe(&self, name: &str, code: c_int) -> String {
        let text = |describe: Describe| {
            let mut text = null();
            // SAFETY: any code may be passed; `text` receives the result.
            let known = unsafe { describe(code, &raw mut text) } == code::SUCCESS;
            if !known || text.is_null() {
                return None;
            }
            // SAFETY: the library's texts are static strings.
            let text = unsafe { CStr::from_ptr(text) };
            Some(text.to_string_lossy().into_owned())
        };
        match (text(self.name), text(self.text)) {
            (Some(code), Some(text)) => format!("{name}: {code}, {text}"),
            _ => format!("{name}: an error this driver has no name for"),
        }
    }
}

/// Loads a library. The error says what is wrong with it; `None` if the file does not exist.
fn load(name: &str) -> Result<libloading::Library, Option<String>> {
    // SAFETY: the driver's library is made to be loaded; loading runs its initializers.
    let loaded = unsafe { libloading::Library::new(name) };
    loaded.map_err(|error| {
        // The loader's message is the source of libloading's error.
        let told = error
            .source()
            .map_or_else(|| error.to_string(), ToString::to_string);
        (!told.contains("No such file")).then(|| format!(" ({told})"))
    })
}

/// The file that the code at an address was loaded from; `otherwise` if that cannot be determined.
fn file_of(address: usize, otherwise: &str) -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let holds = |line: &&str| {
        let range = line
            .split(' ')
            .next()
            .and_then(|range| range.split_once('-'));
        let bound = |text| usize::from_str_radix(text, 16).unwrap_or_default();
        range.is_some_and(|(from, to)| (bound(from)..bound(to)).contains(&address))
    };
    let line = maps.lines().find(holds).unwrap_or_default();
    let path = line.find('/').map(|at| &line[at..]);
    PathBuf::from(path.unwrap_or(otherwise))
}

fn missing(opened_as: &str, name: &str) -> Error {
    let reason =
        format!("{opened_as} has no function {name}: the driver's installation is damaged");
    failure::refuse("open", code::SHARED_OBJECT_SYMBOL_NOT_FOUND, reason)
}

fn describe(library: &libloading::Library, name: &'static str) -> Result<Describe, &'static str> {
    // SAFETY: this is the signature in NVIDIA's header, with the enum as a plain integer.
    let symbol = unsafe { library.get::<Describe>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|_| name)
}

/// The version of a library that is not initialized yet.
fn version_of(opened_as: &'static str, library: &libloading::Library) -> Result<c_int> {
    const NAME: &str = "cuDriverGetVersion";
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: this is the signature in NVIDIA's header.
    let symbol = unsafe { library.get::<GetVersion>(NAME.as_bytes()) };
    let get = symbol.map_err(|_| missing(opened_as, NAME))?;
    let mut version = 0;
    // SAFETY: may be called before anything else; `version` receives the result.
    match unsafe { get(&raw mut version) } {
        code::SUCCESS => Ok(version),
        code => Err(failure::refuse(
            "open",
            code,
            format!("{NAME} of {opened_as} failed"),
        )),
    }
}

fn dotted(version: c_int) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
