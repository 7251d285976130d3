//! Pool memory for code written against cudarc: kernel launches, copies, cuBLAS, cuBLASLt, NCCL.
//!
//! A program needs three lines: a context over a cudarc stream, a buffer, and a use.
//!
//! ```no_run
//! # fn program(
//! #     pool: &kitsune::Pool,
//! #     stream: &std::sync::Arc<cudarc::driver::CudaStream>,
//! #     scale: &cudarc::driver::CudaFunction,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use cudarc::driver::{LaunchConfig, PushKernelArg};
//! use kitsune::Context;
//! use kitsune::storage::DeviceBuffer;
//!
//! let context = Context::on_cuda_stream(pool, stream)?;
//! let mut x = DeviceBuffer::<f32>::zeros(&context, 1 << 20)?;
//! // SAFETY: the kernel takes an array and its length.
//! unsafe { stream.launch_builder(scale).arg(&x.on_mut(stream)).arg(&(1_u64 << 20)).launch(LaunchConfig::for_num_elems(1 << 20))? };
//! # Ok(())
//! # }
//! ```
//!
//! # Ordering
//! A buffer can be used on every cudarc stream, and is freed in order with its context's stream, its *home*. A use on
//! another stream starts after everything enqueued on home so far. Its end is marked with an event when its guard
//! (cudarc's `SyncOnDrop`, or [`InUse`]) is dropped. Later uses on any stream wait for that mark, unless both uses only
//! read. After the buffer is dropped, the memory waits for it, too; the drop does not delay home itself.
//!
//! Every stream of use has its own event, so that several streams can read at once and every use is tracked. Along with
//! the event, the range of elements that the stream has used so far is recorded: uses of disjoint parts,
//! [views](DeviceView) of one buffer, do not wait for each other. While cudarc's event tracking is off
//! (`disable_event_tracking`, which captures need), this module neither orders nor marks uses: ordering is then the
//! caller's duty.
//!
//! A kernel launch does not tell its arguments which stream it runs on, so a buffer cannot be an argument itself:
//! [`on`](DeviceBuffer::on) and [`on_mut`](DeviceBuffer::on_mut) name the stream. The next cudarc call on the context
//! reports a guard's errors, as it does for cudarc's own guards.
//!
//! Code map: this file (the buffer, and conversions from and to tensors); `uses` (which streams used which parts);
//! `view` (views of parts).

#![allow(unsafe_code, reason = "cudarc's trait for kernel arguments is unsafe")]

mod uses;
mod view;

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{
    CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, DriverError, LaunchArgs, PushKernelArg,
    SyncOnDrop,
};

use self::uses::{Access, Uses};
pub use self::view::{DeviceView, DeviceViewMut};
use super::{Buffer, Context, Layout, Shape, Tensor};
use crate::driver::Stream;
use crate::driver::cuda::share_stream;
use crate::dtype::Element;
use crate::error::{Error, Result};
use crate::memory::Pool;

/// cudarc's side of a context.
#[derive(Debug)]
pub(super) struct Shared {
    home: Arc<CudaStream>,
    /// A stream for waits only. When a buffer is dropped before its uses end, this stream waits for their ends, and the
    /// memory waits for this stream. Home does not wait.
    relay: Arc<CudaStream>,
    relay_stream: Stream,
}

impl Context {
    /// A context on a cudarc stream, with memory from `pool`, as [`DeviceBuffer`] requires. It keeps the stream alive,
    /// and creates a second stream for waits.
    ///
    /// # Errors
    /// [`Error::Driver`] if the pool is not on the stream's CUDA device, for the per-thread default stream, or if the
    /// device refuses to create a stream.
    pub fn on_cuda_stream(pool: &Pool, stream: &Arc<CudaStream>) -> Result<Self> {
        let home = share_stream(pool.device(), stream)?;
        let refused = |error: DriverError| Error::Driver {
            call: "create_stream",
            code: error.0 as i32,
            reason: error.to_string(),
        };
        let relay = stream.context().new_stream().map_err(refused)?;
        let relay_stream = share_stream(pool.device(), &relay)?;
        let mut context = Self::on_stream(pool, &home)?;
        context.shared = Some(Arc::new(Shared {
            home: Arc::clone(stream),
            relay,
            relay_stream,
        }));
        Ok(context)
    }
}

