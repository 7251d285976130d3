//! The scaler's journal, which the device writes and the host reads on request.
//!
//! A step must not wait for the device, so its outcome is not known when it returns. [`record_step`] runs after the
//! step on the device and counts it. If the step was skipped, it also copies the offending gradients into a ring,
//! before the next check overwrites them. If the step was applied and made weights infinite or NaN, which the
//! optimizer's kernel counts, it moves those counts into another ring. The scale update records itself in the journal,
//! too.
//!
//! The journal is an array of f64, which hold counts exactly up to 2⁵³: counters, a ring of the last [`SCALE_CHANGES`]
//! scale changes, a ring of the last [`OVERFLOWS`] skipped steps, and a ring of as many steps that lost weights. Entry
//! k (from 0) of a ring is at position k modulo its size, so the counters tell which entry is newest and which were
//! overwritten. Counters are never overwritten.
//!
//! Twin: [`StepRecord`].

use crate::driver::{Arguments, Kernel, Stream, Traffic};
use crate::dtype::DType;
use crate::error::Result;
use crate::launch::device::{push_optional, push_sizes, push_spans};
use crate::launch::gradient_check::{COUNT_WORDS, NO_INDEX};
use crate::launch::update_pass::{FOUND_HEAD, FOUND_WORDS};
use crate::launch::{Span, enqueue};

/// Steps recorded.
pub(crate) const STEPS: usize = 0;
/// Steps skipped among them.
pub(crate) const SKIPPED: usize = 1;
/// Steps skipped since the last one that was applied.
pub(crate) const SKIPPED_IN_A_ROW: usize = 2;
/// Scale updates.
pub(crate) const UPDATES: usize = 3;
/// Updates that raised the scale because the interval was over.
pub(crate) const GROWTHS: usize = 4;
/// Updates that saw an overflow, including those that found the scale at its floor.
pub(crate) const BACKOFFS: usize = 5;
/// Updates that changed the scale.
pub(crate) const CHANGES: usize = 6;
/// Steps skipped with a NaN among the gradients.
pub(crate) const NAN_STEPS: usize = 7;
/// Steps skipped with a NaN since the last step without.
pub(crate) const NAN_IN_A_ROW: usize = 8;
/// 1 from the first applied step on; reset to 0 when the scale is set.
pub(crate) const CALIBRATED: usize = 9;
/// The last [`RECENT_STEPS`] steps since then as bits, newest in the lowest bit; 1 means skipped.
pub(crate) const RECENT_SKIPS: usize = 10;
/// The scale of the last applied step; 0 before the first.
pub(crate) const LAST_GOOD: usize = 11;
/// Overflows in a row that found the scale at its floor.
pub(crate) const FLOOR_HITS: usize = 12;
/// Steps skipped since the last update with NaN and no infinity.
pub(crate) const NAN_STEPS_SINCE_UPDATE: usize = 13;
/// Steps skipped since the last update with an infinity, or with a norm too large.
pub(crate) const INF_STEPS_SINCE_UPDATE: usize = 14;
/// Nanoseconds in checks of gradients, if steps are timed.
pub(crate) const CHECK_TIME: usize = 15;
/// Nanoseconds in clipping, beyond the check.
pub(crate) const CLIP_TIME: usize = 16;
/// Nanoseconds in optimizer steps.
pub(crate) const STEP_TIME: usize = 17;
/// The start time of the running stopwatch.
pub(crate) const CLOCK: usize = 18;
/// Applied steps that made weights infinite or NaN.
pub(crate) const LOSSES: usize = 19;
/// Elements of weights that became infinite or NaN.
pub(crate) const LOST_WEIGHTS: usize = 20;
const HEAD_WORDS: usize = 24;

/// Steps that [`RECENT_SKIPS`] covers.
pub(crate) const RECENT_STEPS: u32 = 32;

/// Scale changes that the journal remembers.
pub(crate) const SCALE_CHANGES: usize = 32;
/// One change: the update's number (from 1) and the new scale.
pub(crate) const CHANGE_WORDS: usize = 2;

