//! Scaled conversion to and from 8 bits.
//!
//! ```text
//! amax        amax[0] = max(amax[0], |x[i]|); NaN counts as largest
//! quantize    y[i] = x[i] · scale, rounded; optionally also amax as above, 1/scale, and counts of lost values
//! dequantize  y[i] = x[i] · inverse, rounded
//! ```
//!
//! Products are computed in f32, or in f64 if the wide side is f64. They are rounded there, and then to the type of the
//! result. `amax` and the counts accumulate, so several tensors can share them: a maximum and sums of integers do not
//! depend on the order.
//!
//! An element *overflows* if its product is too large for the type (including infinities), and *vanishes* if the result
//! is 0 for an input other than 0.
//!
//! Twins: [`Amax`], [`Quantize`], [`Dequantize`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Span;
use super::compute::{
    CHUNK, Compute, check_floats, check_streams, convert, entry_name, for_chunks, load,
    load_scalar, map, multiply_all, with_compute,
};
use super::device::{push_optional, push_spans};
use super::scale_update::inverse_scale;
use super::vector::vectorized;
use crate::driver::{Arguments, Kernel, Stream};
use crate::dtype::{DType, Element, F8E4M3, F8E5M2, Overflow};
use crate::error::{Error, Result};

// Words of a tensor's counts, f64. The first four are written here, the others by `fp8_update`.
/// Elements converted.
pub(crate) const ELEMENTS: usize = 0;
/// Elements that overflowed.
pub(crate) const OVERFLOWED: usize = 1;
/// Elements that vanished.
pub(crate) const VANISHED: usize = 2;
/// Elements whose product is NaN.
pub(crate) const NAN: usize = 3;
/// The number of counts that are written here.
const QUANTIZE_WORDS: usize = 4;
/// Updates of the scale.
pub(crate) const UPDATES: usize = 4;
/// Updates that saw an infinity or NaN.
pub(crate) const NOT_FINITE: usize = 5;
/// The amax of the last update whose amax was not 0.
pub(crate) const LAST_AMAX: usize = 6;
/// The number of counts.
pub(crate) const FP8_COUNTS: usize = 7;

/// The outputs of a conversion to 8 bits.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeTo<'a> {
    /// The 8-bit result.
    pub y: &'a Span,
    /// A single f32: the factor.
    pub scale: &'a Span,
    /// How elements that overflow are converted.
    pub overflow: Overflow,
    /// A single f32: receives 1/scale.
    pub inverse: Option<&'a Span>,
    /// A single f32, not negative: raised to the largest magnitude of the input.
    pub amax: Option<&'a Span>,
    /// f64, four or more. The first four count all elements, and those that overflowed, vanished or became NaN.
    pub counts: Option<&'a Span>,
}

/// Enqueues `amax[0] = max(amax[0], |x[i]|)`, with NaN as the largest.
///
/// # Errors
/// [`Error::InvalidArgument`] if `amax` is not a single f32, for operands of another stream, or that overlap;
/// [`Error::UnsupportedDtype`] if `x` is not a float type of 16 bits or more.
pub fn amax(stream: &Stream, x: &Span, amax: &Span) -> Result<()> {
    const OP: &str = "amax";
    check_streams(OP, stream, &[x])?;
    check_floats(OP, &[x])?;
    check_beside(OP, stream, amax, DType::F32, 1, &[x])?;
    if x.is_empty() {
        return Ok(());
    }
    super::enqueue(stream, Amax { x: *x, amax: *amax })
}

