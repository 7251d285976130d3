//! A digest of the addresses that a pool hands out.
//!
//! The system places ranges of addresses differently from run to run, but a pool can still place blocks in them the
//! same way. So an address is represented by the number of its range, in the order in which the pool took ranges, and
//! its offset in the range. Two runs with the same digest placed every block alike.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use kitsune::Block;
use kitsune::driver::DevicePtr;

use super::backend::{Backend, PoolBackend, Trouble};
use super::probe::ProbeDriver;
use super::program::StreamIndex;

/// The ranges of addresses that a pool holds: reserved ranges and plain allocations.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    /// The number of each range, by its first address.
    numbers: BTreeMap<u64, u64>,
    taken: u64,
}

impl Ranges {
    pub(super) fn take(&mut self, base: DevicePtr) {
        self.numbers.insert(base.0, self.taken);
        self.taken += 1;
    }

    pub(super) fn give_back(&mut self, base: DevicePtr) {
        self.numbers.remove(&base.0);
    }

    /// The number of the range that contains an address, and the address's offset in it.
    pub(super) fn find(&self, ptr: DevicePtr) -> Option<(u64, u64)> {
        let (base, number) = self.numbers.range(..=ptr.0).next_back()?;
        Some((*number, ptr.0 - base))
    }
}

/// 64-bit FNV-1a over numbers.
#[derive(Debug)]
pub(crate) struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    fn add(&mut self, number: u64) {
        for byte in number.to_le_bytes() {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// As sixteen hexadecimal digits.
    fn text(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// A pool whose addresses are added to a digest. Used by one thread.
#[derive(Debug)]
pub(crate) struct DigestedBackend {
    inner: PoolBackend,
    probe: Arc<ProbeDriver>,
    digest: Arc<Mutex<Digest>>,
}

impl DigestedBackend {
    /// Digests the addresses that `inner` hands out; `probe` is its device.
    pub(crate) fn new(
        inner: PoolBackend,
        probe: Arc<ProbeDriver>,
        digest: Arc<Mutex<Digest>>,
    ) -> Self {
        Self {
            inner,
            probe,
            digest,
        }
    }
}

/// The digest so far, as text.
pub(crate) fn text(digest: &Mutex<Digest>) -> String {
    let digest = digest.lock().unwrap_or_else(PoisonError::into_inner);
    digest.text()
}

impl Backend for DigestedBackend {
    type Block = Block;

    fn allocate(&mut self, bytes: u64, stream: StreamIndex) -> Result<Option<Block>, Trouble> {
        let block = self.inner.allocate(bytes, stream)?;
        // Out of memory, and a block of zero bytes without memory, are represented by two more values.
        let (range, distance) = match &block {
            None => (u64::MAX, 0),
            Some(block) => self.probe.place(block.ptr()).unwrap_or((u64::MAX, 1)),
        };
        let mut digest = self.digest.lock().unwrap_or_else(PoisonError::into_inner);
        digest.add(range);
        digest.add(distance);
        drop(digest);
        Ok(block)
    }

    fn bytes(block: &Block) -> u64 {
        PoolBackend::bytes(block)
    }

    fn record_stream(&mut self, block: &mut Block, stream: StreamIndex) -> Result<(), Trouble> {
        self.inner.record_stream(block, stream)
    }

    fn free(&mut self, block: Block) -> Result<(), Trouble> {
        self.inner.free(block)
    }

    fn synchronize(&mut self, stream: Option<StreamIndex>) -> Result<(), Trouble> {
        self.inner.synchronize(stream)
    }

    fn trim(&mut self) -> Result<(), Trouble> {
        self.inner.trim()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_told_by_its_range_and_distance() {
        let mut ranges = Ranges::default();
        ranges.take(DevicePtr(1000));
        ranges.take(DevicePtr(500));
        assert_eq!(ranges.find(DevicePtr(1007)), Some((0, 7)));
        assert_eq!(ranges.find(DevicePtr(999)), Some((1, 499)));
        assert_eq!(ranges.find(DevicePtr(499)), None);
        ranges.give_back(DevicePtr(1000));
        ranges.take(DevicePtr(1000));
        assert_eq!(ranges.find(DevicePtr(1000)), Some((2, 0)));
    }

    #[test]
    fn digests_are_of_the_numbers_in_their_order() {
        let text = |numbers: &[u64]| {
            let mut digest = Digest::default();
            numbers.iter().for_each(|number| digest.add(*number));
            digest.text()
        };
        assert_eq!(text(&[]), "cbf29ce484222325");
        // Eight zero bytes: the offset basis times the prime to the eighth, modulo 2^64.
        assert_eq!(text(&[0]), "a8c7f832281a39c5");
        assert_ne!(text(&[1, 2]), text(&[2, 1]));
    }
}