/// Skipped steps that the journal remembers, and steps that lost weights.
pub(crate) const OVERFLOWS: usize = 16;
/// Offending gradients that an entry names; the rest are only counted.
pub(crate) const NAMED: usize = 8;
/// One offending gradient: its index, infinite elements, NaN elements, position of the first.
pub(crate) const NAMED_WORDS: usize = 4;
/// One skipped step: the step's number (from 1), the optimizer's number, the scale, the total norm (NaN if none was
/// computed), how many gradients offended, then [`NAMED`] of them. A step that lost weights has the same entry for
/// weights, without a norm.
pub(crate) const OVERFLOW_WORDS: usize = OVERFLOW_HEAD + NAMED * NAMED_WORDS;
/// Words of a skipped step before the gradients.
pub(crate) const OVERFLOW_HEAD: usize = 8;

/// Length of a journal.
pub(crate) const JOURNAL_WORDS: usize = LOSSES_START + OVERFLOWS * OVERFLOW_WORDS;
const CHANGES_START: usize = HEAD_WORDS;
const OVERFLOWS_START: usize = CHANGES_START + SCALE_CHANGES * CHANGE_WORDS;
const LOSSES_START: usize = OVERFLOWS_START + OVERFLOWS * OVERFLOW_WORDS;

/// The words of scale change `number`, from 0.
pub(crate) fn change_words(number: usize) -> std::ops::Range<usize> {
    let start = CHANGES_START + number % SCALE_CHANGES * CHANGE_WORDS;
    start..start + CHANGE_WORDS
}

/// The words of skipped step `number`, from 0.
pub(crate) fn overflow_words(number: usize) -> std::ops::Range<usize> {
    let start = OVERFLOWS_START + number % OVERFLOWS * OVERFLOW_WORDS;
    start..start + OVERFLOW_WORDS
}

/// The words of step `number`, from 0, among the steps that lost weights.
pub(crate) fn loss_words(number: usize) -> std::ops::Range<usize> {
    let start = LOSSES_START + number % OVERFLOWS * OVERFLOW_WORDS;
    start..start + OVERFLOW_WORDS
}

/// A counter of the journal as a number that can index.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counters are whole, not negative and below 2^53"
)]
pub(crate) fn counter(journal: &[f64], which: usize) -> usize {
    journal[which] as usize
}

/// What [`record_step`] reads and writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecordOperands {
    /// f64, [`JOURNAL_WORDS`] long.
    pub(crate) journal: Span,
    /// f32: the flag that decided whether the step was applied.
    pub(crate) found_inf: Span,
    /// f32: the scale that the gradients had.
    pub(crate) scale: Span,
    /// u32: the counts of the gradient check.
    pub(crate) counts: Span,
    /// f64: the total norm, if one was computed.
    pub(crate) total_norm: Option<Span>,
    /// 64-bit words: the counts of lost weights, if the optimizer's kernel takes them; cleared.
    pub(crate) found: Option<Span>,
    /// Which optimizer stepped.
    pub(crate) optimizer: u64,
    /// The step's number (from 1), as the host counts. The device also counts replays of a captured step, but it is the
    /// host that queries steps.
    pub(crate) step: u64,
}

/// Counts one step and, if it was skipped, records why.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn record_step(stream: &Stream, operands: &RecordOperands) -> Result<()> {
    let op = "step";
    let RecordOperands {
        journal,
        found_inf,
        scale,
        counts,
        total_norm,
        found,
        ..
    } = *operands;
    for (span, dtype, len) in [
        Some((journal, DType::F64, JOURNAL_WORDS)),
        Some((found_inf, DType::F32, 1)),
        Some((scale, DType::F32, 1)),
        Some((counts, DType::U32, counts.len() / COUNT_WORDS * COUNT_WORDS)),
        total_norm.map(|span| (span, DType::F64, 1)),
        found.map(|span| {
            (
                span,
                DType::F64,
                FOUND_HEAD + FOUND_WORDS * found_tensors(&span),
            )
        }),
    ]
    .into_iter()
    .flatten()
    {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, len)?;
    }
    enqueue(
        stream,
        StepRecord {
            operands: *operands,
        },
    )
}

/// The number of tensors that `found` has words for.
fn found_tensors(found: &Span) -> usize {
    found.len().saturating_sub(FOUND_HEAD) / FOUND_WORDS
}

#[derive(Debug)]
struct StepRecord {
    operands: RecordOperands,
}