/// Enqueues `y[i] = x[i] · scale`, rounded to an 8-bit type, and the optional outputs of `to`.
///
/// # Errors
/// [`Error::InvalidArgument`] for operands of other lengths or types than [`QuantizeTo`] requires, of another stream,
/// or that overlap; [`Error::UnsupportedDtype`] if `x` is not a float type of 16 bits or more, or `y` is not an 8-bit
/// type.
pub fn quantize(stream: &Stream, x: &Span, to: &QuantizeTo<'_>) -> Result<()> {
    const OP: &str = "quantize";
    let QuantizeTo {
        y,
        scale,
        overflow,
        inverse,
        amax,
        counts,
    } = *to;
    check_streams(OP, stream, &[x, y])?;
    check_floats(OP, &[x])?;
    check_f8(OP, y)?;
    y.check_len(OP, x.len())?;
    y.check_disjoint(OP, x)?;
    check_beside(OP, stream, scale, DType::F32, 1, &[x, y])?;
    if let Some(inverse) = inverse {
        check_beside(OP, stream, inverse, DType::F32, 1, &[x, y, scale])?;
    }
    if let Some(amax) = amax {
        check_beside(OP, stream, amax, DType::F32, 1, &[x, y, scale])?;
    }
    let counts = match counts {
        Some(counts) if counts.len() < QUANTIZE_WORDS => {
            let reason = format!("{} counts, but {QUANTIZE_WORDS} are needed", counts.len());
            return Err(Error::argument(OP, reason));
        }
        Some(counts) => {
            let counts = counts.sub(0, QUANTIZE_WORDS);
            check_beside(
                OP,
                stream,
                &counts,
                DType::F64,
                QUANTIZE_WORDS,
                &[x, y, scale],
            )?;
            Some(counts)
        }
        None => None,
    };
    super::enqueue(
        stream,
        Quantize {
            x: *x,
            y: *y,
            scale: *scale,
            inverse: inverse.copied(),
            amax: amax.copied(),
            counts,
            overflow,
        },
    )
}

/// Enqueues `y[i] = x[i] · inverse`, rounded to the type of `y`.
///
/// # Errors
/// [`Error::InvalidArgument`] for operands of different lengths, of another stream, or that overlap, or if
/// `inverse` is not a single f32; [`Error::UnsupportedDtype`] if `x` is not an 8-bit type, or `y` is not a float type
/// of 16 bits or more.
pub fn dequantize(stream: &Stream, x: &Span, inverse: &Span, y: &Span) -> Result<()> {
    const OP: &str = "dequantize";
    check_streams(OP, stream, &[x, y])?;
    check_f8(OP, x)?;
    check_floats(OP, &[y])?;
    y.check_len(OP, x.len())?;
    y.check_disjoint(OP, x)?;
    check_beside(OP, stream, inverse, DType::F32, 1, &[y])?;
    if x.is_empty() {
        return Ok(());
    }
    super::enqueue(
        stream,
        Dequantize {
            x: *x,
            inverse: *inverse,
            y: *y,
        },
    )
}

fn check_f8(op: &'static str, span: &Span) -> Result<()> {
    if span.dtype().is_f8() {
        return Ok(());
    }
    Err(Error::UnsupportedDtype {
        op,
        dtype: span.dtype(),
    })
}

/// Refuses an auxiliary operand of another stream, type or length, or that overlaps one of `others`.
fn check_beside(
    op: &'static str,
    stream: &Stream,
    span: &Span,
    dtype: DType,
    len: usize,
    others: &[&Span],
) -> Result<()> {
    span.check_stream(op, stream)?;
    span.check_dtype(op, dtype)?;
    span.check_len(op, len)?;
    others
        .iter()
        .try_for_each(|other| span.check_disjoint(op, other))
}

/// Runs `$body` with `$type` standing for the 8-bit type `$dtype`, which the launchers have checked.
macro_rules! with_f8 {
    ($dtype:expr, $type:ident => $body:expr) => {
        if $dtype == DType::F8E4M3 {
            type $type = F8E4M3;
            $body
        } else {
            type $type = F8E5M2;
            $body
        }
    };
}

#[derive(Debug)]
struct Amax {
    x: Span,
    amax: Span,
}

