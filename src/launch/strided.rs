//! Copies between layouts, for making views contiguous and writing to views, with optional type conversion.
//!
//! `dst[Σ idx·dst_stride] = src[Σ idx·src_stride]` for every index of a shape of up to [`RANK_MAX`]
//! dimensions. Strides count elements and are not negative; a source stride of 0 broadcasts.
//! Types as in [`cast`](super::cast()): equal, or any two floats with one rounding.
//!
//! Adjacent dimensions that are contiguous on both sides are merged first. The last two remaining dimensions are
//! processed in tiles, so that a transpose uses all of each cache line it touches. A last dimension that is dense on
//! both sides is converted as a run.

use rayon::prelude::*;
use smallvec::SmallVec;

use super::compute::{CHUNK, check_convertible, check_streams, convert, entry_name, with_element};
use super::device::{push_sizes, push_spans};
use super::{PARALLEL_MIN, Span};
use crate::driver::{Arguments, Kernel, Stream};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::units::to_usize;

const OP: &str = "copy_strided";

/// The most dimensions of a strided copy.
pub const RANK_MAX: usize = 8;

/// Rows and columns of a tile: 32 rows of one 64-byte cache line each fit in any L1 cache.
const TILE: usize = 32;

/// What to copy: a shape, and its layout in two spans.
#[derive(Clone, Copy, Debug)]
pub struct StridedCopy<'a> {
    /// Extent of each dimension.
    pub shape: &'a [usize],
    /// Memory to read, from the element of index 0 on.
    pub src: &'a Span,
    /// Elements of `src` from one index of each dimension to the next.
    pub src_strides: &'a [usize],
    /// Memory to write, from the element of index 0 on.
    pub dst: &'a Span,
    /// Elements of `dst` from one index of each dimension to the next.
    pub dst_strides: &'a [usize],
}

/// Enqueues a copy from one layout to another. Elements of the destination that `dst_strides` do not reach keep their
/// values.
///
/// # Errors
/// [`Error::InvalidArgument`] for strides that do not fit the shape or reach outside their span, for a destination in
/// which two indices name one element or that overlaps the source, or for operands of another stream;
/// [`Error::UnsupportedDtype`] for a conversion from or to u32.
pub fn copy_strided(stream: &Stream, copy: &StridedCopy<'_>) -> Result<()> {
    check_streams(OP, stream, &[copy.src, copy.dst])?;
    match Strided::checked(copy)? {
        Some(kernel) => super::enqueue(stream, kernel),
        None => Ok(()),
    }
}

/// One dimension: extent, source stride, destination stride.
type Dimension = [usize; 3];

#[derive(Debug)]
struct Strided {
    /// Outermost first, at least two (the outer ones may have extent 1).
    dimensions: SmallVec<[Dimension; RANK_MAX]>,
    src: Span,
    dst: Span,
}

impl Strided {
    /// The kernel for `copy`, or `None` if there is nothing to copy.
    fn checked(copy: &StridedCopy<'_>) -> Result<Option<Self>> {
        let StridedCopy {
            shape,
            src,
            src_strides,
            dst,
            dst_strides,
        } = *copy;
        if src.dtype() != dst.dtype() {
            check_convertible(OP, &[src, dst])?;
        }
        let rank = shape.len();
        if rank > RANK_MAX || src_strides.len() != rank || dst_strides.len() != rank {
            return Err(Error::argument(
                OP,
                format!(
                    "shape {shape:?} with strides {src_strides:?} and {dst_strides:?}: one stride for \
                     each of at most {RANK_MAX} dimensions is needed"
                ),
            ));
        }
        if shape.contains(&0) {
            return Ok(None);
        }
        let src = reached(src, shape, src_strides)?;
        let dst = reached(dst, shape, dst_strides)?;
        if !is_injective(shape, dst_strides) {
            return Err(Error::argument(
                OP,
                format!("shape {shape:?} with strides {dst_strides:?} writes elements twice"),
            ));
        }
        dst.check_disjoint(OP, &src)?;
        Ok(Some(Self {
            dimensions: merged(shape, src_strides, dst_strides),
            src,
            dst,
        }))
    }
}