impl Kernel for StepRecord {
    fn entry(&self) -> &'static str {
        "step_record"
    }

    fn elements(&self) -> u64 {
        1
    }

    fn arguments(&self, into: &mut Arguments) {
        let operands = &self.operands;
        push_spans(
            into,
            &[
                &operands.journal,
                &operands.found_inf,
                &operands.scale,
                &operands.counts,
            ],
        );
        push_sizes(into, &[operands.counts.len() / COUNT_WORDS]);
        push_optional(into, operands.total_norm.as_ref());
        into.u64(operands.optimizer);
        into.u64(operands.step);
        push_optional(into, operands.found.as_ref());
        push_sizes(into, &[operands.found.as_ref().map_or(0, found_tensors)]);
    }

    fn traffic(&self) -> Option<Traffic> {
        Some(Traffic::default())
    }

    unsafe fn run(&self) {
        let operands = &self.operands;
        // SAFETY: only this kernel accesses the journal now.
        let journal = unsafe { operands.journal.slice_mut::<f64>() };
        // SAFETY: written before, in stream order.
        let found_inf = unsafe { operands.found_inf.slice::<f32>() }[0];
        // SAFETY: as above.
        let scale = unsafe { operands.scale.slice::<f32>() }[0];
        journal[STEPS] += 1.0;
        // NaN counts as skipped: it is not equal to 0.
        let skipped = found_inf != 0.0;
        if journal[CALIBRATED] != 0.0 {
            journal[RECENT_SKIPS] = shifted(journal[RECENT_SKIPS], skipped);
        }
        if !skipped {
            journal[SKIPPED_IN_A_ROW] = 0.0;
            journal[NAN_IN_A_ROW] = 0.0;
            journal[CALIBRATED] = 1.0;
            journal[LAST_GOOD] = f64::from(scale);
            if let Some(found) = &operands.found {
                // SAFETY: only this kernel accesses the words now.
                let found = unsafe { found.slice_mut::<f64>() };
                self.record_lost(journal, bytemuck::cast_slice_mut(found), f64::from(scale));
            }
            return;
        }
        let place = overflow_words(counter(journal, SKIPPED));
        journal[SKIPPED] += 1.0;
        journal[SKIPPED_IN_A_ROW] += 1.0;
        // SAFETY: as above.
        let norm = operands
            .total_norm
            .map_or(f64::NAN, |span| unsafe { span.slice::<f64>() }[0]);
        // SAFETY: as above.
        let counts = unsafe { operands.counts.slice::<u32>() };
        let (inf, nan) = write_overflow(&mut journal[place.clone()], counts);
        let numbers = [operands.step, operands.optimizer].map(to_f64);
        let entry = &mut journal[place];
        entry[..2].copy_from_slice(&numbers);
        entry[2..4].copy_from_slice(&[f64::from(scale), norm]);
        if nan {
            journal[NAN_STEPS] += 1.0;
            journal[NAN_IN_A_ROW] += 1.0;
        } else {
            journal[NAN_IN_A_ROW] = 0.0;
        }
        // A step without offenders of its own was skipped because of another optimizer, so it counts for neither.
        if inf || !nan && norm == f64::INFINITY {
            journal[INF_STEPS_SINCE_UPDATE] += 1.0;
        } else if nan {
            journal[NAN_STEPS_SINCE_UPDATE] += 1.0;
        }
    }
}

impl StepRecord {
    /// Moves the counts of lost weights into the journal.
    fn record_lost(&self, journal: &mut [f64], found: &mut [u64], scale: f64) {
        if found[0] == 0 {
            return;
        }
        let place = loss_words(counter(journal, LOSSES));
        journal[LOSSES] += 1.0;
        journal[LOST_WEIGHTS] += to_f64(found[0]);
        let (head, named) = journal[place].split_at_mut(OVERFLOW_HEAD);
        let mut places = named.chunks_exact_mut(NAMED_WORDS);
        let mut offending = 0;
        let tensors = found[FOUND_HEAD..].chunks_exact(FOUND_WORDS);
        for (tensor, words) in tensors.enumerate() {
            let [inf, nan, first] = [words[0], words[1], !words[2]];
            if inf + nan == 0 {
                continue;
            }
            offending += 1;
            if let Some(place) = places.next() {
                place.copy_from_slice(&[tensor as u64, inf, nan, first].map(to_f64));
            }
        }
        let [step, optimizer, offending] =
            [self.operands.step, self.operands.optimizer, offending].map(to_f64);
        head[..5].copy_from_slice(&[step, optimizer, scale, f64::NAN, offending]);
        found.fill(0);
    }
}

