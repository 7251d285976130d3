//! Exponential moving averages of weights, over any number of tensors.
//!
//! ```text
//! average = average − share · (average − weight)
//! ```
//!
//! Nothing is written while the flag is set. Averages and arithmetic are in f32, or in f64 for f64 weights. If a weight
//! is the upper half of a split master, the average follows the master.
//!
//! Bytes per element: f32 12, f64 24, 16 bits 10, split master 12.
//!
//! Twin: [`Ema`].

use rayon::prelude::*;

use crate::driver::{Arguments, Grid, Kernel, Stream, Traffic};
use crate::dtype::{DType, Element};
use crate::error::Result;
use crate::launch::chunk_table::{Chunk, ChunkTable};
use crate::launch::compute::{CHUNK as BLOCK, Compute, load, store};
use crate::launch::device::{push_optional, push_spans};
use crate::launch::split_master::join;
use crate::launch::vector::vectorized;
use crate::launch::{PARALLEL_MIN, Span, enqueue};

/// Columns of the table. The remainder, the lower halves of masters as [`Span::halves`], is present only if the weight
/// is the upper half of its master.
pub(crate) const AVERAGE: usize = 0;
pub(crate) const WEIGHT: usize = 1;
pub(crate) const REMAINDER: usize = 2;
pub(crate) const COLUMNS: usize = 3;

/// Moves all averages of `table` towards their weights by the fraction `share`, an f64 on the device; does nothing if
/// `found_inf`, an f32 on the device, is not 0.
///
/// # Errors
/// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the operands do not fit each other.
pub(crate) fn ema(
    stream: &Stream,
    table: &ChunkTable,
    share: &Span,
    found_inf: Option<&Span>,
) -> Result<()> {
    let op = "Ema::update";
    table.check(op, stream, COLUMNS)?;
    for (span, dtype) in [(share, DType::F64)]
        .into_iter()
        .chain(found_inf.map(|flag| (flag, DType::F32)))
    {
        span.check_stream(op, stream)?;
        span.check_dtype(op, dtype)?;
        span.check_len(op, 1)?;
    }
    if table.elements() == 0 {
        return Ok(());
    }
    enqueue(
        stream,
        Ema {
            table: *table,
            share: *share,
            found_inf: found_inf.copied(),
        },
    )
}

#[derive(Debug)]
struct Ema {
    table: ChunkTable,
    share: Span,
    found_inf: Option<Span>,
}

vectorized! {
    fn approach<C: Compute>(averages: &mut [C], weights: &[C], share: C) {
        for (average, weight) in averages.iter_mut().zip(weights) {
            *average = *average - share * (*average - *weight);
        }
    }
}

/// # Safety
/// Called from `run`: rows are live, and chunks share no bytes, so only this task writes this chunk.
unsafe fn chunk<C: Compute>(chunk: &Chunk<'_>, share: C) {
    // SAFETY: the caller's promise.
    let [average, weight, remainder] =
        [AVERAGE, WEIGHT, REMAINDER].map(|column| unsafe { chunk.column(column) });
    let average = average.expect("every row has an average");
    let weight = weight.expect("every row has a weight");
    let (mut averages, mut weights) = ([C::default(); BLOCK], [C::default(); BLOCK]);
    for start in (0..average.len()).step_by(BLOCK) {
        let len = BLOCK.min(average.len() - start);
        let (averages, weights) = (&mut averages[..len], &mut weights[..len]);
        if let Some(remainder) = remainder {
            // SAFETY: the caller's promise.
            let [high, low] =
                [weight, remainder].map(|half| unsafe { half.sub(start, len).slice() });
            join(high, low, weights);
        } else {
            // SAFETY: the caller's promise.
            unsafe { load(&weight, start, weights) };
        }
        // SAFETY: the caller's promise.
        unsafe { load(&average, start, averages) };
        approach(averages, weights, share);
        // SAFETY: the caller's promise.
        unsafe { store(&average, start, averages) };
    }
}

impl Kernel for Ema {
    fn entry(&self) -> &'static str {
        "ema"
    }

    fn elements(&self) -> u64 {
        self.table.elements()
    }

    fn arguments(&self, into: &mut Arguments) {
        self.table.push_to(into);
        push_optional(into, self.found_inf.as_ref());
        push_spans(into, &[&self.share]);
    }

    fn traffic(&self) -> Option<Traffic> {
        let written = self.table.bytes(AVERAGE);
        Some(Traffic {
            read: written + self.table.bytes(WEIGHT) + self.table.bytes(REMAINDER),
            written,
        })
    }

    fn grid(&self) -> Grid {
        Grid::of_blocks(self.table.chunks_len() as u64)
    }

    unsafe fn run(&self) {
        // SAFETY: the flag was written earlier, in stream order.
        let found_inf = self.found_inf.map(|flag| unsafe { flag.slice::<f32>() }[0]);
        // NaN counts as set: it is not equal to 0.
        if found_inf.is_some_and(|flag| flag != 0.0) {
            return;
        }
        // SAFETY: the share was written earlier, in stream order.
        let share = unsafe { self.share.slice::<f64>() }[0];
        // SAFETY: the table was uploaded in stream order before this kernel.
        let chunks: Vec<_> = unsafe { self.table.chunks() }.collect();
        let row = |row: &Chunk<'_>| {
            // SAFETY: the caller promises that rows are live.
            let average = unsafe { row.column(AVERAGE) };
            if average.is_some_and(|average| average.dtype() == DType::F64) {
                // SAFETY: this is `run`.
                unsafe { chunk(row, share) };
            } else {
                // SAFETY: this is `run`.
                unsafe { chunk(row, <f32 as Element>::from_f64(share)) };
            }
        };
        if self.table.elements() < PARALLEL_MIN as u64 {
            chunks.iter().for_each(row);
        } else {
            chunks.par_iter().for_each(row);
        }
    }
}
