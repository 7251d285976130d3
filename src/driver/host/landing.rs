//! The destination of a copy to the host: a slice that is lent to the copy while the slice's owner waits.
//!
//! The copy is stream work like any other, so it sits in a queue while the owner waits. The wait can end before the
//! copy has run (because the stream cannot reach it, or the wait is refused). The copy is then still queued, but its
//! destination is gone. So the slice is *withdrawn* before the wait returns, and a copy to a withdrawn slice does
//! nothing.

use std::marker::PhantomData;
use std::sync::Arc;

use parking_lot::Mutex;

/// A slice for a copy to fill, unless it was withdrawn.
#[derive(Clone, Debug)]
pub(super) struct Landing(Arc<Mutex<Option<Destination>>>);

#[derive(Debug)]
struct Destination {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: the slice stays mutably borrowed as long as its address is here, and any thread may write bytes.
unsafe impl Send for Destination {}

/// The borrow behind a [`Landing`]. Dropping it withdraws the slice, after waiting for a copy in progress.
#[derive(Debug)]
pub(super) struct Lent<'a> {
    landing: Landing,
    slice: PhantomData<&'a mut [u8]>,
}

impl<'a> Lent<'a> {
    /// Lends `slice` until the returned value is dropped. It must be dropped, not forgotten.
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
    /// Fills the slice from `src`, unless it was withdrawn.
    ///
    /// # Safety
    /// As many bytes as the slice has can be read at `src`, and nothing writes them meanwhile.
    pub(super) unsafe fn fill_from(&self, src: *const u8) {
        let destination = self.0.lock();
        if let Some(Destination { start, bytes }) = &*destination {
            // SAFETY: the caller promises the source. The destination is lent: nothing else uses it until it is
            // withdrawn, which takes the lock held here. `ptr::copy` allows overlap.
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
        // SAFETY: the array is alive.
        unsafe { landing.fill_from(source.as_ptr()) };
        drop(lent);
        assert_eq!(slice, source);
        slice = [1; 4];
        // SAFETY: the array is alive.
        unsafe { landing.fill_from(source.as_ptr()) };
        assert_eq!(slice, [1; 4]);
    }
}
