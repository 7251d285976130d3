//! Conventions shared by launchers and device code: names of entry points, codes of types, order of fields.
//!
//! A body for operands of one type is named after that type. If the operands' types differ, there is one body per
//! compute type, which reads their type codes: `<op>_mixed_f32`, `<op>_mixed_f64`.

use super::Span;
use crate::driver::{Arguments, DevicePtr};
use crate::dtype::DType;

/// The entry point of `$op` for operands of the types that the spans have.
macro_rules! entry_by_types {
    ($op:literal, [$($span:expr),+]) => {
        match $crate::launch::device::common_type(&[$($span.dtype()),+]) {
            Ok(dtype) => $crate::launch::compute::entry_name!($op, dtype),
            Err($crate::dtype::DType::F64) => concat!($op, "_mixed_f64"),
            Err(_) => concat!($op, "_mixed_f32"),
        }
    };
}

pub(super) use entry_by_types;

/// The common type of all operands; the error is the compute type if they differ.
pub(super) fn common_type(dtypes: &[DType]) -> Result<DType, DType> {
    let first = dtypes[0];
    if dtypes.iter().all(|dtype| *dtype == first) {
        Ok(first)
    } else if dtypes.contains(&DType::F64) {
        Err(DType::F64)
    } else {
        Err(DType::F32)
    }
}

/// The device's code of an element type.
pub(super) fn type_code(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 0,
        DType::Bf16 => 1,
        DType::F32 => 2,
        DType::F64 => 3,
        DType::U32 => 4,
        DType::F8E4M3 => 5,
        DType::F8E5M2 => 6,
    }
}

/// Adds the addresses of `spans`.
pub(super) fn push_spans(into: &mut Arguments, spans: &[&Span]) {
    for span in spans {
        into.ptr(span.ptr());
    }
}

/// Adds the address of `span`, or 0 if it is absent.
pub(super) fn push_optional(into: &mut Arguments, span: Option<&Span>) {
    into.ptr(span.map_or(DevicePtr(0), Span::ptr));
}

/// Adds the type codes of `spans`.
pub(super) fn push_types(into: &mut Arguments, spans: &[&Span]) {
    for span in spans {
        into.u32(type_code(span.dtype()));
    }
}

/// Adds lengths and counts.
pub(super) fn push_sizes(into: &mut Arguments, sizes: &[usize]) {
    for size in sizes {
        into.u64(*size as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_places_among_all_types() {
        for (place, dtype) in (0..).zip(DType::ALL) {
            assert_eq!(type_code(dtype), place);
        }
    }

    #[test]
    fn mixtures_are_named_by_their_compute_type() {
        use DType::{Bf16, F16, F32, F64};
        assert_eq!(common_type(&[F16, F16]), Ok(F16));
        assert_eq!(common_type(&[F16, Bf16]), Err(F32));
        assert_eq!(common_type(&[F16, F32]), Err(F32));
        assert_eq!(common_type(&[F16, F16, F64]), Err(F64));
    }
}
