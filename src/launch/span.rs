//! Typed ranges of device memory: the array arguments of kernels.

use crate::driver::{DevicePtr, Stream};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::units::{StreamId, to_usize};

/// `len` elements of `dtype` at an address, usable in stream order on one stream.
///
/// A span does not own its memory. Whoever made the span promised that the memory is live whenever a kernel on its
/// stream touches it. Memory that is freed in stream order satisfies that promise without waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    ptr: DevicePtr,
    len: usize,
    dtype: DType,
    stream: StreamId,
}

impl Span {
    /// `len` elements of `dtype` at `ptr`, for launches on `stream`.
    ///
    /// # Safety
    /// `len` elements of `dtype` at `ptr` are mapped and aligned, and stay so for all work enqueued on
    /// `stream` while this span is in use. Work of other streams that touches them is ordered with it.
    pub unsafe fn new(ptr: DevicePtr, len: usize, dtype: DType, stream: StreamId) -> Self {
        Self {
            ptr,
            len,
            dtype,
            stream,
        }
    }

    /// Address of the first element.
    #[must_use]
    pub fn ptr(&self) -> DevicePtr {
        self.ptr
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len as u64 * (self.dtype.bits() / 8)
    }

    /// Elements `start..start + len` of this span.
    ///
    /// # Panics
    /// If the range reaches past the end.
    #[must_use]
    pub fn sub(&self, start: usize, len: usize) -> Self {
        assert!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "sub-span past the end"
        );
        let ptr = self.ptr.offset(start as u64 * (self.dtype.bits() / 8));
        Self { ptr, len, ..*self }
    }

    /// The first `len` 16-bit halves of these u32 words, as bf16; only the bits matter.
    ///
    /// # Panics
    /// If the words are of another type, or have fewer halves.
    pub(crate) fn halves(&self, len: usize) -> Self {
        assert_eq!(self.dtype, DType::U32, "halves of words");
        assert!(len <= 2 * self.len, "{len} halves of {} words", self.len);
        Self {
            len,
            dtype: DType::Bf16,
            ..*self
        }
    }

    /// Refuses a span that belongs to another stream than `stream`.
    pub(crate) fn check_stream(&self, op: &'static str, stream: &Stream) -> Result<()> {
        if self.stream == stream.id() {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!(
                "an operand is on stream {}, not {}",
                self.stream.0,
                stream.id().0
            ),
        ))
    }

    /// Refuses a span of another element type than `dtype`.
    pub(crate) fn check_dtype(&self, op: &'static str, dtype: DType) -> Result<()> {
        if self.dtype == dtype {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!("an operand is {}, not {dtype}", self.dtype),
        ))
    }

    /// Refuses a span of another length than `len`.
    pub(crate) fn check_len(&self, op: &'static str, len: usize) -> Result<()> {
        if self.len == len {
            return Ok(());
        }
        Err(Error::argument(
            op,
            format!("an operand has {} elements, not {len}", self.len),
        ))
    }

    /// Whether the two spans share bytes.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        if self.is_empty() || other.is_empty() {
            return false;
        }
        let (a, b) = (self.ptr.0, other.ptr.0);
        a < b + other.bytes() && b < a + self.bytes()
    }

    /// Refuses `self`, which will be written, if it shares bytes with `read` without being the same span.
    pub(crate) fn check_in_place_or_disjoint(&self, op: &'static str, read: &Self) -> Result<()> {
        let same = self.ptr == read.ptr && self.bytes() == read.bytes();
        if same || !self.overlaps(read) {
            return Ok(());
        }
        Err(Error::argument(
            op,
            "the output overlaps an input without being the same tensor",
        ))
    }

    /// Refuses `self`, which will be written, if it shares any byte with `read`.
    pub(crate) fn check_disjoint(&self, op: &'static str, read: &Self) -> Result<()> {
        if !self.overlaps(read) {
            return Ok(());
        }
        Err(Error::argument(op, "the output overlaps an input"))
    }

    /// The elements, for a twin to read.
    ///
    /// # Safety
    /// Called from [`Kernel::run`](crate::driver::Kernel::run) on the host device, in order of the span's
    /// stream; nothing writes the elements while the slice lives.
    pub(crate) unsafe fn slice<'a, T: Element>(&self) -> &'a [T] {
        assert_eq!(
            T::DTYPE,
            self.dtype,
            "a twin reads a span as its own element type"
        );
        if self.len == 0 {
            return &[];
        }
        // SAFETY: `Span::new` promised mapped, aligned memory for `len` elements; every bit pattern is a valid
        // `Element`; and the caller promises that nothing writes the elements meanwhile.
        unsafe { std::slice::from_raw_parts(to_usize(self.ptr.0) as *const T, self.len) }
    }

    /// The elements, for a twin to write (and read, when it works in place).
    ///
    /// # Safety
    /// As [`slice`](Self::slice), and nothing else reads the elements while the slice lives: in place,
    /// this must be the only slice.
    pub(crate) unsafe fn slice_mut<'a, T: Element>(&self) -> &'a mut [T] {
        assert_eq!(
            T::DTYPE,
            self.dtype,
            "a twin writes a span as its own element type"
        );
        if self.len == 0 {
            return &mut [];
        }
        // SAFETY: as in `slice`, and the caller promises exclusive access.
        unsafe { std::slice::from_raw_parts_mut(to_usize(self.ptr.0) as *mut T, self.len) }
    }
}