/// The part of `span` from its start to the last element that the strides reach.
fn reached(span: &Span, shape: &[usize], strides: &[usize]) -> Result<Span> {
    let last = shape
        .iter()
        .zip(strides)
        .try_fold(0usize, |last, (extent, stride)| {
            (extent - 1).checked_mul(*stride)?.checked_add(last)
        });
    match last {
        Some(last) if last < span.len() => Ok(span.sub(0, last + 1)),
        _ => Err(Error::argument(
            OP,
            format!(
                "shape {shape:?} with strides {strides:?} reaches outside {} elements",
                span.len()
            ),
        )),
    }
}

/// Whether each dimension, in order of increasing stride, steps over everything that the smaller ones reach. This is
/// sufficient for injectivity, and necessary for every layout that slicing and transposing can produce.
fn is_injective(shape: &[usize], strides: &[usize]) -> bool {
    let mut dimensions: SmallVec<[(usize, usize); RANK_MAX]> = strides
        .iter()
        .copied()
        .zip(shape.iter().copied())
        .filter(|(_, extent)| *extent > 1)
        .collect();
    dimensions.sort_unstable();
    let mut last = 0;
    dimensions.iter().all(|(stride, extent)| {
        let clear = *stride > last;
        // This cannot overflow: `reached` has checked the same sum.
        last += stride * (extent - 1);
        clear
    })
}

/// The dimensions without those of extent 1, with contiguous neighbors merged, padded to at least two.
fn merged(shape: &[usize], src: &[usize], dst: &[usize]) -> SmallVec<[Dimension; RANK_MAX]> {
    let mut dimensions: SmallVec<[Dimension; RANK_MAX]> = SmallVec::new();
    for ((extent, src), dst) in shape.iter().zip(src).zip(dst) {
        if *extent == 1 {
            continue;
        }
        match dimensions.last_mut() {
            // A step of the outer dimension spans all of this one, on both sides.
            Some(outer) if outer[1] == extent * src && outer[2] == extent * dst => {
                *outer = [outer[0] * extent, *src, *dst];
            }
            _ => dimensions.push([*extent, *src, *dst]),
        }
    }
    while dimensions.len() < 2 {
        dimensions.insert(0, [1, 0, 0]);
    }
    dimensions
}

impl Kernel for Strided {
    fn entry(&self) -> &'static str {
        match self.src.dtype() {
            DType::F16 => entry_name!("copy_strided_f16", self.dst.dtype()),
            DType::Bf16 => entry_name!("copy_strided_bf16", self.dst.dtype()),
            DType::F32 => entry_name!("copy_strided_f32", self.dst.dtype()),
            DType::F64 => entry_name!("copy_strided_f64", self.dst.dtype()),
            DType::U32 => entry_name!("copy_strided_u32", self.dst.dtype()),
            DType::F8E4M3 => entry_name!("copy_strided_f8e4m3", self.dst.dtype()),
            DType::F8E5M2 => entry_name!("copy_strided_f8e5m2", self.dst.dtype()),
        }
    }

    fn elements(&self) -> u64 {
        self.dimensions
            .iter()
            .map(|[extent, ..]| *extent as u64)
            .product()
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.src, &self.dst]);
        into.u64(self.elements());
        push_sizes(into, &[self.dimensions.len()]);
        for field in 0..3 {
            let mut values = [0; RANK_MAX];
            for (value, dimension) in values.iter_mut().zip(&self.dimensions) {
                *value = dimension[field];
            }
            push_sizes(into, &values);
        }
    }

    unsafe fn run(&self) {
        with_element!(self.src.dtype(), S => with_element!(self.dst.dtype(), D => {
            // SAFETY: the caller promises access to both spans, and `checked` has verified that all indices are inside.
            unsafe { self.run_as::<S, D>() }
        }));
    }
}

