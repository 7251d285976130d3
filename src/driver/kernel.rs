//! Device code and its arguments, as one value.

use std::fmt::Debug;

use smallvec::SmallVec;

use super::DevicePtr;

/// A kernel with its arguments: what [`Driver::launch`](super::Driver::launch) enqueues.
///
/// One struct per kernel holds the arguments as plain numbers and addresses. The host driver calls
/// [`run`](Self::run), the host twin. A driver of another device looks up [`entry`](Self::entry) in its
/// device code and passes the struct that [`arguments`](Self::arguments) writes. Both therefore compute from the same
/// arguments. A captured kernel runs once per replay, so `run` takes `&self`.
pub trait Kernel: Debug + Send + Sync {
    /// Name of the entry point: `<op>_<dtype>`, or `<op>` if one body serves every type.
    fn entry(&self) -> &'static str;

    /// Elements the kernel works on, from which a device derives its launch shape.
    fn elements(&self) -> u64;

    /// Writes the struct that the entry point takes by value, field by field. A kernel that writes nothing has no
    /// device code.
    fn arguments(&self, into: &mut Arguments) {
        let _ = into;
    }

    /// The bytes that the kernel moves between memory and processor unless it skips itself, or `None` if unknown.
    /// Array elements count each time they are read or written. Scalars, tables and data that blocks exchange do not
    /// count.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// The launch shape of the entry point.
    fn grid(&self) -> Grid {
        Grid::over(self.elements())
    }

    /// Computes the kernel on the host, on the calling thread and the workers of the rayon pool.
    ///
    /// # Safety
    /// Every address in the arguments is valid for the element type and count in the arguments. While the kernel runs,
    /// nothing else accesses memory that it writes, and nothing else writes memory that it reads.
    unsafe fn run(&self);
}

/// Bytes that a kernel moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes it reads.
    pub read: u64,
    /// Bytes it writes.
    pub written: u64,
}

/// The launch shape of device code. One-dimensional: every body iterates over its elements itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Thread blocks, at least one.
    pub blocks: u32,
    /// Threads per block, a multiple of the warp size of 32.
    pub threads: u32,
    /// Bytes of dynamic shared memory, in addition to what the code declares statically.
    pub shared_bytes: u32,
}

impl Grid {
    /// Threads per block unless a kernel needs another number. Device code relies on this value.
    pub const THREADS: u32 = 256;

    /// Threads per warp.
    pub const WARP: u32 = 32;

    /// The largest number of blocks in a grid: enough to fill any device several times over. A grid-stride loop covers
    /// the remaining elements.
    const BLOCKS_MAX: u32 = 4096;

    /// Elements per thread, until the grid reaches [`BLOCKS_MAX`](Self::BLOCKS_MAX).
    const ELEMENTS_A_THREAD: u64 = 4;

    /// The shape for a body with a grid-stride loop over `elements`.
    #[must_use]
    pub fn over(elements: u64) -> Self {
        Self::of_blocks(elements.div_ceil(Self::ELEMENTS_A_THREAD * u64::from(Self::THREADS)))
    }

    /// The shape for a body that assigns each of `tasks` to one warp.
    #[must_use]
    pub fn of_warps(tasks: u64) -> Self {
        Self::of_blocks(tasks.div_ceil(u64::from(Self::THREADS / Self::WARP)))
    }

    /// The shape for a body that assigns each of `tasks` to one block.
    #[must_use]
    pub fn of_blocks(tasks: u64) -> Self {
        let blocks = u32::try_from(tasks).unwrap_or(u32::MAX);
        Self {
            blocks: blocks.clamp(1, Self::BLOCKS_MAX),
            threads: Self::THREADS,
            shared_bytes: 0,
        }
    }
}

