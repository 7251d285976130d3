//! Tensors whose memory is counted per owner.
//!
//! A pool counts bytes by tag, over everything allocated under that tag. A [`Meter`] counts the bytes of one owner: a
//! [`Metered`] tensor adds the bytes of its block when it is made and subtracts them when it is dropped.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Tensor;

/// Bytes that one owner holds, and their peak.
///
/// All accesses are relaxed: the numbers are for statistics, and nothing is published through them.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    current: AtomicU64,
    peak: AtomicU64,
}

impl Meter {
    /// Bytes held now.
    pub(crate) fn current(&self) -> u64 {
        self.current.load(Ordering::Relaxed)
    }

    /// The most bytes held at one time.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) {
        let before = self.current.fetch_add(bytes, Ordering::Relaxed);
        self.peak.fetch_max(before + bytes, Ordering::Relaxed);
    }

    fn subtract(&self, bytes: u64) {
        self.current.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// A tensor with its own block, which a [`Meter`] counts until this is dropped.
#[derive(Debug)]
pub(crate) struct Metered {
    tensor: Tensor,
    bytes: u64,
    meter: Arc<Meter>,
}

impl Metered {
    /// Counts the block of `tensor`. Make only one for each block: two views of a block would count it twice.
    pub(crate) fn new(tensor: Tensor, meter: &Arc<Meter>) -> Self {
        let bytes = tensor.buffer().allocated();
        meter.add(bytes);
        Self {
            tensor,
            bytes,
            meter: meter.clone(),
        }
    }

    /// Counts the block on `meter` from now on.
    pub(crate) fn move_to(&mut self, meter: &Arc<Meter>) {
        if Arc::ptr_eq(&self.meter, meter) {
            return;
        }
        meter.add(self.bytes);
        std::mem::replace(&mut self.meter, meter.clone()).subtract(self.bytes);
    }
}

impl Deref for Metered {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.meter.subtract(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{Device, HostConfig};
    use crate::dtype::DType;
    use crate::storage::Context;

    #[test]
    fn blocks_count_for_the_user_that_has_them() {
        let device = Device::host(HostConfig::default()).expect("the machine has memory");
        let context = Context::new(&device).expect("a context");
        let [one, two] = [(); 2].map(|()| Arc::new(Meter::default()));
        let tensor = |len: usize| Tensor::zeros(&context, [len], DType::F64).expect("memory");
        let counts = || [&one, &two].map(|meter| (meter.current(), meter.peak()));

        let small = Metered::new(tensor(1), &one);
        let mut large = Metered::new(tensor(1000), &one);
        let allocated = |tensor: &Tensor| tensor.buffer().allocated();
        let (few, many) = (allocated(&small), allocated(&large));
        assert!(few >= 8 && many >= 8000, "{few} {many}");
        assert_eq!(few + many, context.pool().stats().allocated_bytes.current);
        assert_eq!(counts(), [(few + many, few + many), (0, 0)]);
        drop(small);
        assert_eq!(counts(), [(many, few + many), (0, 0)]);
        large.move_to(&two);
        large.move_to(&two);
        assert_eq!(counts(), [(0, few + many), (many, many)]);
        // A clone of the tensor does not count.
        let clone = Tensor::clone(&large);
        drop(large);
        assert_eq!(counts(), [(0, few + many), (0, many)]);
        drop(clone);
    }
}
