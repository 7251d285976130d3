//! Processes spans chunk by chunk, in a type wide enough to compute in.
//!
//! A twin reads a chunk of each operand into a small buffer of its *compute type* (f32, or f64 if any operand is f64),
//! computes there in plain loops that the compiler vectorizes, and writes the result with one rounding. The element
//! types are matched once per chunk, so a twin is compiled for the two compute types, not for every combination of
//! element types. A chunk is read completely before any of it is written, so an output may be one of the inputs.
//!
//! Chunks start at multiples of [`CHUNK`] for any number of threads, so results do not depend on that number.
//!
//! Must not know: which operation is computed.

use std::ops::{Add, Div, Mul, Neg, Sub};

use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::vector::vectorized;
use super::{PARALLEL_MIN, Span};
use crate::driver::Stream;
use crate::dtype::{DType, Element, bf16, f16};
use crate::error::{Error, Result};

/// Elements of a chunk: three f64 buffers take 24 KiB, which leaves room in a 32 KiB L1 cache.
pub(super) const CHUNK: usize = 1024;

/// Runs `$body` with `$type` standing for the element type that `$dtype` names.
///
/// In `$body` the type is concrete, so its inherent methods take precedence over those of [`Element`], and `half` has
/// an inherent `from_f64` that rounds twice. Write `<$type as Element>::from_f64`, or call a generic function.
macro_rules! with_element {
    ($dtype:expr, $type:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::F16 => {
                type $type = $crate::dtype::f16;
                $body
            }
            $crate::dtype::DType::Bf16 => {
                type $type = $crate::dtype::bf16;
                $body
            }
            $crate::dtype::DType::F32 => {
                type $type = f32;
                $body
            }
            $crate::dtype::DType::F64 => {
                type $type = f64;
                $body
            }
            $crate::dtype::DType::U32 => {
                type $type = u32;
                $body
            }
            $crate::dtype::DType::F8E4M3 => {
                type $type = $crate::dtype::F8E4M3;
                $body
            }
            $crate::dtype::DType::F8E5M2 => {
                type $type = $crate::dtype::F8E5M2;
                $body
            }
        }
    };
}

/// Runs `$body` with `$type` standing for the compute type of the spans listed.
macro_rules! with_compute {
    ([$($span:expr),+], $type:ident => $body:expr) => {
        if [$($span.dtype()),+].contains(&$crate::dtype::DType::F64) {
            type $type = f64;
            $body
        } else {
            type $type = f32;
            $body
        }
    };
}

/// The entry point `<op>_<dtype>`.
macro_rules! entry_name {
    ($op:literal, $dtype:expr) => {
        match $dtype {
            $crate::dtype::DType::F16 => concat!($op, "_f16"),
            $crate::dtype::DType::Bf16 => concat!($op, "_bf16"),
            $crate::dtype::DType::F32 => concat!($op, "_f32"),
            $crate::dtype::DType::F64 => concat!($op, "_f64"),
            $crate::dtype::DType::U32 => concat!($op, "_u32"),
            $crate::dtype::DType::F8E4M3 => concat!($op, "_f8e4m3"),
            $crate::dtype::DType::F8E5M2 => concat!($op, "_f8e5m2"),
        }
    };
}

pub(super) use {entry_name, with_compute, with_element};

/// A type that twins compute in: f32 or f64.
pub(super) trait Compute:
    Element
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
{
    /// The square root, rounded once.
    fn root(self) -> Self;
}

impl Compute for f32 {
    #[inline]
    fn root(self) -> Self {
        self.sqrt()
    }
}

impl Compute for f64 {
    #[inline]
    fn root(self) -> Self {
        self.sqrt()
    }
}

