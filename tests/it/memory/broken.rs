//! A pool whose lock a panic unwound through: it hands out nothing more, says so, and harms nobody.
//!
//! The panics come from a driver that panics inside a call, which pools make with their books half changed.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "a driver of the test's own, and a test fails by panicking"
)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread;

use kitsune::driver::{
    DeviceProperties, DevicePtr, Driver, Kernel, MemoryInfo, PageHandle, RawEvent, RawGraph,
    RawStream,
};
use kitsune::memory::{Allocate, Limit, PinnedPool, PrivatePool};
use kitsune::units::{KIB, MIB};
use kitsune::{
    Block, Context, DType, Device, Error, HostConfig, Pool, PoolConfig, Result, Stream, Tensor,
};
use parking_lot::Mutex;

/// A driver that panics in the next call of a name, once.
#[derive(Debug)]
struct Panicking {
    inner: Arc<dyn Driver>,
    armed: Mutex<Option<&'static str>>,
}

impl Panicking {
    fn device(config: HostConfig) -> (Arc<Self>, Device) {
        let driver = Arc::new(Self {
            inner: Device::host(config).unwrap().driver().clone(),
            armed: Mutex::default(),
        });
        (driver.clone(), Device::from_driver(driver))
    }

    fn arm(&self, call: &'static str) {
        *self.armed.lock() = Some(call);
    }

    fn pass(&self, call: &'static str) -> &dyn Driver {
        let is_due = self.armed.lock().take_if(|armed| *armed == call).is_some();
        assert!(!is_due, "the driver panics in {call}");
        &*self.inner
    }
}

macro_rules! pass_on {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty;)*) => {
        $(fn $name(&self $(, $argument: $type)*) -> $out {
            self.pass(stringify!($name)).$name($($argument),*)
        })*
    };
    ($(unsafe fn $name:ident($($argument:ident: $type:ty),*) -> $out:ty;)*) => {
        $(unsafe fn $name(&self $(, $argument: $type)*) -> $out {
            let inner = self.pass(stringify!($name));
            // SAFETY: the caller promises the same.
            unsafe { inner.$name($($argument),*) }
        })*
    };
}