/// cudarc's side of `context`, if it has one.
fn shared_of(op: &'static str, context: &Context) -> Result<Arc<Shared>> {
    let reason =
        "the context's stream is not cudarc's: make the context with Context::on_cuda_stream";
    let shared = context.shared.clone();
    shared.ok_or_else(|| Error::argument(op, reason))
}

/// `len` elements of pool memory, for use through cudarc. The [module](super) says how uses are ordered.
pub struct DeviceBuffer<T> {
    shared: Arc<Shared>,
    buffer: Buffer,
    len: usize,
    uses: Uses,
    marker: PhantomData<fn() -> T>,
}

impl<T: Pod> DeviceBuffer<T> {
    /// `len` elements with undefined contents. An empty buffer has the address 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `context` was not made by [`Context::on_cuda_stream`], or if the size in bytes
    /// overflows; [`Error::OutOfMemory`].
    pub fn uninit(context: &Context, len: usize) -> Result<Self> {
        Self::with(context, len, Buffer::uninit)
    }

    /// `len` elements whose bytes are zero.
    ///
    /// # Errors
    /// As [`uninit`](Self::uninit); [`Error::Driver`] if the fill cannot be enqueued.
    pub fn zeros(context: &Context, len: usize) -> Result<Self> {
        Self::with(context, len, Buffer::zeros)
    }

    fn with(
        context: &Context,
        len: usize,
        make: impl FnOnce(&Context, u64) -> Result<Buffer>,
    ) -> Result<Self> {
        const OP: &str = "DeviceBuffer";
        let shared = shared_of(OP, context)?;
        let bytes = (len as u64).checked_mul(size_of::<T>() as u64);
        let bytes = bytes.ok_or_else(|| Error::argument(OP, format!("{len} elements overflow")))?;
        Ok(Self {
            shared,
            buffer: make(context, bytes)?,
            len,
            uses: Uses::default(),
            marker: PhantomData,
        })
    }
}

impl<T> DeviceBuffer<T> {
    /// The underlying memory. Work enqueued on it other than through this type is not ordered with its uses.
    #[must_use]
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// A use on `stream` that reads, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on<'a>(&'a self, stream: &'a CudaStream) -> InUse<'a, T> {
        self.use_part(0..self.len, stream, Access::Read)
    }

    /// A use on `stream` that writes, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on_mut<'a>(&'a mut self, stream: &'a CudaStream) -> InUse<'a, T> {
        self.use_part(0..self.len, stream, Access::Write)
    }

    fn use_part<'a>(
        &'a self,
        part: Range<usize>,
        stream: &'a CudaStream,
        access: Access,
    ) -> InUse<'a, T> {
        InUse {
            ptr: self.address(part.start),
            _end: self.begin(part, stream, access),
            marker: PhantomData,
        }
    }

    /// The address of an element.
    fn address(&self, index: usize) -> CUdeviceptr {
        self.buffer.ptr().0 + index as u64 * size_of::<T>() as u64
    }

    /// Orders a use of a part on `stream` after everything it must follow, and returns the guard that marks its end.
    fn begin<'a>(
        &'a self,
        part: Range<usize>,
        stream: &'a CudaStream,
        access: Access,
    ) -> SyncOnDrop<'a> {
        let context = stream.context();
        if !context.is_event_tracking() {
            return SyncOnDrop::Record(None);
        }
        for usage in self.uses.iter() {
            if usage.is_before(&part, access) {
                context.record_err(stream.wait(usage.end()));
            }
        }
        let home = &self.shared.home;
        if stream == &**home {
            return SyncOnDrop::Record(None);
        }
        context.record_err(stream.join(home));
        match self.uses.on(stream) {
            // cudarc ignores marks until it knows of a second stream.
            Ok(usage) if context.is_managing_stream_synchronization() => {
                usage.add(&part, access);
                SyncOnDrop::Record(Some((usage.end(), stream)))
            }
            Ok(_) => SyncOnDrop::Sync(Some(stream)),
            Err(error) => {
                context.record_err::<()>(Err(error));
                SyncOnDrop::Sync(Some(stream))
            }
        }
    }
}