impl Kernel for Amax {
    fn entry(&self) -> &'static str {
        entry_name!("amax", self.x.dtype())
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.amax]);
        into.u64(self.elements());
    }

    unsafe fn run(&self) {
        let found = Found::default();
        with_compute!([self.x], C => for_chunks(self.x.len(), |start, len| {
            let mut buffer = [C::default(); CHUNK];
            let values = &mut buffer[..len];
            // SAFETY: the caller promises that nothing writes `x`.
            unsafe { load(&self.x, start, values) };
            found.take_amax(values);
        }));
        // SAFETY: the caller promises exclusive access to `amax`.
        unsafe { found.write_amax(&self.amax) };
    }
}

#[derive(Debug)]
struct Quantize {
    x: Span,
    y: Span,
    scale: Span,
    inverse: Option<Span>,
    amax: Option<Span>,
    counts: Option<Span>,
    overflow: Overflow,
}

impl Kernel for Quantize {
    fn entry(&self) -> &'static str {
        match self.x.dtype() {
            DType::F16 => entry_name!("quantize_f16", self.y.dtype()),
            DType::Bf16 => entry_name!("quantize_bf16", self.y.dtype()),
            DType::F64 => entry_name!("quantize_f64", self.y.dtype()),
            _ => entry_name!("quantize_f32", self.y.dtype()),
        }
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.y]);
        into.u64(self.elements());
        push_spans(into, &[&self.scale]);
        push_optional(into, self.inverse.as_ref());
        push_optional(into, self.amax.as_ref());
        push_optional(into, self.counts.as_ref());
        into.u32(u32::from(self.overflow == Overflow::Saturate));
    }

    unsafe fn run(&self) {
        let found = Found::default();
        with_compute!([self.x], C => with_f8!(self.y.dtype(), F => {
            // SAFETY: the caller's promise.
            unsafe { self.convert_all::<C, F>(&found) }
        }));
        if let Some(amax) = &self.amax {
            // SAFETY: the caller promises exclusive access to `amax`.
            unsafe { found.write_amax(amax) };
        }
        if let Some(counts) = &self.counts {
            // SAFETY: the caller promises exclusive access to `counts`.
            let counts = unsafe { counts.slice_mut::<f64>() };
            found.add_to(counts, self.x.len());
        }
        if let Some(inverse) = &self.inverse {
            // SAFETY: nothing writes the scale now.
            let scale = unsafe { self.scale.slice::<f32>() }[0];
            // SAFETY: the caller promises exclusive access to `inverse`.
            let inverse = unsafe { inverse.slice_mut::<f32>() };
            inverse[0] = inverse_scale(scale);
        }
    }
}

impl Quantize {
    /// # Safety
    /// As [`Kernel::run`].
    unsafe fn convert_all<C: Compute, F: F8>(&self, found: &Found) {
        // SAFETY: the caller promises that nothing writes the scale.
        let scale: C = unsafe { load_scalar(&self.scale) };
        for_chunks(self.x.len(), |start, len| {
            let (mut inputs, mut products) = ([C::default(); CHUNK], [C::default(); CHUNK]);
            let (inputs, products) = (&mut inputs[..len], &mut products[..len]);
            // SAFETY: the caller promises that nothing writes `x`.
            unsafe { load(&self.x, start, inputs) };
            products.copy_from_slice(inputs);
            multiply_all(products, scale);
            // SAFETY: chunks are disjoint, so only this thread touches these elements of `y`.
            let codes = unsafe { self.y.sub(start, len).slice_mut::<F>() };
            convert(products, codes);
            found.take_amax(inputs);
            let lost = count_lost(inputs, products, bytemuck::cast_slice(codes), F::OVERFLOW);
            found.add(lost);
            if self.overflow == Overflow::Saturate && lost[0] > 0 {
                saturate(bytemuck::cast_slice_mut(codes), products, F::OVERFLOW);
            }
        });
    }
}

/// An 8-bit type whose codes show overflows.
trait F8: Element {
    /// The code, without its sign, of values that overflowed. The largest value is one below.
    const OVERFLOW: u8;
}

impl F8 for F8E4M3 {
    const OVERFLOW: u8 = Self::MAX.to_bits() + 1;
}

impl F8 for F8E5M2 {
    const OVERFLOW: u8 = Self::MAX.to_bits() + 1;
}

