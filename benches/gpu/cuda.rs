//! Driver functions that no layer of the crate needs, or that must be timed one by one: events with time, the
//! driver's own allocators, pages and their mappings.
//!
//! The signatures are written out: those of cudarc's bindings vary with the toolkit that it was built beside.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;
use std::ptr::null_mut;

use kitsune::driver::cuda::stream_handle;
use kitsune::{Result, Stream};

use crate::setting::failure;

/// A handle of the driver's. Never followed.
pub(crate) type Handle = *mut c_void;

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct PageProperties {
    kind: c_int,
    handle_types: c_int,
    location: Location,
    /// For Windows only.
    metadata: u64,
    flags: [u8; 8],
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Location {
    kind: c_int,
    device: c_int,
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Access {
    location: Location,
    flags: c_int,
}

/// The first device.
const DEVICE: Location = Location { kind: 1, device: 0 };
static PAGE: PageProperties = PageProperties {
    kind: 1,
    handle_types: 0,
    location: DEVICE,
    metadata: 0,
    flags: [0; 8],
};
static READ_WRITE: Access = Access {
    location: DEVICE,
    flags: 3,
};
/// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`: bytes that a pool keeps when a stream is waited for.
const RELEASE_THRESHOLD: c_int = 4;

macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        /// Functions of the driver under their own names. A current context is theirs to have.
        #[allow(non_snake_case, reason = "the names are the driver's")]
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl Functions {
            fn find(library: &libloading::Library) -> Result<Self, libloading::Error> {
                Ok(Self {$(
                    // SAFETY: this is the signature in NVIDIA's header.
                    $name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }?,
                )*})
            }
        }
    };
}

functions! {
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuCtxSetCurrent(Handle);
    cuEventCreate(*mut Handle, c_uint);
    cuEventDestroy_v2(Handle);
    cuEventRecord(Handle, Handle);
    cuEventQuery(Handle);
    cuEventElapsedTime(*mut f32, Handle, Handle);
    cuStreamWaitEvent(Handle, Handle, c_uint);
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemAllocAsync(*mut u64, usize, Handle);
    cuMemFreeAsync(u64, Handle);
    cuDeviceGetDefaultMemPool(*mut Handle, c_int);
    cuMemPoolSetAttribute(Handle, c_int, *const u64);
    cuMemAddressReserve(*mut u64, usize, usize, u64, c_ulonglong);
    cuMemAddressFree(u64, usize);
    cuMemCreate(*mut u64, usize, *const PageProperties, c_ulonglong);
    cuMemRelease(u64);
    cuMemMap(u64, usize, usize, u64, c_ulonglong);
    cuMemSetAccess(u64, usize, *const Access, usize);
    cuMemUnmap(u64, usize);
}

/// The driver's library with the device's primary context current on this thread.
pub(crate) struct Cuda {
    pub(crate) functions: Functions,
    _library: libloading::Library,
}

/// Calls a function of the driver; an error unless it succeeds. What makes the call sound is the caller's to say.
macro_rules! call {
    ($cuda:expr, $name:ident($($argument:expr),* $(,)?)) => {
        match ($cuda.functions.$name)($($argument),*) {
            0 => Ok(()),
            code => Err($crate::setting::failure(stringify!($name), code)),
        }
    };
}
pub(crate) use call;

impl Cuda {
    /// Opens the library at `path`, which the crate has opened already.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        // SAFETY: the library is loaded, so no initializer runs.
        let library = unsafe { libloading::Library::new(path) };
        let library = library.map_err(|_| failure("open", 0))?;
        let functions = Functions::find(&library).map_err(|_| failure("open", 500))?;
        let cuda = Self {
            functions,
            _library: library,
        };
        let mut context = null_mut();
        // SAFETY: `context` takes the answer.
        unsafe { call!(cuda, cuDevicePrimaryCtxRetain(&raw mut context, 0)) }?;
        // SAFETY: the context was just given, and is kept until the process ends.
        unsafe { call!(cuda, cuCtxSetCurrent(context)) }?;
        Ok(cuda)
    }

    /// An event that notes the time.
    pub(crate) fn event(&self) -> Result<Handle> {
        let mut event = null_mut();
        // SAFETY: `event` takes the answer.
        unsafe { call!(self, cuEventCreate(&raw mut event, 0)) }?;
        Ok(event)
    }

    pub(crate) fn record(&self, event: Handle, stream: &Stream) -> Result<()> {
        let stream = stream_handle(stream)?.cast();
        // SAFETY: both handles are alive.
        unsafe { call!(self, cuEventRecord(event, stream)) }
    }

    /// Microseconds of the device between two events that are complete.
    pub(crate) fn microseconds(&self, start: Handle, end: Handle) -> Result<f64> {
        let mut milliseconds = 0.0;
        // SAFETY: both events are alive, and `milliseconds` takes the answer.
        unsafe { call!(self, cuEventElapsedTime(&raw mut milliseconds, start, end)) }?;
        Ok(f64::from(milliseconds) * 1e3)
    }

    pub(crate) fn destroy(&self, event: Handle) -> Result<()> {
        // SAFETY: the event is ours and is not used again.
        unsafe { call!(self, cuEventDestroy_v2(event)) }
    }

    /// Lets the driver's own pool keep so many bytes that it was given back when a stream is waited for; at first it
    /// keeps none.
    pub(crate) fn keep_freed_memory(&self, bytes: u64) -> Result<()> {
        let mut pool = null_mut();
        // SAFETY: `pool` takes the answer.
        unsafe { call!(self, cuDeviceGetDefaultMemPool(&raw mut pool, 0)) }?;
        let value = &raw const bytes;
        // SAFETY: the attribute is a 64-bit number, which is read during the call.
        unsafe { call!(self, cuMemPoolSetAttribute(pool, RELEASE_THRESHOLD, value)) }
    }

    pub(crate) fn reserve(&self, bytes: usize) -> Result<u64> {
        let mut address = 0;
        // SAFETY: `address` takes the answer.
        unsafe { call!(self, cuMemAddressReserve(&raw mut address, bytes, 0, 0, 0)) }?;
        Ok(address)
    }

    pub(crate) fn create_page(&self, bytes: usize) -> Result<u64> {
        let mut page = 0;
        // SAFETY: `page` takes the answer; the properties are read during the call.
        unsafe { call!(self, cuMemCreate(&raw mut page, bytes, &raw const PAGE, 0)) }?;
        Ok(page)
    }

    pub(crate) fn map(&self, address: u64, bytes: usize, page: u64) -> Result<()> {
        // SAFETY: nothing is mapped there, and nobody uses the addresses.
        unsafe { call!(self, cuMemMap(address, bytes, 0, page, 0)) }
    }

    pub(crate) fn set_access(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: pages are mapped there; the description is read during the call.
        unsafe {
            call!(
                self,
                cuMemSetAccess(address, bytes, &raw const READ_WRITE, 1)
            )
        }
    }

    pub(crate) fn unmap(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: no work was enqueued on the range.
        unsafe { call!(self, cuMemUnmap(address, bytes)) }
    }

    pub(crate) fn release_page(&self, page: u64) -> Result<()> {
        // SAFETY: the page is ours.
        unsafe { call!(self, cuMemRelease(page)) }
    }

    pub(crate) fn release(&self, address: u64, bytes: usize) -> Result<()> {
        // SAFETY: the range is ours, and nothing is mapped there.
        unsafe { call!(self, cuMemAddressFree(address, bytes)) }
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Cuda")
    }
}
