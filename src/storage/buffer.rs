//! Untyped device memory on one stream, with an owner.
//!
//! The only file of this layer that passes addresses to the driver. Its safety promises follow from owning the block.

#![allow(
    unsafe_code,
    reason = "owning the block satisfies the driver's safety contracts"
)]

use std::fmt;

use parking_lot::Mutex;

use super::Context;
use super::version::Version;
use crate::driver::{DevicePtr, Stream};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::launch::Span;
use crate::memory::{Block, PinnedBlock};
use crate::units::{MIB, to_usize};

/// Uses of at least this many bytes are announced to the driver: half of a huge page.
const PREFAULT_MIN: u64 = MIB;

/// A block of pool memory for use on one stream. Dropping it, on any thread, frees the memory in stream order. The drop
/// does not wait for any stream, unless it drops the last reference to its [pool](crate::Pool#dropping).
pub struct Buffer {
    context: Context,
    ptr: DevicePtr,
    bytes: u64,
    /// Only `record_stream` changes the block.
    block: Mutex<Block>,
    version: Version,
}

impl Buffer {
    /// `bytes` bytes with undefined contents.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory);
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the context's allocator returned a block that is
    /// too small or was allocated for another stream.
    pub fn uninit(context: &Context, bytes: u64) -> Result<Self> {
        let block = context.allocator().allocate(bytes, context.stream())?;
        check_block(&block, bytes, context.stream())?;
        Ok(Self {
            context: context.clone(),
            // The block may have memory even for 0 bytes, but nothing uses it.
            ptr: if bytes == 0 {
                DevicePtr(0)
            } else {
                block.ptr()
            },
            bytes,
            block: Mutex::new(block),
            version: Version::default(),
        })
    }

