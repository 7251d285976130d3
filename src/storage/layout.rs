//! Maps indices to elements of a buffer: shapes, strides and views. Touches no memory.
//!
//! All counts are in elements. Invariants: every index inside the shape maps to an element within
//! [`extent`](Layout::extent), and a view's elements stay within the extent of the layout it was made from.

use std::fmt;
use std::ops::Deref;

use smallvec::SmallVec;

use crate::error::{Error, Result};

/// Lengths of a tensor's dimensions, outermost first; a scalar has no dimensions.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(SmallVec<[usize; 4]>);

impl Shape {
    /// The most dimensions a tensor can have.
    pub const RANK_MAX: usize = 8;

    /// Number of elements; `None` if that does not fit in `usize`.
    #[must_use]
    pub fn elements(&self) -> Option<usize> {
        // A zero anywhere makes the tensor empty, even if the product of the other lengths overflows.
        if self.contains(&0) {
            return Some(0);
        }
        self.iter()
            .try_fold(1usize, |product, length| product.checked_mul(*length))
    }

    /// Strides of the dense layout of this shape.
    fn dense_strides(&self) -> SmallVec<[usize; 4]> {
        let mut strides: SmallVec<[usize; 4]> = SmallVec::from_elem(1, self.len());
        for dim in (1..self.len()).rev() {
            strides[dim - 1] = strides[dim].saturating_mul(self[dim].max(1));
        }
        strides
    }
}

impl Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    fn from(lengths: [usize; N]) -> Self {
        Self(SmallVec::from_slice(&lengths))
    }
}

impl From<&[usize]> for Shape {
    fn from(lengths: &[usize]) -> Self {
        Self(SmallVec::from_slice(lengths))
    }
}

impl From<&Shape> for Shape {
    fn from(shape: &Shape) -> Self {
        shape.clone()
    }
}

/// A shape with the stride of each dimension and the offset of the first element.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    shape: Shape,
    strides: SmallVec<[usize; 4]>,
    offset: usize,
}

impl Layout {
    /// The dense layout of `shape`, last dimension innermost.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more than [`Shape::RANK_MAX`] dimensions or too many elements.
    pub fn dense(shape: Shape) -> Result<Self> {
        if shape.len() > Shape::RANK_MAX {
            let reason = format!("{shape} has more than {} dimensions", Shape::RANK_MAX);
            return Err(Error::argument("shape", reason));
        }
        if shape.elements().is_none() {
            return Err(Error::argument(
                "shape",
                format!("{shape} has too many elements"),
            ));
        }
        let strides = shape.dense_strides();
        Ok(Self {
            shape,
            strides,
            offset: 0,
        })
    }

    /// Lengths of the dimensions.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Distance between adjacent elements in each dimension.
    #[must_use]
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Distance of the first element from the buffer's start.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Number of elements.
    ///
    /// # Panics
    /// Never: a layout whose count overflows cannot be made.
    #[must_use]
    pub fn elements(&self) -> usize {
        self.shape
            .elements()
            .expect("checked when the layout was made")
    }

    /// Elements from the first to the last, including gaps; 0 for an empty layout.
    #[must_use]
    pub fn extent(&self) -> usize {
        if self.elements() == 0 {
            return 0;
        }
        self.shape
            .iter()
            .zip(&self.strides)
            .map(|(length, stride)| (length - 1) * stride)
            .sum::<usize>()
            + 1
    }

    /// Whether the elements are contiguous in index order.
    #[must_use]
    pub fn is_contiguous(&self) -> bool {
        let dense = self.shape.dense_strides();
        let mut dims = self.shape.iter().zip(&self.strides).zip(&dense);
        // The stride of a dimension of length 1 is never used.
        self.elements() == 0
            || dims.all(|((length, stride), dense)| *length == 1 || stride == dense)
    }

    /// The same elements under another shape.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the counts differ or the elements are not contiguous in index order.
    pub fn reshape(&self, shape: Shape) -> Result<Self> {
        let reshaped = Self {
            offset: self.offset,
            ..Self::dense(shape)?
        };
        if reshaped.elements() != self.elements() {
            let reason = format!(
                "{} does not have as many elements as {}",
                reshaped.shape, self.shape
            );
            return Err(Error::argument("reshape", reason));
        }
        if !self.is_contiguous() {
            let reason = format!(
                "a view of strides {:?}; make it contiguous first",
                self.strides
            );
            return Err(Error::argument("reshape", reason));
        }
        Ok(reshaped)
    }

    /// The same elements with dimensions `first` and `second` exchanged.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such dimension.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        if first.max(second) >= self.shape.len() {
            let reason = format!("dimensions {first} and {second} of {}", self.shape);
            return Err(Error::argument("transpose", reason));
        }
        let mut view = self.clone();
        view.shape.0.swap(first, second);
        view.strides.swap(first, second);
        Ok(view)
    }

    /// The elements with index `start..start + len` in dimension `dim`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if there is no such dimension or it is shorter.
    pub fn narrow(&self, dim: usize, start: usize, len: usize) -> Result<Self> {
        let length = self.shape.get(dim).copied();
        let fits =
            length.is_some_and(|length| start.checked_add(len).is_some_and(|end| end <= length));
        if !fits {
            let reason = format!("{len} from {start} in dimension {dim} of {}", self.shape);
            return Err(Error::argument("narrow", reason));
        }
        let mut view = self.clone();
        view.shape.0[dim] = len;
        // An empty view keeps its offset: the new offset could be past the buffer's end, and the strides of an empty
        // layout are not bounded by any buffer.
        if view.elements() > 0 {
            view.offset += start * self.strides[dim];
        }
        Ok(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_stay_inside_the_layout_they_started_from() {
        let layout = Layout::dense([4, 5, 6].into()).unwrap();
        assert_eq!((layout.elements(), layout.extent()), (120, 120));
        let view = layout.narrow(1, 2, 3).unwrap().transpose(0, 2).unwrap();
        assert_eq!(&**view.shape(), [6, 3, 4]);
        assert_eq!(view.strides(), [1, 6, 30]);
        assert_eq!(view.offset(), 12);
        assert!(view.offset() + view.extent() <= 120);
        assert!(!view.is_contiguous());
        assert!(view.reshape([72].into()).is_err());
    }

    #[test]
    fn counts_that_overflow_are_refused_and_empty_ones_are_not() {
        assert!(Layout::dense([usize::MAX, 2].into()).is_err());
        assert!(Layout::dense([1; 9].into()).is_err());
        let empty = Layout::dense([usize::MAX, 0, usize::MAX].into()).unwrap();
        assert_eq!((empty.elements(), empty.extent()), (0, 0));
        assert!(empty.is_contiguous());
        let scalar = Layout::dense([].into()).unwrap();
        assert_eq!((scalar.elements(), scalar.extent()), (1, 1));
    }

    #[test]
    fn narrow_at_the_ends() {
        let layout = Layout::dense([3].into()).unwrap();
        assert!(layout.narrow(0, 3, 0).is_ok());
        assert!(layout.narrow(0, 3, 1).is_err());
        assert!(layout.narrow(0, usize::MAX, 2).is_err());
        assert!(layout.narrow(1, 0, 1).is_err());
    }
}
