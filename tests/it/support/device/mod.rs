//! The device that suites run on: the host device, or the same with its twins replaced by the device kernels.
//!
//! `KITSUNE_TEST_DEVICE=shim` chooses the second: each launch then packs the kernel's arguments as a driver
//! of a GPU does, and runs the text of `kernels/` that `kitsune-shim` compiled for the host.
//! `KITSUNE_TEST_DEVICE=simcuda` chooses the CUDA device over a simulated driver, which runs the same text. That
//! driver is one for the whole process: the suites then need cargo-nextest, which gives each test its own.
//! `KITSUNE_TEST_DEVICE=cuda` chooses the first CUDA device of the machine. With `REQUIRE_GPU=1` a test that would run on
//! anything else fails.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a program takes the suites it needs"
)]
#![allow(unsafe_code, reason = "drivers work on plain addresses")]

/// Methods of `Driver` that ask `self.inner`.
macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty;)*) => {
        $(fn $name(&self $(, $argument: $type)*) -> $out {
            self.inner.$name($($argument),*)
        })*
    };
    ($(unsafe fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty;)*) => {
        $(unsafe fn $name(&self $(, $argument: $type)*) -> $out {
            // SAFETY: the caller promises the same.
            unsafe { self.inner.$name($($argument),*) }
        })*
    };
}

mod capped;
pub mod counted;

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use kitsune::driver::{
    Arguments, DeviceProperties, DevicePtr, Driver, Grid, Kernel, MemoryInfo, PageHandle, RawEvent,
    RawGraph, RawStream,
};
use kitsune::{Device, HostConfig, Result};
use parking_lot::Mutex;

/// Which device the environment names.
fn chosen() -> String {
    let chosen = std::env::var("KITSUNE_TEST_DEVICE").unwrap_or_else(|_| "host".to_owned());
    let required = std::env::var("REQUIRE_GPU").is_ok_and(|value| value == "1");
    assert!(
        !required || chosen == "cuda",
        "REQUIRE_GPU is set, and KITSUNE_TEST_DEVICE is `{chosen}`, not `cuda`"
    );
    chosen
}

/// The device that the environment names. A CUDA device seems to have no more memory than `config` gives.
pub fn device(config: HostConfig) -> Device {
    let host = || Device::host(config.clone()).expect("the machine has memory");
    match chosen().as_str() {
        "host" => host(),
        "shim" => over_shim(&host()),
        "simcuda" => over_simcuda(&config),
        "cuda" => capped::device(&cuda(), config.capacity),
        other => {
            panic!("KITSUNE_TEST_DEVICE is `{other}`, not `host`, `shim`, `simcuda` or `cuda`")
        }
    }
}

/// The device that device kernels are compared on with the twins of `host`: a CUDA device if the environment names
/// it, else the shim.
pub fn with_kernels(host: &Device) -> Device {
    if on_gpu() { cuda() } else { over_shim(host) }
}

/// Whether device kernels run on a CUDA device, whose `exp`, `log` and `pow` in f64 are not the host's.
pub fn on_gpu() -> bool {
    chosen() == "cuda"
}

