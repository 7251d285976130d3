//! A backend that writes to every block and checks that the bytes do not change.
//!
//! A *stamp* is a number unique to one allocation. It is written repeatedly over the first and the last page of the
//! block on its home stream, and read back before the free. Overlapping live blocks, or a page mapped to the wrong
//! place, change it. For each use on another stream, a stamp is copied out of the block on that stream, after a wait
//! for home. If the block is reused before that copy runs, the copy has a different stamp; some order of the streams
//! shows it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kitsune::driver::DevicePtr;
use kitsune::units::{KIB, to_usize};
use kitsune::{Block, Stream};

use super::backend::{Backend, PoolBackend, Trouble};
use super::program::StreamIndex;

const STAMP: u64 = size_of::<u64>() as u64;
/// The most bytes written at each end of a block. The last run starts at a multiple of the stamp size.
const PAGE: u64 = 4 * KIB;

/// A pool whose blocks are written, used and read back.
#[derive(Debug)]
pub(crate) struct CheckedBackend {
    inner: PoolBackend,
    /// Shared by all threads of a run.
    next_stamp: Arc<AtomicU64>,
    seen: SeenStamps,
}

/// A block with its stamp.
#[derive(Debug)]
pub(crate) struct StampedBlock {
    block: Block,
    home: StreamIndex,
    stamp: u64,
}

/// The memory that uses copy stamps to. It is pinned, so that it takes no memory of the device under test.
#[derive(Debug)]
struct SeenStamps {
    stream: Stream,
    base: Option<DevicePtr>,
    /// The stamp that each use must have seen, in order.
    expected: Vec<u64>,
}

impl CheckedBackend {
    /// Checks blocks of `inner`, with room for `uses` uses on other streams per pass.
    pub(crate) fn new(
        inner: PoolBackend,
        next_stamp: Arc<AtomicU64>,
        uses: usize,
    ) -> Result<Self, kitsune::Error> {
        let stream = inner.streams[0].clone();
        let base = match uses as u64 * STAMP {
            0 => None,
            bytes => Some(stream.driver().allocate_pinned(bytes)?),
        };
        let seen = SeenStamps {
            stream,
            base,
            expected: Vec::with_capacity(uses),
        };
        Ok(Self {
            inner,
            next_stamp,
            seen,
        })
    }

    /// Copies the stamp out of the block on another stream, like a reader on that stream.
    fn use_on(&mut self, stamped: &StampedBlock, stream: StreamIndex) -> Result<(), Trouble> {
        let holds_a_stamp = stamped.block.requested() >= STAMP;
        let Some(base) = self.seen.base.filter(|_| holds_a_stamp) else {
            return Ok(());
        };
        let user = self.inner.stream(stream);
        user.wait_for(self.inner.stream(stamped.home))?;
        let place = base.offset(self.seen.expected.len() as u64 * STAMP);
        copy_stamp(place, stamped.block.ptr(), user)?;
        self.seen.expected.push(stamped.stamp);
        Ok(())
    }

    fn verify(&self, stamped: &StampedBlock) -> Result<(), Trouble> {
        let stream = self.inner.stream(stamped.home);
        let mut bytes = Vec::new();
        for (offset, len) in ends(stamped.block.requested()) {
            bytes.resize(to_usize(len), 0);
            read(&mut bytes, stamped.block.ptr().offset(offset), stream)?;
            if let Some(at) = first_difference(&bytes, &stamp_bytes(stamped.stamp, len)) {
                let bytes = stamped.block.requested();
                let at = offset + at;
                let message = format!("byte {at} of a live block of {bytes} bytes was overwritten");
                return Err(Trouble::Overwritten(message));
            }
        }
        Ok(())
    }
}

impl Backend for CheckedBackend {
    type Block = StampedBlock;