/// The argument struct of an entry point, in C layout: each field is at the next multiple of its size.
///
/// # Examples
/// ```
/// use kitsune::driver::Arguments;
///
/// let mut arguments = Arguments::new();
/// arguments.u32(7);
/// arguments.u64(1);
/// assert_eq!(arguments.as_bytes().len(), 16);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Arguments {
    /// Whole 8-byte words, so that the struct is aligned for every field and padded at its end.
    words: SmallVec<[u64; 16]>,
    /// Bytes written so far.
    len: usize,
}

impl Arguments {
    /// A struct without fields.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there are no fields.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The struct: aligned to 8 bytes and padded to a multiple of 8.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words)
    }

    /// Adds an address.
    pub fn ptr(&mut self, value: DevicePtr) {
        self.u64(value.0);
    }

    /// Adds a 64-bit integer.
    pub fn u64(&mut self, value: u64) {
        self.push(value.to_ne_bytes());
    }

    /// Adds a 32-bit integer.
    pub fn u32(&mut self, value: u32) {
        self.push(value.to_ne_bytes());
    }

    /// Adds an f32.
    pub fn f32(&mut self, value: f32) {
        self.push(value.to_ne_bytes());
    }

    /// Adds an f64.
    pub fn f64(&mut self, value: f64) {
        self.push(value.to_ne_bytes());
    }

    fn push<const SIZE: usize>(&mut self, bytes: [u8; SIZE]) {
        let start = self.len.next_multiple_of(SIZE);
        self.len = start + SIZE;
        self.words.resize(self.len.div_ceil(size_of::<u64>()), 0);
        bytemuck::cast_slice_mut(&mut self.words)[start..self.len].copy_from_slice(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    /// The struct that `arguments` below describes, laid out by the compiler.
    #[repr(C)]
    struct Laid {
        a: u32,
        b: f64,
        c: f32,
        d: u32,
        e: u32,
        f: u64,
        g: f32,
    }

    fn arguments() -> Arguments {
        let mut arguments = Arguments::new();
        arguments.u32(1);
        arguments.f64(2.0);
        arguments.f32(3.0);
        arguments.u32(4);
        arguments.u32(5);
        arguments.ptr(DevicePtr(6));
        arguments.f32(7.0);
        arguments
    }

    #[test]
    fn fields_lie_where_c_puts_them() {
        let arguments = arguments();
        let bytes = arguments.as_bytes();
        assert_eq!(bytes.len(), size_of::<Laid>());
        let expected: [(usize, &[u8]); 7] = [
            (offset_of!(Laid, a), &1u32.to_ne_bytes()),
            (offset_of!(Laid, b), &2f64.to_ne_bytes()),
            (offset_of!(Laid, c), &3f32.to_ne_bytes()),
            (offset_of!(Laid, d), &4u32.to_ne_bytes()),
            (offset_of!(Laid, e), &5u32.to_ne_bytes()),
            (offset_of!(Laid, f), &6u64.to_ne_bytes()),
            (offset_of!(Laid, g), &7f32.to_ne_bytes()),
        ];
        for (offset, field) in expected {
            assert_eq!(&bytes[offset..offset + field.len()], field, "at {offset}");
        }
    }

    #[test]
    fn the_struct_is_aligned_and_padding_is_zero() {
        let arguments = arguments();
        let bytes = arguments.as_bytes();
        assert_eq!(bytes.as_ptr() as usize % align_of::<Laid>(), 0);
        assert_eq!(bytes[4..8], [0; 4]);
        assert_eq!(bytes[bytes.len() - 4..], [0; 4]);
        assert!(Arguments::new().is_empty());
    }

    #[test]
    fn grids_cover_all_elements_and_stay_bounded() {
        assert_eq!(Grid::over(0).blocks, 1);
        assert_eq!(Grid::over(1024).blocks, 1);
        assert_eq!(Grid::over(1025).blocks, 2);
        assert_eq!(Grid::over(u64::MAX).blocks, Grid::BLOCKS_MAX);
        assert_eq!(Grid::of_blocks(7).blocks, 7);
        assert_eq!(Grid::of_blocks(0).blocks, 1);
    }
}