#[cfg(feature = "cuda")]
fn cuda() -> Device {
    Device::cuda(0).expect("the environment asks for a CUDA device")
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Device {
    panic!("built without the feature `cuda`")
}

/// The first device of the simulated CUDA driver, with the capacity that `config` gives.
#[cfg(all(target_os = "linux", feature = "cuda"))]
fn over_simcuda(config: &HostConfig) -> Device {
    static LOADED: OnceLock<libloading::Library> = OnceLock::new();
    LOADED.get_or_init(|| {
        let settings = format!("memory={},shim={}", config.capacity, kitsune_shim::LIBRARY);
        // SAFETY: the only test of this process, and its first step.
        unsafe { std::env::set_var("SIMCUDA", settings) };
        let test = std::env::current_exe().expect("a test knows its file");
        // SAFETY: our own library, without initializers. It has the name of the driver's.
        let library = unsafe { libloading::Library::new(test.with_file_name("libsimcuda.so")) };
        library.expect("cargo builds the library beside the tests")
    });
    Device::cuda(0).expect("the simulated driver works")
}

#[cfg(not(all(target_os = "linux", feature = "cuda")))]
fn over_simcuda(_: &HostConfig) -> Device {
    panic!("the simulated driver needs Linux and the feature `cuda`")
}

/// `host` with device kernels in place of twins.
pub fn over_shim(host: &Device) -> Device {
    let inner = Arc::clone(host.driver());
    let touched = Arc::default();
    Device::from_driver(Arc::new(ShimDriver { inner, touched }))
}

/// As [`over_shim`]; each launch adds what its device code read and wrote to `touched`.
pub fn over_shim_counting(host: &Device, touched: &Arc<Touched>) -> Device {
    let inner = Arc::clone(host.driver());
    let touched = Arc::clone(touched);
    Device::from_driver(Arc::new(ShimDriver { inner, touched }))
}

/// Entry points that ran, and the bytes of array elements that each read and wrote.
pub type Touched = Mutex<Vec<(&'static str, [u64; 2])>>;

/// A kernel whose `run` is its device code.
#[derive(Debug)]
struct OverShim(Box<dyn Kernel>, Arc<Touched>);

impl Kernel for OverShim {
    fn entry(&self) -> &'static str {
        self.0.entry()
    }

    fn elements(&self) -> u64 {
        self.0.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.0.arguments(into);
    }

    fn grid(&self) -> Grid {
        self.0.grid()
    }

    unsafe fn run(&self) {
        let (entry, grid) = (self.entry(), self.grid());
        let mut arguments = Arguments::new();
        self.arguments(&mut arguments);
        let taken = argument_bytes().get(entry).copied();
        assert_eq!(
            taken,
            Some(arguments.as_bytes().len()),
            "arguments of {entry}"
        );
        let shape = [grid.blocks, grid.threads, grid.shared_bytes];
        // SAFETY: the sizes agree, and the caller promises what the kernel asks for.
        let outcome = unsafe { kitsune_shim::launch(entry, shape, arguments.as_bytes()) };
        assert_eq!(outcome, Ok(()), "{self:?}");
        self.1.lock().push((entry, kitsune_shim::traffic()));
    }
}

/// Bytes of the argument struct of every entry point, as the PTX declares them.
pub fn argument_bytes() -> &'static HashMap<&'static str, usize> {
    static SIZES: OnceLock<HashMap<&'static str, usize>> = OnceLock::new();
    SIZES.get_or_init(|| {
        let entries = kitsune_kernels::MODULES
            .iter()
            .flat_map(|module| module.text.split(".visible .entry ").skip(1));
        entries
            .map(|entry| {
                let (name, rest) = entry.split_once('(').expect("an entry has parameters");
                let (_, size) = rest.split_once('[').expect("the parameter is a struct");
                let (size, _) = size.split_once(']').expect("its size is a number");
                (name, size.parse().expect("its size is a number"))
            })
            .collect()
    })
}

/// A driver that puts [`OverShim`] around every kernel and passes everything else on.
#[derive(Debug)]
struct ShimDriver {
    inner: Arc<dyn Driver>,
    touched: Arc<Touched>,
}

// SAFETY: each call is passed on; a kernel is exchanged for another form of the same one.
unsafe impl Driver for ShimDriver {
    unsafe fn launch(&self, kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()> {
        let kernel = Box::new(OverShim(kernel, Arc::clone(&self.touched)));
        // SAFETY: the caller promises what the kernel asks for, whichever of its forms runs.
        unsafe { self.inner.launch(kernel, stream) }
    }

    pass_on! {
        fn properties() -> &DeviceProperties;
        fn memory_info() -> Result<MemoryInfo>;
        fn platform() -> u64;
        fn allocate(bytes: u64) -> Result<DevicePtr>;
        fn allocate_pinned(bytes: u64) -> Result<DevicePtr>;
        fn reserve(bytes: u64) -> Result<DevicePtr>;
        fn release(ptr: DevicePtr, bytes: u64) -> Result<()>;
        fn create_page(bytes: u64) -> Result<PageHandle>;
        fn destroy_page(page: PageHandle) -> Result<()>;
        fn map(ptr: DevicePtr, pages: &[PageHandle]) -> Result<()>;
        fn prefault(ptr: DevicePtr, bytes: u64) -> ();
        fn create_stream() -> Result<RawStream>;
        fn destroy_stream(stream: RawStream) -> Result<()>;
        fn synchronize_stream(stream: RawStream) -> Result<()>;
        fn query_stream(stream: RawStream) -> Result<bool>;
        fn create_event() -> Result<RawEvent>;
        fn destroy_event(event: RawEvent) -> Result<()>;
        fn record(event: RawEvent, stream: RawStream) -> Result<()>;
        fn query_event(event: RawEvent) -> Result<bool>;
        fn synchronize_event(event: RawEvent) -> Result<()>;
        fn stream_wait(stream: RawStream, event: RawEvent) -> Result<()>;
        fn begin_capture(stream: RawStream) -> Result<()>;
        fn end_capture(stream: RawStream) -> Result<RawGraph>;
        fn is_capturing(stream: RawStream) -> Result<bool>;
        fn destroy_graph(graph: RawGraph) -> Result<()>;
    }

    pass_on! {
        unsafe fn free(ptr: DevicePtr) -> Result<()>;
        unsafe fn free_pinned(ptr: DevicePtr) -> Result<()>;
        unsafe fn unmap(ptr: DevicePtr, bytes: u64) -> Result<()>;
        unsafe fn copy(dst: DevicePtr, src: DevicePtr, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn copy_from_host(dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()>;
        unsafe fn copy_to_host(dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()>;
        unsafe fn fill(dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn launch_graph(graph: RawGraph, stream: RawStream) -> Result<()>;
    }
}
