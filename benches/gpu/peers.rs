//! Allocators to play on: ours, the driver's own two, and cudarc's.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use kitsune::driver::cuda::stream_handle;
use kitsune::{Block, Device, Error, Pool, PoolConfig, Result, Stream};

use crate::cuda::{Cuda, Handle, call};
use crate::setting::failure;

/// An allocator of stream-ordered memory.
pub(crate) trait Peer {
    /// A live block.
    type Block;

    /// Memory for `bytes` on stream number `stream`.
    fn allocate(&self, bytes: u64, stream: usize) -> Result<Self::Block>;

    /// Says that stream number `stream` uses the block as well.
    fn record_stream(&self, block: &mut Self::Block, stream: usize) -> Result<()>;

    /// Gives the block back in order with its stream.
    fn free(&self, block: Self::Block) -> Result<()>;

    /// Waits for all of its streams.
    fn synchronize(&self) -> Result<()>;
}

/// The pool.
pub(crate) struct Kitsune {
    pub(crate) pool: Pool,
    streams: Vec<Stream>,
}

impl Kitsune {
    pub(crate) fn new(device: &Device, streams: usize) -> Result<Self> {
        let streams = (0..streams).map(|_| device.create_stream());
        Ok(Self {
            pool: Pool::new(device, PoolConfig::default())?,
            streams: streams.collect::<Result<_>>()?,
        })
    }
}

impl Peer for Kitsune {
    type Block = Block;

    fn allocate(&self, bytes: u64, stream: usize) -> Result<Block> {
        self.pool.allocate(bytes, &self.streams[stream])
    }

    fn record_stream(&self, block: &mut Block, stream: usize) -> Result<()> {
        block.record_stream(&self.streams[stream]);
        Ok(())
    }

    fn free(&self, block: Block) -> Result<()> {
        drop(block);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        self.streams.iter().try_for_each(Stream::synchronize)
    }
}

/// `cuMemAllocAsync` and `cuMemFreeAsync`, whose pool keeps all memory. Knows no uses on other streams: a program
/// would have to order the free by hand.
pub(crate) struct MallocAsync<'a> {
    cuda: &'a Cuda,
    streams: Vec<Stream>,
    handles: Vec<Handle>,
}

impl<'a> MallocAsync<'a> {
    pub(crate) fn new(cuda: &'a Cuda, device: &Device, streams: usize) -> Result<Self> {
        cuda.keep_freed_memory(u64::MAX)?;
        let streams = (0..streams).map(|_| device.create_stream());
        let streams = streams.collect::<Result<Vec<_>>>()?;
        let handles = streams
            .iter()
            .map(|stream| Ok(stream_handle(stream)?.cast()));
        Ok(Self {
            cuda,
            handles: handles.collect::<Result<_>>()?,
            streams,
        })
    }
}

impl Peer for MallocAsync<'_> {
    /// The address, and the stream.
    type Block = (u64, usize);

    fn allocate(&self, bytes: u64, stream: usize) -> Result<(u64, usize)> {
        let mut address = 0;
        let bytes = kitsune::units::to_usize(bytes.max(1));
        let handle = self.handles[stream];
        // SAFETY: the stream is alive, and `address` takes the answer.
        unsafe { call!(self.cuda, cuMemAllocAsync(&raw mut address, bytes, handle)) }?;
        Ok((address, stream))
    }

    fn record_stream(&self, _: &mut (u64, usize), _: usize) -> Result<()> {
        Ok(())
    }

    fn free(&self, (address, stream): (u64, usize)) -> Result<()> {
        // SAFETY: the memory is ours, and no work was enqueued on it.
        unsafe { call!(self.cuda, cuMemFreeAsync(address, self.handles[stream])) }
    }

    fn synchronize(&self) -> Result<()> {
        self.streams.iter().try_for_each(Stream::synchronize)
    }
}

impl Drop for MallocAsync<'_> {
    /// The driver's pool is one for the process; the next peer finds it as it is at first.
    fn drop(&mut self) {
        let _ = self.cuda.keep_freed_memory(0);
        let _ = self.synchronize();
    }
}

/// `cuMemAlloc` and `cuMemFree`, which no program calls on a hot path.
pub(crate) struct Malloc<'a>(pub(crate) &'a Cuda);

impl Peer for Malloc<'_> {
    type Block = u64;

    fn allocate(&self, bytes: u64, _: usize) -> Result<u64> {
        let mut address = 0;
        let bytes = kitsune::units::to_usize(bytes.max(1));
        // SAFETY: `address` takes the answer.
        unsafe { call!(self.0, cuMemAlloc_v2(&raw mut address, bytes)) }?;
        Ok(address)
    }

    fn record_stream(&self, _: &mut u64, _: usize) -> Result<()> {
        Ok(())
    }

    fn free(&self, address: u64) -> Result<()> {
        // SAFETY: the memory is ours, and no work was enqueued on it.
        unsafe { call!(self.0, cuMemFree_v2(address)) }
    }

    /// Its calls wait by themselves.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// cudarc's slices, which are allocated in stream order and carry two events each.
pub(crate) struct Cudarc {
    streams: Vec<Arc<CudaStream>>,
}

impl Cudarc {
    pub(crate) fn new(streams: usize) -> Result<Self> {
        let context = CudaContext::new(0).map_err(refused)?;
        let streams = (0..streams).map(|_| context.new_stream().map_err(refused));
        Ok(Self {
            streams: streams.collect::<Result<_>>()?,
        })
    }
}

fn refused(error: cudarc::driver::DriverError) -> Error {
    failure("cudarc", error.0 as i32)
}

impl Peer for Cudarc {
    type Block = CudaSlice<u8>;

    fn allocate(&self, bytes: u64, stream: usize) -> Result<CudaSlice<u8>> {
        let bytes = kitsune::units::to_usize(bytes.max(1));
        // SAFETY: nothing reads the memory.
        unsafe { self.streams[stream].alloc(bytes) }.map_err(refused)
    }

    fn record_stream(&self, _: &mut CudaSlice<u8>, _: usize) -> Result<()> {
        Ok(())
    }

    fn free(&self, block: CudaSlice<u8>) -> Result<()> {
        drop(block);
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        let mut streams = self.streams.iter();
        streams.try_for_each(|stream| stream.synchronize().map_err(refused))
    }
}
