//! That nothing of CUDA is called when the process ends: the driver may be gone by then.
//!
//! A process of its own leaves with everything alive, as programs do that keep their pools in statics. Its
//! thread-local values are destroyed on the way out; a handler that comes after them compares the calls.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    reason = "tests ask the C library for the end of the process, and fail by panicking"
)]

use crate::support;
use std::cell::RefCell;
use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, thread};

use crate::support::cuda::Sim;
use crate::support::process;
use cudarc::driver::CudaContext;
use kitsune::amp::{AmpConfig, GradScaler};
use kitsune::memory::PinnedPool;
use kitsune::storage::DeviceBuffer;
use kitsune::{Block, Context, DType, Device, Pool, PoolConfig, Stream, Tensor, ops};

const VARIABLE: &str = "KITSUNE_TEST_EXIT";
const QUIET: i32 = 42;
const CALLED: i32 = 43;

unsafe extern "C" {
    fn atexit(handler: extern "C" fn()) -> c_int;
    fn _exit(status: c_int) -> !;
}

/// Calls so far, those that only ask for the current context included.
fn count() -> u64 {
    let simple = ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuInit"];
    let simple: u64 = simple.into_iter().map(support::cuda::calls).sum();
    simple + support::cuda::log().lines().count() as u64
}

static CALLS: AtomicU64 = AtomicU64::new(0);

extern "C" fn compare() {
    let is_quiet = count() == CALLS.load(Ordering::Relaxed);
    // SAFETY: ends the process, which was about to.
    unsafe { _exit(if is_quiet { QUIET } else { CALLED }) }
}

/// Calls the driver when the thread ends.
struct Caller(Device);

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.memory_info();
    }
}

thread_local! {
    static CALLER: RefCell<Option<Caller>> = const { RefCell::new(None) };
}

/// What a program has in statics.
struct Kept {
    _pool: Pool,
    _pinned: PinnedPool,
    _blocks: Vec<Block>,
    _streams: [Stream; 2],
    _scaler: GradScaler,
    _tensors: Vec<Tensor>,
    _buffer: DeviceBuffer<f32>,
}

/// Fills this thread's lanes, and everything else that may be alive at the end.
fn live(device: &Device) -> Kept {
    let pool = Pool::new(device, PoolConfig::default()).unwrap();
    let streams = [(); 2].map(|()| device.create_stream().unwrap());
    let mut blocks = Vec::new();
    for bytes in [100, 4096, 100_000, 3 << 20, 30 << 20] {
        for stream in &streams {
            drop(pool.allocate(bytes, stream).unwrap());
            let mut block = pool.allocate(bytes, stream).unwrap();
            block.record_stream(&streams[0]);
            blocks.push(block);
            drop(pool.allocate(bytes / 2, stream).unwrap());
        }
    }
    // Freed while another stream may use it.
    blocks.drain(..2).for_each(drop);
    let pinned = PinnedPool::new(device);
    drop(pinned.allocate(1000).unwrap());
    let context = Context::with_pool(&pool).unwrap();
    let ones = Tensor::full(&context, [300], DType::F32, 1.0).unwrap();
    let twos = ops::add(&ones, &ones).unwrap();
    let cuda = CudaContext::new(0).unwrap();
    let home = Context::on_cuda_stream(&pool, &cuda.new_stream().unwrap()).unwrap();
    let mut buffer = DeviceBuffer::zeros(&home, 100).unwrap();
    let side = cuda.new_stream().unwrap();
    side.memset_zeros(&mut buffer).unwrap();
    // As if cudarc's handles were in statics as well.
    std::mem::forget((cuda, side));
    Kept {
        _scaler: GradScaler::new(&context, AmpConfig::default()).unwrap(),
        _pool: pool,
        _pinned: pinned,
        _blocks: blocks,
        _streams: streams,
        _tensors: vec![ones, twos],
        _buffer: buffer,
    }
}

/// Ends the process; its exit code tells what `compare` found.
fn leave(calls: bool) -> ! {
    static KEPT: OnceLock<(Kept, Kept)> = OnceLock::new();
    let (sim, device) = Sim::device();
    sim.set("shim", kitsune_shim::LIBRARY);
    let elsewhere = device.clone();
    // A thread that ended before, and one that runs on.
    let of_other = thread::spawn(move || live(&elsewhere)).join().unwrap();
    let kept = KEPT.get_or_init(|| (live(&device), of_other));
    let pool = kept.0._pool.clone();
    let stream = kept.0._streams[0].clone();
    let (ready, waits) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(pool.allocate(4096, &stream).unwrap());
        ready.send(()).unwrap();
        thread::park();
    });
    waits.recv().unwrap();
    if calls {
        CALLER.set(Some(Caller(device.clone())));
    }
    CALLS.store(count(), Ordering::Relaxed);
    // SAFETY: the handler takes nothing and does not return.
    assert_eq!(unsafe { atexit(compare) }, 0);
    std::process::exit(0)
}

/// The exit code of a process that leaves.
fn code_of(name: &str, calls: bool) -> Option<i32> {
    let output = process::again(name, [(VARIABLE, u8::from(calls).to_string())]);
    let code = output.status.code();
    if code != Some(QUIET) && code != Some(CALLED) {
        panic!("{}", String::from_utf8_lossy(&output.stderr));
    }
    code
}

#[test]
fn nothing_is_called_when_the_process_ends() {
    if let Ok(calls) = env::var(VARIABLE) {
        leave(calls == "1");
    }
    let name = process::test_name!("nothing_is_called_when_the_process_ends");
    assert_eq!(code_of(name, false), Some(QUIET));
    assert_eq!(code_of(name, true), Some(CALLED), "a call would be seen");
}
