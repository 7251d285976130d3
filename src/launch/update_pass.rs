//! The part of an optimizer kernel that is common to all formulas: skipping, unscaling, clipping, master weights, and
//! rounding of state.
//!
//! ```text
//! if found_inf ≠ 0: nothing is written
//! for each element:  w = master, or the parameter;  g = gradient · inv_scale · clip
//!                    (w, state) = rule(w, g, state)
//!                    master = w;  parameter = w rounded once
//!                    if the parameter was finite and no longer is, `found` counts it
//! ```
//!
//! Computed in f32, or in f64 for f64 parameters. The three scalars and the settings of groups are in device memory. So
//! the device decides and scales a step without the host waiting for it, and the settings of a captured step can
//! change.
//!
//! Rows of the table: parameter, gradient, master (only for a 16-bit parameter), then the optimizer's state. The
//! gradient is only read. A master is f32. For a bf16 parameter it can instead be the lower half of a split master,
//! whose upper half is the parameter (`split_master`); that column has a 16-bit type, of which only the bits matter.
//! State has the compute type, or is bf16 with stochastic rounding (`stochastic`). Only stored results are rounded;
//! within a step, the formula uses unrounded values.

use parking_lot::Mutex;
use rayon::prelude::*;

use crate::driver::{Arguments, Stream, Traffic};
use crate::dtype::{DType, bf16};
use crate::error::Result;
use crate::launch::chunk_table::{Chunk, ChunkTable, MAX_COLUMNS};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, load_scalar, store};
use crate::launch::device::{push_optional, push_spans, type_code};
use crate::launch::split_master::{join, split};
use crate::launch::stochastic::Chances;
use crate::launch::vector::vectorized;
use crate::launch::{PARALLEL_MIN, Span};
use crate::units::to_usize;

/// Column of the parameters.
pub(crate) const PARAMETER: usize = 0;
/// Column of the gradients.
pub(crate) const GRADIENT: usize = 1;
/// Column of the masters.
pub(crate) const MASTER: usize = 2;
/// First column of optimizer state.
pub(crate) const STATE: usize = 3;

/// The most state tensors of an optimizer.
pub(super) const MAX_STATES: usize = MAX_COLUMNS - STATE;

/// Words of one group's settings.
pub(crate) const SETTING_WORDS: usize = 8;

/// Words of `found` before those of the tensors: how many elements of all weights became infinite or NaN.
pub(crate) const FOUND_HEAD: usize = 1;
/// Words of `found` per tensor: how many elements became infinite, how many NaN, and the complement of the position of
/// the first. All are 0 if there are none.
pub(crate) const FOUND_WORDS: usize = 3;

/// The scalars that decide and scale a step, each on the device or absent: an f32, or an f64 for `clip`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepScalars {
    /// The step is skipped unless this is 0.
    pub(crate) found_inf: Option<Span>,
    /// Gradients are first multiplied by this,
    pub(crate) inv_scale: Option<Span>,
    /// and then by this, f32 or f64.
    pub(crate) clip: Option<Span>,
}

impl StepScalars {
    /// Refuses scalars of another stream, type or length.
    pub(crate) fn check(&self, op: &'static str, stream: &Stream) -> Result<()> {
        let clip_dtype = match &self.clip {
            Some(clip) if clip.dtype() == DType::F64 => DType::F64,
            _ => DType::F32,
        };
        for (span, dtype) in [
            (self.found_inf, DType::F32),
            (self.inv_scale, DType::F32),
            (self.clip, clip_dtype),
        ] {
            let Some(span) = span else { continue };
            span.check_stream(op, stream)?;
            span.check_dtype(op, dtype)?;
            span.check_len(op, 1)?;
        }
        Ok(())
    }

    /// Adds the addresses for device code.
    pub(super) fn push_to(&self, into: &mut Arguments) {
        for span in [self.found_inf, self.inv_scale, self.clip] {
            push_optional(into, span.as_ref());
        }
        let clip_dtype = self.clip.map_or(DType::F32, |clip| clip.dtype());
        into.u64(u64::from(type_code(clip_dtype)));
    }

    /// The factors of the gradients, or `None` if the step is to be skipped.
    ///
    /// # Safety
    /// As [`Span::slice`].
    pub(super) unsafe fn factors(&self) -> Option<[f64; 2]> {
        // SAFETY: the caller's promise; the scalars were written earlier, in stream order.
        let read = |span: Span| unsafe { load_scalar::<f64>(&span) };
        let found_inf = self.found_inf.map_or(0.0, read);
        // NaN counts as set: it is not equal to 0.
        (found_inf == 0.0).then(|| [self.inv_scale, self.clip].map(|span| span.map_or(1.0, read)))
    }
}

