//! Kitsune's pool behind the eight functions by which the harness drives an allocator.
//!
//! What a trainer does, the plug-in does: one pool, owned blocks, statistics on, a free by dropping the
//! block. Between the calls the harness keeps a block as a pointer. A free on another stream is
//! [`Block::record_stream`], then a drop.
//!
//! The options are words separated by commas: a reuse policy (`never`, `only-complete`, `wait`) and
//! `contiguous`.

mod stub;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::{ManuallyDrop, transmute};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use kitsune::{Block, Pool, PoolConfig, Result, Stream};

/// A live allocation, as the harness keeps it: whether there is one, and the block's bits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Handle {
    is_live: u64,
    block: *mut c_void,
}

/// What the harness asks about an allocator. Bytes, but for the last.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    reserved: u64,
    peak_reserved: u64,
    requested: u64,
    /// Uses on other streams that could not be recorded.
    dropped: u64,
}

struct Peer {
    pool: Pool,
    streams: Vec<Stream>,
}

/// Null until [`peer_init`].
static PEER: AtomicPtr<Peer> = AtomicPtr::new(ptr::null_mut());

fn peer() -> &'static Peer {
    let peer = PEER.load(Ordering::Relaxed);
    debug_assert!(!peer.is_null(), "the harness calls peer_init first");
    // SAFETY: from a box that is never dropped, since the harness calls peer_init first.
    unsafe { &*peer }
}

impl Peer {
    fn new(device_bytes: u64, streams: u32, options: &str) -> Result<Self> {
        let device = stub::device(device_bytes)?;
        let mut config = PoolConfig::default();
        for option in options.split(',').filter(|option| !option.is_empty()) {
            match option {
                "contiguous" => config.contiguous = true,
                policy => config.reuse = policy.parse()?,
            }
        }
        let streams = (0..streams).map(|_| device.create_stream());
        Ok(Self {
            streams: streams.collect::<Result<_>>()?,
            pool: Pool::new(&device, config)?,
        })
    }

    fn stream(&self, number: u32) -> &Stream {
        &self.streams[number as usize]
    }
}

/// A block as a pointer, which [`block`] takes back: what it is but for its type. The compiler sees to it that
/// both have one size.
fn pointer(block: Block) -> *mut c_void {
    // SAFETY: any initialized bytes of that size are a raw pointer.
    unsafe { transmute::<Block, *mut c_void>(block) }
}

/// The block of a handle.
///
/// # Safety
/// The handle came from [`peer_alloc`], and no other value that owns its block is dropped.
unsafe fn block(handle: Handle) -> Block {
    // SAFETY: the bits are those of a block, and the caller promises that it is owned once.
    unsafe { transmute::<*mut c_void, Block>(handle.block) }
}

/// Makes the pool. 0 if that went well.
///
/// # Safety
/// `options` is a string that ends in a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peer_init(
    device_bytes: u64,
    streams: u32,
    options: *const c_char,
) -> c_int {
    // SAFETY: the harness gives a string.
    let options = unsafe { CStr::from_ptr(options) };
    let made = Peer::new(device_bytes, streams, &options.to_string_lossy());
    match made {
        Ok(peer) => {
            PEER.store(Box::leak(Box::new(peer)), Ordering::Relaxed);
            0
        }
        Err(error) => {
            eprintln!("kitsune: {error}");
            1
        }
    }
}

/// The allocator's name.
#[unsafe(no_mangle)]
pub extern "C" fn peer_name() -> *const c_char {
    c"kitsune".as_ptr()
}

/// A block of `bytes` for `stream`, or a handle of zeros.
#[unsafe(no_mangle)]
pub extern "C" fn peer_alloc(bytes: usize, stream: u32) -> Handle {
    let peer = peer();
    match peer.pool.allocate(bytes as u64, peer.stream(stream)) {
        Ok(block) => Handle {
            is_live: 1,
            block: pointer(block),
        },
        Err(_) => Handle {
            is_live: 0,
            block: ptr::null_mut(),
        },
    }
}

/// Frees a block in the order of stream `on`.
///
/// # Safety
/// The handle came from [`peer_alloc`] and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peer_free(handle: Handle, _bytes: usize, home: u32, on: u32) {
    // SAFETY: the harness gives each handle up once.
    let block = unsafe { block(handle) };
    if on == home {
        drop(block);
    } else {
        free_on(block, on);
    }
}

#[inline(never)]
fn free_on(mut block: Block, stream: u32) {
    block.record_stream(peer().stream(stream));
}

/// Says that `stream` uses a block as well.
///
/// # Safety
/// The handle came from [`peer_alloc`] and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peer_record(handle: Handle, _bytes: usize, stream: u32) {
    // SAFETY: the harness still owns the block; this value of it is not dropped.
    let mut block = ManuallyDrop::new(unsafe { block(handle) });
    block.record_stream(peer().stream(stream));
    // The harness keeps the bits it has: a block must not move what it points to.
    debug_assert_eq!(pointer(ManuallyDrop::into_inner(block)), handle.block);
}

/// Waits for the device.
#[unsafe(no_mangle)]
pub extern "C" fn peer_sync() {
    stub::cudaDeviceSynchronize();
}

/// Gives back what no block uses.
#[unsafe(no_mangle)]
pub extern "C" fn peer_trim() {
    // What is not given back stays reserved, which the harness sees.
    drop(peer().pool.empty_cache());
}

/// The pool's own figures.
///
/// # Safety
/// `out` points to room for [`Stats`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peer_stats(out: *mut Stats) {
    let stats = peer().pool.stats();
    let stats = Stats {
        reserved: stats.reserved_bytes.current,
        peak_reserved: stats.reserved_bytes.peak,
        requested: stats.requested_bytes.current,
        dropped: 0,
    };
    // SAFETY: the harness gives room for it.
    unsafe { out.write(stats) };
}

/// The address of a block.
///
/// # Safety
/// The handle came from [`peer_alloc`] and was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn peer_addr(handle: Handle) -> u64 {
    // SAFETY: the harness still owns the block; this value of it is not dropped.
    let block = ManuallyDrop::new(unsafe { block(handle) });
    block.ptr().0
}