impl<T: Element> DeviceBuffer<T> {
    /// Converts a tensor without a copy; its context's stream becomes home. Work enqueued for the tensor runs before
    /// the buffer's uses.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the tensor's context was not made by [`Context::on_cuda_stream`], if its element
    /// type differs, if it is a partial or non-contiguous view, or if a clone or view shares the memory.
    /// The tensor is dropped then.
    pub fn from_tensor(tensor: Tensor) -> Result<Self> {
        const OP: &str = "from_tensor";
        let shared = shared_of(OP, tensor.context())?;
        if tensor.dtype() != T::DTYPE {
            let reason = format!("the tensor is {}, not {}", tensor.dtype(), T::DTYPE);
            return Err(Error::argument(OP, reason));
        }
        if !tensor.is_contiguous() || tensor.layout().offset() != 0 {
            let reason = "the tensor is a view that is not contiguous or does not start at the first element";
            return Err(Error::argument(OP, reason));
        }
        let len = tensor.len();
        let buffer = tensor.into_buffer();
        let buffer = buffer
            .ok_or_else(|| Error::argument(OP, "a clone or a view still shares the memory"))?;
        Ok(Self {
            shared,
            buffer,
            len,
            uses: Uses::default(),
            marker: PhantomData,
        })
    }

    /// Converts the buffer to a tensor of this shape without a copy. The tensor's work runs on home, after every use so
    /// far.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the shape has a different number of elements; [`Error::Driver`] if home cannot
    /// be made to wait. The buffer is dropped then.
    pub fn into_tensor(mut self, shape: impl Into<Shape>) -> Result<Tensor> {
        const OP: &str = "into_tensor";
        let layout = Layout::dense(shape.into())?;
        if layout.elements() != self.len {
            let reason = format!(
                "{} elements do not make a tensor of {}",
                self.len,
                layout.shape()
            );
            return Err(Error::argument(OP, reason));
        }
        for usage in self.uses.iter() {
            let waits = self.shared.home.wait(usage.end());
            waits.map_err(|error| Error::Driver {
                call: "stream_wait",
                code: error.0 as i32,
                reason: error.to_string(),
            })?;
        }
        let empty = Buffer::uninit(self.buffer.context(), 0)?;
        self.uses = Uses::default();
        let buffer = std::mem::replace(&mut self.buffer, empty);
        // Uses may have written it.
        buffer.version().advance(&(0..buffer.bytes()));
        Ok(Tensor::over(buffer, layout, T::DTYPE))
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        let relay = &self.shared.relay;
        let context = relay.context();
        let mut is_held = false;
        for usage in self.uses.iter() {
            if matches!(usage.end().try_is_complete(), Ok(true)) {
                continue;
            }
            match relay.wait(usage.end()) {
                Ok(()) => is_held = true,
                // The memory must not be reused before the use is over: if the device cannot be made to wait, the
                // host must.
                Err(_) => context.record_err(usage.end().synchronize()),
            }
        }
        if is_held {
            self.buffer.record_use(&self.shared.relay_stream);
        }
    }
}

impl<T> DeviceSlice<T> for DeviceBuffer<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<CudaStream> {
        &self.shared.home
    }
}

impl<T> DevicePtr<T> for DeviceBuffer<T> {
    fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        let end = self.begin(0..self.len, stream, Access::Read);
        (self.address(0), end)
    }
}

impl<T> DevicePtrMut<T> for DeviceBuffer<T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        let end = self.begin(0..self.len, stream, Access::Write);
        (self.address(0), end)
    }
}

impl<T> fmt::Debug for DeviceBuffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "DeviceBuffer({} elements at {:#x})",
            self.len,
            self.buffer.ptr().0
        )
    }
}

/// A use of a [`DeviceBuffer`], or of a part of one, on one stream. Dropping it marks the end of the use, so keep it
/// until the launch that takes it as an argument.
#[derive(Debug)]
pub struct InUse<'a, T> {
    ptr: CUdeviceptr,
    _end: SyncOnDrop<'a>,
    marker: PhantomData<fn() -> T>,
}

// SAFETY: pushes the address of the part's first element, as cudarc's own slices do, from a place that outlives the
// launch.
unsafe impl<'a, 'b: 'a, 'c: 'b, T> PushKernelArg<&'b InUse<'c, T>> for LaunchArgs<'a> {
    #[inline(always)]
    fn arg(&mut self, arg: &'b InUse<'c, T>) -> &mut Self {
        self.arg(&arg.ptr)
    }
}