/// Settings of groups of tensors, in device memory, so that a captured step reads their values when it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupSettings {
    /// f64, [`SETTING_WORDS`] per group; the kernel defines their meaning.
    pub(crate) rows: Span,
    /// u32, one per tensor: its group.
    pub(crate) groups: Span,
}

impl GroupSettings {
    /// Refuses settings of another stream or type, or for another number of tensors.
    pub(crate) fn check(&self, op: &'static str, stream: &Stream, tensors: usize) -> Result<()> {
        self.rows.check_stream(op, stream)?;
        self.groups.check_stream(op, stream)?;
        self.rows.check_dtype(op, DType::F64)?;
        self.groups.check_dtype(op, DType::U32)?;
        self.groups.check_len(op, tensors)
    }

    /// Adds the addresses for device code.
    pub(super) fn push_to(&self, into: &mut Arguments) {
        push_spans(into, &[&self.rows, &self.groups]);
    }

    /// The settings of the group of a tensor.
    ///
    /// # Safety
    /// As [`Span::slice`].
    pub(super) unsafe fn of(&self, tensor: usize) -> [f64; SETTING_WORDS] {
        // SAFETY: the caller's promise.
        let group = unsafe { self.groups.sub(tensor, 1).slice::<u32>() }[0];
        let row = self
            .rows
            .sub(to_usize(u64::from(group)) * SETTING_WORDS, SETTING_WORDS);
        // SAFETY: the caller's promise.
        let row = unsafe { row.slice::<f64>() };
        std::array::from_fn(|word| row[word])
    }
}

/// One optimizer's formula for a block of weights.
pub(super) trait Rule: Sync {
    /// Updates `weights` by `gradients`, which it may overwrite. Each state has the same length, or is empty if the row
    /// does not have it. `tensor` is the parameter's index.
    fn apply<C: Compute>(
        &self,
        tensor: usize,
        weights: &mut [C],
        gradients: &mut [C],
        states: [&mut [C]; MAX_STATES],
    );

    /// The key of the random numbers that round bf16 state.
    fn random_key(&self, tensor: usize) -> u64;
}

/// The traffic of a pass over `table`: weights, gradients and state are read; weights and state are written, and so are
/// parameters that have masters.
pub(super) fn traffic(table: &ChunkTable) -> Traffic {
    let states: u64 = (STATE..table.columns())
        .map(|column| table.bytes(column))
        .sum();
    let parameters = table.bytes(PARAMETER);
    let masters = table.bytes(MASTER);
    Traffic {
        // A parameter with an f32 master is not read; one that is the upper half of a split master is.
        read: parameters - table.bytes_beside_wider(MASTER)
            + table.bytes(GRADIENT)
            + masters
            + states,
        written: parameters + masters + states,
    }
}

/// Refuses a `found` for a different number of tensors, or of another stream.
pub(super) fn check_found(
    op: &'static str,
    stream: &Stream,
    found: &Span,
    tensors: usize,
) -> Result<()> {
    found.check_stream(op, stream)?;
    found.check_dtype(op, DType::F64)?;
    found.check_len(op, FOUND_HEAD + FOUND_WORDS * tensors)
}

/// The weights of one chunk that a step made infinite or NaN.
#[derive(Clone, Copy, Debug, Default)]
struct Lost {
    inf: u64,
    nan: u64,
    /// Position in the tensor.
    first: Option<u64>,
}

/// Adds the weights lost by chunks of tensors to the counts in `found`.
///
/// # Safety
/// As [`Span::slice_mut`].
unsafe fn add_lost(found: &Span, lost: &[(usize, Lost)]) {
    // SAFETY: the caller's promise.
    let words = unsafe { found.slice_mut::<f64>() };
    let words: &mut [u64] = bytemuck::cast_slice_mut(words);
    for (tensor, lost) in lost {
        words[0] += lost.inf + lost.nan;
        let of = &mut words[FOUND_HEAD + FOUND_WORDS * tensor..][..FOUND_WORDS];
        of[0] += lost.inf;
        of[1] += lost.nan;
        of[2] = of[2].max(lost.first.map_or(0, |first| !first));
    }
}

/// The magnitude from which on weights round to infinity in type `dtype`.
fn infinite_from<C: Compute>(dtype: DType) -> C {
    match dtype {
        DType::F16 => C::from_f32(65520.0),
        DType::Bf16 => C::from_f32(f32::from_bits(0x7f7f_8000)),
        _ => C::from_f32(f32::INFINITY),
    }
}

vectorized! {
    /// Whether all magnitudes are below `infinite`.
    fn are_finite<C: Compute>(weights: &[C], infinite: C) -> bool {
        let mut all = true;
        for weight in weights {
            all &= (*weight < infinite) & (-*weight < infinite);
        }
        all
    }
}

