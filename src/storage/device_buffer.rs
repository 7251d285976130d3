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
//! forgotten. While cudarc tracks no events (`disable_event_tracking`, as captures need), nothing is ordered or
//! marked here either: that is what its caller promised to do.
//!
//! A kernel launch does not tell its arguments the stream, so a buffer is no argument by itself:
//! [`on`](DeviceBuffer::on) and [`on_mut`](DeviceBuffer::on_mut) name it. Errors of a guard come out of the
//! next call of cudarc's on its context, as its own do.

#![allow(
    unsafe_code,
    reason = "passing a kernel argument is an unsafe trait of cudarc's"
)]

use std::fmt;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use bytemuck::Pod;
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{
    CudaEvent, CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, DriverError, LaunchArgs,
    PushKernelArg, SyncOnDrop,
};

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
        let shared = context.shared.clone().ok_or_else(|| {
            Error::argument(
                OP,
                "the context's stream is not cudarc's: make it by Context::on_cuda_stream",
            )
        })?;
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
        InUse {
            ptr: self.buffer.ptr().0,
            _end: self.begin(stream, false),
            marker: PhantomData,
        }
    }

    /// A use on `stream` that writes, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on_mut<'a>(&'a mut self, stream: &'a CudaStream) -> InUse<'a, T> {
        InUse {
            ptr: self.buffer.ptr().0,
            _end: self.begin(stream, true),
            marker: PhantomData,
        }
    }

    /// Orders a use on `stream` behind what it must follow, and gives the guard that marks its end.
    fn begin<'a>(&'a self, stream: &'a CudaStream, writes: bool) -> SyncOnDrop<'a> {
        let context = stream.context();
        if !context.is_event_tracking() {
            return SyncOnDrop::Record(None);
        }
        for usage in self.uses.iter() {
            if writes || usage.has_written.load(Ordering::Acquire) {
                context.record_err(stream.wait(&usage.end));
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
                if writes {
                    usage.has_written.store(true, Ordering::Release);
                }
                SyncOnDrop::Record(Some((&usage.end, stream)))
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
    /// The elements as a tensor of this shape: its work goes to home, behind every use so far.
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
            let waits = self.shared.home.wait(&usage.end);
            waits.map_err(|error| Error::Driver {
                call: "stream_wait",
                code: error.0 as i32,
                reason: error.to_string(),
            })?;
        }
        let empty = Buffer::uninit(self.buffer.context(), 0)?;
        self.uses = Uses::default();
        let buffer = std::mem::replace(&mut self.buffer, empty);
        Ok(Tensor::over(buffer, layout, T::DTYPE))
    }
}

impl<T> Drop for DeviceBuffer<T> {
    fn drop(&mut self) {
        let relay = &self.shared.relay;
        let context = relay.context();
        let mut is_held = false;
        for usage in self.uses.iter() {
            if matches!(usage.end.try_is_complete(), Ok(true)) {
                continue;
            }
            match relay.wait(&usage.end) {
                Ok(()) => is_held = true,
                // The memory must not be had before the use is over: where the device cannot be made to wait,
                // the host has to.
                Err(_) => context.record_err(usage.end.synchronize()),
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
        (self.buffer.ptr().0, self.begin(stream, false))
    }
}

impl<T> DevicePtrMut<T> for DeviceBuffer<T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        (self.buffer.ptr().0, self.begin(stream, true))
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

/// A use of a [`DeviceBuffer`] on one stream. Its end is marked when this is dropped, so keep it until the
/// launch that it is an argument of.
#[derive(Debug)]
pub struct InUse<'a, T> {
    ptr: CUdeviceptr,
    _end: SyncOnDrop<'a>,
    marker: PhantomData<fn() -> T>,
}

// SAFETY: what is pushed is the address of the first element, as for cudarc's own slices, at a place that
// outlives the launch.
unsafe impl<'a, 'b: 'a, 'c: 'b, T> PushKernelArg<&'b InUse<'c, T>> for LaunchArgs<'a> {
    #[inline(always)]
    fn arg(&mut self, arg: &'b InUse<'c, T>) -> &mut Self {
        self.arg(&arg.ptr)
    }
}

/// A stream, as cudarc names it: context, handle, and for the per-thread default stream the thread.
type Name = (usize, usize, Option<ThreadId>);

fn name(stream: &CudaStream) -> Name {
    let handle = stream.cu_stream().addr();
    let per_thread = (handle == 2).then(|| thread::current().id());
    (stream.context().cu_ctx().addr(), handle, per_thread)
}

/// Streams other than home that used a buffer: a list that only grows, so that events can be lent from it.
#[derive(Default)]
struct Uses(OnceLock<Box<Use>>);

struct Use {
    stream: Name,
    has_written: AtomicBool,
    /// The end of the last use. Marks nothing before the first one ends.
    end: CudaEvent,
    next: Uses,
}

impl Uses {
    fn iter(&self) -> impl Iterator<Item = &Use> {
        let first = self.0.get();
        std::iter::successors(first, |usage| usage.next.0.get()).map(|usage| &**usage)
    }

    /// The entry of `stream`, made if there is none.
    fn on(&self, stream: &CudaStream) -> Result<&Use, DriverError> {
        let wanted = name(stream);
        let mut place = self;
        loop {
            let usage = match place.0.get() {
                Some(usage) => usage,
                None => {
                    let new = Box::new(Use {
                        stream: wanted,
                        has_written: AtomicBool::new(false),
                        end: stream.context().new_event(None)?,
                        next: Self::default(),
                    });
                    // Another thread may have been faster: then its entry counts, and the walk goes on.
                    place.0.get_or_init(|| new)
                }
            };
            if usage.stream == wanted {
                // A stream that is gone may have left its handle to this one.
                stream.wait(&usage.end)?;
                return Ok(usage);
            }
            place = &usage.next;
        }
    }
}