/// `bits` with one more step and without the oldest.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "32 bits, kept as a whole number"
)]
fn shifted(bits: f64, skipped: bool) -> f64 {
    let bits = (bits as u64) << 1 & 0xffff_ffff;
    to_f64(bits | u64::from(skipped))
}

/// Copies the first offending gradients out of `counts`. Returns whether there are infinities, and whether there is
/// NaN.
fn write_overflow(entry: &mut [f64], counts: &[u32]) -> (bool, bool) {
    let (head, named) = entry.split_at_mut(OVERFLOW_HEAD);
    let mut places = named.chunks_exact_mut(NAMED_WORDS);
    let mut offending = 0;
    let (mut any_inf, mut any_nan) = (false, false);
    for (tensor, words) in counts.chunks_exact(COUNT_WORDS).enumerate() {
        let first = u64::from(words[2]) | u64::from(words[3]) << 32;
        if first == NO_INDEX {
            continue;
        }
        offending += 1;
        any_inf |= words[0] > 0;
        any_nan |= words[1] > 0;
        if let Some(place) = places.next() {
            let (inf, nan) = (f64::from(words[0]), f64::from(words[1]));
            place.copy_from_slice(&[to_f64(tensor as u64), inf, nan, to_f64(first)]);
        }
    }
    head[4] = to_f64(offending);
    (any_inf, any_nan)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts and places stay below 2^53"
)]
fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::DevicePtr;
    use crate::dtype::Element;
    use crate::units::StreamId;

    fn span<T: Element>(values: &[T]) -> Span {
        // SAFETY: the vectors below outlive the kernels, which run on this thread.
        unsafe {
            Span::new(
                DevicePtr(values.as_ptr() as u64),
                values.len(),
                T::DTYPE,
                StreamId(0),
            )
        }
    }

    #[test]
    fn skipped_steps_are_counted_and_the_first_offenders_named() {
        let journal = vec![0f64; JOURNAL_WORDS];
        let scale = vec![512f32];
        // Ten tensors: all but the first offend, tensor i at position i with i infinities.
        let counts: Vec<u32> = (0..10)
            .flat_map(|i| if i == 0 { [0, 0, !0, !0] } else { [i, 0, i, 0] })
            .collect();
        let mut step = 0;
        let mut record = |flag: f32| {
            step += 1;
            let flag = vec![flag];
            let operands = RecordOperands {
                journal: span(&journal),
                found_inf: span(&flag),
                scale: span(&scale),
                counts: span(&counts),
                total_norm: None,
                found: None,
                optimizer: 3,
                step,
            };
            // SAFETY: all operands are alive, and this thread is the only user.
            unsafe { StepRecord { operands }.run() };
        };
        for flag in [0.0, 1.0, f32::NAN, -1.0] {
            record(flag);
        }
        assert_eq!(journal[..4], [4.0, 3.0, 3.0, 0.0]);
        assert_eq!((journal[CALIBRATED], journal[RECENT_SKIPS]), (1.0, 7.0));
        assert_eq!(
            (journal[LAST_GOOD], journal[INF_STEPS_SINCE_UPDATE]),
            (512.0, 3.0)
        );
        let entry = &journal[overflow_words(2)];
        assert_eq!(
            (entry[0], entry[1], entry[2], entry[4]),
            (4.0, 3.0, 512.0, 9.0)
        );
        assert!(entry[3].is_nan());
        assert_eq!(
            entry[OVERFLOW_HEAD..][..8],
            [1.0, 1.0, 0.0, 1.0, 2.0, 2.0, 0.0, 2.0]
        );
        record(0.0);
        assert_eq!(
            (journal[SKIPPED_IN_A_ROW], journal[RECENT_SKIPS]),
            (0.0, 14.0)
        );
        // The ring drops the oldest entry; the counters keep everything.
        for _ in 0..OVERFLOWS {
            record(2.0);
        }
        assert_eq!(counter(&journal, SKIPPED), 3 + OVERFLOWS);
        assert_eq!(journal[overflow_words(2)][0], 21.0);
    }
}
