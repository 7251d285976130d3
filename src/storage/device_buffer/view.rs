//! Views of part of a buffer, which cudarc's launches, copies and library calls accept like the whole buffer.
//!
//! A view borrows its buffer. A use of a view is recorded on the buffer, together with the part used. Views that do not
//! overlap, such as those of [`split_at_mut`](DeviceBuffer::split_at_mut), can be used on two streams at once.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use super::uses::Access;
use super::{DeviceBuffer, InUse};

/// A read-only view of part of a [`DeviceBuffer`].
pub struct DeviceView<'b, T> {
    buffer: &'b DeviceBuffer<T>,
    part: Range<usize>,
}

/// An exclusive view of part of a [`DeviceBuffer`].
pub struct DeviceViewMut<'b, T> {
    buffer: &'b DeviceBuffer<T>,
    part: Range<usize>,
    marker: PhantomData<&'b mut T>,
}

/// The part of `whole` that `range`, relative to the start of `whole`, selects; `None` if it is out of bounds.
fn part_of(whole: &Range<usize>, range: impl RangeBounds<usize>) -> Option<Range<usize>> {
    let from = match range.start_bound() {
        Bound::Included(&from) => from,
        Bound::Excluded(&before) => before.checked_add(1)?,
        Bound::Unbounded => 0,
    };
    let to = match range.end_bound() {
        Bound::Included(&last) => last.checked_add(1)?,
        Bound::Excluded(&to) => to,
        Bound::Unbounded => whole.len(),
    };
    (from <= to && to <= whole.len()).then(|| whole.start + from..whole.start + to)
}

impl<T> DeviceBuffer<T> {
    /// A read-only view of the elements in `range`; `None` if it is out of bounds.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Option<DeviceView<'_, T>> {
        let part = part_of(&(0..self.len), range)?;
        Some(DeviceView { buffer: self, part })
    }

    /// An exclusive view of the elements in `range`; `None` if it is out of bounds.
    #[must_use]
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Option<DeviceViewMut<'_, T>> {
        let part = part_of(&(0..self.len), range)?;
        Some(DeviceViewMut::new(self, part))
    }

    /// Splits the buffer at index `middle`; `None` if it is out of bounds.
    #[must_use]
    pub fn split_at_mut(
        &mut self,
        middle: usize,
    ) -> Option<(DeviceViewMut<'_, T>, DeviceViewMut<'_, T>)> {
        let len = self.len;
        (middle <= len).then(|| {
            let buffer = &*self;
            let part = |part| DeviceViewMut::new(buffer, part);
            (part(0..middle), part(middle..len))
        })
    }
}

impl<'b, T> DeviceView<'b, T> {
    /// A view of the elements in `range` of this view; `None` if it is out of bounds.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Option<DeviceView<'b, T>> {
        let part = part_of(&self.part, range)?;
        let buffer = self.buffer;
        Some(Self { buffer, part })
    }

    /// A use on `stream` that reads, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on<'a>(&'a self, stream: &'a CudaStream) -> InUse<'a, T> {
        self.buffer
            .use_part(self.part.clone(), stream, Access::Read)
    }
}

impl<'b, T> DeviceViewMut<'b, T> {
    fn new(buffer: &'b DeviceBuffer<T>, part: Range<usize>) -> Self {
        Self {
            buffer,
            part,
            marker: PhantomData,
        }
    }

    /// A read-only view of the elements in `range` of this view; `None` if it is out of bounds.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Option<DeviceView<'_, T>> {
        let part = part_of(&self.part, range)?;
        let buffer = self.buffer;
        Some(DeviceView { buffer, part })
    }

    /// An exclusive view of the elements in `range` of this view; `None` if it is out of bounds.
    #[must_use]
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Option<DeviceViewMut<'_, T>> {
        let part = part_of(&self.part, range)?;
        Some(DeviceViewMut::new(self.buffer, part))
    }

    /// A use on `stream` that reads, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on<'a>(&'a self, stream: &'a CudaStream) -> InUse<'a, T> {
        self.buffer
            .use_part(self.part.clone(), stream, Access::Read)
    }

    /// A use on `stream` that writes, for as long as the guard lives: an argument of a kernel.
    #[must_use]
    pub fn on_mut<'a>(&'a mut self, stream: &'a CudaStream) -> InUse<'a, T> {
        self.buffer
            .use_part(self.part.clone(), stream, Access::Write)
    }
}

/// Implements cudarc's traits for reading, for both kinds of views.
macro_rules! readable {
    ($view:ident) => {
        impl<T> DeviceSlice<T> for $view<'_, T> {
            fn len(&self) -> usize {
                self.part.len()
            }

            fn stream(&self) -> &Arc<CudaStream> {
                &self.buffer.shared.home
            }
        }

        impl<T> DevicePtr<T> for $view<'_, T> {
            fn device_ptr<'a>(&'a self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
                let end = self.buffer.begin(self.part.clone(), stream, Access::Read);
                (self.buffer.address(self.part.start), end)
            }
        }

        impl<T> fmt::Debug for $view<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = stringify!($view);
                write!(f, "{name}({:?} of {:?})", self.part, self.buffer)
            }
        }
    };
}

readable!(DeviceView);
readable!(DeviceViewMut);

impl<T> DevicePtrMut<T> for DeviceViewMut<'_, T> {
    fn device_ptr_mut<'a>(&'a mut self, stream: &'a CudaStream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        let end = self.buffer.begin(self.part.clone(), stream, Access::Write);
        (self.buffer.address(self.part.start), end)
    }
}

#[cfg(test)]
mod tests {
    use super::part_of;

    #[test]
    fn parts_are_counted_from_the_start_of_the_whole_and_lie_in_it() {
        let whole = 10..20;
        assert_eq!(part_of(&whole, ..), Some(10..20));
        assert_eq!(part_of(&whole, 3..), Some(13..20));
        assert_eq!(part_of(&whole, ..=3), Some(10..14));
        assert_eq!(part_of(&whole, 10..10), Some(20..20));
        for outside in [0..11, 11..11] {
            assert_eq!(part_of(&whole, outside), None);
        }
        #[expect(clippy::reversed_empty_ranges, reason = "what a caller may pass")]
        let reversed = 5..4;
        assert_eq!(part_of(&whole, reversed), None);
        assert_eq!(part_of(&whole, ..=usize::MAX), None);
    }
}