/// Applies `rule` to every row of `table`, with gradients multiplied by `factors`, and counts in `found` the weights
/// that become infinite or NaN.
///
/// # Safety
/// As [`Kernel::run`](crate::driver::Kernel::run), for all rows of the table and for `found`.
pub(super) unsafe fn for_each_row(
    table: &ChunkTable,
    factors: [f64; 2],
    found: &Span,
    rule: &impl Rule,
) {
    let lost = Mutex::new(Vec::new());
    // SAFETY: the caller's promise.
    let chunks: Vec<_> = unsafe { table.chunks() }.collect();
    let row = |chunk: &Chunk<'_>| {
        // SAFETY: the caller's promise.
        let columns: [_; MAX_COLUMNS] = std::array::from_fn(|column| {
            // SAFETY: as above; columns past the table's last are absent.
            (column < table.columns())
                .then(|| unsafe { chunk.column(column) })
                .flatten()
        });
        let parameter = columns[PARAMETER].expect("every row has a parameter");
        let gradient = columns[GRADIENT].expect("every row has a gradient");
        let row = Row {
            tensor: chunk.tensor(),
            offset: chunk.offset(),
            parameter,
            gradient,
            master: columns[MASTER],
            states: std::array::from_fn(|state| columns[STATE + state]),
        };
        let of_chunk = if parameter.dtype() == DType::F64 {
            // SAFETY: the caller's promise.
            unsafe { row.update::<f64>(factors, rule) }
        } else {
            // SAFETY: the caller's promise.
            unsafe { row.update::<f32>(factors, rule) }
        };
        if of_chunk.first.is_some() {
            lost.lock().push((chunk.tensor(), of_chunk));
        }
    };
    if table.elements() < PARALLEL_MIN as u64 {
        chunks.iter().for_each(row);
    } else {
        chunks.par_iter().for_each(row);
    }
    let lost = lost.into_inner();
    if !lost.is_empty() {
        // SAFETY: the caller's promise.
        unsafe { add_lost(found, &lost) };
    }
}

vectorized! {
    /// `values[i] = (values[i] · factors[0]) · factors[1]`.
    pub(super) fn scale<C: Compute>(values: &mut [C], factors: [C; 2]) {
        for value in values {
            *value = *value * factors[0] * factors[1];
        }
    }
}

vectorized! {
    /// [`scale`] with a separate source, which avoids the extra pass of a copy.
    fn scale_into<C: Compute>(values: &mut [C], from: &[C], factors: [C; 2]) {
        for (value, from) in values.iter_mut().zip(from) {
            *value = *from * factors[0] * factors[1];
        }
    }
}

/// A chunk of one parameter, with its gradient, master and state.
struct Row {
    tensor: usize,
    /// Elements of the tensor before this chunk.
    offset: u64,
    parameter: Span,
    gradient: Span,
    master: Option<Span>,
    states: [Option<Span>; MAX_STATES],
}

impl Row {
    /// Applies `rule` to the chunk, one block at a time. Returns what became infinite or NaN.
    ///
    /// # Safety
    /// Called from a `run`, whose caller promises that rows are live and not accessed by others. The columns of a
    /// row share no bytes.
    unsafe fn update<C: Compute>(&self, factors: [f64; 2], rule: &impl Rule) -> Lost {
        let factors = factors.map(C::from_f64);
        let by_chance = self.states[0].is_some_and(|state| state.dtype() != C::DTYPE);
        let weight = self.master.unwrap_or(self.parameter);
        let mut lost = Lost::default();
        let [mut weights, mut gradients, mut before] = [[C::default(); BLOCK]; 3];
        let mut kept = [[C::default(); BLOCK]; MAX_STATES];
        for start in (0..self.parameter.len()).step_by(BLOCK) {
            let len = BLOCK.min(self.parameter.len() - start);
            let gradients = &mut gradients[..len];
            if self.gradient.dtype() == C::DTYPE {
                // SAFETY: the caller's promise.
                let from = unsafe { self.gradient.sub(start, len).slice::<C>() };
                scale_into(gradients, from, factors);
            } else {
                // SAFETY: the caller's promise.
                unsafe { load(&self.gradient, start, gradients) };
                scale(gradients, factors);
            }
            let mut buffers = kept.iter_mut();
            let mut states = self.states.map(|state| {
                let buffer = buffers.next().expect("one for each state");
                let none: &mut [C] = &mut [];
                match state {
                    None => none,
                    Some(span) if by_chance => {
                        let buffer = &mut buffer[..len];
                        // SAFETY: the caller's promise.
                        unsafe { load(&span, start, buffer) };
                        buffer
                    }
                    // SAFETY: the caller's promise.
                    Some(span) => unsafe { span.sub(start, len).slice_mut::<C>() },
                }
            });
            let operands = states.each_mut().map(|state| &mut **state);
            if weight.dtype() == C::DTYPE {
                // SAFETY: the caller's promise.
                let weights = unsafe { weight.sub(start, len).slice_mut::<C>() };
                before[..len].copy_from_slice(weights);
                rule.apply(self.tensor, weights, gradients, operands);
                self.note_lost(&mut lost, start, &before[..len], weights);
                if self.master.is_some() {
                    // SAFETY: the caller's promise.
                    unsafe { store(&self.parameter, start, weights) };
                }
            } else {
                let weights = &mut weights[..len];
                // SAFETY: the caller's promise.
                unsafe { self.load_narrow(start, weights) };
                before[..len].copy_from_slice(weights);
                rule.apply(self.tensor, weights, gradients, operands);
                self.note_lost(&mut lost, start, &before[..len], weights);
                // SAFETY: the caller's promise.
                unsafe { self.store_narrow(start, weights) };
            }
            if by_chance {
                let key = rule.random_key(self.tensor);
                let chances = Chances::new(key, self.offset + start as u64, len);
                for (which, (span, values)) in self.states.iter().zip(&states).enumerate() {
                    if let Some(span) = span {
                        // SAFETY: the caller's promise.
                        let into = unsafe { span.sub(start, len).slice_mut::<bf16>() };
                        chances.round(which, values, into);
                    }
                }
            }
        }
        lost
    }