    fn allocate(&mut self, bytes: u64, home: StreamIndex) -> Result<Option<StampedBlock>, Trouble> {
        let Some(block) = self.inner.allocate(bytes, home)? else {
            return Ok(None);
        };
        // Relaxed: the number only has to be unique. It is not zero, because new memory is.
        let stamp = 1 + self.next_stamp.fetch_add(1, Ordering::Relaxed);
        for (offset, len) in ends(bytes) {
            let ptr = block.ptr().offset(offset);
            write(ptr, &stamp_bytes(stamp, len), self.inner.stream(home))?;
        }
        Ok(Some(StampedBlock { block, home, stamp }))
    }

    fn bytes(stamped: &StampedBlock) -> u64 {
        stamped.block.requested()
    }

    fn record_stream(
        &mut self,
        stamped: &mut StampedBlock,
        stream: StreamIndex,
    ) -> Result<(), Trouble> {
        self.inner.record_stream(&mut stamped.block, stream)?;
        self.use_on(stamped, stream)
    }

    fn free(&mut self, stamped: StampedBlock) -> Result<(), Trouble> {
        self.verify(&stamped)?;
        self.inner.free(stamped.block)
    }

    fn wait(&mut self, waiter: StreamIndex, signaller: StreamIndex) -> Result<(), Trouble> {
        let signaller = self.inner.stream(signaller);
        Ok(self.inner.stream(waiter).wait_for(signaller)?)
    }

    fn synchronize(&mut self, stream: Option<StreamIndex>) -> Result<(), Trouble> {
        self.inner.synchronize(stream)
    }

    fn trim(&mut self) -> Result<(), Trouble> {
        self.inner.trim()
    }

    /// Checks the stamps that the uses of this pass saw.
    fn finish(&mut self) -> Result<(), Trouble> {
        self.inner.synchronize(None)?;
        let expected = std::mem::take(&mut self.seen.expected);
        let Some(base) = self.seen.base else {
            return Ok(());
        };
        let mut seen = vec![0; to_usize(expected.len() as u64 * STAMP)];
        read(&mut seen, base, &self.seen.stream)?;
        let wanted: Vec<u8> = expected
            .iter()
            .flat_map(|stamp| stamp.to_le_bytes())
            .collect();
        match first_difference(&seen, &wanted) {
            None => Ok(()),
            Some(at) => {
                let number = at / STAMP + 1;
                let message = format!("a block was reused before its recorded use {number} ran");
                Err(Trouble::Overwritten(message))
            }
        }
    }
}

/// The parts of a block of `bytes` bytes to stamp, as (offset, length): all of it, or both ends.
fn ends(bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let first = (0, bytes.min(PAGE));
    let start = bytes.saturating_sub(PAGE) / STAMP * STAMP;
    let last = (bytes > PAGE).then_some((start, bytes - start));
    std::iter::once(first)
        .chain(last)
        .filter(|(_, len)| *len > 0)
}

/// `stamp`, repeated over `len` bytes.
fn stamp_bytes(stamp: u64, len: u64) -> Vec<u8> {
    stamp
        .to_le_bytes()
        .into_iter()
        .cycle()
        .take(to_usize(len))
        .collect()
}

fn first_difference(left: &[u8], right: &[u8]) -> Option<u64> {
    left.iter()
        .zip(right)
        .position(|(left, right)| left != right)
        .map(|at| at as u64)
}

#[expect(unsafe_code, reason = "the check plays a program that uses its blocks")]
fn write(ptr: DevicePtr, bytes: &[u8], stream: &Stream) -> Result<(), kitsune::Error> {
    // SAFETY: the bytes are in a live block of the calling program, which is freed in order with `stream`, its home.
    // Whether the pool keeps others away from the block is what this checks.
    unsafe { stream.driver().copy_from_host(ptr, bytes, stream.raw()) }
}