// SAFETY: each call is passed on, or never returns.
unsafe impl Driver for Panicking {
    pass_on! {
        fn properties() -> &DeviceProperties;
        fn memory_info() -> Result<MemoryInfo>;
        fn platform() -> u64;
        fn allocate(bytes: u64) -> Result<DevicePtr>;
        fn allocate_on(bytes: u64, stream: RawStream) -> Result<DevicePtr>;
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
        unsafe fn free_on(ptr: DevicePtr, stream: RawStream) -> Result<()>;
        unsafe fn free_pinned(ptr: DevicePtr) -> Result<()>;
        unsafe fn unmap(ptr: DevicePtr, bytes: u64) -> Result<()>;
        unsafe fn copy(dst: DevicePtr, src: DevicePtr, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn copy_from_host(dst: DevicePtr, src: &[u8], stream: RawStream) -> Result<()>;
        unsafe fn copy_to_host(dst: &mut [u8], src: DevicePtr, stream: RawStream) -> Result<()>;
        unsafe fn fill(dst: DevicePtr, value: u8, bytes: u64, stream: RawStream) -> Result<()>;
        unsafe fn launch(kernel: Box<dyn Kernel>, stream: RawStream) -> Result<()>;
        unsafe fn launch_graph(graph: RawGraph, stream: RawStream) -> Result<()>;
    }
}

fn config(virtual_memory: bool) -> HostConfig {
    HostConfig {
        capacity: 256 * MIB,
        virtual_memory,
        ..HostConfig::default()
    }
}

/// Breaks `pool`: an allocation that needs more than it holds panics in the driver.
fn break_pool(driver: &Panicking, pool: &Pool, stream: &Stream) {
    assert!(!pool.is_broken());
    let pages = pool.device().properties().virtual_memory;
    driver.arm(if pages { "create_page" } else { "allocate" });
    let outcome = catch_unwind(AssertUnwindSafe(|| pool.allocate(40 * MIB, stream)));
    assert!(outcome.is_err(), "the driver did not panic");
    assert!(pool.is_broken());
}

fn assert_broken<T: std::fmt::Debug>(what: &str, outcome: Result<T>) {
    match outcome {
        Err(Error::BrokenPool { pool }) => assert!(pool.ends_with("pool"), "{pool}"),
        other => panic!("{what}: {other:?}"),
    }
}

#[test]
fn every_call_on_a_broken_pool_says_so() {
    for virtual_memory in [true, false] {
        let (driver, device) = Panicking::device(config(virtual_memory));
        let pool = Pool::new(&device, PoolConfig::default()).unwrap();
        let context = Context::with_pool(&pool).unwrap();
        let (stream, other) = (context.stream(), device.create_stream().unwrap());
        let private = pool.private().unwrap();
        let graph = private.capture(stream, || pool.allocate(4096, stream).map(drop));
        let graph = graph.unwrap();
        let scope = pool.peak_scope();
        let tensor = Tensor::full(&context, [1 << 18], DType::F32, 3.0).unwrap();
        let blocks: Vec<Block> = (1..100)
            .map(|n| pool.allocate(n * 5000, stream).unwrap())
            .collect();
        let of_other_thread = pool.allocate(3 * MIB, stream).unwrap();
        // The lane of this thread has blocks of these sizes now.
        for bytes in [4096, 8 * MIB] {
            drop(pool.allocate(bytes, stream).unwrap());
        }
        let (before, limit_before) = (pool.stats(), pool.limit());
        break_pool(&driver, &pool, stream);

        for bytes in [4096, 8 * MIB, 5000, 64 * MIB] {
            assert_broken("the same stream", pool.allocate(bytes, stream));
            assert_broken("another one", pool.allocate(bytes, &other));
        }
        thread::scope(|scope| {
            let elsewhere = || {
                assert_broken("another thread", pool.allocate(4096, stream));
                drop(of_other_thread);
                assert_broken("after a free", pool.allocate(3 * MIB, stream));
            };
            scope.spawn(elsewhere);
        });
        assert_broken("a tensor", Tensor::zeros(&context, [4], DType::F32));
        assert_changes_nothing(&pool, &private, stream);
        // SAFETY: nothing is launched.
        assert_broken("launch", unsafe { graph.launch(stream) });

        // What asks and changes nothing answers.
        pool.decay_now();
        pool.reset_peaks();
        assert_eq!(pool.limit(), limit_before);
        assert!(pool.stats().reserved_bytes.current >= before.reserved_bytes.current);
        assert!(!pool.tag_stats().is_empty());
        assert!(scope.stats().allocated_bytes.peak >= MIB.cast_signed());
        assert!(private.reserved_bytes() <= pool.stats().reserved_bytes.current);

        // What is out is as good as ever.
        assert_eq!(tensor.to_vec::<f32>().unwrap(), vec![3.0; 1 << 18]);
        tensor.fill(4.0).unwrap();
        drop(blocks);
        assert_eq!(tensor.to_vec::<f32>().unwrap(), vec![4.0; 1 << 18]);
        drop((scope, graph, private));
        let check = catch_unwind(AssertUnwindSafe(|| pool.check_invariants()));
        assert!(check.is_err(), "its invariants do not hold");
        drop(pool);
        assert_eq!(tensor.to_vec::<f32>().unwrap(), vec![4.0; 1 << 18]);
        drop((context, tensor));

        // Other pools of the device are none the worse.
        let pool = Pool::new(&device, PoolConfig::default()).unwrap();
        drop(pool.allocate(8 * MIB, &other).unwrap());
        pool.check_invariants();
        assert!(!pool.is_broken());
    }
}

/// What takes memory from a broken pool, returns it or sets it aside.
fn assert_changes_nothing(pool: &Pool, private: &PrivatePool, stream: &Stream) {
    assert_broken("trim", pool.trim(0));
    assert_broken("empty_cache", pool.empty_cache());
    assert_broken("set_limit", pool.set_limit(Some(64 * MIB)));
    assert_broken("private", pool.private().map(drop));
    assert_broken("capture", private.capture(stream, || Ok(())).map(drop));
    assert_broken("prime", private.prime(|| pool.allocate(4096, stream)));
    let limit = Limit::new(pool.clone(), 1024);
    assert_broken("a limit that refuses", limit.allocate(4096, stream));
}

#[test]
fn memory_of_a_broken_pool_is_given_to_nobody() {
    let (driver, device) = Panicking::device(config(true));
    let stream = device.create_stream().unwrap();
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let block = pool.allocate(32 * MIB, &stream).unwrap();
    drop(pool.allocate(8 * MIB, &stream).unwrap());
    break_pool(&driver, &pool, &stream);
    let free = device.memory_info().unwrap().free;
    assert!(free <= 256 * MIB - 32 * MIB);
    drop(block);
    drop(pool);
    // Which of it is in use, nobody knows.
    assert_eq!(device.memory_info().unwrap().free, free);
}

#[test]
fn a_program_that_unwinds_through_a_pool_breaks_nothing() {
    struct AllocatesAsItGoes(Pool, Stream);
    impl Drop for AllocatesAsItGoes {
        fn drop(&mut self) {
            let block = self.0.allocate(20 * MIB, &self.1).unwrap();
            self.0.trim(0).unwrap();
            drop(block);
        }
    }
    let (_, device) = Panicking::device(config(true));
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let _blocks: Vec<Block> = (1..50)
            .map(|n| pool.allocate(n * KIB, &stream).unwrap())
            .collect();
        let _last = AllocatesAsItGoes(pool.clone(), stream.clone());
        panic!("the program's own");
    }));
    assert!(outcome.is_err());
    // A callback that panics does so without the lock.
    let registration = pool.on_shortage(|_| panic!("the program's own"));
    let full = pool.allocate(200 * MIB, &stream).unwrap();
    let outcome = catch_unwind(AssertUnwindSafe(|| pool.allocate(100 * MIB, &stream)));
    assert!(outcome.is_err());
    drop(registration);
    assert!(!pool.is_broken());
    assert!(pool.allocate(4096, &stream).is_ok());
    drop(full);
    pool.check_invariants();
}