    /// Counts the weights from `start` on that were finite in the parameter's type before and no longer are.
    fn note_lost<C: Compute>(&self, lost: &mut Lost, start: usize, before: &[C], now: &[C]) {
        let infinite = infinite_from::<C>(self.parameter.dtype());
        if are_finite(now, infinite) {
            return;
        }
        let places = self.offset + start as u64..;
        for ((before, now), place) in before.iter().zip(now).zip(places) {
            if are_finite(&[*now], infinite) || !are_finite(&[*before], infinite) {
                continue;
            }
            if now.to_f64().is_nan() {
                lost.nan += 1;
            } else {
                lost.inf += 1;
            }
            lost.first.get_or_insert(place);
        }
    }

    /// Reads 16-bit weights without masters, or with split masters.
    ///
    /// # Safety
    /// As [`Span::slice`], for these elements of the row.
    unsafe fn load_narrow<C: Compute>(&self, start: usize, weights: &mut [C]) {
        let Some(low) = self.master else {
            // SAFETY: the caller's promise.
            return unsafe { load(&self.parameter, start, weights) };
        };
        // SAFETY: the caller's promise.
        let high = unsafe { self.parameter.sub(start, weights.len()).slice::<bf16>() };
        // SAFETY: the caller's promise.
        let low = unsafe { low.sub(start, weights.len()).slice::<bf16>() };
        join(high, low, weights);
    }

    /// Writes what [`load_narrow`](Self::load_narrow) reads.
    ///
    /// # Safety
    /// As [`Span::slice_mut`], for these elements of the row.
    unsafe fn store_narrow<C: Compute>(&self, start: usize, weights: &[C]) {
        let Some(low) = self.master else {
            // SAFETY: the caller's promise.
            return unsafe { store(&self.parameter, start, weights) };
        };
        // SAFETY: the caller's promise.
        let high = unsafe { self.parameter.sub(start, weights.len()).slice_mut::<bf16>() };
        // SAFETY: the caller's promise; the columns of a row share no bytes.
        let low = unsafe { low.sub(start, weights.len()).slice_mut::<bf16>() };
        split(weights, high, low);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_scaled_alike_wherever_they_are_read() {
        let quiet_nan = f32::from_bits(0xffc1_2345);
        let edges = [
            0.0,
            f32::MIN_POSITIVE,
            1e-45,
            1e-30,
            0.1,
            3.0,
            f32::MAX,
            f32::INFINITY,
        ];
        let values: Vec<f32> = edges
            .into_iter()
            .flat_map(|value| [value, -value])
            .collect();
        let values = [values, vec![quiet_nan]].concat();
        for factors in [
            [1.0, 1.0],
            [1.0 / 65536.0, 0.3],
            [1e-30, 1e30],
            [1e30, 1e-30],
        ] {
            // One factor after the other, because the product of both would neither overflow nor underflow.
            let expected = values.iter().map(|value| value * factors[0] * factors[1]);
            let expected: Vec<u32> = expected.map(f32::to_bits).collect();
            let (mut there, mut here) = (values.clone(), vec![7.0; values.len()]);
            scale(&mut there, factors);
            scale_into(&mut here, &values, factors);
            for scaled in [there, here] {
                let bits: Vec<u32> = scaled.into_iter().map(f32::to_bits).collect();
                assert_eq!(bits, expected, "{factors:?}");
                if factors == [1.0, 1.0] {
                    assert!(
                        bits.iter()
                            .zip(&values)
                            .all(|(bits, value)| *bits == value.to_bits())
                    );
                }
            }
        }
    }
}