/// `dst[i] = src[i]`, rounded once, to nearest, ties to even.
pub(super) fn convert<S: Element, D: Element>(src: &[S], dst: &mut [D]) {
    use DType::{Bf16, F8E4M3, F8E5M2, F16, F32, F64};
    // The slice casts are identities: the match has already fixed the types.
    match (S::DTYPE, D::DTYPE) {
        (from, to) if from == to => dst.copy_from_slice(bytemuck::cast_slice(src)),
        (F16, F32) => {
            bytemuck::cast_slice::<S, f16>(src).convert_to_f32_slice(bytemuck::cast_slice_mut(dst));
        }
        (F32, F16) => {
            bytemuck::cast_slice_mut::<D, f16>(dst)
                .convert_from_f32_slice(bytemuck::cast_slice(src));
        }
        (F8E4M3 | F8E5M2, F32) => widen_f8::<f32, S>(bytemuck::cast_slice_mut(dst), src),
        (F32, F8E4M3 | F8E5M2) => narrow_f8::<f32, D>(bytemuck::cast_slice(src), dst),
        // Through f32, which represents every narrower number, so that the loops vectorize.
        (F16 | Bf16 | F8E4M3 | F8E5M2, F64 | F8E4M3 | F8E5M2) | (F8E4M3 | F8E5M2, F16 | Bf16) => {
            let mut single = [0.0f32; 256];
            for (src, dst) in src.chunks(single.len()).zip(dst.chunks_mut(single.len())) {
                let single = &mut single[..src.len()];
                convert(src, single);
                convert(single, dst);
            }
        }
        (F64, _) | (_, F64) => {
            for (to, from) in dst.iter_mut().zip(src) {
                *to = D::from_f64(from.to_f64());
            }
        }
        (Bf16, F32) => {
            widen_bf16::<f32>(bytemuck::cast_slice(src), bytemuck::cast_slice_mut(dst));
        }
        (F32, Bf16) => {
            narrow_bf16::<f32>(bytemuck::cast_slice(src), bytemuck::cast_slice_mut(dst));
        }
        _ => {
            for (to, from) in dst.iter_mut().zip(src) {
                *to = D::from_f32(from.to_f32());
            }
        }
    }
}

vectorized! {
    /// A shift is exact, including for NaN.
    fn widen_bf16<C: Compute>(src: &[bf16], dst: &mut [C]) {
        for (to, from) in dst.iter_mut().zip(src) {
            *to = C::from_f32(f32::from_bits(u32::from(from.to_bits()) << 16));
        }
    }
}

vectorized! {
    fn narrow_bf16<C: Compute>(src: &[C], dst: &mut [bf16]) {
        for (to, from) in dst.iter_mut().zip(src) {
            *to = bf16_nearest(from.to_f32());
        }
    }
}

vectorized! {
    fn widen_f8<C: Compute, F: Element>(dst: &mut [C], src: &[F]) {
        for (to, from) in dst.iter_mut().zip(src) {
            *to = C::from_f32(from.to_f32());
        }
    }
}

vectorized! {
    fn narrow_f8<C: Compute, F: Element>(src: &[C], dst: &mut [F]) {
        for (to, from) in dst.iter_mut().zip(src) {
            *to = F::from_f32(from.to_f32());
        }
    }
}

/// `value` rounded to nearest, ties to even, without a branch. `half`'s version has a branch and does not vectorize.
#[inline]
fn bf16_nearest(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Half a unit in the last place, minus one so that ties round to even, carries into the upper half.
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // Rounding could turn a NaN into infinity: keep its upper half and make it quiet.
    let quiet = (bits >> 16) | 0x40;
    let kept = if value.is_nan() { quiet } else { rounded };
    #[expect(clippy::cast_possible_truncation, reason = "both have 16 bits left")]
    bf16::from_bits(kept as u16)
}

/// Elements `start..` of `span`, as many as `into` holds, in the compute type.
///
/// # Safety
/// As [`Span::slice`], for these elements, while the call lasts.
pub(super) unsafe fn load<C: Compute>(span: &Span, start: usize, into: &mut [C]) {
    let part = span.sub(start, into.len());
    with_element!(part.dtype(), T => {
        // SAFETY: the caller promises what `slice` requires; the slice does not outlive this call.
        let src = unsafe { part.slice::<T>() };
        convert(src, into);
    });
}

/// Like [`load`], but without a copy if the elements are of the compute type; `buffer` is used only for other types.
///
/// # Safety
/// As [`Span::slice`], for these elements, as long as the result lives.
pub(super) unsafe fn view<'a, C: Compute>(
    span: &Span,
    start: usize,
    buffer: &'a mut [C],
) -> &'a [C] {
    if span.dtype() == C::DTYPE {
        // SAFETY: the caller's promise.
        return unsafe { span.sub(start, buffer.len()).slice::<C>() };
    }
    // SAFETY: the caller's promise.
    unsafe { load(span, start, buffer) };
    buffer
}

/// Writes `values` to elements `start..` of `span`, rounded once.
///
/// # Safety
/// As [`Span::slice_mut`], for these elements, while the call lasts.
pub(super) unsafe fn store<C: Compute>(span: &Span, start: usize, values: &[C]) {
    let part = span.sub(start, values.len());
    with_element!(part.dtype(), T => {
        // SAFETY: the caller promises what `slice_mut` requires; the slice does not outlive this call.
        let dst = unsafe { part.slice_mut::<T>() };
        convert(values, dst);
    });
}