vectorized! {
    /// Counts the elements that overflowed, vanished, and became NaN.
    fn count_lost<C: Compute>(inputs: &[C], products: &[C], codes: &[u8], overflow: u8) -> [u32; 3] {
        let mut lost = [0; 3];
        for ((x, product), code) in inputs.iter().zip(products).zip(codes) {
            let magnitude = *code & 0x7f;
            let is_nan = product.to_f32().is_nan();
            lost[0] += u32::from(magnitude == overflow && !is_nan);
            lost[1] += u32::from(magnitude == 0 && *x != C::default());
            lost[2] += u32::from(is_nan);
        }
        lost
    }
}

vectorized! {
    fn saturate<C: Compute>(codes: &mut [u8], products: &[C], overflow: u8) {
        for (code, product) in codes.iter_mut().zip(products) {
            let is_nan = product.to_f32().is_nan();
            *code -= u8::from(*code & 0x7f == overflow && !is_nan);
        }
    }
}

vectorized! {
    /// The bits of the largest magnitude. Bits compare like the numbers, with infinity and NaN above them.
    fn largest_bits<C: Compute>(values: &[C]) -> u32 {
        let mut largest = 0;
        for value in values {
            largest = largest.max(value.to_f32().to_bits() & 0x7fff_ffff);
        }
        largest
    }
}

/// The combined findings of a twin's threads, in any order.
#[derive(Debug, Default)]
struct Found {
    amax: AtomicU32,
    lost: [AtomicU64; 3],
}

impl Found {
    fn take_amax<C: Compute>(&self, values: &[C]) {
        // Relaxed: read when all threads have ended.
        self.amax.fetch_max(largest_bits(values), Ordering::Relaxed);
    }

    fn add(&self, lost: [u32; 3]) {
        for (total, lost) in self.lost.iter().zip(lost) {
            // Relaxed: as above.
            total.fetch_add(u64::from(lost), Ordering::Relaxed);
        }
    }

    /// # Safety
    /// Nothing else accesses `amax`, in order of its stream.
    unsafe fn write_amax(&self, amax: &Span) {
        // SAFETY: the caller's promise.
        let amax = &mut unsafe { amax.slice_mut::<f32>() }[0];
        // Relaxed: all threads have ended.
        let bits = amax.to_bits().max(self.amax.load(Ordering::Relaxed));
        *amax = f32::from_bits(bits);
    }

    #[expect(clippy::cast_precision_loss, reason = "counts stay below 2^53")]
    fn add_to(&self, counts: &mut [f64], elements: usize) {
        counts[ELEMENTS] += elements as f64;
        for (word, lost) in [OVERFLOWED, VANISHED, NAN].into_iter().zip(&self.lost) {
            // Relaxed: all threads have ended.
            counts[word] += lost.load(Ordering::Relaxed) as f64;
        }
    }
}

#[derive(Debug)]
struct Dequantize {
    x: Span,
    inverse: Span,
    y: Span,
}

impl Kernel for Dequantize {
    fn entry(&self) -> &'static str {
        if self.x.dtype() == DType::F8E4M3 {
            entry_name!("dequantize_f8e4m3", self.y.dtype())
        } else {
            entry_name!("dequantize_f8e5m2", self.y.dtype())
        }
    }

    fn elements(&self) -> u64 {
        self.x.len() as u64
    }

    fn arguments(&self, into: &mut Arguments) {
        push_spans(into, &[&self.x, &self.y]);
        into.u64(self.elements());
        push_spans(into, &[&self.inverse]);
    }

    unsafe fn run(&self) {
        with_compute!([self.x, self.y], C => {
            // SAFETY: nothing writes the inverse now.
            let inverse: C = unsafe { load_scalar(&self.inverse) };
            // SAFETY: the caller promises what `map` needs of both spans.
            unsafe { map::<C>(&self.x, &self.y, |value| value * inverse) };
        });
    }
}

#[cfg(test)]
mod tests;
