//! Where a copy to the host goes: a slice whose owner waits, for as long as it waits.
//!
//! The copy is work of its stream like any other, so it lies in a queue while the owner of the slice waits. A wait may
//! end before the copy has run (the stream cannot get there, or the wait is refused); the queue then holds a copy whose
//! destination is gone. So the slice is *withdrawn* before the wait returns, and a copy that finds none does nothing.

use std::marker::PhantomData;
use std::sync::Arc;

use parking_lot::Mutex;

/// A slice that a copy fills, unless it was withdrawn.
#[derive(Clone, Debug)]
pub(super) struct Landing(Arc<Mutex<Option<Destination>>>);

#[derive(Debug)]
struct Destination {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the slice is borrowed mutably for as long as it is here, and bytes may be written by any thread.
unsafe impl Send for Destination {}

/// The borrow of a slice that a [`Landing`] names. Withdraws the slice when it is dropped, waiting for a copy that is
/// under way.
#[derive(Debug)]
pub(super) struct Lent<'a> {
    landing: Landing,
    slice: PhantomData<&'a mut [u8]>,
}

impl<'a> Lent<'a> {
    /// Lends `slice` until this is dropped. It must be dropped, not forgotten.
    pub(super) fn new(slice: &'a mut [u8]) -> Self {
        let destination = Destination {
            start: slice.as_mut_ptr(),
            bytes: slice.len(),
        };
        Self {
            landing: Landing(Arc::new(Mutex::new(Some(destination)))),
            slice: PhantomData,
        }
    }

    /// The slice, for a copy.
    pub(super) fn landing(&self) -> Landing {
        self.landing.clone()
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.landing.0.lock() = None;
    }
}

impl Landing {
    /// Fills the slice with as many bytes from `src`, if it was not withdrawn.
    ///
    /// # Safety
    /// So many bytes can be read at `src`, and nothing writes them meanwhile.
    pub(super) unsafe fn fill_from(&self, src: *const u8) {
        let destination = self.0.lock();
        if let Some(Destination { start, bytes }) = &*destination {
            // SAFETY: the caller promises the source. The destination is lent: it is withdrawn under the lock that is
            // held, and until then nobody else uses it. `ptr::copy` allows overlap.
            unsafe { std::ptr::copy(src, *start, *bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_filled_while_it_is_lent_and_left_alone_afterwards() {
        let source = [7_u8; 4];
        let mut slice = [0; 4];
        let lent = Lent::new(&mut slice);
        let landing = lent.landing();
        // SAFETY: the array is there.
        unsafe { landing.fill_from(source.as_ptr()) };
        drop(lent);
        assert_eq!(slice, source);
        slice = [1; 4];
        // SAFETY: the array is there.
        unsafe { landing.fill_from(source.as_ptr()) };
        assert_eq!(slice, [1; 4]);
    }
}