/// A call that had unlocked the pool finds it broken when it comes back.
#[test]
fn a_call_that_was_waiting_when_the_pool_broke_says_so_too() {
    let (driver, device) = Panicking::device(config(true));
    let pool = Pool::new(&device, PoolConfig::default()).unwrap();
    let stream = device.create_stream().unwrap();
    let full = pool.allocate(150 * MIB, &stream).unwrap();
    let [asked, broken] = [(); 2].map(|()| Arc::new(Barrier::new(2)));
    let of_callback = (asked.clone(), broken.clone());
    let _registration = pool.on_shortage(move |_| {
        of_callback.0.wait();
        of_callback.1.wait();
    });
    thread::scope(|scope| {
        let waiting = scope.spawn(|| pool.allocate(200 * MIB, &stream));
        asked.wait();
        break_pool(&driver, &pool, &stream);
        broken.wait();
        assert_broken("the call that waited", waiting.join().unwrap());
    });
    drop(full);
}

#[test]
fn a_broken_pinned_pool_hands_out_nothing_and_lets_go_of_nothing() {
    let (driver, device) = Panicking::device(config(true));
    let pool = PinnedPool::new(&device);
    let stream = device.create_stream().unwrap();
    let mut kept = pool.allocate(4096).unwrap();
    kept.as_mut_slice().unwrap().fill(5);
    // A block whose use is in flight: whether it is over is asked under the lock.
    let (sender, gate) = std::sync::mpsc::channel::<()>();
    let gate = Mutex::new(gate);
    let held = Box::new(Act(move || {
        let _ = gate.lock().recv();
    }));
    // SAFETY: the kernel uses no memory.
    unsafe { device.driver().launch(held, stream.raw()) }.unwrap();
    let mut used = pool.allocate(100_000).unwrap();
    used.record_use(&stream).unwrap();
    drop(used);
    driver.arm("query_event");
    let outcome = catch_unwind(AssertUnwindSafe(|| pool.allocate(100_000).map(drop)));
    assert!(outcome.is_err(), "the driver did not panic");
    for bytes in [1, 4096, 100_000] {
        assert_broken("pinned", pool.allocate(bytes));
    }
    assert!(pool.allocate(0).is_ok(), "which takes nothing");
    pool.empty_cache().unwrap();
    let stats = pool.stats();
    assert_eq!((stats.num_host_alloc, stats.num_host_free), (2, 0));
    assert!(kept.as_slice().unwrap().iter().all(|byte| *byte == 5));
    drop(kept);
    assert_broken("after a free", pool.allocate(4096));
    // Waits for no stream: the gate is closed.
    drop(pool);
    drop(sender);
    stream.synchronize().unwrap();
}

struct Act<F>(F);

impl<F> std::fmt::Debug for Act<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Act")
    }
}

impl<F: Fn() + Send + Sync> Kernel for Act<F> {
    fn entry(&self) -> &'static str {
        "act"
    }

    fn elements(&self) -> u64 {
        1
    }

    unsafe fn run(&self) {
        (self.0)();
    }
}
