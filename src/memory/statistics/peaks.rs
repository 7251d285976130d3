//! Peaks of a section of a program.
//!
//! The pool keeps one running peak for each quantity. While scopes are open, it covers only the time since the running
//! peaks were last *folded*: that raises the peak of every open scope, and the pool's own, to the running one, and
//! starts the running one again at the present value. So an allocation costs the same with a hundred scopes as with
//! none, and an outer scope includes everything that an inner one has seen.

use std::collections::BTreeMap;

use super::gauge::{Gauge, Usage};

/// One quantity since a scope began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScopedStat {
    /// Value now less the value at the start: negative if more was freed than allocated.
    pub current: i64,
    /// Highest value less the value at the start; not below 0.
    pub peak: i64,
    /// Sum of all increases.
    pub total: u64,
}

/// What a pool's callers held since a scope began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ScopeStats {
    /// Blocks in callers' hands.
    pub blocks: ScopedStat,
    /// Bytes that callers asked for.
    pub requested_bytes: ScopedStat,
    /// Bytes in callers' hands, rounded to the granularity.
    pub allocated_bytes: ScopedStat,
}

/// Blocks, requested and allocated bytes.
const QUANTITIES: usize = 3;

fn gauges(usage: &mut Usage) -> [&mut Gauge; QUANTITIES] {
    [
        &mut usage.blocks,
        &mut usage.requested,
        &mut usage.allocated,
    ]
}

/// The open scopes of a pool.
#[derive(Debug, Default)]
pub(crate) struct Peaks {
    next: u64,
    /// By key: where each quantity stood at the start, and its peak up to the last settling.
    open: BTreeMap<u64, [Scope; QUANTITIES]>,
    /// The pool's own peaks up to the last settling, while a scope is open.
    overall: [i64; QUANTITIES],
}

#[derive(Clone, Copy, Debug, Default)]
struct Scope {
    start: i64,
    start_total: u64,
    peak: i64,
}

impl Peaks {
    pub(crate) fn open(&mut self, usage: &mut Usage) -> u64 {
        if self.open.is_empty() {
            self.overall = gauges(usage).map(|gauge| gauge.take_peak());
        } else {
            self.fold_running_peaks(usage);
        }
        let begin = |gauge: &mut Gauge| Scope {
            start: gauge.current(),
            start_total: gauge.increases(),
            peak: gauge.current(),
        };
        let key = self.next;
        self.next += 1;
        self.open.insert(key, gauges(usage).map(begin));
        key
    }

    /// Makes the running peaks those of everything that is counted, and starts them anew.
    fn fold_running_peaks(&mut self, usage: &mut Usage) {
        let running = gauges(usage).map(|gauge| gauge.take_peak());
        let raise = |peak: &mut i64, running: i64| *peak = (*peak).max(running);
        for (index, running) in running.into_iter().enumerate() {
            raise(&mut self.overall[index], running);
            for scope in self.open.values_mut() {
                raise(&mut scope[index].peak, running);
            }
        }
    }

    pub(crate) fn stats(&mut self, key: u64, usage: &mut Usage) -> ScopeStats {
        self.fold_running_peaks(usage);
        let scope = &self.open[&key];
        let stat = |scope: Scope, gauge: &Gauge| ScopedStat {
            current: gauge.current() - scope.start,
            peak: scope.peak - scope.start,
            total: gauge.increases() - scope.start_total,
        };
        ScopeStats {
            blocks: stat(scope[0], &usage.blocks),
            requested_bytes: stat(scope[1], &usage.requested),
            allocated_bytes: stat(scope[2], &usage.allocated),
        }
    }

    pub(crate) fn close(&mut self, key: u64, usage: &mut Usage) {
        self.fold_running_peaks(usage);
        self.open.remove(&key);
        if self.open.is_empty() {
            self.complete(usage);
            self.overall = [0; QUANTITIES];
        }
    }

    /// Gives `usage` the pool's own peaks.
    fn complete(&self, usage: &mut Usage) {
        for (gauge, peak) in gauges(usage).into_iter().zip(self.overall) {
            gauge.raise_peak(peak);
        }
    }

    /// `usage` with the pool's own peaks, whatever scopes are open.
    pub(crate) fn completed(&self, usage: &Usage) -> Usage {
        let mut usage = *usage;
        if !self.open.is_empty() {
            self.complete(&mut usage);
        }
        usage
    }

    /// To be called before the running peaks are reset: the pool's own then start anew, those of scopes
    /// stay.
    pub(crate) fn reset_overall(&mut self, usage: &mut Usage) {
        if !self.open.is_empty() {
            self.fold_running_peaks(usage);
            self.overall = gauges(usage).map(|gauge| gauge.current());
        }
    }
}
