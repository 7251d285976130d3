//! The allocators that programs are played on: a pool, or the system's allocator.

use std::hint::black_box;

use kitsune::{Block, Error, Pool, Stream};

use super::program::StreamIndex;

/// An allocator as one thread sees it.
pub(crate) trait Backend: Send {
    /// A live block.
    type Block: Send;

    /// Allocates `bytes` on `stream`; `Ok(None)` if memory ran out.
    fn allocate(&mut self, bytes: u64, stream: StreamIndex)
    -> Result<Option<Self::Block>, Trouble>;

    /// Bytes requested for the block.
    fn bytes(block: &Self::Block) -> u64;

    /// Records that `stream` also uses the block.
    fn record_stream(
        &mut self,
        block: &mut Self::Block,
        stream: StreamIndex,
    ) -> Result<(), Trouble>;

    /// Frees a block.
    fn free(&mut self, block: Self::Block) -> Result<(), Trouble>;

    /// Makes `waiter` wait for `signaller`. Does nothing by default: allocators do not see waits, and most backends
    /// enqueue no work that would have to be ordered.
    fn wait(&mut self, _waiter: StreamIndex, _signaller: StreamIndex) -> Result<(), Trouble> {
        Ok(())
    }

    /// Waits for a stream, or for all streams.
    fn synchronize(&mut self, stream: Option<StreamIndex>) -> Result<(), Trouble>;

    /// Returns cached memory.
    fn trim(&mut self) -> Result<(), Trouble>;

    /// Called at the end of each pass.
    fn finish(&mut self) -> Result<(), Trouble> {
        Ok(())
    }
}

/// Why a program was stopped.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// An error of the pool or the driver other than out of memory.
    Refused(Error),
    /// A check found bytes that should not have been written.
    Overwritten(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

/// A pool, with the streams that programs refer to by number.
#[derive(Clone, Debug)]
pub(crate) struct PoolBackend {
    pub(super) pool: Pool,
    pub(super) streams: Vec<Stream>,
}

impl PoolBackend {
    /// `pool` with `count` new streams of its device.
    pub(crate) fn new(pool: Pool, count: u32) -> Result<Self, Error> {
        let streams = (0..count)
            .map(|_| pool.device().create_stream())
            .collect::<Result<_, _>>()?;
        Ok(Self { pool, streams })
    }

    pub(super) fn stream(&self, stream: StreamIndex) -> &Stream {
        &self.streams[usize::from(stream)]
    }
}

impl Backend for PoolBackend {
    type Block = Block;

    fn allocate(&mut self, bytes: u64, stream: StreamIndex) -> Result<Option<Block>, Trouble> {
        match self.pool.allocate(bytes, self.stream(stream)) {
            Ok(block) => Ok(Some(block)),
            Err(Error::OutOfMemory(_)) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn bytes(block: &Block) -> u64 {
        block.requested()
    }

    fn record_stream(&mut self, block: &mut Block, stream: StreamIndex) -> Result<(), Trouble> {
        block.record_stream(self.stream(stream));
        Ok(())
    }

    fn free(&mut self, block: Block) -> Result<(), Trouble> {
        drop(block);
        Ok(())
    }

    fn synchronize(&mut self, stream: Option<StreamIndex>) -> Result<(), Trouble> {
        match stream {
            Some(stream) => self.stream(stream).synchronize()?,
            None => self.streams.iter().try_for_each(Stream::synchronize)?,
        }
        Ok(())
    }

    fn trim(&mut self) -> Result<(), Trouble> {
        Ok(self.pool.empty_cache()?)
    }
}

/// The system's allocator, through the standard library. Ignores streams.
#[derive(Debug)]
pub(crate) struct SystemBackend;

impl Backend for SystemBackend {
    type Block = Vec<u8>;

    fn allocate(&mut self, bytes: u64, _stream: StreamIndex) -> Result<Option<Vec<u8>>, Trouble> {
        let mut block = Vec::new();
        let room = block.try_reserve_exact(kitsune::units::to_usize(bytes));
        // Without this the compiler may see that the memory is unused, and remove the allocation.
        Ok(room.ok().map(|()| black_box(block)))
    }

    fn bytes(block: &Vec<u8>) -> u64 {
        block.capacity() as u64
    }

    fn record_stream(&mut self, _: &mut Vec<u8>, _: StreamIndex) -> Result<(), Trouble> {
        Ok(())
    }

    fn free(&mut self, block: Vec<u8>) -> Result<(), Trouble> {
        drop(black_box(block));
        Ok(())
    }

    fn synchronize(&mut self, _stream: Option<StreamIndex>) -> Result<(), Trouble> {
        Ok(())
    }

    fn trim(&mut self) -> Result<(), Trouble> {
        Ok(())
    }
}
