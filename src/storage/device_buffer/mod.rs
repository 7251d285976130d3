//! Pool memory for code written against cudarc: kernel launches, copies, cuBLAS, cuBLASLt, NCCL.
//!
//! Three lines take a program there: a context over a stream of cudarc's, a buffer, a use.
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
//! A buffer may be used on every stream of cudarc's, and is freed in order with its context's stream, its
//! *home*. A use on another stream begins behind what home was given so far, and its end is marked with an
//! event when the guard that stands for it (cudarc's `SyncOnDrop`, or [`InUse`]) is dropped. What waits for
//! that mark: later uses on any stream, unless both only read; and the memory, when the buffer is dropped. Home
//! itself is not held up by the drop.
//!
//! Every stream of use has an event of its own, so that several streams may read at once and none is
//! forgotten. With the event goes the part that the stream has used since the buffer was made: uses of parts
//! that share nothing, [views](DeviceView) of one buffer, do not wait for each other. While cudarc tracks no events (`disable_event_tracking`, as captures need), nothing is ordered or
//! marked here either: that is what its caller promised to do.
//!
//! A kernel launch does not tell its arguments the stream, so a buffer is no argument by itself:
//! [`on`](DeviceBuffer::on) and [`on_mut`](DeviceBuffer::on_mut) name it. Errors of a guard come out of the
//! next call of cudarc's on its context, as its own do.
//!
//! Code map: here, the buffer and its way from and to tensors; `uses`, who used which part; `view`, parts.

#![allow(
    unsafe_code,
    reason = "passing a kernel argument is an unsafe trait of cudarc's"
)]

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
    /// A stream that is given nothing but waits: for the ends of uses, when a buffer is dropped before them.
    /// The memory then waits for this stream, and home does not.
    relay: Arc<CudaStream>,
    relay_stream: Stream,
}

impl Context {
    /// A context on a stream of cudarc's, with memory from `pool`: the one [`DeviceBuffer`] needs. It keeps the
    /// stream alive, and makes one more for waits.
    ///
    /// # Errors
    /// [`Error::Driver`] if the pool is not of the stream's CUDA device, for the per-thread default stream, and
    /// if the device refuses a stream.
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
    let reason = "the context's stream is not cudarc's: make it by Context::on_cuda_stream";
    let shared = context.shared.clone();
    shared.ok_or_else(|| Error::argument(op, reason))
}

/// `len` elements of pool memory, for use through cudarc. See the [module](super) for what orders its uses.
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
    /// [`Error::InvalidArgument`] if `context` was not made by [`Context::on_cuda_stream`], and for more bytes
    /// than can be counted; [`Error::OutOfMemory`].
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
    /// The memory below. What is enqueued for it by other ways than this type's is not ordered with its uses.
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

    /// Where an element is.
    fn address(&self, index: usize) -> CUdeviceptr {
        self.buffer.ptr().0 + index as u64 * size_of::<T>() as u64
    }

    /// Orders a use of a part on `stream` behind what it must follow, and gives the guard that marks its end.
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
            // Before cudarc knows of a second stream, it passes over marks.
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
    /// The elements of a tensor, without a copy; its context's stream is home. What was enqueued for the tensor
    /// comes before what the buffer is used for.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the tensor's context was not made by [`Context::on_cuda_stream`], for
    /// another element type, for a view of a part or out of order, and if a clone or view shares the memory.
    /// The tensor is dropped then.
    pub fn from_tensor(tensor: Tensor) -> Result<Self> {
        const OP: &str = "from_tensor";
        let shared = shared_of(OP, tensor.context())?;
        if tensor.dtype() != T::DTYPE {
            let reason = format!("the tensor is {}, not {}", tensor.dtype(), T::DTYPE);
            return Err(Error::argument(OP, reason));
        }
        if !tensor.is_contiguous() || tensor.layout().offset() != 0 {
            let reason = "a view that is not the first elements of its memory, one after another";
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

    /// The elements as a tensor of this shape, without a copy: its work goes to home, behind every use so far.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the shape has another number of elements; [`Error::Driver`] if home cannot
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
                // The memory must not be had before the use is over: where the device cannot be made to wait,
                // the host has to.
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

/// A use of a [`DeviceBuffer`], or of a part of one, on one stream. Its end is marked when this is dropped, so keep it until the
/// launch that it is an argument of.
#[derive(Debug)]
pub struct InUse<'a, T> {
    ptr: CUdeviceptr,
    _end: SyncOnDrop<'a>,
    marker: PhantomData<fn() -> T>,
}

// SAFETY: what is pushed is the address of the first element of the part, as for cudarc's own slices, at a place that
// outlives the launch.
unsafe impl<'a, 'b: 'a, 'c: 'b, T> PushKernelArg<&'b InUse<'c, T>> for LaunchArgs<'a> {
    #[inline(always)]
    fn arg(&mut self, arg: &'b InUse<'c, T>) -> &mut Self {
        self.arg(&arg.ptr)
    }
}