#[expect(unsafe_code, reason = "the check plays a program that uses its blocks")]
fn read(bytes: &mut [u8], ptr: DevicePtr, stream: &Stream) -> Result<(), kitsune::Error> {
    // SAFETY: the bytes are in a live block, and read in order with its home stream, or they are in the pinned memory
    // of this check, after a wait for all streams.
    unsafe { stream.driver().copy_to_host(bytes, ptr, stream.raw()) }
}

#[expect(unsafe_code, reason = "the check plays a program that uses its blocks")]
fn copy_stamp(dst: DevicePtr, src: DevicePtr, stream: &Stream) -> Result<(), kitsune::Error> {
    // SAFETY: `dst` is one use's place in the pinned memory, which is read only after the pass. The block at `src` is
    // at least one stamp long and was recorded on `stream`, and its memory stays mapped until the pool knows that
    // `stream` has passed the use.
    unsafe { stream.driver().copy(dst, src, STAMP, stream.raw()) }
}

impl Drop for SeenStamps {
    #[expect(unsafe_code, reason = "the memory is this check's own")]
    fn drop(&mut self) {
        let Some(base) = self.base else { return };
        // After a failed pass, copies may still be in flight, so the memory is leaked.
        if self.expected.is_empty() {
            // SAFETY: `finish` has waited for all streams after every use so far.
            let _ = unsafe { self.stream.driver().free_pinned(base) };
        }
    }
}

#[cfg(test)]
mod tests {
    use kitsune::{Device, HostConfig, HostSchedule, Pool, PoolConfig};

    use super::*;

    #[test]
    fn both_ends_are_stamped_in_phase() {
        let all = |bytes| ends(bytes).collect::<Vec<_>>();
        assert_eq!(all(0), []);
        assert_eq!(all(7), [(0, 7)]);
        assert_eq!(all(4096), [(0, 4096)]);
        assert_eq!(all(4097), [(0, 4096), (0, 4097)]);
        assert_eq!(all(1 << 21), [(0, 4096), ((1 << 21) - 4096, 4096)]);
        for bytes in 4097..4120 {
            let (start, len) = all(bytes)[1];
            assert_eq!((start % STAMP, start + len), (0, bytes));
        }
    }

    fn backend(seed: u64) -> CheckedBackend {
        let schedule = HostSchedule::Seeded(seed);
        let device = Device::host(HostConfig {
            schedule,
            ..HostConfig::default()
        })
        .unwrap();
        let pool = Pool::new(&device, PoolConfig::default()).unwrap();
        CheckedBackend::new(PoolBackend::new(pool, 2).unwrap(), Arc::default(), 1).unwrap()
    }

    #[test]
    fn a_write_from_elsewhere_is_found_at_either_end() {
        for offset in [5, (3 << 20) - 1] {
            let mut backend = backend(0);
            let stamped = backend.allocate(3 << 20, 0).unwrap().unwrap();
            let ptr = stamped.block.ptr().offset(offset);
            write(ptr, &[0xee], backend.inner.stream(0)).unwrap();
            match backend.free(stamped) {
                Err(Trouble::Overwritten(message)) => {
                    assert!(message.contains(&format!("byte {offset} ")), "{message}");
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Uses a block on stream 1, frees it, and allocates it again on its home. Returns whether the check passes.
    fn passes(seed: u64, recorded: bool) -> bool {
        let mut backend = backend(seed);
        let mut stamped = backend.allocate(4096, 0).unwrap().unwrap();
        if recorded {
            backend.record_stream(&mut stamped, 1).unwrap();
        } else {
            backend.use_on(&stamped, 1).unwrap();
        }
        // Dropped rather than freed: `free` verifies the stamp, which makes the host wait.
        drop(stamped);
        let again = backend.allocate(4096, 0).unwrap().unwrap();
        drop(again);
        backend.finish().is_ok()
    }

    #[test]
    fn a_use_that_was_not_recorded_is_found_under_some_seed() {
        assert!((0..200).all(|seed| passes(seed, true)));
        assert!((0..200).any(|seed| !passes(seed, false)));
    }
}