/// Calls `body(start, len)` for every chunk of `0..len`, on several threads if there are enough elements.
pub(super) fn for_chunks(len: usize, body: impl Fn(usize, usize) + Sync) {
    let chunk = |idx: usize| body(idx * CHUNK, CHUNK.min(len - idx * CHUNK));
    let chunks = 0..len.div_ceil(CHUNK);
    if len < PARALLEL_MIN {
        chunks.for_each(chunk);
    } else {
        chunks
            .into_par_iter()
            .with_min_len(PARALLEL_MIN / CHUNK)
            .for_each(chunk);
    }
}

/// `out[i] = f(x[i])`; `out` may be `x`.
///
/// # Safety
/// As [`Kernel::run`](crate::driver::Kernel::run), for both spans.
pub(super) unsafe fn map<C: Compute>(x: &Span, out: &Span, f: impl Fn(C) -> C + Sync) {
    for_chunks(out.len(), |start, len| {
        let mut buffer = [C::default(); CHUNK];
        let values = &mut buffer[..len];
        // SAFETY: nothing writes these elements of `x` now: the caller keeps others away, and if `out` is `x`, only
        // this thread writes this chunk.
        unsafe { load(x, start, values) };
        apply(values, &f);
        // SAFETY: chunks are disjoint, so only this thread touches these elements of `out`.
        unsafe { store(out, start, values) };
    });
}

/// `out[i] = f(a[i], b[i])`; `out` may be `a` or `b`.
///
/// # Safety
/// As [`Kernel::run`](crate::driver::Kernel::run), for the three spans.
pub(super) unsafe fn map2<C: Compute>(
    a: &Span,
    b: &Span,
    out: &Span,
    f: impl Fn(C, C) -> C + Sync,
) {
    for_chunks(out.len(), |start, len| {
        let mut left = [C::default(); CHUNK];
        let mut right = [C::default(); CHUNK];
        let (left, right) = (&mut left[..len], &mut right[..len]);
        // SAFETY: as in `map`.
        unsafe { load(a, start, left) };
        // SAFETY: as in `map`.
        unsafe { load(b, start, right) };
        apply2(left, right, &f);
        // SAFETY: as in `map`.
        unsafe { store(out, start, left) };
    });
}

vectorized! {
    fn apply<C: Compute, F: Fn(C) -> C>(values: &mut [C], f: &F) {
        for value in values {
            *value = f(*value);
        }
    }
}

vectorized! {
    fn apply2<C: Compute, F: Fn(C, C) -> C>(left: &mut [C], right: &[C], f: &F) {
        for (x, y) in left.iter_mut().zip(right) {
            *x = f(*x, *y);
        }
    }
}

vectorized! {
    /// `values[i] = values[i] · factor`.
    pub(super) fn multiply_all<C: Compute>(values: &mut [C], factor: C) {
        for value in values {
            *value = *value * factor;
        }
    }
}

vectorized! {
    /// `values[i] = terms[i] + values[i]`.
    pub(super) fn add_all<C: Compute>(values: &mut [C], terms: &[C]) {
        for (value, term) in values.iter_mut().zip(terms) {
            *value = *term + *value;
        }
    }
}

/// The only element of a one-element span.
///
/// # Safety
/// As [`Span::slice`], while the call lasts.
pub(super) unsafe fn load_scalar<C: Compute>(span: &Span) -> C {
    let mut value = [C::default()];
    // SAFETY: the caller promises what `load` requires.
    unsafe { load(span, 0, &mut value) };
    value[0]
}

/// Refuses operands of another stream.
pub(super) fn check_streams(op: &'static str, stream: &Stream, spans: &[&Span]) -> Result<()> {
    spans
        .iter()
        .try_for_each(|span| span.check_stream(op, stream))
}

/// Refuses operands of types that ops do not compute with: integers, and the 8-bit types.
pub(super) fn check_floats(op: &'static str, spans: &[&Span]) -> Result<()> {
    check_all(op, spans, DType::is_computed)
}

/// Refuses operands that are not of a floating-point type, of any width.
pub(super) fn check_convertible(op: &'static str, spans: &[&Span]) -> Result<()> {
    check_all(op, spans, DType::is_float)
}

fn check_all(op: &'static str, spans: &[&Span], is_taken: fn(DType) -> bool) -> Result<()> {
    match spans.iter().find(|span| !is_taken(span.dtype())) {
        Some(span) => Err(Error::UnsupportedDtype {
            op,
            dtype: span.dtype(),
        }),
        None => Ok(()),
    }
}

/// The type of sums over elements of `dtype`: f64 for f64, f32 for narrower types.
#[must_use]
pub const fn sum_dtype(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