impl Strided {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn run_as<S: Element, D: Element>(&self) {
        let (outer, inner) = self.dimensions.split_at(self.dimensions.len() - 2);
        let (rows, columns) = (inner[0], inner[1]);
        let dense = columns[1] == 1 && columns[2] == 1;
        // A task is a band of rows of one plane: of tile height, or with enough elements if rows are dense.
        let height = if dense {
            CHUNK.div_ceil(columns[0])
        } else {
            TILE
        };
        let bands = rows[0].div_ceil(height);
        let planes: usize = outer.iter().map(|[extent, ..]| extent).product();
        let task = |idx: usize| {
            let (src, dst) = offsets(outer, idx / bands);
            let first = idx % bands * height;
            let band = Band {
                src: to_usize(self.src.ptr().0) as *const S,
                dst: to_usize(self.dst.ptr().0) as *mut D,
                at: [src + first * rows[1], dst + first * rows[2]],
                rows: [height.min(rows[0] - first), rows[1], rows[2]],
                columns,
            };
            if dense {
                // SAFETY: the caller promises what the band needs, and bands write disjoint elements.
                unsafe { band.copy_runs() }
            } else {
                // SAFETY: as above.
                unsafe { band.copy_tiles() }
            }
        };
        if to_usize(self.elements()) < PARALLEL_MIN {
            (0..planes * bands).for_each(task);
        } else {
            (0..planes * bands)
                .into_par_iter()
                .with_min_len(4)
                .for_each(task);
        }
    }
}

/// The offsets at which plane `number` begins on both sides. Planes are numbered with the last dimension fastest.
fn offsets(dimensions: &[Dimension], mut number: usize) -> (usize, usize) {
    let (mut src, mut dst) = (0, 0);
    for [extent, src_stride, dst_stride] in dimensions.iter().rev() {
        src += number % extent * src_stride;
        dst += number % extent * dst_stride;
        number /= extent;
    }
    (src, dst)
}

/// Some rows of a plane.
struct Band<S, D> {
    src: *const S,
    dst: *mut D,
    /// The first element, as an offset from `src` and from `dst`.
    at: [usize; 2],
    rows: Dimension,
    columns: Dimension,
}

impl<S: Element, D: Element> Band<S, D> {
    /// # Safety
    /// All elements of the band are in memory that nothing writes (`src`) or touches (`dst`) meanwhile.
    unsafe fn copy_runs(&self) {
        for row in 0..self.rows[0] {
            // SAFETY: the offset is inside the source.
            let src = unsafe { self.src.add(self.at[0] + row * self.rows[1]) };
            // SAFETY: the offset is inside the destination.
            let dst = unsafe { self.dst.add(self.at[1] + row * self.rows[2]) };
            // SAFETY: the row is dense in the source, where nothing writes.
            let src = unsafe { std::slice::from_raw_parts(src, self.columns[0]) };
            // SAFETY: the row is dense in the destination, and only this thread touches it.
            let dst = unsafe { std::slice::from_raw_parts_mut(dst, self.columns[0]) };
            convert(src, dst);
        }
    }

    /// # Safety
    /// As [`copy_runs`](Self::copy_runs).
    unsafe fn copy_tiles(&self) {
        let [_, row_src, row_dst] = self.rows;
        let [width, column_src, column_dst] = self.columns;
        let (mut gathered, mut converted) = ([S::default(); TILE], [D::default(); TILE]);
        for left in (0..width).step_by(TILE) {
            let len = TILE.min(width - left);
            for row in 0..self.rows[0] {
                for (idx, value) in gathered[..len].iter_mut().enumerate() {
                    let at = self.at[0] + row * row_src + (left + idx) * column_src;
                    // SAFETY: the offset is inside the source.
                    let element = unsafe { self.src.add(at) };
                    // SAFETY: an element of the source, where nothing writes.
                    *value = unsafe { *element };
                }
                convert(&gathered[..len], &mut converted[..len]);
                for (idx, value) in converted[..len].iter().enumerate() {
                    let at = self.at[1] + row * row_dst + (left + idx) * column_dst;
                    // SAFETY: the offset is inside the destination.
                    let element = unsafe { self.dst.add(at) };
                    // SAFETY: an element of the destination, which only this thread touches.
                    unsafe { *element = *value };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
