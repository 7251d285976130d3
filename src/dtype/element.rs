//! The Rust types that can be elements of a tensor.

use half::{bf16, f16};

use super::round::{bf16_from_f64, f16_from_f64};
use super::{DType, F8E4M3, F8E5M2};

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a tensor can hold. Implemented for `f16`, `bf16`, `f32`, `f64`, `u32`, [`F8E4M3`] and
/// [`F8E5M2`]; sealed.
pub trait Element:
    sealed::Sealed
    + bytemuck::Pod
    + Default
    + PartialEq
    + std::fmt::Debug
    + std::fmt::Display
    + Send
    + Sync
    + 'static
{
    /// The element type at run time.
    const DTYPE: DType;

    /// Converts with one rounding, to nearest, ties to even. Values that are too large become infinity (NaN in
    /// [`F8E4M3`], which has no infinity); integers truncate and saturate.
    fn from_f64(value: f64) -> Self;

    /// Like [`from_f64`](Self::from_f64), from an `f32`.
    fn from_f32(value: f32) -> Self;

    /// The value as `f64`; exact for every element type.
    fn to_f64(self) -> f64;

    /// The value as `f32`; rounded for `f64` and large integers, exact otherwise.
    fn to_f32(self) -> f32;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $from_f64:expr, $from_f32:expr, $to_f64:expr, $to_f32:expr) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
            #[inline]
            fn from_f64(value: f64) -> Self {
                $from_f64(value)
            }
            #[inline]
            fn from_f32(value: f32) -> Self {
                $from_f32(value)
            }
            #[inline]
            fn to_f64(self) -> f64 {
                $to_f64(self)
            }
            #[inline]
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
        }
    };
}

element!(
    f16,
    F16,
    f16_from_f64,
    f16::from_f32,
    f16::to_f64,
    f16::to_f32
);
element!(
    bf16,
    Bf16,
    bf16_from_f64,
    bf16::from_f32,
    bf16::to_f64,
    bf16::to_f32
);
element!(
    F8E4M3,
    F8E4M3,
    F8E4M3::from_f64,
    F8E4M3::from_f32,
    F8E4M3::to_f64,
    F8E4M3::to_f32
);
element!(
    F8E5M2,
    F8E5M2,
    F8E5M2::from_f64,
    F8E5M2::from_f32,
    F8E5M2::to_f64,
    F8E5M2::to_f32
);
#[expect(
    clippy::cast_possible_truncation,
    reason = "rounding to f32 is the documented meaning"
)]
mod wide {
    use super::{DType, Element, sealed};
    element!(f32, F32, |v: f64| v as f32, |v| v, f64::from, |v| v);
    element!(f64, F64, |v| v, f64::from, |v| v, |v: f64| v as f32);
}
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "integers truncate and saturate, as documented"
)]
mod integer {
    use super::{DType, Element, sealed};
    element!(
        u32,
        U32,
        |v: f64| v as u32,
        |v: f32| v as u32,
        f64::from,
        |v: u32| v as f32
    );
}