    /// `bytes` bytes of zero.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory); [`Error::Driver`](crate::Error::Driver) if the
    /// fill cannot be enqueued.
    pub fn zeros(context: &Context, bytes: u64) -> Result<Self> {
        let buffer = Self::uninit(context, bytes)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// Address of the first byte, aligned to 512; zero for an empty buffer.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Bytes requested.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that the block takes from the pool: the bytes requested, rounded up to the pool's granularity.
    pub(crate) fn allocated(&self) -> u64 {
        self.block.lock().allocated()
    }

    /// The stream and pool of this buffer.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// When this buffer is dropped, keeps the memory from being reused until `stream` has run all work enqueued on it
    /// by then. For work that other code enqueued on `stream`; [`copy_to`](super::Tensor::copy_to) does not need it.
    pub fn record_stream(&self, stream: &Stream) {
        self.block.lock().record_stream(stream);
    }

    /// Like [`record_stream`](Self::record_stream), but only work already enqueued on `stream` delays the reuse.
    /// Records an event.
    pub fn record_use(&self, stream: &Stream) {
        self.block.lock().record_use(stream);
    }

    /// The versions of this buffer's memory.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// Tells the driver that the next work uses all of `bytes` bytes from byte `start` on. Called at the first use
    /// rather than at the allocation, so that unused memory costs nothing.
    pub(super) fn announce(&self, start: u64, bytes: u64) {
        if bytes >= PREFAULT_MIN {
            let driver = self.context.stream().driver();
            driver.prefault(self.ptr.offset(start), bytes);
        }
    }

    /// Enqueues setting every byte to `value`.
    pub(super) fn fill_bytes(&self, value: u8) -> Result<()> {
        self.version.advance(&(0..self.bytes));
        if self.bytes == 0 {
            return Ok(());
        }
        self.announce(0, self.bytes);
        let stream = self.context.stream();
        // SAFETY: `uninit` checked that the block is at least `bytes` long and that its home, in whose order it is
        // freed, is this stream.
        unsafe {
            stream
                .driver()
                .fill(self.ptr, value, self.bytes, stream.raw())
        }
    }

    /// `len` elements of `dtype` from element `start`, as a kernel argument.
    ///
    /// # Panics
    /// If the range reaches past the end. Layouts are checked when they are made, so that would be a bug.
    pub(super) fn span(&self, start: usize, len: usize, dtype: DType) -> Span {
        let element = dtype.bits() / 8;
        let (start, len_bytes) = (start as u64 * element, len as u64 * element);
        assert!(
            start + len_bytes <= self.bytes,
            "a span past the end of its buffer"
        );
        // SAFETY: the range is in this buffer's block, which starts at a multiple of 512 and is freed in order with the
        // stream named here.
        unsafe {
            Span::new(
                self.ptr.offset(start),
                len,
                dtype,
                self.context.stream().id(),
            )
        }
    }

    /// Enqueues a copy of `bytes` to this buffer, from its byte `start` on.
    pub(super) fn write(&self, start: u64, bytes: &[u8]) -> Result<()> {
        self.version.advance(&(start..start + bytes.len() as u64));
        assert!(
            start + bytes.len() as u64 <= self.bytes,
            "a write past the end of its buffer"
        );
        if bytes.is_empty() {
            return Ok(());
        }
        self.announce(start, bytes.len() as u64);
        let stream = self.context.stream();
        // SAFETY: the range is in the block, which is freed in order with this same stream.
        unsafe {
            stream
                .driver()
                .copy_from_host(self.ptr.offset(start), bytes, stream.raw())
        }
    }

    /// Enqueues a copy of the first `bytes` bytes of `source` to the start of this buffer.
    pub(super) fn write_pinned(&self, source: &mut PinnedBlock, bytes: u64) -> Result<()> {
        self.version.advance(&(0..bytes));
        assert!(bytes <= self.bytes, "a write past the end of its buffer");
        assert!(bytes <= source.bytes(), "a read past the end of a block");
        if bytes == 0 {
            return Ok(());
        }
        self.announce(0, bytes);
        let stream = self.context.stream();
        source.order(stream)?;
        // SAFETY: both are long enough. The buffer is freed in order with this same stream; `source` cannot be written,
        // freed or given other work before the use below is recorded.
        unsafe {
            stream
                .driver()
                .copy(self.ptr, source.ptr(), bytes, stream.raw())
        }?;
        source.record_use(stream)
    }

    /// Enqueues a copy of `bytes` bytes from byte `start` on to the start of `destination`.
    pub(super) fn read_pinned(
        &self,
        start: u64,
        destination: &mut PinnedBlock,
        bytes: u64,
    ) -> Result<()> {
        assert!(
            start + bytes <= self.bytes,
            "a read past the end of its buffer"
        );
        assert!(
            bytes <= destination.bytes(),
            "a write past the end of a block"
        );
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.context.stream();
        destination.order(stream)?;
        // SAFETY: both ranges are in bounds; otherwise as in `write_pinned`.
        unsafe {
            let (to, from) = (destination.ptr(), self.ptr.offset(start));
            stream.driver().copy(to, from, bytes, stream.raw())
        }?;
        destination.record_use(stream)
    }

    /// Copies `bytes.len()` bytes from byte `start` on, and waits for them.
    pub(super) fn read(&self, start: u64, bytes: &mut [u8]) -> Result<()> {
        assert!(
            start + bytes.len() as u64 <= self.bytes,
            "a read past the end of its buffer"
        );
        if bytes.is_empty() {
            return Ok(());
        }
        let stream = self.context.stream();
        // SAFETY: the range is in the block, and all writes to it are on this same stream or ordered with it.
        unsafe {
            stream
                .driver()
                .copy_to_host(bytes, self.ptr.offset(start), stream.raw())
        }
    }

    /// Enqueues a copy of `bytes` bytes of `source`, from its byte `start` on, to the start of this buffer,
    /// in order with the streams of both.
    pub(super) fn copy_across(&self, source: &Self, start: u64, bytes: u64) -> Result<()> {
        self.version.advance(&(0..bytes));
        assert!(bytes <= self.bytes, "a copy past the end of its buffer");
        assert!(
            start + bytes <= source.bytes,
            "a copy from past the end of a buffer"
        );
        if bytes == 0 {
            return Ok(());
        }
        self.announce(0, bytes);
        let (to, from) = (self.context.stream(), source.context.stream());
        to.wait_for(from)?;
        // SAFETY: both ranges are in their blocks. The wait above orders the copy after all writes of the source; the
        // waits below order later work on the source, including its free, after the copy.
        unsafe {
            to.driver()
                .copy(self.ptr, source.ptr.offset(start), bytes, to.raw())
        }?;
        // The copy is already enqueued: if the other stream cannot be made to wait for it, the host must.
        from.wait_for(to).or_else(|_| to.synchronize())
    }
}

/// Refuses a block that an allocator should not have returned. Allocators are safe code, but the promises that this
/// file makes to the driver depend on the block: on its length, and on its home being the stream that runs the work.
/// The home implies the device.
fn check_block(block: &Block, bytes: u64, stream: &Stream) -> Result<()> {
    const OP: &str = "Allocate::allocate";
    if bytes == 0 {
        return Ok(());
    }
    if block.allocated() < bytes {
        let reason = format!("a block of {} bytes for {bytes}", block.allocated());
        return Err(Error::argument(OP, reason));
    }
    match block.home().map(Stream::id) {
        Some(home) if home == stream.id() => Ok(()),
        home => {
            let home = home.map_or_else(|| "no stream".to_owned(), |home| home.0.to_string());
            let reason = format!("a block of stream {home} for stream {}", stream.id().0);
            Err(Error::argument(OP, reason))
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Buffer({} bytes at {:#x})",
            to_usize(self.bytes),
            self.ptr.0
        )
    }
}
