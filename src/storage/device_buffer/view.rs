//! Parts of a buffer, for use through cudarc as the whole: launches, copies, library calls.
//!
//! A view borrows its buffer, and its uses are the buffer's, noted with the part they are of. Views that do not
//! overlap, as of [`split_at_mut`](DeviceBuffer::split_at_mut), may be used on two streams at once.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, DeviceSlice, SyncOnDrop};

use super::uses::Access;
use super::{DeviceBuffer, InUse};

/// Elements of a [`DeviceBuffer`], to read.
pub struct DeviceView<'b, T> {
    buffer: &'b DeviceBuffer<T>,
    part: Range<usize>,
}

/// Elements of a [`DeviceBuffer`] that nobody else can name meanwhile.
pub struct DeviceViewMut<'b, T> {
    buffer: &'b DeviceBuffer<T>,
    part: Range<usize>,
    marker: PhantomData<&'b mut T>,
}

/// The part of `whole` that `range` names, counted from its start; `None` if it is not in there.
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
    /// The elements of `range`, to read; `None` if they are not all there.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Option<DeviceView<'_, T>> {
        let part = part_of(&(0..self.len), range)?;
        Some(DeviceView { buffer: self, part })
    }

    /// The elements of `range`; `None` if they are not all there.
    #[must_use]
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Option<DeviceViewMut<'_, T>> {
        let part = part_of(&(0..self.len), range)?;
        Some(DeviceViewMut::new(self, part))
    }

    /// The elements before `middle` and the others; `None` if there are fewer.
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
    /// The elements of `range` among these; `None` if they are not all there.
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

    /// The elements of `range` among these, to read; `None` if they are not all there.
    #[must_use]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Option<DeviceView<'_, T>> {
        let part = part_of(&self.part, range)?;
        let buffer = self.buffer;
        Some(DeviceView { buffer, part })
    }

    /// The elements of `range` among these; `None` if they are not all there.
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

/// What both kinds of views are for reading.
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
